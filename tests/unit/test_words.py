"""Short sentences, short files, and a settings page that is the code's own."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lopd_megatron.settings_reference import all_settings, as_markdown

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SENTENCE = 40
LONGEST_FILE = 400
LONGEST_FUNCTION = 80


def _tracked(*patterns: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    return subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def sentences(page: str) -> Iterator[str]:
    """The sentences of a Markdown page, without code, tables and the targets of links."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.)\s?)", prose):
        if not paragraph.lstrip().startswith("|"):
            plain = re.sub(r"`[^`]*`|\]\([^)]*\)", " X ", paragraph)
            yield from re.split(r"(?<=[.!?:;])\s+", plain)


def words(sentence: str) -> int:
    return len(re.findall(r"\w[\w'’-]*", sentence))


def test_long_sentences_are_seen() -> None:
    page = "Short. " + "word " * 41 + "end.\n\n```\n" + "code " * 50 + "\n```\n"
    assert [words(s) > LONGEST_SENTENCE for s in sentences(page) if s.strip()] == [False, True]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs"])
def test_sentences_are_short(page: str) -> None:
    for name in _tracked(f"{page}/**.md" if page == "docs" else page):
        if name == "docs/settings.md":  # its texts are the docstrings of the sections
            continue
        long = [s for s in sentences((ROOT / name).read_text()) if words(s) > LONGEST_SENTENCE]
        assert not long, f"{name}: {long}"


def test_files_and_functions_are_short() -> None:
    long = []
    for name in _tracked("*.py"):
        text = (ROOT / name).read_text()
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{name}: {node.name} has {lines} lines")
    assert not long


def test_every_setting_says_what_it_means() -> None:
    assert [setting.name for setting in all_settings() if not setting.meaning] == []


def test_the_settings_page_is_current() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    assert page == as_markdown(), "run: .venv/bin/lopd settings --markdown > docs/settings.md"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [p for p in _tracked("docs/**.md", "docs/*.md") if p.removeprefix("docs/") not in menu] == []
