"""When stored rollouts are called stale."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lopd_megatron.config import StalenessConfig
from lopd_megatron.train.staleness import StalenessHook
from lopd_megatron.train.warning_log import WarningLog

TRAINER: Any = SimpleNamespace(iteration=7, topology=SimpleNamespace(rank=0))


def report_of(log_ratio: np.ndarray, valid_k2: float | None = None) -> dict[str, torch.Tensor]:
    """What training reports where log π_θ − log π_rollout is `log_ratio` [n]."""
    ratio, count = np.exp(log_ratio), float(len(log_ratio))
    pairs = {
        "importance_ratio": (ratio.sum(), count),
        "importance_ratio_squared": ((ratio**2).sum(), count),
        "drift_kl": (-log_ratio.sum(), count),
    }
    if valid_k2 is not None:
        pairs["valid_k2"] = (valid_k2 * 50, 50.0)
    return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in pairs.items()}


def advice(hook: StalenessHook, sums: dict[str, torch.Tensor]) -> float:
    hook.after_step(TRAINER, SimpleNamespace(metric_sums=sums))  # type: ignore[arg-type]
    return float(sums["refresh_advised"][0])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hook(**settings: Any) -> StalenessHook:
    return StalenessHook(StalenessConfig(window=3, **settings), WarningLog(Path("warnings.jsonl")))


def test_fresh_rollouts_are_not_stale(capsys: pytest.CaptureFixture[str]) -> None:
    watch = hook()
    assert [advice(watch, report_of(np.zeros(100))) for _ in range(6)] == [0.0] * 6
    assert capsys.readouterr().err == ""


def test_few_effective_samples_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """One token in a hundred has nearly all the weight: about 100/101² … a few per cent are effective."""
    weights = np.full(100, -3.0)
    weights[0] = 5.0
    watch = hook(max_drift_kl=100.0)
    seen = [advice(watch, report_of(weights)) for _ in range(5)]
    assert seen == [0.0, 0.0, 1.0, 1.0, 1.0]  # pooled over a whole window first
    message = capsys.readouterr().err
    assert message.count("the rollouts are stale") == 1
    assert "staleness.min_effective_sample_fraction" in message


def test_a_uniform_drift_is_seen_by_its_kl_alone(capsys: pytest.CaptureFixture[str]) -> None:
    watch = hook(max_drift_kl=0.2)
    assert [advice(watch, report_of(np.full(10, -0.3))) for _ in range(3)][-1] == 1.0
    assert "drift_kl 0.300 nats is over staleness.max_drift_kl=0.2" in capsys.readouterr().err


def test_a_rising_held_out_score_is_enough() -> None:
    watch = hook(max_held_out_rise=0.1)
    values = [0.5, 0.4, 0.43, 0.45]
    assert [advice(watch, report_of(np.zeros(4), valid_k2=v)) for v in values] == [0.0, 0.0, 0.0, 1.0]


def test_a_dataset_without_rollout_logprobs_has_no_advice() -> None:
    sums: dict[str, torch.Tensor] = {}
    hook().after_step(TRAINER, SimpleNamespace(metric_sums=sums))  # type: ignore[arg-type]
    assert sums == {}
