"""torch's variable-length flash attention against one document at a time, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lopd_megatron.model.attention import SdpaAttention, VarlenAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


class FakeGroup:
    """A context-parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_varlen_equals_sdpa_per_document() -> None:
    """bfloat16 keeps 8 bits: both sides round the output and the gradients once, to 2⁻⁸ of the largest."""
    config = SimpleNamespace(kv_channels=128)
    groups = SimpleNamespace(cp=FakeGroup())
    bounds = torch.tensor([0, 300, 317, 1024], dtype=torch.int32, device="cuda")
    packed = SimpleNamespace(cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=707, max_seqlen_kv=707)
    generator = torch.Generator("cuda").manual_seed(0)
    whole = [torch.randn(1024, heads, 128, device="cuda", generator=generator) for heads in (8, 2, 2)]
    upstream = torch.randn(1024, 8 * 128, device="cuda", generator=generator)
    results = []
    for kind, dtype in ((VarlenAttention, torch.bfloat16), (SdpaAttention, torch.float32)):
        attention = kind(config, 1, None, "self", pg_collection=groups)
        inputs = [part.bfloat16().to(dtype).requires_grad_() for part in whole]
        output = attention(*inputs, None, packed_seq_params=packed)
        output.backward(upstream.bfloat16().to(dtype))
        results.append([output, *(part.grad for part in inputs)])
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected).abs().max() < 2**-6 * expected.abs().max()
