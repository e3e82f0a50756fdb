"""Layouts that fit a cluster, ranked by a simple model of what each costs in speed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.model.flops import train_flops
from lopd_megatron.model.memory_estimate import OVERHEAD_BYTES, MemoryEstimate, estimate_memory
from lopd_megatron.model.student_spec import num_experts, student_spec
from lopd_megatron.parallel.topology import check_world_size

GPUS_PER_NODE = 8
_RECOMPUTE_COST = {"none": 1.0, "selective": 1.12, "full": 1.33}
"""Time relative to no recomputation: full repeats the forward, a third of a step; MLPs are part of it."""
_TENSOR_PARALLEL_COST = 0.06
"""Extra time per doubling of TP inside a node; published TP8 runs lose about 28 % at small batch."""


@dataclass(frozen=True)
class Layout:
    """A layout, what it needs and how long a step would take."""

    config: RunConfig
    memory: MemoryEstimate
    relative_time: float

    @property
    def label(self) -> str:
        parallel, train = self.config.parallel, self.config.train
        parts = [f"TP{parallel.tensor_model_parallel_size}", f"PP{parallel.pipeline_model_parallel_size}"]
        if parallel.expert_model_parallel_size > 1:
            parts.append(f"EP{parallel.expert_model_parallel_size}")
        return " ".join([*parts, f"recompute {train.recompute_granularity}"])


def feasible_layouts(
    hf: dict[str, Any], base: RunConfig, *, gpus: int, gpu_bytes: float, mean_tokens: int
) -> tuple[list[Layout], int]:
    """(layouts that fit, fastest first; number of layouts tried). Attention kernels of CUDA are assumed.

    TP stays inside a node; context parallelism is left to the user: it pays only for rows longer than these.
    """
    fitting: list[Layout] = []
    tried = 0
    for config in _candidates(hf, base, gpus):
        try:
            check_world_size(config.parallel, gpus)
            spec = student_spec(hf, config, attention="varlen")
        except UserError:
            continue
        tried += 1
        memory = estimate_memory(spec, config, gpus)
        if memory.total + OVERHEAD_BYTES <= gpu_bytes:
            fitting.append(Layout(config, memory, _relative_time(config, gpus, mean_tokens)))
    return sorted(fitting, key=lambda layout: (layout.relative_time, layout.memory.total)), tried


def step_flops(hf: dict[str, Any], config: RunConfig, mean_tokens: int) -> float:
    """FLOPs of one optimizer step on `global_batch_size` sequences of `mean_tokens` tokens."""
    spec = student_spec(hf, config, attention="varlen")
    return train_flops(spec, [mean_tokens] * config.train.global_batch_size)


def _candidates(hf: dict[str, Any], base: RunConfig, gpus: int) -> Iterator[RunConfig]:
    powers = [2**n for n in range(12)]
    experts = num_experts(hf)
    for tp, pp, ep, recompute in itertools.product(
        [size for size in powers if size <= min(gpus, GPUS_PER_NODE)],
        [size for size in powers if size <= min(gpus, 16)],
        [size for size in powers if size <= min(gpus, experts)] if experts else [1],
        ("none", "selective", "full"),
    ):
        config = base.model_copy(deep=True)
        config.parallel.tensor_model_parallel_size = tp
        config.parallel.sequence_parallel = tp > 1
        config.parallel.pipeline_model_parallel_size = pp
        config.parallel.expert_model_parallel_size = ep
        config.parallel.expert_tensor_parallel_size = tp if experts and ep == 1 else 1
        config.train.recompute_granularity = recompute  # type: ignore[assignment]
        config.train.recompute_modules = ["moe" if experts else "mlp"]
        if tp * pp <= gpus and gpus % (tp * pp) == 0:
            yield config


def _relative_time(config: RunConfig, gpus: int, mean_tokens: int) -> float:
    """Time of a step relative to data parallelism alone: recomputation, TP, pipeline bubble, EP."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    rows = max(1, config.train.global_batch_size * mean_tokens // config.data.seq_length)
    microbatches = max(1, rows // parallel.data_parallel_size(gpus))
    bubble = 1 + (pp - 1) / microbatches
    tensor = 1 + _TENSOR_PARALLEL_COST * (tp.bit_length() - 1)
    ep = parallel.expert_model_parallel_size
    expert = 1.0 if ep <= GPUS_PER_NODE else 1.3  # all-to-all over the network
    return _RECOMPUTE_COST[config.train.recompute_granularity] * bubble * tensor * expert
