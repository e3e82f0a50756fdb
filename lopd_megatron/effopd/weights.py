"""This rank's trained weights on the line through the accepted and the current ones.

Everything is elementwise on the shards a rank owns: no collective, and the same bits under any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ParameterShard:
    """This rank's part of one trained parameter, as the optimizer updates it; it may be empty."""

    name: str
    """`<model chunk>.<parameter name>`, as in "0.decoder.layers.3.mlp.linear_fc1.weight"."""
    main: torch.Tensor
    """Written in place: the fp32 main parameter, or the parameter itself where there is no other copy."""
    parameter: torch.nn.Parameter
    """The model parameter it belongs to."""
    start: int = 0
    """First element of the flattened `parameter` that `main` holds; it holds main.numel() of them."""
    group: dist.ProcessGroup | None = None
    """The ranks that `parameter` is cut over; None where each holds all of it."""


class WeightLine:
    """Points accepted + (1 + m)·Δ = current + m·Δ, Δ = current − accepted, written into the shards.

    The accepted weights are one copy of the shards in host memory (pinned beside CUDA), there all the time;
    a second one holds the current weights from `begin` to `accept`. Multipliers 0 and −1 are copied back
    from them, not computed, so both restore every bit.
    """

    def __init__(self, shards: Sequence[ParameterShard]) -> None:
        self.shards = list(shards)
        self.accepted = [_host_copy(shard.main) for shard in self.shards]
        self._current: list[torch.Tensor] = []

    def begin(self) -> None:
        """Hold the weights in place as the current ones: the end point of Δ."""
        self._current = [_host_copy(shard.main) for shard in self.shards]

    @torch.no_grad()
    def move(self, multiplier: int) -> None:
        """Write current + multiplier·Δ into the shards."""
        for shard, accepted, current in zip(self.shards, self.accepted, self._current, strict=True):
            if multiplier == 0:
                shard.main.copy_(current)
            elif multiplier == -1:
                shard.main.copy_(accepted)
            else:
                # Three operations with a rounding each: a fused kernel such as `lerp` is free to round
                # otherwise at the end of a tensor, and where a tensor ends depends on the layout.
                point = current.to(shard.main.device)
                delta = point - accepted.to(shard.main.device)
                shard.main.copy_(delta.mul_(multiplier).add_(point))

    @torch.no_grad()
    def accept(self) -> None:
        """Make the weights in place the accepted ones, and drop the copy of the current ones."""
        for shard, accepted in zip(self.shards, self.accepted, strict=True):
            accepted.copy_(shard.main)
        self._current = []


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return copy.copy_(tensor.detach())
