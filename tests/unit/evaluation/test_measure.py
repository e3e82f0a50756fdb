"""`measure` as a program: which prompts, what is resumed, what is refused. The engine is a stand-in here;
tests/e2e/test_measure.py has the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.documents import Document
from lopd_megatron.errors import UserError
from lopd_megatron.evaluation.measure import main
from lopd_megatron.rollouts import shard_files
from tests.unit.rollouts.test_programs import FakeVllmEngine, config, save_model

__all__ = ["config"]  # a fixture

RECIPE = """
from lopd_megatron.config import RunConfig

def run() -> RunConfig:
    return RunConfig.model_validate_json({text!r})
"""


@pytest.fixture
def recipe(config: RunConfig, tmp_path: Path) -> str:
    """A run whose held-out data has 20 prompts of two samples each."""
    documents = [
        Document(
            tokens=np.array([5, prompt, 7, 8], np.int32),
            loss_mask=np.array([0, 0, 1, 1], np.uint8),
            teacher_logprobs=np.zeros(4, np.float32),
            rollout_logprobs=np.zeros(4, np.float32),
        )
        for prompt in range(10, 30)
        for _ in range(2)
    ]
    write_dataset(tmp_path / "held_out", documents)
    config.data.valid_prefixes = [str(tmp_path / "held_out")]
    (tmp_path / "recipe.py").write_text(RECIPE.format(text=config.model_dump_json()))
    return f"{tmp_path}/recipe.py:run"


def summary(config: RunConfig, name: str) -> dict:
    return json.loads((config.paths.measure / f"{name}.json").read_text())


def test_before_and_after_on_held_out_prompts(
    config: RunConfig, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", recipe, "--samples", "3"]) == 0
    before = summary(config, "before")
    assert (before["prompts"], before["responses"], before["topk"]) == (20, 60, 8)
    assert not (config.paths.measure / "after.json").exists()
    save_model(config.paths.run_dir / "hf", 9)
    started = FakeVllmEngine.started
    assert main(["--recipe", recipe, "--samples", "3"]) == 0
    assert "before.json is there already" in capsys.readouterr().err
    assert FakeVllmEngine.started == started + 3
    assert summary(config, "after")["model"] == str(config.paths.hf)
    # Other weights at the same place are measured anew.
    for file in config.paths.hf.iterdir():
        file.unlink()
    config.paths.hf.rmdir()
    save_model(config.paths.hf, 10)
    assert main(["--recipe", recipe, "--samples", "3"]) == 0
    assert FakeVllmEngine.started == started + 6


def test_what_was_sampled_is_kept_over_a_kill(config: RunConfig, recipe: str) -> None:
    main(["--recipe", recipe, "--prompts", "5"])
    first = summary(config, "before")
    assert first["prompts"] == 5
    started = FakeVllmEngine.started
    (config.paths.measure / "before.json").unlink()
    work = next(path for path in config.paths.measure.iterdir() if path.is_dir())
    shard_files.manifest_path(work / "own_scores", 0).unlink()
    main(["--recipe", recipe, "--prompts", "5"])
    assert FakeVllmEngine.started == started + 1  # the rollouts and the teacher's scores were there
    assert summary(config, "before") == first


def test_prompt_files_and_refusals(config: RunConfig, recipe: str, tmp_path: Path) -> None:
    files = config.prompts.input
    assert main(["--recipe", recipe, "data.valid_prefixes=[]", "--prompts", "7", "--input", *files]) == 0
    assert summary(config, "before")["prompts"] == 7
    with pytest.raises(UserError, match="no held-out prompts"):
        main(["--recipe", recipe, "data.valid_prefixes=[]"])
    with pytest.raises(UserError, match="need as many different --name"):
        main(["--recipe", recipe, "--model", "x"])
