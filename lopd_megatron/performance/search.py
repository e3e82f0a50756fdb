"""All layouts of a student on a cluster: what fits, and how long a step takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.model.memory_estimate import OVERHEAD_BYTES, MemoryEstimate, estimate_memory
from lopd_megatron.model.student_spec import num_experts, student_spec
from lopd_megatron.parallel.topology import check_world_size
from lopd_megatron.performance.hardware import Gpu
from lopd_megatron.performance.prediction import Batch, predict_training
from lopd_megatron.performance.software import our_software
from lopd_megatron.performance.step_time import StepTime

USABLE = 0.97
"""Of the memory on the label; a layout that fills the rest is not worth the risk."""


@dataclass(frozen=True)
class Plan:
    """A layout that fits, what it needs and how long a step takes."""

    config: RunConfig
    memory: MemoryEstimate
    time: StepTime

    @property
    def seconds(self) -> float:
        return self.time.seconds

    @property
    def label(self) -> str:
        parallel, train = self.config.parallel, self.config.train
        parts = [f"TP{parallel.tensor_model_parallel_size}", f"PP{parallel.pipeline_model_parallel_size}"]
        if parallel.virtual_pipeline_model_parallel_size:
            parts.append(f"VP{parallel.virtual_pipeline_model_parallel_size}")
        if parallel.expert_model_parallel_size > 1:
            parts.append(f"EP{parallel.expert_model_parallel_size}")
        if train.recompute_granularity != "none":
            modules = "+".join(train.recompute_modules) if train.recompute_granularity == "selective" else ""
            parts.append(f"recompute {modules or 'full'}")
        return " ".join(parts)


def even_pipeline(num_layers: int, pp: int, vp: int) -> bool:
    """Whether the trainer can cut the layers into PP · VP stages; today all must be equal."""
    return num_layers % (pp * vp) == 0


def search_layouts(
    hf: dict[str, Any],
    base: RunConfig,
    gpu: Gpu,
    gpus: int,
    batch: Batch,
    *,
    node_gpus: int = 8,
    attention: str = "varlen",
    imbalance: float = 1.0,
) -> tuple[list[Plan], int]:
    """(layouts that fit, fastest first; number of layouts tried).

    TP stays inside a node. Context parallelism is that of `base`: it pays only for rows longer than most.
    """
    fitting: list[Plan] = []
    tried = 0
    for config in _candidates(hf, base, gpus, node_gpus):
        try:
            plan, fits = plan_layout(hf, config, gpu, gpus, batch, attention=attention, imbalance=imbalance)
        except UserError:
            continue
        tried += 1
        if fits:
            fitting.append(plan)
    return sorted(fitting, key=lambda plan: (plan.seconds, plan.memory.total)), tried


def plan_layout(
    hf: dict[str, Any],
    config: RunConfig,
    gpu: Gpu,
    gpus: int,
    batch: Batch,
    *,
    attention: str = "varlen",
    imbalance: float = 1.0,
) -> tuple[Plan, bool]:
    """(the plan of one layout, whether it fits); what the trainer refuses is a UserError."""
    check_world_size(config.parallel, gpus)
    spec = student_spec(hf, config, attention=attention)
    memory = estimate_memory(spec, config, gpus)
    fits = memory.total + OVERHEAD_BYTES <= USABLE * gpu.memory
    software = our_software(config, transformer_engine=attention == "transformer_engine")
    time = predict_training(hf, config, gpu, gpus, batch, software=software, imbalance=imbalance)
    return Plan(config, memory, time), fits


def _candidates(hf: dict[str, Any], base: RunConfig, gpus: int, node_gpus: int) -> Iterator[RunConfig]:
    powers = [2**n for n in range(12)]
    experts, layers = num_experts(hf), hf["num_hidden_layers"]
    stages = [
        (pp, vp)
        for pp in powers
        for vp in (None, 2, 4, 8)
        if pp <= min(gpus, 32) and (vp is None or pp > 1) and even_pipeline(layers, pp, vp or 1)
    ]
    recomputations: list[tuple[Literal["none", "selective", "full"], list[str]]] = [
        ("none", ["core_attn"]),
        ("selective", ["moe"] if experts else ["mlp"]),
        ("full", ["core_attn"]),
    ]
    for tp, (pp, vp), ep, (granularity, modules) in itertools.product(
        [size for size in powers if size <= min(gpus, node_gpus)],
        stages,
        [size for size in powers if size <= min(gpus, experts)] if experts else [1],
        recomputations,
    ):
        if gpus % (tp * pp * base.parallel.context_parallel_size):
            continue
        config = base.model_copy(deep=True)
        config.parallel.tensor_model_parallel_size = tp
        config.parallel.sequence_parallel = tp > 1
        config.parallel.pipeline_model_parallel_size = pp
        config.parallel.virtual_pipeline_model_parallel_size = vp
        config.parallel.expert_model_parallel_size = ep
        config.parallel.expert_tensor_parallel_size = tp if experts and ep == 1 else 1
        config.train.recompute_granularity = granularity
        config.train.recompute_modules = modules
        yield config
