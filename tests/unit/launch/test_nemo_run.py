"""What nemo_run.py asks of NeMo-Run, with a FakeNemoRun; tests/slurm has the real one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lopd_megatron.errors import UserError
from lopd_megatron.launch import nemo_run
from lopd_megatron.launch.stages import chain

ROOT = Path(__file__).resolve().parents[3]
RECIPE = "recipes/qwen3_8b.py:lightning_opd"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    def record(**fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    cli = SimpleNamespace(factory=lambda **_: lambda function: function, main=lambda function: None)
    module = SimpleNamespace(SlurmExecutor=record, LocalTunnel=record, Packager=record, cli=cli)
    monkeypatch.setitem(sys.modules, "nemo_run", module)
    monkeypatch.chdir(ROOT)
    return module


def train_executor(*overrides: str) -> SimpleNamespace:
    (train,) = chain([RECIPE], overrides, ["train"])
    return nemo_run._slurm_executor(train)


def test_the_warning_goes_to_the_tasks(fake: SimpleNamespace) -> None:
    """NeMo-Run's batch script has no trap: a signal of its own would end it."""
    assert train_executor().signal == "USR1@300"
    longer = train_executor("launch.sbatch_options=[--signal=B:USR1@600,--mem=0,--exclusive]")
    assert longer.signal == "USR1@600"
    assert longer.additional_parameters == {"kill_on_invalid_dep": "yes", "mem": "0", "exclusive": True}


def test_what_nemo_run_cannot_write_is_refused(fake: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="'-C h100' only as --NAME or --NAME=VALUE"):
        train_executor("launch.sbatch_options=[-C h100]")
    for override, message in (
        ("run_dir=my runs/x", "does not quote blanks"),
        ("name=a run", "does not quote blanks"),
        ("run_dir=/nemo_run/x", "replaces the text /nemo_run"),
    ):
        with pytest.raises(UserError, match=message):
            nemo_run.run(chain([RECIPE], [override]), "slurm")


def test_its_command_line_fails_when_nothing_was_launched(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It returns as if all were well after an unknown factory or argument."""
    monkeypatch.setattr(sys, "argv", ["nemo_run", "--factory", "nothing", "--yes"])
    with pytest.raises(SystemExit) as exit_code:
        nemo_run.main()
    assert exit_code.value.code == 1
