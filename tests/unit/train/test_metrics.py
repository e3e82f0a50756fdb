"""Measurements of a run that is killed and started again."""

from pathlib import Path

import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.train.metrics import JsonLines, open_writers, read_metrics
from lopd_megatron.train.peak_flops import device_peak_flops


def iterations(path: Path) -> list[int]:
    return [line["iteration"] for line in read_metrics(path)]


def test_a_resumed_run_drops_what_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for iteration in (1, 2, 3, 4):
        first.write(iteration, {"loss": 1.0 / iteration})
    first.close()
    with path.open("a") as file:
        file.write('{"iteration": 5, "lo')  # killed while it wrote
    assert iterations(path) == [1, 2, 3, 4]
    second = JsonLines(path, 3)
    second.write(4, {"loss": 0.5})
    second.close()
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 0.5, 1 / 3, 0.5]


def test_tensorboard_on_demand(tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path))
    assert len(open_writers(config, 0)) == 1
    config.train.tensorboard = True
    for writer in open_writers(config, 0):
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert list((tmp_path / "logs" / "tensorboard").glob("events*"))


def test_no_mfu_without_a_known_peak() -> None:
    if not torch.cuda.is_available():
        assert device_peak_flops() is None
