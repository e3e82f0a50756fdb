"""What a study consists of: cells, the runs they are made of, and the data of those."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lopd_megatron.config import RunConfig


@dataclass(frozen=True)
class Data:
    """A dataset of rollouts: who answers, who scores (None: SFT), which prompts."""

    name: str
    generator: str
    teacher: str | None
    prompts: str
    samples: int = 1
    max_prompts: int | None = None
    topk: int = 0


@dataclass(frozen=True)
class Part:
    """One training run. `data` None: standard OPD on `prompts`."""

    config: RunConfig
    data: Data | None
    prompts: str = ""


@dataclass(frozen=True)
class Cell:
    """One row of a study: runs that follow each other, measured against `teacher` at the end."""

    name: str
    group: str
    parts: tuple[Part, ...]
    teacher: str
    needs: tuple[str, ...] = ()
    """Cells that must be done before."""
    teachers: tuple[str, ...] = ("teacher",)
    """Teachers that must have been trained."""

    @property
    def result_path(self) -> Path:
        return self.parts[-1].config.paths.run_dir / "result.json"
