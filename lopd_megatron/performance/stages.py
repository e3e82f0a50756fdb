"""Time and disk of the stages around training: decoding, scoring, checkpoints, export."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from statistics import NormalDist

from lopd_megatron.performance.hardware import Gpu
from lopd_megatron.performance.shapes import Attention, Experts, ModelShape
from lopd_megatron.performance.software import Software
from lopd_megatron.performance.step_time import Layout, Step, StepModel

DECODING_BANDWIDTH = 0.60
"""Share of the memory bandwidth that a decoding step reaches; vLLM on 8B models reaches 0.55 to 0.70."""
DECODING_STEP_S = 1.5e-3
"""Scheduling, sampling and launches of one decoding step (vLLM with CUDA graphs)."""
ENGINE_MEMORY = 0.88
"""Of the GPU that an engine uses; `rollouts.engine.gpu_memory_utilization`."""
LENGTH_SIGMA = 0.9
"""Of the lognormal distribution of response lengths, where a median is given."""


@dataclass(frozen=True)
class Decoding:
    """Rollouts of one stage."""

    seconds: float
    slots: int
    """Sequences that one engine decodes at once, by its memory and `max_num_seqs`."""
    tail_share: float
    """Share of the time in which less than half of the slots are busy."""
    tokens: float


def response_lengths(count: int, cap: int, median: float | None) -> list[float]:
    """Quantiles of the lengths, capped; without a median every response reaches the cap (an upper bound)."""
    if median is None:
        return [float(cap)] * count
    normal = NormalDist(math.log(median), LENGTH_SIGMA)
    return [min(float(cap), math.exp(normal.inv_cdf((n + 0.5) / count))) for n in range(count)]


def kv_bytes(shape: ModelShape) -> float:
    """Bytes of the KV cache per token, bfloat16."""
    return sum(
        2.0 * block.kv_heads * (block.qk_dim + block.v_dim)
        for layer in shape.layers
        for block in layer
        if isinstance(block, Attention)
    )


def decode(
    shape: ModelShape,
    gpu: Gpu,
    *,
    lengths: list[float],
    prompt: float,
    engines: int,
    gpus_per_engine: int,
    max_sequences: int,
    value_bytes: float = 2.0,
) -> Decoding:
    """Continuous batching on `engines` equal engines: a finished sequence hands its slot to the next.

    A decoding step reads the weights once and the KV cache of the sequences in flight. `value_bytes`: of a
    weight and of a cached value, 1 for FP8.
    """
    weights = value_bytes * shape.parameters
    memory = gpu.memory * gpus_per_engine
    mean = sum(lengths) / len(lengths)
    cache = kv_bytes(shape) * value_bytes / 2
    room = ENGINE_MEMORY * memory - weights
    slots = int(min(max_sequences, room / (cache * (prompt + mean / 2)))) if cache else max_sequences
    bandwidth = gpus_per_engine * gpu.hbm * DECODING_BANDWIDTH
    own = lengths[::engines]
    if slots < 1 or not own:
        return Decoding(math.inf if own else 0.0, 0, 0.0, float(sum(lengths)))
    order = sorted(range(len(own)), key=lambda n: (n * 7919) % len(own))  # mixed, the same every time
    waiting = [own[n] for n in order]
    running: list[float] = []
    clock = seconds = tail = 0.0
    context = prompt + mean / 2
    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, clock + waiting.pop())
        busy = len(running)
        end = heapq.heappop(running)
        read = value_bytes / 2 * _active(shape, busy) + busy * context * cache
        step = read / bandwidth + DECODING_STEP_S
        seconds += (end - clock) * step
        tail += (end - clock) * step * (busy < slots / 2)
        clock = end
    return Decoding(seconds, slots, tail / seconds if seconds else 0.0, float(sum(lengths)))


def _active(shape: ModelShape, sequences: int) -> float:
    """Bytes of the weights that a decoding step of so many sequences reads: of experts only those chosen."""
    total = 2.0 * shape.vocab * shape.hidden * (1 if shape.tied else 2)
    for layer, count in shape.kinds.items():
        dense, expert = shape.layer_parameters(layer)
        for block in layer:
            if isinstance(block, Experts):
                expert *= 1 - (1 - block.topk / block.count) ** sequences
        total += 2.0 * count * (dense + expert)
    return total


def score_seconds(
    model: StepModel,
    shape: ModelShape,
    gpu: Gpu,
    *,
    tokens: float,
    length: float,
    response: float,
    tp: int,
    precision: str = "bf16",
) -> float:
    """GPU-seconds of one forward pass over `tokens` tokens; response rows alone pass the head."""
    batch = 8192.0
    step = Step(
        shape=shape,
        gpu=gpu,
        layout=Layout(tp, tp=tp, etp=tp),
        precision=precision,
        row_tokens=batch,
        length=length,
        microbatches=1.0,
        software=Software(graphs="full", fused_experts=True, overlap_tensor=False),
        head_share=response / length,
    )
    return model.forward_seconds(step) * tp * tokens / batch


@dataclass(frozen=True)
class Disk:
    """Bytes on disk of a run."""

    rollouts: float
    dataset: float
    checkpoint: float
    kept_checkpoints: int
    export: float

    @property
    def total(self) -> float:
        return self.rollouts + self.dataset + self.kept_checkpoints * self.checkpoint + self.export


def disk_bytes(
    shape: ModelShape, *, tokens: float, topk: int, kept_checkpoints: int, save_optimizer: bool
) -> Disk:
    """A dataset keeps 13 bytes a token and 6 for each cached teacher token (records.COLUMNS)."""
    per_token = 13 + 6 * topk
    weights = 2.0 * shape.parameters
    return Disk(
        rollouts=2 * tokens * (8 + 6 * topk),  # rollouts and their scores, Parquet
        dataset=tokens * per_token,
        checkpoint=weights + (12.0 * shape.parameters if save_optimizer else 0.0),
        kept_checkpoints=kept_checkpoints,
        export=weights,
    )
