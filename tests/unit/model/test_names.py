"""The table of weights: every name once, and both directions inverse to each other."""

from __future__ import annotations

import pytest
import torch

from lopd_megatron.model.names import (
    Weight,
    canonical_name,
    global_name,
    merge,
    shard,
    split,
    unshard,
    weight_table,
)
from tests.unit.model.tiny import FAMILIES, LLAMA31, MOE, QWEN3, spec_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hf_tensor_is_named_once(family: str) -> None:
    table = weight_table(spec_of(FAMILIES[family]))
    names = [name for weight in table.values() for name in weight.hf_names]
    assert len(names) == len(set(names))


def test_tied_embeddings_have_no_head() -> None:
    assert "output_layer.weight" not in weight_table(spec_of(LLAMA31))
    assert "output_layer.weight" in weight_table(spec_of(QWEN3))


def example(weight: Weight, spec, generator: torch.Generator) -> list[torch.Tensor]:
    """Random Hugging Face tensors for one weight, of the right shapes."""
    config = spec.transformer_config
    h, d = config.hidden_size, config.kv_channels
    q, kv = config.num_attention_heads * d, config.num_query_groups * d
    ffn = config.moe_ffn_hidden_size if weight.expert else config.ffn_hidden_size
    shapes = {
        "q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q), "gate_proj": (ffn, h),
        "up_proj": (ffn, h), "down_proj": (h, ffn), "gate": (spec.num_experts, h), "q_norm": (d,),
        "k_norm": (d,), "embed_tokens": (spec.vocab_size, h), "lm_head": (spec.vocab_size, h),
    }  # fmt: skip
    tensors = []
    for name in weight.hf_names:
        shape = shapes.get(name.split(".")[-2], (h,))
        tensors.append(torch.randn(shape[:1] if name.endswith("bias") else shape, generator=generator))
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_merge_and_shard_invert(family: str, size: int) -> None:
    spec = spec_of(FAMILIES[family])
    generator = torch.Generator().manual_seed(0)
    for weight in weight_table(spec).values():
        tensors = example(weight, spec, generator)
        whole = merge(weight, tensors, spec)
        parts = [shard(weight, whole, rank, size) for rank in range(size)]
        if weight.vocabulary:  # an odd vocabulary splits evenly only when it is padded
            parts = list(torch.nn.functional.pad(whole, (0, 0, 0, -len(whole) % size)).chunk(size))
        back = split(weight, unshard(weight, parts), spec)
        for name, before, after in zip(weight.hf_names, tensors, back, strict=True):
            assert torch.equal(before, after), name


def test_qkv_is_interleaved_by_query_group() -> None:
    """Megatron's order: the group's query heads, its key, its value; then the next group."""
    spec = spec_of(QWEN3)
    weight = weight_table(spec)["decoder.layers.0.self_attention.linear_qkv.weight"]
    query = torch.arange(8.0).repeat_interleave(16)[:, None].expand(128, 64)
    key = torch.tensor([100.0, 101.0]).repeat_interleave(16)[:, None].expand(32, 64)
    value = key + 100
    rows = merge(weight, [query, key, value], spec)[::16, 0]
    assert rows.tolist() == [0, 1, 2, 3, 100, 200, 4, 5, 6, 7, 101, 201]


def test_a_gate_up_shard_holds_both_halves() -> None:
    weight = weight_table(spec_of(QWEN3))["decoder.layers.0.mlp.linear_fc1.weight"]
    whole = torch.cat([torch.zeros(4, 1), torch.ones(4, 1)])
    assert shard(weight, whole, 1, 2).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("te", "local"),
    [
        (
            "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.3.input_layernorm.weight",
        ),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.3.mlp.experts.linear_fc2.weight5",
            "decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight",
        ),
        ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
    ],
)
def test_transformer_engine_names(te: str, local: str) -> None:
    assert canonical_name(te) == local


def test_global_numbers() -> None:
    local = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    assert global_name(local, layer_offset=12, expert_offset=16) == (
        "decoder.layers.13.mlp.experts.local_experts.18.linear_fc1.weight"
    )
    assert global_name(local, layer_offset=2, expert_offset=4) in weight_table(spec_of(MOE))
