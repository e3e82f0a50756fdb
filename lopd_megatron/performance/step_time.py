"""Seconds of one optimizer step: layers, collectives, pipeline, gradients, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lopd_megatron.performance.communication import layer_communication, pipeline_hop, ring_seconds
from lopd_megatron.performance.constants import Constants
from lopd_megatron.performance.hardware import Gpu
from lopd_megatron.performance.layer_time import (
    Device,
    Seconds,
    Work,
    head_seconds,
    launch_seconds,
    layer_seconds,
    sum_seconds,
)
from lopd_megatron.performance.shapes import Attention, Experts, Layer, Mamba, Mlp, ModelShape
from lopd_megatron.performance.software import Software

_MODULE = {Attention: "core_attn", Mlp: "mlp", Experts: "moe", Mamba: "mamba"}
"""Megatron's names of what selective recomputation repeats."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs."""

    gpus: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int = 1
    ep: int = 1
    etp: int = 1
    chunk_layers: tuple[int, ...] = ()
    """Layers of each virtual stage in order, PP · VP numbers; empty: as even as possible, the rest last."""

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    def chunks(self, num_layers: int) -> tuple[int, ...]:
        if self.chunk_layers:
            return self.chunk_layers
        count = self.pp * self.vp
        size = math.ceil(num_layers / count)
        full = num_layers // size
        rest = (num_layers - full * size,) if num_layers % size else ()
        chunks = (size,) * full + rest
        return chunks + (0,) * (count - len(chunks))


@dataclass(frozen=True)
class Step:
    """One optimizer step of a run."""

    shape: ModelShape
    gpu: Gpu
    layout: Layout
    precision: str
    row_tokens: float
    """Of one micro-batch of one data-parallel rank, before context parallelism cuts it."""
    length: float
    """Of a document."""
    microbatches: float
    """Of one data-parallel rank."""
    software: Software
    head_share: float = 1.0
    """Share of the rows that pass the output head."""
    frozen: bool = False
    imbalance: float = 1.0

    @property
    def tokens(self) -> float:
        """Of the whole step."""
        return self.row_tokens * self.microbatches * self.layout.dp


@dataclass(frozen=True)
class StepTime:
    """Seconds by part; they add up to the step."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass
class _Stage:
    seconds: Seconds
    host: float = 0.0

    def busy(self) -> float:
        """GPU and host work side by side; the slower counts, with a soft corner."""
        return math.hypot(self.seconds.total() ** 2, self.host**2) ** 0.5


class StepModel:
    """Predicts steps with one set of constants."""

    def __init__(self, constants: Constants | None = None) -> None:
        self.constants = constants or Constants.fitted()

    def predict(self, step: Step) -> StepTime:
        """Seconds of a step by part."""
        device = Device(step.gpu, self.constants)
        stages = self._stages(step, device)
        slowest = max(stages, key=_Stage.busy)
        count = step.microbatches
        parts = {
            name: count * (slowest.seconds.forward.get(name, 0) + slowest.seconds.backward.get(name, 0))
            for name in {**slowest.seconds.forward, **slowest.seconds.backward}
        }
        parts["host"] = count * (slowest.busy() - slowest.seconds.total())
        others = sum(stage.busy() for stage in stages) - slowest.busy()
        parts["pipeline bubble"] = others / step.layout.vp
        parts |= self._update(step, device, slowest)
        age = (1.0 + self.constants.progress) ** step.software.months_behind
        return StepTime({name: seconds * age for name, seconds in parts.items()})

    def forward_seconds(self, step: Step) -> float:
        """Seconds of the forward passes alone of all micro-batches (scoring)."""
        device = Device(step.gpu, self.constants)
        stage = max(self._stages(step, device), key=_Stage.busy)
        return step.microbatches * max(sum(stage.seconds.forward.values()), stage.host / 3)

    def _work(self, step: Step) -> Work:
        layout = step.layout
        return Work(
            tokens=step.row_tokens / layout.cp,
            length=step.length,
            hidden=step.shape.hidden,
            precision=step.precision,
            tp=layout.tp,
            cp=layout.cp,
            ep=layout.ep,
            etp=layout.etp,
            frozen=step.frozen,
            imbalance=step.imbalance,
            streams=step.shape.streams,
        )

    def _stages(self, step: Step, device: Device) -> list[_Stage]:
        """Work of one micro-batch on every pipeline stage."""
        shape, layout = step.shape, step.layout
        work = self._work(step)
        cache: dict[Layer, tuple[Seconds, float]] = {}
        chunks = layout.chunks(len(shape.layers))
        layers = iter(shape.layers)
        members: list[list[Layer]] = [[] for _ in range(layout.pp)]
        for number, size in enumerate(chunks):
            members[number % layout.pp] += [next(layers) for _ in range(size)]
        members[(len(chunks) - 1) % layout.pp] += shape.extra
        last = layout.pp - 1
        stages = []
        for number, held in enumerate(members):
            items, host = [], 0.0
            for layer in held:
                if layer not in cache:
                    cache[layer] = self._layer(layer, step, work, device)
                seconds, launched = cache[layer]
                items.append((seconds, 1.0))
                host += launched
            items += self._recomputed(step, held, cache)
            if number == last:
                rows = work.tokens * step.head_share
                head = head_seconds(shape.vocab, work, device, rows)
                items.append((head, 1.0 + len(shape.extra)))
            if layout.pp > 1 and layout.vp == 1:
                hop = pipeline_hop(work, device, layout.gpus // layout.pp)
                items.append((Seconds({"pipeline hops": hop}, {"pipeline hops": hop}), 1.0))
            stages.append(_Stage(sum_seconds(items), host))
        return stages

    def _recomputed(
        self, step: Step, held: list[Layer], cache: dict[Layer, tuple[Seconds, float]]
    ) -> list[tuple[Seconds, float]]:
        """Forward passes that the backward repeats."""
        repeated = held[: step.software.recompute_layers * step.layout.vp]
        return [
            (Seconds({}, {"recompute": sum(cache[layer][0].forward.values())}), 1.0) for layer in repeated
        ]

    def _layer(self, layer: Layer, step: Step, work: Work, device: Device) -> tuple[Seconds, float]:
        software = step.software
        computed = layer_seconds(layer, work, device, software)
        if software.high_precision_share:
            high = layer_seconds(layer, replace(work, precision="bf16"), device, software)
            share = software.high_precision_share
            computed = sum_seconds([(computed, 1 - share), (high, share)])
        communication = layer_communication(layer, work, device, software)
        seconds = sum_seconds([(computed, 1.0), (communication, 1.0)])
        repeated = sum(
            sum(layer_seconds((block,), work, device, software).forward.values())
            + sum(layer_communication((block,), work, device, software).forward.values())
            for block in layer
            if _MODULE[type(block)] in software.recompute_modules
        )
        if repeated:
            seconds.add("recompute", 0.0, repeated)
        return seconds, launch_seconds(layer, device, software, work.ep)

    def _update(self, step: Step, device: Device, slowest: _Stage) -> dict[str, float]:
        """Gradient reduction, parameter gather and optimizer of the fullest stage."""
        layout, software = step.layout, step.software
        dense, expert = rank_parameters(step)
        if step.frozen:
            return {"step": self.constants.step}
        dense_ranks = layout.dp * layout.cp
        expert_ranks = layout.gpus // (layout.pp * layout.ep * layout.etp)
        parameter = weight_bytes(step.precision)
        stride = layout.tp
        expert_stride = layout.ep * layout.etp

        def both(size: float) -> float:
            return ring_seconds(size * dense, dense_ranks, stride, device) + ring_seconds(
                size * expert, expert_ranks, expert_stride, device
            )

        reduce, gather = both(software.gradient_bytes), both(parameter)
        hidden = self.constants.data_hidden if software.overlap_data else 0.0
        forward, backward = (sum(p.values()) for p in (slowest.seconds.forward, slowest.seconds.backward))
        if software.fsdp:
            forward, backward = forward * step.microbatches, backward * step.microbatches
            gather *= 2 * step.microbatches
            reduce *= step.microbatches
        exposed = max(0.0, reduce - hidden * backward) + max(0.0, gather - hidden * forward)
        states = dense / max(1, dense_ranks) + expert / max(1, expert_ranks)
        added = step.microbatches * software.accumulation_bytes * (dense + expert)
        return {
            "data parallel": exposed,
            "gradient sums": device.move(added),
            "optimizer": device.move(30.0 * states),
            "step": self.constants.step,
        }


def rank_parameters(step: Step) -> tuple[float, float]:
    """(parameters outside experts, of experts) that one rank of a stage holds, on average."""
    shape, layout = step.shape, step.layout
    dense = float(shape.vocab * shape.hidden * (1 if shape.tied else 2))
    expert = 0.0
    for layer, count in shape.kinds.items():
        own, mixture = shape.layer_parameters(layer)
        dense += own * count
        expert += mixture * count
    return dense / (layout.tp * layout.pp), expert / (layout.pp * layout.ep * layout.etp)


def weight_bytes(precision: str) -> float:
    """Bytes of one weight as ranks hold and gather it: FP8 runs keep FP8, NVFP4 runs bfloat16."""
    return 1.0 if precision in ("fp8_cs", "fp8_ds", "mxfp8") else 2.0


def least_bytes(step: Step) -> float:
    """Bytes that a rank cannot do without: weights, bfloat16 gradients, its share of 12 optimizer bytes.

    Activations are not in it, so a run that needs more than a GPU has cannot have taken place.
    """
    parameters = sum(rank_parameters(step))
    weights = weight_bytes(step.precision)
    ranks = step.layout.dp * step.layout.cp
    if step.frozen:
        return parameters * weights / (ranks if step.software.fsdp else 1)
    if step.software.fsdp:
        return parameters * (weights + 14.0) / ranks
    return parameters * (weights + 2.0 + 12.0 / ranks)
