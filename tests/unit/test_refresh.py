"""Refresh rounds: who starts from whom, and a learning rate that goes on where it was."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.refresh import refresh_rounds


def config(**optimizer: Any) -> RunConfig:
    result = RunConfig(name="opd", run_dir="runs/opd")
    result.model.student, result.model.teacher = "sft/hf", "teacher"
    result.train.train_iters = 100
    for name, value in ({"lr": 1e-3} | optimizer).items():
        setattr(result.optimizer, name, value)
    return result


def test_each_round_starts_from_the_one_before() -> None:
    first, second, last = refresh_rounds(config(), 3)
    assert [r.train.train_iters for r in (first, second, last)] == [33, 34, 33]
    assert first.model.student == "sft/hf"
    assert second.model.student == "runs/opd_round_1/hf"
    assert last.model.student == "runs/opd_round_2/hf"
    assert (last.name, last.run_dir) == ("opd", "runs/opd")  # where what follows looks for the result
    assert len({r.rollouts.seed for r in (first, second, last)}) == 3


def test_one_round_is_the_run_itself() -> None:
    whole = config(lr_decay_style="cosine", min_lr=1e-4, lr_warmup_iters=10)
    assert refresh_rounds(whole, 1) == [whole]


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_the_learning_rate_is_that_of_megatron_at_the_edges(style: str) -> None:
    """Megatron's scheduler over the whole run is the reference; only the first round warms up."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class FakeOptimizer:
        param_groups: list[dict[str, Any]] = [{"params": []}]  # noqa: RUF012

    whole = config(lr_decay_style=style, min_lr=1e-4, lr_warmup_iters=10)
    schedule = OptimizerParamScheduler(
        FakeOptimizer(),
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-4,
        lr_warmup_steps=10,
        lr_decay_steps=100,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    rounds = refresh_rounds(whole, 4)
    assert [r.optimizer.lr_warmup_iters for r in rounds] == [10, 0, 0, 0]
    done = 0
    for part, following in pairwise(rounds):
        done += part.train.train_iters
        schedule.num_steps = done
        expected = schedule.get_lr({"max_lr": 1e-3, "min_lr": 1e-4})
        assert part.optimizer.min_lr == pytest.approx(expected, rel=1e-6)
        assert following.optimizer.lr == pytest.approx(expected, rel=1e-6)
    assert rounds[-1].optimizer.min_lr == pytest.approx(1e-4)


@pytest.mark.parametrize("count", [0, 101])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"{count} is not between 1 and train.train_iters=100"):
        refresh_rounds(config(), count)
