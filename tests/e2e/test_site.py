"""The documentation as a site: built as `make docs` builds it, opened in a real browser without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.browser import browse, needs_browser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built_and_asks_no_other_host(site: Path) -> None:
    pages = sorted((ROOT / "docs").rglob("*.md"))
    assert len(pages) > 10
    for page in pages:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        html = site / ("index.html" if name.name == "index" else f"{name}/index.html")
        assert html.is_file(), name
        for loads in ('<script src="http', 'rel="stylesheet" href="http', '<img src="http'):
            assert loads not in html.read_text(), f"{name}: {loads}"


@needs_browser
@pytest.mark.parametrize(
    ("page", "heading"), [("index.html", "lopd_megatron"), ("settings/index.html", "loss.objective")]
)
def test_a_browser_shows_it(site: Path, tmp_path: Path, page: str, heading: str) -> None:
    document = browse(tmp_path, "--dump-dom", "--allow-file-access-from-files", (site / page).as_uri())
    assert heading in document
    assert "md-nav" in document
