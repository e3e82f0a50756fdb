"""What a trainer does besides the arithmetic: CUDA graphs, fusions, overlap, recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Software:
    """Settings of a trainer that change its speed, not its result."""

    graphs: Literal["none", "partial", "full"] = "none"
    """CUDA graphs: of nothing, of what has fixed shapes in a layer, or of the whole step."""
    dispatcher: Literal["alltoall", "deepep", "hybridep"] = "alltoall"
    """How tokens reach experts: NCCL all-to-all; DeepEP and HybridEP send a token once to each rank."""
    overlap_experts: bool = False
    """The all-to-all of one micro-batch runs beside the computation of another."""
    fused_experts: bool = False
    """All experts of a rank are one kernel, casts and activation inside."""
    overlap_tensor: bool = True
    """TP collectives are cut up and run beside their products."""
    overlap_data: bool = True
    """Gradients are reduced during the last backward, parameters gathered during the next forward."""
    fused_layers: bool = True
    """Norms, rotary embedding and activation are one kernel each."""
    fsdp: bool = False
    """Parameters are sharded too and gathered for every micro-batch."""
    recompute_layers: int = 0
    """Layers of each virtual stage whose forward is repeated."""
    recompute_modules: frozenset[str] = frozenset()
    gradient_bytes: int = 2
    """Of one reduced gradient."""
    high_precision_share: float = 0.0
    """Share of the layers whose products stay in bfloat16 in a low-precision run."""
    fp8_attention: bool = False
    """Attention multiplies FP8 operands."""
    months_behind: float = 0.0
    """Age of the release against the newest in the table; kernels of later ones are faster."""


OURS = Software(
    graphs="none",
    dispatcher="alltoall",
    overlap_experts=False,
    fused_experts=False,
    overlap_tensor=False,
    overlap_data=False,
    fused_layers=False,
    gradient_bytes=4,
)
"""This trainer: Megatron-Core with its defaults, no fusions that need Transformer Engine."""
