"""What moves, by name, and settings that cannot work."""

from pathlib import Path

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.effopd.optimizer_shards import is_selected
from lopd_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
LAYER = "0.decoder.layers.3."


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        (LAYER + "self_attention.linear_qkv.weight", True),
        (LAYER + "self_attention.q_layernorm.weight", True),
        (LAYER + "mlp.linear_fc1.weight", True),
        (LAYER + "mlp.router.weight", True),
        (LAYER + "mlp.experts.local_experts.2.linear_fc2.weight", True),
        (LAYER + "input_layernorm.weight", False),
        (LAYER + "pre_mlp_layernorm.weight", False),
        (
            LAYER + "self_attention.linear_qkv.layer_norm_weight",
            False,
        ),  # the same two under Transformer Engine
        (LAYER + "mlp.linear_fc1.layer_norm_weight", False),
        ("0.embedding.word_embeddings.weight", False),
        ("0.decoder.final_layernorm.weight", False),
        ("1.output_layer.weight", False),
    ],
)
def test_attention_and_mlp_by_name(name: str, moves: bool) -> None:
    assert is_selected(name, "attention_mlp") is moves
    assert is_selected(name, "all")


def config(**settings: object) -> RunConfig:
    result = RunConfig()
    result.effopd.enabled = True
    result.data.valid_prefixes = ["held_out"]
    for name, value in settings.items():
        section, field = name.split("__")
        setattr(getattr(result, section), field, value)
    return result


def test_good_settings_pass() -> None:
    config().check()
    config(
        effopd__score="accuracy", effopd__accuracy_problems=["valid.jsonl"], data__valid_prefixes=[]
    ).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer__use_precision_aware_optimizer": True}, "switch one of them off"),
        ({"data__valid_prefixes": []}, "set data.valid_prefixes"),
        ({"effopd__score": "accuracy"}, "set effopd.accuracy_problems"),
        (
            {
                "effopd__score": "accuracy",
                "effopd__accuracy_problems": ["a.jsonl", "test.jsonl"],
                "evaluation__input": ["test.jsonl"],
            },
            "test.jsonl is in effopd.accuracy_problems and evaluation.input",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**settings).check()
