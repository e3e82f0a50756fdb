"""docs/cluster.md says what is there."""

from __future__ import annotations

import re
from pathlib import Path

from lopd_megatron.config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/cluster.md").read_text()
TRAPS = (ROOT / "docs/dev/traps.md").read_text()


def test_every_test_it_names_exists() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)", TRAPS))
    assert len(names) >= 8
    assert {name for name in names if f"def {name}" not in sources} == set()


def test_every_setting_it_names_exists() -> None:
    leaves = RunConfig().leaves()
    settings = set(re.findall(r"`((?:launch|online)\.[a-z_.]+)", TEXT))
    assert len(settings) >= 8
    assert {name for name in settings if name not in leaves and not name.endswith(".")} == set()


def test_its_defaults_are_the_defaults() -> None:
    launch = RunConfig().launch
    assert f"`launch.max_retries` times ({launch.max_retries})" in TEXT
    assert f"`launch.max_restarts` times ({launch.max_restarts})" in TEXT
    train = (ROOT / "slurm/train.sbatch").read_text()
    (seconds,) = re.findall(r"--signal=B:USR1@(\d+)", train)
    assert f"{seconds} s before, for training" in TEXT
