"""The command lines of the offline programs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lopd_megatron.errors import UserError

RECIPE = """
from lopd_megatron.config import RunConfig

def small() -> RunConfig:
    config = RunConfig(name="small", run_dir={run_dir!r})
    config.prompts.input = ["p.jsonl"]
    config.evaluation.input = ["e.jsonl"]
    return config
"""


def main_of(verb: str) -> Callable[[], int]:
    return importlib.import_module(f"lopd_megatron.commands.{verb}").main


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.py").write_text(RECIPE.format(run_dir=str(tmp_path / "run")))
    return f"{tmp_path}/recipe.py:small"


@pytest.mark.parametrize(
    ("tool", "written"),
    [
        ("prompts", "run/prompts"),
        ("rollouts", "run/rollouts"),
        ("scores", "run/scores"),
        ("evaluate", "run/evaluation/small.json"),
    ],
)
def test_dry_run_says_what_it_would_do_and_does_nothing(
    tool: str,
    written: str,
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, "--recipe", recipe, "--dry-run", "rollouts.seed=5"])
    assert main_of(tool)() == 0
    out = capsys.readouterr().out
    assert f"would write: {tmp_path}/{written}" in out
    assert '"seed": 5' in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.py"]


def test_every_model_needs_its_own_name(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", "--recipe", recipe, "--model", "a", "--model", "b", "--name", "x", "--name", "x"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="2 --model need as many different --name, got 1"):
        main_of("evaluate")()
