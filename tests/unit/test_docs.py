"""Every command in README and docs is one that the programs understand; every link leads somewhere.

Commands are found in ```bash and unmarked code blocks. Each is read by its program's own parser, recipes and
overrides included, and stopped there; where it holds a placeholder, options are looked up in the program's
text. What is quoted as an error stands in the sources.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lopd_megatron import cli
from lopd_megatron.__main__ import main as lopd
from lopd_megatron.commands import VERBS
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.launch import stages as launch_stages
from lopd_megatron.records import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("lopd", "python", "torchrun", "make", "slurm/pipeline.sh", "sbatch")
OTHERS = {"pytest", "git", "cd", "source", "pip", "hf", "squeue", "tail", "docker", "export"}
PLACEHOLDER = re.compile(
    r"…|\.\.\.|\[|→|\$|\b(FILE|PREFIX|MODEL|FOLDER|RUN_DIR|RECIPE|ADDRESS|ACCOUNT|URL)\b"
)
TORCHRUN = {"--nproc-per-node", "--nnodes", "--standalone", "-m"}


def code_blocks(text: str) -> Iterator[tuple[str, str]]:
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M)


def commands(page: Path) -> Iterator[str]:
    """Each command of a page on one line, comments and prompts removed."""
    for language, body in code_blocks(page.read_text()):
        if language not in ("", "bash", "sh", "console"):
            continue
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            for part in line.split("&&"):
                command = part.split(" #")[0].strip()
                first = command.split(" ")[0].removeprefix(".venv/bin/")
                if first in OURS or first in OTHERS or first.startswith("$EDITOR"):
                    yield command.removeprefix(".venv/bin/")


def is_dry_launch(command: str) -> bool:
    starts = ("slurm/pipeline.sh", "lopd run ")
    return command.startswith(starts) and "--dry-run" in command and not PLACEHOLDER.search(command)


CASES = [(page.name, command) for page in PAGES for command in dict.fromkeys(commands(page))]


@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{page}: {text}" for page, text in CASES])
def test_command(page: str, command: str) -> None:
    """The program exists, the recipe loads, and every option and setting is known."""
    check(command)


@pytest.mark.parametrize(
    "command",
    dict.fromkeys(
        text
        for _, text in CASES
        if text.startswith(("lopd ", "python ", "torchrun ")) and not PLACEHOLDER.search(text)
    ),
)
def test_command_is_read_by_its_program(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read(command, monkeypatch)


class Understood(Exception):
    """The command line was read; nothing of the program has run."""


def read(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program parse a command, with required options, recipe and overrides, and no further."""
    words = shlex.split(command)
    program, arguments = split_program(words)
    if program in ("venv", "lopd_megatron.launch.nemo_run"):
        return  # not ours; NeMo-Run's own command line, which tests/slurm runs
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(cli, "parse", stopping(cli.parse))
    monkeypatch.setattr(launch_stages, "chain", stopping(launch_stages.chain))
    monkeypatch.setattr(cli, "dry_run", stopping(lambda *_: 0))
    if words[0] == "lopd":
        module, _, function = VERBS[words[1]][0].partition(":")
        sys.modules.pop(module, None)  # it may have imported by name what is replaced here
        main = getattr(importlib.import_module(module), function)
        sys.modules.pop(module)  # and no later test may get this one
    else:
        path = ROOT / program if program.endswith(".py") else _module_file(program)
        main = runpy.run_path(str(path))["main"]
    with pytest.raises(Understood):
        main()


def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # `chain` and `cli.parse` call what is wrapped, too; only the program's own call stops it.
        nested = any(frame.function == "wrapped" for frame in inspect.stack()[1:])
        result = function(*args, **kwargs)
        if nested:
            return result
        raise Understood

    return wrapped


def split_program(words: list[str]) -> tuple[str, list[str]]:
    """`lopd verb …`, `python FILE.py …`, `python -m x …`, `torchrun … -m x …` → (program, its arguments)."""
    if words[0] == "lopd":
        assert words[1] in VERBS, f"lopd has no verb {words[1]}"
        return VERBS[words[1]][0].partition(":")[0], words[2:]
    if "-m" in words:
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    return words[1], words[2:]


def check(command: str) -> None:
    # `…` stands for what a reader fills in; [brackets] mark what may be left out.
    words = shlex.split(re.sub(r"…|\.\.\.|(?<=\s)\[|\](?=\s|\.|$)", "", command))
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"make {target}"
    elif words[0] in ("lopd", "python", "torchrun"):
        program, arguments = split_program(words)
        if program.endswith(".py"):
            assert (ROOT / program).is_file(), program
        else:
            assert importlib.util.find_spec(program) is not None, program
        if words[0] == "torchrun":
            launcher = words[1 : words.index("-m")]
            unknown = {word.split("=")[0] for word in launcher if word.startswith("--")} - TORCHRUN
            assert not unknown
        if program != "venv":
            _check_options(program, arguments)
    elif words[0] == "slurm/pipeline.sh":
        assert (ROOT / words[0]).is_file()
        _check_options("lopd_megatron.commands.run", words[1:])
    elif words[0].startswith("$EDITOR"):
        assert (ROOT / words[1]).is_file(), words[1]


def _check_options(program: str, words: list[str]) -> None:
    known = options(program)
    for word, value in itertools.pairwise([*words, ""]):
        for name in (word, value):
            if re.fullmatch(r"recipes/\w+\.py:\w+(\(.*\))?", name):
                known |= set(cli._flags(cli.load_recipe(name)))
    for before, word in itertools.pairwise(["", *words]):
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{program} has no option {word}"
        elif re.fullmatch(r"[a-z_]+(\.\w+)+=.*", word) and not before.startswith("--"):
            key, value = word.split("=", 1)
            if value and not value.isupper():  # ACCOUNT stands for what the reader fills in
                cli.apply_override(RunConfig(), key, value)
            else:
                assert key in RunConfig().leaves(), key


def options(program: str) -> set[str]:
    """Whatever looks like an option in a program, and in the command line that programs share."""
    if program == "lopd_megatron.launch.nemo_run":
        return {"--factory", "--yes"}  # NeMo-Run's own command line; tests/slurm runs it
    path = ROOT / program if program.endswith(".py") else _module_file(program)
    text = path.read_text()
    trees = [ast.parse(text)]
    if re.search(r"lopd_megatron(\.cli| import .*\bcli\b)", text):
        trees.append(ast.parse((ROOT / "lopd_megatron" / "cli.py").read_text()))
    words = [str(node.value) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {"--help"} | {word for word in words if re.fullmatch(r"--[a-z-]+", word)}


def _module_file(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in CASES if is_dry_launch(command)))
def test_a_launch_is_rendered(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dry runs of whole chains are cheap enough to be made, in this process."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    lopd(words[1:] if words[0] == "lopd" else ["run", "--on", "slurm", *words[1:]])
    assert "lopd_megatron" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "python tools/no_such_program.py",
        "lopd no-such-verb",
        "lopd report runs/x --no-such-option",
        "lopd evaluate recipes/tiny.py:no_such_recipe",
        "python -m lopd_megatron.train --recipe recipes/tiny.py:sft optimizer.learning_rate=1",
        "python -m lopd_megatron.no_such_module",
        "make no-such-target",
        "lopd tiny-task --recipe recipes/tiny.py:sft",
    ],
)
def test_a_planted_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, UserError)):
        check(command)


@pytest.mark.parametrize(
    "command",
    [
        "lopd plan --model Qwen3-8B",
        "lopd plan --model Qwen3-8B --gpus many",
        "lopd evaluate recipes/tiny.py:sft train.train_iters=-1",
    ],
)
def test_a_planted_command_that_its_program_refuses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((UserError, SystemExit)):
        read(command, monkeypatch)


def test_commands_are_found_at_all() -> None:
    assert len(CASES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http") and target != "study.md":  # study.md is written by tools/study.py
            assert (page.parent / target).exists(), target
    for path in re.findall(
        r"`((?:lopd_megatron|tools|recipes|tests|slurm)/[\w./]+\.(?:py|sh|sbatch|json))`", text
    ):
        assert (ROOT / path).exists(), path


def test_python_blocks_are_valid() -> None:
    for page in PAGES:
        for language, body in code_blocks(page.read_text()):
            if language == "python":
                compile(body, page.name, "exec")


def test_values_that_pages_name_are_accepted() -> None:
    for page in PAGES:
        for word in " ".join(re.findall(r"`([^`\n]+)`", page.read_text())).split():
            key, _, value = word.partition("=")
            if key in RunConfig().leaves() and value and not value.isupper() and "…" not in value:
                cli.apply_override(RunConfig(), key, value)


def test_settings_that_pages_name_exist() -> None:
    known = RunConfig().leaves()
    sections = {key.split(".")[0] for key in known if "." in key}
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+\.[a-z_.]+?)(?:=[^`]*)?`", page.read_text()):
            section, _, field = name.partition(".")
            # `train.tokens` is a file of a dataset, `launch.refresh` a module.
            first = field.split(".")[0]
            other = first in {*COLUMNS, "py", "json", "building", "manifest", ""}
            other |= (ROOT / "lopd_megatron" / section / f"{first}.py").exists()
            if section in sections and not other:
                assert any(key == name or key.startswith(name + ".") for key in known), f"{page.name}: {name}"


@functools.cache
def source_text() -> str:
    """All string literals of the package, f-strings with a gap for each value."""
    found = []
    for path in (ROOT / "lopd_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
                )
    return "\n".join(found)


def quoted_errors() -> list[str]:
    """First cells of the tables of troubleshooting.md that quote an error."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| `([^`]*[ …][^`]*)`", text, re.M)
    return [cell for cell in cells if " " in cell]


@pytest.mark.parametrize("error", quoted_errors())
def test_quoted_errors_are_those_of_the_programs(error: str) -> None:
    for piece in filter(None, (piece.strip(" ;?") for piece in error.split("…"))):
        assert piece in source_text(), piece


@pytest.mark.processes
def test_the_dockerfile_has_no_lint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if hadolint is None:
        pytest.skip("hadolint is not in this environment; the dev extra brings it")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.processes
def test_the_script_that_installs_packages_has_no_lint() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}")
    if shellcheck is None:
        pytest.skip("shellcheck is not in this environment; the dev extra brings it")
    scripts = sorted(str(path) for path in (ROOT / "tools").glob("*.sh"))
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_verb_documents_itself() -> None:
    """The docstring of a verb, which is its --help, shows how it is called."""
    for verb, (place, _) in VERBS.items():
        module = importlib.import_module(place.partition(":")[0])
        assert re.search(rf"^\s*lopd {verb}\b", module.__doc__ or "", re.M), verb


def test_the_tools_are_doors() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        calls = re.findall(r'^    run_verb\("([a-z-]+)"\)$', path.read_text(), re.M)
        assert len(calls) == 1, path.name
        assert calls[0] in VERBS, path.name
