"""When a run is called bad from what it trains on, and where the warning goes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lopd_megatron.train.warning_log import WarningLog
from lopd_megatron.train.watch import WINDOW, WatchHook


def trainer(iteration: int, rank: int = 0) -> Any:
    return SimpleNamespace(iteration=iteration, topology=SimpleNamespace(rank=rank))


def sums_of(log_ratio: np.ndarray) -> dict[str, torch.Tensor]:
    """What training pools where log π_θ − log π_T is `log_ratio` [n]."""
    k2, count = 0.5 * log_ratio**2, float(len(log_ratio))
    pairs = {"log_ratio_mean": log_ratio.sum(), "k2": k2.sum(), "k2_squared": (k2**2).sum()}
    return {name: torch.tensor([total, count], dtype=torch.float64) for name, total in pairs.items()}


def watched(path: Path, steps: list[np.ndarray]) -> list[dict[str, Any]]:
    hook = WatchHook(WarningLog(path))
    for iteration, log_ratio in enumerate(steps, start=1):
        result: Any = SimpleNamespace(metric_sums=sums_of(log_ratio))
        hook.after_step(trainer(iteration), result)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def noise(rng: np.random.Generator, tokens: int, mean: float = 0.3) -> np.ndarray:
    """Log-ratios with the long tail of sampled tokens; documents of 20 tokens share a part of it."""
    shared = np.repeat(rng.normal(0, 0.3, -(-tokens // 20)), 20)[:tokens]
    tail = rng.exponential(3.0, tokens) * (rng.random(tokens) < 0.05)
    return mean + shared + rng.normal(0, 0.5, tokens) + tail


@pytest.mark.parametrize("tokens", [100, 1000, 20_000])
def test_noise_does_not_warn(tmp_path: Path, tokens: int) -> None:
    rng = np.random.default_rng(0)
    for run in range(20):
        assert watched(tmp_path / f"{run}.jsonl", [noise(rng, tokens) for _ in range(150)]) == []


def test_a_falling_k2_does_not_warn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = [noise(rng, 1000) * (0.2 + 0.8 * 0.95**i) for i in range(80)]
    assert watched(tmp_path / "w.jsonl", steps) == []


def test_a_k2_that_explodes_is_told_once_within_the_first_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    found = watched(tmp_path / "w.jsonl", [noise(rng, 500) * 1.5**i for i in range(30)])
    assert [line["key"] for line in found] == ["k2_rises"]
    assert found[0]["iteration"] <= WINDOW + 3
    assert capsys.readouterr().err.count("k2 rose from") == 1


def test_a_log_ratio_below_zero_is_told_once(tmp_path: Path) -> None:
    """The real run of which the log said −0.227 while the KL rose."""
    rng = np.random.default_rng(0)
    steps = [rng.normal(0.37 - 0.03 * i, 0.5, 500) for i in range(20)]
    found = [line for line in watched(tmp_path / "w.jsonl", steps) if line["key"] == "log_ratio_negative"]
    assert len(found) == 1
    assert 13 < found[0]["iteration"] <= 13 + WINDOW + 1
    assert "farther from the policy that wrote the rollouts" in found[0]["text"]


def test_a_resumed_run_does_not_repeat_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.jsonl"
    first = WarningLog(path)
    first.on_start(trainer(0))
    first.tell(trainer(3), "a", "early")
    first.tell(trainer(8), "b", "late")
    first.tell(trainer(8, rank=1), "c", "of another rank")
    resumed = WarningLog(path)
    resumed.on_start(trainer(5))  # the checkpoint of iteration 5: the second one is forgotten
    resumed.tell(trainer(6), "a", "early")
    resumed.tell(trainer(7), "b", "late")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["iteration"], line["key"]) for line in lines] == [(3, "a"), (7, "b")]
    assert capsys.readouterr().err.count("early") == 1
