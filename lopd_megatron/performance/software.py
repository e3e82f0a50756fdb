"""What a trainer does besides the arithmetic: CUDA graphs, fusions, overlap, recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lopd_megatron.config import RunConfig


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
    sequential_experts: bool = False
    """Experts of a rank run one after the other instead of as one grouped product."""
    accumulation_bytes: float = 0.0
    """Moved per parameter and micro-batch to add a gradient; 0: the product adds it."""
    gradient_bytes: int = 2
    """Of one reduced gradient."""
    high_precision_share: float = 0.0
    """Share of the layers whose products stay in bfloat16 in a low-precision run."""
    fp8_attention: bool = False
    """Attention multiplies FP8 operands."""
    months_behind: float = 0.0
    """Age of the release against the newest in the table; kernels of later ones are faster."""


EVERY_LAYER = 1_000_000


def our_software(config: RunConfig, *, transformer_engine: bool = False) -> Software:
    """What this trainer does under `config` (model/student_spec.py sets it).

    Megatron-Core launches every kernel from Python, reaches experts by NCCL all-to-all and hides no
    collective of a layer. Without Transformer Engine experts run one by one and norms are separate kernels.
    """
    train, optimizer = config.train, config.optimizer
    selective = train.recompute_granularity == "selective"
    return Software(
        graphs="none",
        dispatcher="alltoall",
        overlap_experts=False,
        fused_experts=False,
        overlap_tensor=False,
        overlap_data=optimizer.overlap_grad_reduce and optimizer.overlap_param_gather,
        fused_layers=transformer_engine,
        sequential_experts=not transformer_engine,
        accumulation_bytes=10.0,  # read a bfloat16 gradient, read and write the float32 buffer
        gradient_bytes=2 if optimizer.use_precision_aware_optimizer else 4,
        recompute_layers=EVERY_LAYER if train.recompute_granularity == "full" else 0,
        recompute_modules=frozenset(train.recompute_modules if selective else ()),
    )
