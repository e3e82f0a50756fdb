"""The fitted constants of the time model: meaning, prior and where the fit is kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FIT = Path(__file__).with_name("fit.json")


@dataclass(frozen=True)
class Constants:
    """Shares of what the vendor states, and times of one event. The defaults are the priors of the fit."""

    bf16: float = 0.78
    fp8: float = 0.66
    mxfp8: float = 0.62
    fp4: float = 0.50
    depth: float = 200.0
    attention: float = 0.60
    memory: float = 0.75
    kernel: float = 5e-6
    grouped: float = 0.70
    fused_grouped: float = 0.85
    launch: float = 2e-3
    expert_launch: float = 8e-3
    slow_dispatch: float = 1.8
    partial_graphs: float = 0.5
    nvlink: float = 0.70
    nic: float = 0.70
    tensor_exposed: float = 0.35
    expert_exposed: float = 0.4
    data_hidden: float = 0.7
    mamba: float = 30.0
    b_power: float = 0.95
    gb200_power: float = 0.95
    step: float = 0.05
    progress: float = 0.008

    @classmethod
    def fitted(cls) -> Constants:
        return cls(**json.loads(FIT.read_text())["constants"])

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def logs(self) -> list[float]:
        return [math.log(value) for value in asdict(self).values()]

    @classmethod
    def from_logs(cls, logs: list[float]) -> Constants:
        return cls(**{name: math.exp(value) for name, value in zip(cls.names(), logs, strict=True)})
