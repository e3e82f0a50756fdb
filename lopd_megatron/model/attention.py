"""Packed attention without Transformer Engine: documents end to end in one THD row, causal inside each.

Both classes are Megatron-Core `core_attention` modules for `PackedSeqParams(qkv_format="thd")`. Under context
parallelism a rank holds the tokens that `parallel.context` names; keys and values are gathered over the
context-parallel group, queries stay.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lopd_megatron.parallel.context import zigzag_indices


class _PackedAttention(torch.nn.Module):
    """Shared constructor: Megatron-Core passes these arguments to every `core_attention`."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [t, heads, d], key and value [t, kv heads, d] → [t, heads·d]; t: of this CP rank."""
        assert attention_mask is None
        assert packed_seq_params is not None
        output = self.attend(query, key, value, packed_seq_params)
        return output.reshape(output.size(0), -1)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any
    ) -> torch.Tensor:
        raise NotImplementedError


class SdpaAttention(_PackedAttention):
    """torch scaled-dot-product attention, documents of one length at a time: any device, any dtype, CP.

    Reads cu_seqlens on the host, so on CUDA it synchronises once per layer; meant for CPU and as a reference.
    The result for a document does not depend on what is computed beside it.
    """

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any
    ) -> torch.Tensor:
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size > 1:
            key, value = (_gather_context(part, self.cp_group) for part in (key, value))
        else:
            key, value = key[None], value[None]
        lengths = [end - begin for begin, end in itertools.pairwise(packed.cu_seqlens_q.tolist())]
        here = [length // size for length in lengths]
        queries = query.split(here)
        keys, values = ([piece.flatten(0, 1) for piece in part.split(here, 1)] for part in (key, value))
        outputs = list(queries)
        for length, places in _by_value(lengths).items():
            # One call for many documents: a call for each costs four times as much where they are short.
            q, k, v = (
                torch.stack([part[place] for place in places]).transpose(1, 2)
                for part in (queries, keys, values)
            )
            mask = _zigzag_mask(length, size, rank, q.device)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
            for place, output in zip(places, attended.transpose(1, 2).unbind(), strict=True):
                outputs[place] = output
        return torch.cat(outputs)


def _by_value(values: list[int]) -> dict[int, list[int]]:
    """Value → its places, in order."""
    places: dict[int, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return places


class VarlenAttention(_PackedAttention):
    """torch's variable-length flash attention: CUDA, half precision, no host synchronisation, no CP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.11 takes fewer key heads than query heads as they are; from 2.12 on they must be announced.
        announced = "enable_gqa" in inspect.signature(varlen_attn).parameters
        self._kernel = functools.partial(varlen_attn, enable_gqa=True) if announced else varlen_attn

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any
    ) -> torch.Tensor:
        return self._kernel(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.scale,
            window_size=(-1, 0),  # causal
        )


def _zigzag_mask(length: int, size: int, rank: int, device: torch.device) -> torch.Tensor | None:
    """bool [queries, keys], True where attended; keys in rank-major order. None: plain causal."""
    if size == 1:
        return None
    positions = [zigzag_indices(np.array([length]), other, size) for other in range(size)]
    keys, queries = (
        torch.from_numpy(part).to(device) for part in (np.concatenate(positions), positions[rank])
    )
    return keys[None, :] <= queries[:, None]


class _GatherContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        whole = part.new_empty((group.size(), *part.shape))
        dist.all_gather_into_tensor(whole, part.contiguous()[None], group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (whole,) = gradients
        whole = whole.contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return whole[ctx.group.rank()], None


def _gather_context(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[t, heads, d] → [CP, t, heads, d]; the gradient sums what every rank sends back."""
    return _GatherContext.apply(part, group)
