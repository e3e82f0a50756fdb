"""Which part of a sharded stage one process does, and with which model."""

from __future__ import annotations

from dataclasses import dataclass

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError


@dataclass(frozen=True)
class Share:
    """Which part of a sharded stage one process does, and how many failed documents it accepts."""

    index: int = 0
    count: int = 1
    max_failed: int = 0

    @classmethod
    def parse(cls, text: str, max_failed: int = 0) -> Share:
        """`2/8` → the third of eight workers."""
        first, slash, second = text.partition("/")
        if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
            raise UserError(f"--worker {text!r} is not I/N with 0 ≤ I < N, as in 0/8")
        return cls(int(first), int(second), max_failed)


def generator_model(config: RunConfig) -> str:
    return config.model.teacher if config.rollouts.generator == "teacher" else config.model.student
