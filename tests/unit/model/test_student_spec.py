"""Hugging Face configuration → Megatron configuration, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.model.student_spec import padded_vocab_size, read_hf_config, rope_parameters, student_spec
from tests.unit.model.tiny import LLAMA31, MOE, QWEN2, QWEN3, spec_of


def test_dense_fields() -> None:
    config = spec_of(QWEN3).transformer_config
    assert (config.num_query_groups, config.kv_channels, config.ffn_hidden_size) == (2, 16, 96)
    assert config.qk_layernorm
    assert not config.add_qkv_bias
    assert not config.add_bias_linear
    assert config.calculate_per_token_loss
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)


def test_families_differ_where_they_should() -> None:
    qwen2 = spec_of(QWEN2).transformer_config
    assert qwen2.add_qkv_bias
    assert not qwen2.qk_layernorm
    llama = spec_of(LLAMA31)
    assert llama.rope_scaling
    assert llama.rope_scaling_factor == 32.0
    assert llama.tied_embeddings


def test_mixture_fields() -> None:
    config = spec_of(MOE).transformer_config
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (8, 2, 32)
    assert config.moe_router_load_balancing_type == "none"
    assert config.moe_layer_freq == 1  # stacked checkpoint keys
    assert not config.moe_router_pre_softmax
    mixed = spec_of(MOE | {"mlp_only_layers": [0], "norm_topk_prob": False})
    assert mixed.moe_layers == [False, True, True, True]
    assert mixed.transformer_config.moe_router_pre_softmax


def test_auxiliary_loss_is_off_unless_asked_for() -> None:
    config = RunConfig()
    config.train.moe_aux_loss_coeff = 0.01
    transformer = student_spec(MOE, config, attention="sdpa").transformer_config
    assert (transformer.moe_router_load_balancing_type, transformer.moe_aux_loss_coeff) == ("aux_loss", 0.01)


def test_padded_vocabulary_is_the_same_for_every_power_of_two() -> None:
    assert {padded_vocab_size(151936, tp) for tp in (1, 2, 4, 8)} == {151936}
    assert {padded_vocab_size(211, tp) for tp in (1, 2, 4, 8)} == {256}
    assert padded_vocab_size(211, 3) == 384


def test_rope_parameters_of_both_forms_agree() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    for form in (old, new):
        rope = rope_parameters(form)
        assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5e5, "llama3", 8.0)
    assert rope_parameters({})["rope_type"] == "default"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias=true is not supported for qwen3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
    ],
)
def test_unsupported_models_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(QWEN3 | changes)


def test_rope_parameters_that_megatron_fixes_are_refused() -> None:
    scaling = LLAMA31["rope_scaling"] | {"high_freq_factor": 2.0}
    with pytest.raises(
        UserError, match=r"high_freq_factor=2.0 is not supported: Megatron-Core fixes it to 4.0"
    ):
        spec_of(LLAMA31 | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("hf", "layout", "message"),
    [
        (QWEN3, {"tensor_model_parallel_size": 16}, "num_attention_heads 8 is not divisible"),
        (QWEN3, {"pipeline_model_parallel_size": 3}, "num_hidden_layers 4 is not divisible"),
        (QWEN3, {"expert_model_parallel_size": 2}, "on a dense model"),
        (MOE, {"expert_model_parallel_size": 3}, "num_experts 8 is not divisible"),
        (MOE, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "needs expert_tensor_parallel"),
        (
            MOE,
            {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
            "needs parallel.sequence_parallel=true",
        ),
    ],
)
def test_impossible_layouts_are_refused(hf: dict, layout: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(hf, **layout)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a Hugging Face folder"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert read_hf_config(tmp_path) == QWEN3
