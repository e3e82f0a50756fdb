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


MEANING = {
    "bf16": "share of the bfloat16 peak that large products reach",
    "fp8": "the same for FP8 with tensor scaling",
    "mxfp8": "the same for MXFP8",
    "fp4": "the same for NVFP4",
    "depth": "inner terms that filling and draining a tile of a product costs",
    "attention": "share of the bfloat16 peak of the products inside attention, exponentials counted apart",
    "memory": "share of the memory bandwidth for the listed traffic; what is not listed lowers it",
    "kernel": "seconds that each product costs beyond its arithmetic",
    "grouped": "rate of the experts' products over that of a dense one, one kernel an expert",
    "fused_grouped": "the same in one kernel with casts and activation",
    "launch": "seconds of the host for forward and backward of one block without CUDA graphs",
    "expert_launch": "the same for a mixture's block with HybridEP",
    "slow_dispatch": "factor of `expert_launch` with all-to-all or DeepEP",
    "partial_graphs": "share of `expert_launch` that partial CUDA graphs leave",
    "nvlink": "share of the NVLink bandwidth that collectives reach",
    "nic": "share of the network bandwidth that collectives reach",
    "tensor_exposed": "share of TP and CP collectives that overlap does not hide",
    "expert_exposed": "share of the experts' all-to-all that overlap does not hide",
    "data_hidden": "share of the last backward (first forward) that hides gradients (parameters)",
    "mamba": "passes over the inner width of a Mamba block, forward",
    "b_power": "sustained rate of B200 and B300 (1,000 to 1,100 W, air) over GB300",
    "gb200_power": "sustained rate of GB200 over GB300",
    "step": "seconds of a step outside layers: data, norms, logging",
    "progress": "speed that a month of releases adds at unchanged settings",
}
"""Of every constant, for the table in docs/performance.md."""
