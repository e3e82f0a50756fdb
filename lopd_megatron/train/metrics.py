"""Where measurements go: `metrics.jsonl` always, TensorBoard and Weights & Biases on demand. Rank 0 only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from lopd_megatron.config import RunConfig
from lopd_megatron.files import atomic_path, explained


class Writer(Protocol):
    """One place that takes the measurements of an iteration."""

    def write(self, iteration: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object per logged iteration, flushed; a resumed run drops the lines it is going to repeat."""

    def __init__(self, path: Path, resumed_iteration: int) -> None:
        kept = [line for line in read_metrics(path) if line["iteration"] <= resumed_iteration]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._path = path
        with explained(path):
            self._file = path.open("a")

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        with explained(self._path):
            self._file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with explained(self._path):
            self._file.close()


class TensorBoard:
    """Event files below run_dir/logs/tensorboard; a resumed run hides what it repeats."""

    def __init__(self, folder: Path, resumed_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=resumed_iteration + 1)

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()


def open_writers(config: RunConfig, resumed_iteration: int) -> list[Writer]:
    """The writers that the configuration asks for."""
    paths = config.paths
    writers: list[Writer] = [JsonLines(paths.metrics, resumed_iteration)]
    if config.train.tensorboard:
        writers.append(TensorBoard(paths.logs / "tensorboard", resumed_iteration))
    if config.train.wandb_project:
        from lopd_megatron.train.wandb_log import WandbLog

        writers.append(WandbLog(config, resumed_iteration))
    return writers


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]
