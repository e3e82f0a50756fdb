"""Seconds come from the best source there is; shares are of GPU time."""

import dataclasses
from pathlib import Path

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.report.cost import StageCost, paper_shares, shares, stage_costs
from lopd_megatron.report.run_folder import read_run


def test_measured_by_the_chain(whole_run: Path) -> None:
    costs = stage_costs(read_run(whole_run))
    assert [(cost.stage, cost.seconds) for cost in costs] == [("rollouts", 61), ("scores", 24), ("train", 98)]
    assert shares(costs) == pytest.approx([61 / 183, 24 / 183, 98 / 183])


def test_from_logs_and_metrics(whole_run: Path) -> None:
    run = dataclasses.replace(read_run(whole_run), stage_seconds={})
    costs = {cost.stage: cost.seconds for cost in stage_costs(run)}
    assert costs["rollouts"] == pytest.approx(10 + 3)  # of two processes
    # Planted: prompt and response tokens over a rate of response tokens.
    assert costs["rollouts"] != pytest.approx(3 * 2400 / 600)
    assert costs["train"] == pytest.approx(sum(line["iteration_time_ms"] for line in run.metrics) / 1e3)


def test_a_line_stands_for_all_iterations_since_the_last(whole_run: Path) -> None:
    run = read_run(whole_run)
    line = run.metrics[0] | {"iteration_time_ms": 500.0}
    lines = [line | {"iteration": 10}, line | {"iteration": 30}]
    (cost,) = stage_costs(
        dataclasses.replace(run, stage_seconds={}, rollouts=None, scored=None, metrics=lines)
    )
    assert cost.seconds == pytest.approx(15.0)


def test_shares_need_all_three_stages_and_count_gpus(whole_run: Path) -> None:
    one = StageCost("rollouts", 100.0, 1, "")
    assert shares([one]) is None
    four = dataclasses.replace(one, stage="train", gpus=4)
    assert shares([one, dataclasses.replace(one, stage="scores"), four]) == pytest.approx(
        [1 / 6, 1 / 6, 4 / 6]
    )
    assert four.gpu_hours == pytest.approx(400 / 3600)
    assert paper_shares() == pytest.approx([10 / 30, 4 / 30, 16 / 30])


def test_gpus_come_from_the_config(whole_run: Path) -> None:
    run = read_run(whole_run)
    assert run.config is not None
    config: RunConfig = run.config.model_copy(deep=True)
    config.launch.stages.train.nodes, config.launch.stages.train.gpus_per_node = 2, 8
    costs = stage_costs(dataclasses.replace(run, config=config))
    assert {cost.stage: cost.gpus for cost in costs} == {"rollouts": 0, "scores": 0, "train": 16}
