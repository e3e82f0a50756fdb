"""Time of the collectives of one rank: tensor, context, expert, pipeline and data parallelism."""

from __future__ import annotations

import math

from lopd_megatron.performance.layer_time import Device, Seconds, Work
from lopd_megatron.performance.shapes import Attention, Experts, Layer
from lopd_megatron.performance.software import Software


def nvlink_seconds(num_bytes: float, device: Device) -> float:
    return num_bytes / (device.gpu.nvlink * device.constants.nvlink)


def nic_seconds(num_bytes: float, device: Device) -> float:
    return num_bytes / (device.gpu.nic * device.constants.nic)


def layer_communication(layer: Layer, work: Work, device: Device, software: Software) -> Seconds:
    """What the collectives of one layer and micro-batch add to its computation."""
    seconds = Seconds()
    for block in layer:
        if work.tp > 1:
            _tensor(block, work, device, software, seconds)
        if work.cp > 1 and isinstance(block, Attention):
            _context(block, work, device, seconds)
        if work.ep > 1 and isinstance(block, Experts):
            _experts(block, work, device, software, seconds)
    return seconds


def _tensor(block: object, work: Work, device: Device, software: Software, seconds: Seconds) -> None:
    """Sequence parallelism: all-gather and reduce-scatter, twice, and one more gather for the gradients."""
    if isinstance(block, Experts) and not block.shared and work.etp == 1:
        return
    crossing = 2.0 * work.tokens * work.hidden * (work.tp - 1) / work.tp
    one = nvlink_seconds(crossing, device)
    exposed = device.constants.tensor_exposed if software.overlap_tensor else 1.0
    seconds.add("tensor parallel", 2 * one * exposed, 3 * one * exposed)


def _context(block: Attention, work: Work, device: Device, seconds: Seconds) -> None:
    """Keys and values of the other ranks pass by, their gradients come back."""
    width = block.kv_heads * (block.qk_dim + block.v_dim) / work.tp
    one = nvlink_seconds(2.0 * work.tokens * (work.cp - 1) * width, device)
    exposed = device.constants.tensor_exposed
    seconds.add("context parallel", one * exposed, 2 * one * exposed)


def _experts(block: Experts, work: Work, device: Device, software: Software, seconds: Seconds) -> None:
    """Dispatch and combine, in both directions; ranks outside the NVLink domain are reached over the NICs."""
    width = block.latent or work.hidden
    domain = device.gpu.nvlink_domain
    inside = min(work.ep * work.tp, domain) // work.tp
    domains = math.ceil(work.ep * work.tp / domain)
    tokens = work.tokens / work.tp * work.imbalance
    if software.dispatcher != "alltoall":  # a token travels once to a rank, once to a domain
        near = _distinct(block.topk, work.ep) * (work.ep - 1) / work.ep
        far = _distinct(block.topk, domains) * (domains - 1) / domains
    else:
        near = block.topk * (inside - 1) / work.ep
        far = block.topk * (domains - 1) / domains
    one = nvlink_seconds(2.0 * tokens * near * width, device)
    if domains > 1:
        one = max(one, nic_seconds(2.0 * tokens * far * width, device))
    exposed = device.constants.expert_exposed if software.overlap_experts else 1.0
    seconds.add("expert parallel", 2 * one * exposed, 2 * one * exposed)


def _distinct(choices: int, places: int) -> float:
    """Expected number of places that hold at least one of `choices` uniform choices."""
    return places * (1.0 - (1.0 - 1.0 / places) ** choices)


def pipeline_hop(work: Work, device: Device, ranks_of_stage: int) -> float:
    """Hidden states to the next stage."""
    size = 2.0 * work.tokens * work.hidden / work.tp
    if ranks_of_stage >= device.gpu.nvlink_domain:
        return nic_seconds(size, device)
    return nvlink_seconds(size, device)


def ring_seconds(num_bytes: float, ranks: int, stride: int, device: Device) -> float:
    """Reduce-scatter or all-gather of `num_bytes` over `ranks` that are `stride` GPUs apart.

    Each NVLink domain sends over the NICs of all ranks of the group that are in it.
    """
    if ranks <= 1:
        return 0.0
    crossing = num_bytes * (ranks - 1) / ranks
    near = max(1, device.gpu.nvlink_domain // stride)
    if ranks <= near:
        return nvlink_seconds(crossing, device)
    return max(nic_seconds(crossing, device) / near, nvlink_seconds(crossing, device))
