"""One table of weights, read in both directions: Hugging Face tensors ↔ Megatron-Core parameters.

Megatron names here are global and those of the local layer spec, so layer and expert numbers count over the
whole model: `decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight`.
`canonical_name` brings the names of Transformer Engine modules to this form.

Layouts, with G query groups, n query heads per group, head size d, TP ranks T
    whole    one tensor, a copy on every rank
    rows     one tensor, dimension 0 split over T
    columns  one tensor, dimension 1 split over T
    gate_up  [gate; up] concatenated; a rank holds its rows of gate and then its rows of up
    qkv      q, k, v interleaved by query group [G, (n + 2)·d, ...]; dimension 0 split over T
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lopd_megatron.model.student_spec import StudentSpec

Layout = Literal["whole", "rows", "columns", "gate_up", "qkv"]


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors it is made of, in order."""

    name: str
    hf_names: tuple[str, ...]
    layout: Layout
    expert: bool = False
    """Split over the expert-tensor-parallel group instead of the tensor-parallel one."""
    vocabulary: bool = False
    """Rows are padded with zeros to the padded vocabulary."""


def weight_table(spec: StudentSpec) -> dict[str, Weight]:
    """Global Megatron name → Weight, in the order of Hugging Face's files; each HF tensor appears once.

    With tied embeddings there is no `output_layer.weight` entry: its copy on the last pipeline stage is
    the embedding (`tied_copy`).
    """
    weights = [
        Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows", vocabulary=True)
    ]
    for layer, is_moe in enumerate(spec.moe_layers):
        weights += _attention(spec, layer)
        weights += _experts(spec, layer) if is_moe else _mlp(layer)
    weights.append(Weight("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"))
    if not spec.tied_embeddings:
        weights.append(Weight("output_layer.weight", ("lm_head.weight",), "rows", vocabulary=True))
    return {weight.name: weight for weight in weights}


def _attention(spec: StudentSpec, layer: int) -> list[Weight]:
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    config = spec.transformer_config
    weights = [
        Weight(f"{megatron}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), "whole"),
        Weight(f"{megatron}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), "whole"),
        Weight(
            f"{megatron}.self_attention.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",), "columns"
        ),
    ]
    for kind in ("weight", "bias") if config.add_qkv_bias else ("weight",):
        hf_names = tuple(f"{hf}.self_attn.{part}_proj.{kind}" for part in "qkv")
        weights.append(Weight(f"{megatron}.self_attention.linear_qkv.{kind}", hf_names, "qkv"))
    if config.qk_layernorm:
        for part in "qk":
            name = f"{megatron}.self_attention.{part}_layernorm.weight"
            weights.append(Weight(name, (f"{hf}.self_attn.{part}_norm.weight",), "whole"))
    return weights


def _mlp(layer: int) -> list[Weight]:
    return _gated_mlp(f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp", expert=False)


def _experts(spec: StudentSpec, layer: int) -> list[Weight]:
    megatron, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    weights = [Weight(f"{megatron}.router.weight", (f"{hf}.gate.weight",), "whole")]
    for expert in range(spec.num_experts):
        weights += _gated_mlp(
            f"{megatron}.experts.local_experts.{expert}", f"{hf}.experts.{expert}", expert=True
        )
    return weights


def _gated_mlp(megatron: str, hf: str, *, expert: bool) -> list[Weight]:
    gate_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    return [
        Weight(f"{megatron}.linear_fc1.weight", gate_up, "gate_up", expert),
        Weight(f"{megatron}.linear_fc2.weight", (f"{hf}.down_proj.weight",), "columns", expert),
    ]


def tied_copy(spec: StudentSpec, name: str) -> str:
    """The table entry of a parameter: the last stage's `output_layer.weight` is the embedding where tied."""
    if spec.tied_embeddings and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return name


_TE_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.local_experts.\2.\1.weight"),
)


def canonical_name(name: str) -> str:
    """A parameter name of a Transformer Engine layer → the name in the table; others stay as they are."""
    for pattern, replacement in _TE_NAMES:
        name = pattern.sub(replacement, name)
    return name


def global_name(name: str, *, layer_offset: int, expert_offset: int) -> str:
    """A canonical name inside a model chunk → its name in the whole model."""
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) + layer_offset), name)
    return re.sub(r"(?<=local_experts\.)\d+", lambda found: str(int(found[0]) + expert_offset), name)


def hf_shapes(weight: Weight, spec: StudentSpec) -> list[tuple[int, ...]]:
    """The shape that the configuration gives to each Hugging Face tensor of a weight."""
    config = spec.transformer_config
    hidden, head = config.hidden_size, config.kv_channels
    heads, groups = config.num_attention_heads * head, config.num_query_groups * head
    ffn = config.moe_ffn_hidden_size if weight.expert else config.ffn_hidden_size
    if weight.vocabulary:
        return [(spec.vocab_size, hidden)]
    if weight.layout == "qkv":
        rest = () if weight.name.endswith("bias") else (hidden,)
        return [(rows, *rest) for rows in (heads, groups, groups)]
    if weight.layout == "gate_up":
        return [(ffn, hidden), (ffn, hidden)]
    if weight.name.endswith("linear_fc2.weight"):
        return [(hidden, ffn)]
    if weight.name.endswith("linear_proj.weight"):
        return [(hidden, heads)]
    if weight.name.endswith("router.weight"):
        return [(spec.num_experts, hidden)]
    return [(head,) if weight.name.endswith(("q_layernorm.weight", "k_layernorm.weight")) else (hidden,)]


def merge(weight: Weight, tensors: Sequence[torch.Tensor], spec: StudentSpec) -> torch.Tensor:
    """Hugging Face tensors → the whole Megatron tensor (vocabulary not yet padded)."""
    if weight.layout == "gate_up":
        return torch.cat(list(tensors))
    if weight.layout == "qkv":
        groups = spec.transformer_config.num_query_groups
        by_group = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    (tensor,) = tensors
    return tensor


def split(weight: Weight, whole: torch.Tensor, spec: StudentSpec) -> list[torch.Tensor]:
    """The inverse of `merge`, and of the vocabulary padding."""
    if weight.layout == "gate_up":
        return list(whole.chunk(2))
    if weight.layout == "qkv":
        config = spec.transformer_config
        heads = config.num_attention_heads // config.num_query_groups
        by_group = whole.reshape(config.num_query_groups, -1, *whole.shape[1:])
        sizes = [heads * config.kv_channels, config.kv_channels, config.kv_channels]
        return [part.flatten(0, 1) for part in by_group.split(sizes, dim=1)]
    return [whole[: spec.vocab_size] if weight.vocabulary else whole]


def shard(weight: Weight, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The part of the whole Megatron tensor that tensor-parallel rank `rank` of `size` holds."""
    if weight.layout == "whole" or size == 1:
        return whole
    if weight.layout == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size, dim=1 if weight.layout == "columns" else 0)[rank]


def unshard(weight: Weight, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inverse of `shard`: parts in the order of their ranks."""
    if weight.layout == "whole" or len(parts) == 1:
        return parts[0]
    if weight.layout == "gate_up":
        halves = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([torch.cat(half) for half in halves])
    return torch.cat(list(parts), dim=1 if weight.layout == "columns" else 0)
