"""Time of one layer on one rank: matrix products, experts, attention, memory traffic, kernel launches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from lopd_megatron.performance.constants import Constants
from lopd_megatron.performance.hardware import Gpu
from lopd_megatron.performance.shapes import Attention, Block, Experts, Layer, Mamba, Mlp, dense_products
from lopd_megatron.performance.software import Software

CAST_BYTES = {"bf16": 0, "fp8_cs": 6, "fp8_ds": 4, "fp8_sc": 5, "mxfp8": 4, "nvfp4": 6}
ELEMENT_BYTES = {"bf16": 2.0, "fp8_cs": 1.0, "fp8_ds": 1.0, "fp8_sc": 1.03, "mxfp8": 1.03, "nvfp4": 0.56}
ATTENTION_BACKWARD = 2.5


@dataclass
class Seconds:
    """Forward and backward seconds by part."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, forward: float, backward: float) -> None:
        self.forward[part] = self.forward.get(part, 0.0) + forward
        self.backward[part] = self.backward.get(part, 0.0) + backward

    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


@dataclass(frozen=True)
class Device:
    """A GPU with the fitted constants: how long one operation takes."""

    gpu: Gpu
    constants: Constants

    def power(self) -> float:
        c = self.constants
        return {"B200": c.b_power, "B300": c.b_power, "GB200": c.gb200_power}.get(self.gpu.name, 1.0)

    def rate(self, precision: str) -> float:
        c = self.constants
        share = {"bf16": c.bf16, "nvfp4": c.fp4, "mxfp8": c.mxfp8}.get(precision, c.fp8)
        return self.gpu.peak(precision) * share * self.power()

    def arithmetic(self, m: float, k: float, n: float, precision: str) -> float:
        """Of a product whose sums have k terms; filling and draining a tile costs `depth` more."""
        return 2.0 * m * (k + self.constants.depth) * n / self.rate(precision)

    def move(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.hbm * self.constants.memory)

    def product(self, m: float, k: float, n: float, precision: str) -> float:
        """[m, k] · [k, n]: the slower of arithmetic and memory, and what one kernel costs."""
        element = ELEMENT_BYTES[precision]
        arithmetic = self.arithmetic(m, k, n, precision)
        memory = self.move(element * (m * k + k * n) + 2.0 * m * n)
        return max(arithmetic, memory) + self.constants.kernel


@dataclass(frozen=True)
class Work:
    """What one rank does for one micro-batch."""

    tokens: float
    """Of a micro-batch on this rank's context-parallel part; TP ranks share them."""
    length: float
    """Of a document."""
    hidden: int
    precision: str
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    frozen: bool = False
    """Weights get no gradient (LoRA)."""
    streams: int = 1
    imbalance: float = 1.0
    """Tokens of the busiest expert-parallel rank over the mean."""


def layer_seconds(layer: Layer, work: Work, device: Device, software: Software) -> Seconds:
    """Computation of one layer and one micro-batch."""
    seconds = Seconds()
    for block in layer:
        _dense(block, work, device, seconds)
        if isinstance(block, Attention):
            _attention(block, work, device, software, seconds)
        elif isinstance(block, Experts):
            _experts(block, work, device, software, seconds)
        _memory(block, work, device, software, seconds)
    return seconds


EXPERT_KERNELS = 36
"""Of one expert that runs alone: three products and the activation, their gradients and additions."""
LAUNCH_S = 8e-6
"""Of one kernel from Python (PyTorch profiler traces show 5 to 10 µs)."""


def launch_seconds(layer: Layer, device: Device, software: Software, ep: int = 1) -> float:
    """Seconds that the host needs to launch the forward and backward of one layer.

    A mixture without HybridEP waits for the numbers of tokens and launches permutations one by one.
    """
    c = device.constants
    if software.graphs == "full":
        return 0.0
    total = 0.0
    for block in layer:
        if isinstance(block, Experts):
            slow = c.slow_dispatch if software.dispatcher != "hybridep" else 1.0
            if software.sequential_experts:
                total += block.count / ep * EXPERT_KERNELS * LAUNCH_S
            total += c.expert_launch * slow * (c.partial_graphs if software.graphs == "partial" else 1.0)
        elif software.graphs == "none":
            total += c.launch
    return total


def _dense(block: Block, work: Work, device: Device, seconds: Seconds) -> None:
    for inner, outer, cut in dense_products(block, work.hidden):
        k = inner / (work.tp if cut == "row" else 1)
        n = outer / (work.tp if cut == "column" else 1)
        m = work.tokens / (work.tp if cut == "whole" else 1)  # sequence parallelism
        router = isinstance(block, Experts) and outer == block.count
        _product(work, device, seconds, (m, k, n), "bf16" if router else work.precision)


def _product(
    work: Work, device: Device, seconds: Seconds, sizes: tuple[float, float, float], precision: str
) -> None:
    m, k, n = sizes
    forward = device.product(m, k, n, precision)
    backward = device.product(m, n, k, precision)
    if not work.frozen:
        backward += device.product(k, m, n, precision)
    seconds.add("products", forward, backward)
    cast = CAST_BYTES[precision]
    if cast:
        seconds.add("memory", device.move(cast * m * k), device.move(cast * m * n))


def _attention(block: Attention, work: Work, device: Device, software: Software, seconds: Seconds) -> None:
    heads = block.heads / work.tp
    met = work.tokens * heads * block.attended(work.length)
    rate = device.gpu.fp8 if software.fp8_attention else device.gpu.bf16
    rate *= device.constants.attention * device.power()
    products = 2.0 * (block.qk_dim + block.v_dim) / rate  # beside them run the exponentials
    forward = met * math.hypot(products, 1.0 / device.gpu.exponentials)
    seconds.add("attention", forward, ATTENTION_BACKWARD * forward)


def _experts(block: Experts, work: Work, device: Device, software: Software, seconds: Seconds) -> None:
    """Grouped products of the experts on this rank, under routing of the stated imbalance."""
    width = block.latent or work.hidden
    local = block.count / work.ep
    tokens = work.tokens * block.topk * work.imbalance * work.etp / work.tp
    share = device.constants.fused_grouped if software.fused_experts else device.constants.grouped
    inner = block.width / work.etp
    kernels = 1 if software.fused_experts else local
    for k, n in ((width, inner * (2 if block.gated else 1)), (inner, width)):
        element = ELEMENT_BYTES[work.precision]
        weights = local * k * n
        output = element if software.fused_experts else 2.0
        moved = device.move(element * (weights + tokens * k) + output * tokens * n)
        forward = max(device.arithmetic(tokens, k, n, work.precision) / share, moved)
        inputs = max(device.arithmetic(tokens, n, k, work.precision) / share, moved)
        gradient = device.move(element * tokens * (k + n) + 4 * weights)
        gradient = max(device.arithmetic(k, tokens / local, n, work.precision) * local / share, gradient)
        kernel = device.constants.kernel * kernels
        seconds.add("experts", forward + kernel, inputs + gradient + 2 * kernel)
        if not software.fused_experts:
            cast = CAST_BYTES[work.precision]
            seconds.add("memory", device.move(cast * tokens * k), device.move(cast * tokens * n))


def _memory(block: Block, work: Work, device: Device, software: Software, seconds: Seconds) -> None:
    """Bytes of what is no matrix product, in bfloat16 elements that are read or written."""
    hidden, tokens = work.hidden / work.tp, work.tokens
    forward, backward = 5.0 * hidden, 6.0 * hidden  # norm and residual
    if work.streams > 1:  # read for the mixture that enters the block, read and written when it is added
        forward += 3.0 * work.streams * hidden
        backward += 6.0 * work.streams * hidden
    if isinstance(block, Attention):
        rotated = block.heads * block.qk_dim + block.kv_heads * (block.qk_dim + block.v_dim)
        forward += 2.0 * rotated / work.tp
        backward += 2.0 * rotated / work.tp
        forward += block.gathered * block.qk_dim
        backward += 2.0 * block.gathered * block.qk_dim
    elif isinstance(block, Mlp):
        forward += (3.0 if block.gated else 2.0) * block.width / work.tp
        backward += (5.0 if block.gated else 3.0) * block.width / work.tp
    elif isinstance(block, Mamba):
        forward += device.constants.mamba * block.inner / work.tp
        backward += 2.0 * device.constants.mamba * block.inner / work.tp
    else:
        copies = block.topk * work.imbalance * work.etp / work.tp
        width = block.latent or work.hidden
        inner = block.width / work.etp
        forward += 4.0 * copies * width
        backward += 4.0 * copies * width
        if block.clamped:  # 10 and 20 times the gate and up projections, counted in their kernels
            forward += 20.0 * copies * inner
            backward += 40.0 * copies * inner
        elif not software.fused_experts:
            forward += (3.0 if block.gated else 2.0) * copies * inner
            backward += (5.0 if block.gated else 3.0) * copies * inner
        forward += (3.0 if block.gated else 2.0) * block.shared / work.tp
        backward += (5.0 if block.gated else 3.0) * block.shared / work.tp
    scale = 2.0 * tokens * (1.0 if software.fused_layers else 2.0)
    seconds.add("memory", device.move(scale * forward), device.move(scale * backward))


def head_seconds(vocab: float, work: Work, device: Device, rows: float) -> Seconds:
    """Output head and loss over `rows` of the tokens, in bfloat16, logits read and written in float32."""
    seconds = Seconds()
    n = vocab / work.tp
    forward = device.product(rows, work.hidden, n, "bf16")
    seconds.add("head", forward + device.move(8.0 * rows * n), 2 * forward + device.move(4.0 * rows * n))
    return seconds


def sum_seconds(items: Iterable[tuple[Seconds, float]]) -> Seconds:
    """Weighted sum."""
    total = Seconds()
    for seconds, count in items:
        for part in {**seconds.forward, **seconds.backward}:
            total.add(part, count * seconds.forward.get(part, 0.0), count * seconds.backward.get(part, 0.0))
    return total
