"""Layer specifications: Transformer Engine modules where it is installed, Megatron-Core's own elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from lopd_megatron.model.attention import SdpaAttention, VarlenAttention
from lopd_megatron.model.student_spec import StudentSpec
from lopd_megatron.parallel.versions import is_mixture_of_experts

_CORE_ATTENTION = {"sdpa": SdpaAttention, "varlen": VarlenAttention}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm that works under sequence parallelism.

    Megatron-Core's own wrapper refuses sequence parallelism; all it lacks is the mark on the weight that
    makes finalize_model_grads sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def block_spec(spec: StudentSpec, *, pp_rank: int, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk."""
    config = spec.transformer_config
    use_te = spec.attention == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization="RMSNorm",
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if use_te:
        return block
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention = parts.self_attention.submodules
        attention.core_attention = _CORE_ATTENTION[spec.attention]
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    _same_keys_as_transformer_engine(block)
    return block


def _same_keys_as_transformer_engine(block: TransformerBlockSubmodules) -> None:
    """Let a checkpoint written with either kind of modules load into the other.

    The local layer renames both norms to the names that Transformer Engine's fused layers write; in a
    mixture-of-experts layer Transformer Engine does not fuse the second norm, so it keeps its own name.
    """
    for layer in block.layer_specs:
        if is_mixture_of_experts(layer):
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
