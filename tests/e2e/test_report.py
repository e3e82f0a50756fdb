"""The report as its user gets it: written by the program, opened in a real browser without a network."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.browser import browse, needs_browser
from tests.unit.report.sample_run import sample_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = sample_run(tmp_path_factory.mktemp("report"))
    subprocess.run([sys.executable, "tools/make_report.py", str(run)], cwd=ROOT, check=True)
    return run / "report.html"


@needs_browser
def test_the_browser_reads_every_section(page: Path, tmp_path: Path) -> None:
    document = browse(tmp_path, "--dump-dom", page.as_uri())
    for heading in ("Lineage", "Data", "Training", "Staleness", "Rollouts", "Evaluation", "Cost"):
        assert re.search(rf"<h2[^>]*>{heading}", document), heading
    assert document.count("<svg") > 15


@needs_browser
def test_a_screenshot_shows_the_page(page: Path, tmp_path: Path) -> None:
    """Not blank: ink of several colours in the upper part, and no wider than the window."""
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    browse(tmp_path, "--window-size=1200,1600", f"--screenshot={picture}", page.as_uri())
    pixels = (imread(picture)[..., :3] * 255).astype(np.uint8)
    assert pixels.shape[:2] == (1600, 1200)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    margin = pixels[:, 1190:]
    assert (margin == margin[0, 0]).all()


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/make_report.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
