"""Warnings of a run: a line on the terminal and a line in `warnings.jsonl`, which the report shows."""

from __future__ import annotations

import json
from pathlib import Path

from lopd_megatron.files import atomic_path
from lopd_megatron.progress import log_line
from lopd_megatron.train.metrics import read_metrics
from lopd_megatron.train.state import Hook, Trainer


class WarningLog(Hook):
    """Hooks that warn share one; place it before them. Each key is told once in a run, over all restarts.

    The file is the memory: a run that goes back to a checkpoint forgets what was told after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told: set[str] = set()

    def on_start(self, trainer: Trainer) -> None:
        if trainer.topology.rank:
            return
        kept = [line for line in read_metrics(self.path) if 0 < line["iteration"] <= trainer.iteration]
        self._told = {line["key"] for line in kept}
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def tell(self, trainer: Trainer, key: str, text: str) -> None:
        """Warn from rank 0; other ranks may call it, too."""
        if trainer.topology.rank or key in self._told:
            return
        self._told.add(key)
        log_line(f"warning: iteration {trainer.iteration}: {text}")
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": trainer.iteration, "key": key, "text": text}) + "\n")
