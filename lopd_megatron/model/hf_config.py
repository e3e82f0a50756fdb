"""`config.json` of a model as transformers computes it, and what of it Megatron-Core cannot represent.

Supported: Qwen3 and Qwen3-MoE, Qwen2/2.5, Llama 3. Whatever Megatron-Core would compute differently from
transformers is refused by name instead of approximated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.fingerprints import cache_folder
from lopd_megatron.hf_folder import read_config, read_json

MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen2", "llama")

# Fields that are sizes, and the largest that is no mistake.
_SIZES = {
    "num_hidden_layers": 10_000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "num_experts_per_tok": 10_000,
    "decoder_sparse_step": 10_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
# What Megatron-Core hard-codes in RotaryEmbedding._apply_scaling.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_hf_config(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The configuration of a Hugging Face folder as transformers computes it, with all defaults filled in.

    A dictionary is a whole configuration already, and a model type that is not supported stays as written.
    So two forms of the rotary settings, or a missing field, mean here what they mean to transformers.
    """
    if isinstance(source, dict):
        return source
    if not Path(source).exists():
        raise UserError(f"{source} is not a Hugging Face model folder: it does not exist; set model.student")
    stored = read_config(source)
    if stored.get("model_type") not in MODEL_TYPES:
        return stored
    layers = stored.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _SIZES["num_hidden_layers"]:  # transformers would list them all
        raise UserError(f"{source}: num_hidden_layers={layers} in config.json cannot be right")
    # The dtype of the files counts, not what the config says of it.
    known = {key: value for key, value in stored.items() if key not in ("dtype", "torch_dtype")}
    try:
        return _computed(stored["model_type"], known)
    except Exception as error:
        raise UserError(
            f"{source}: transformers does not accept config.json ({' '.join(str(error).split())})"
        ) from error


def _computed(model_type: str, stored: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config, from a cache: its import costs every rank more than a second."""
    key = json.dumps([model_type, stored, version("transformers")], sort_keys=True)
    cache = cache_folder("configs") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(UserError):  # there is none, or it is damaged
        kept = read_json(cache)
        if kept.get("sha256") == _hash(kept.get("config")):
            return kept["config"]
    from transformers import CONFIG_MAPPING

    found: dict[str, Any] = CONFIG_MAPPING[model_type](**stored).to_dict()
    with contextlib.suppress(
        OSError, UserError, ValueError, TypeError
    ):  # no room, or no JSON: computed again next time
        found = json.loads(json.dumps(found))
        write_json(cache, {"sha256": _hash(found), "config": found})
    return found


def _hash(config: Any) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in the transformers-5 form, from either form of config.json."""
    stored = hf.get("rope_parameters") or {}
    old = hf.get("rope_scaling") or {}
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **stored, **old}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return rope


def num_experts(hf: dict[str, Any]) -> int:
    """Experts per mixture layer; 0 for a dense model, which ignores such fields as transformers does."""
    if hf.get("model_type") != "qwen3_moe":
        return 0
    return hf.get("num_experts") or hf.get("num_local_experts") or 0


def refuse_unsupported(hf: dict[str, Any]) -> None:
    """UserError that names the first field of a computed config that the student cannot have."""
    kind = hf.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {hf['hidden_act']!r} is not supported; only 'silu' is")
    for field in ("quantization_config", "text_config"):
        if hf.get(field):
            raise UserError(f"{field} in config.json is not supported: give a plain language model")
    # transformers lists the kind of every layer; the flag alone may concern none of them.
    layers = set(hf.get("layer_types") or ["sliding" if hf.get("use_sliding_window") else "full_attention"])
    if layers != {"full_attention"}:
        raise UserError("use_sliding_window=true is not supported: the student attends to the whole sequence")
    if hf.get("mlp_bias"):
        raise UserError("mlp_bias=true is not supported")
    if kind == "llama" and hf.get("attention_bias"):
        raise UserError(
            "attention_bias=true is not supported for llama: its output projection has a bias too"
        )
    if kind in ("qwen3", "qwen3_moe") and hf.get("attention_bias"):
        raise UserError(f"attention_bias=true is not supported for {kind}")
    _refuse_impossible(hf)
    rope = rope_parameters(hf)
    for name, value in (("rope_theta", rope.get("rope_theta")), ("rms_norm_eps", hf.get("rms_norm_eps"))):
        if not _is_positive(value):
            raise UserError(f"{name}={value} in config.json is no positive number")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise UserError(f"partial_rotary_factor is not supported for {kind}: all of a head is rotated")
    if rope["rope_type"] == "llama3" and not _is_positive(rope.get("factor", 8.0)):
        raise UserError(f"rope parameter factor={rope['factor']} in config.json is no positive number")
    if num_experts(hf) and hf.get("num_experts_per_tok") == 1 and hf.get("norm_topk_prob"):
        raise UserError(
            "num_experts_per_tok=1 with norm_topk_prob=true is not supported: its router has no gradient"
        )
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(f"rope_type {rope['rope_type']!r} is not supported; only 'default' and 'llama3' are")
    if rope["rope_type"] == "llama3":
        for name, value in _LLAMA3_ROPE.items():
            if rope.get(name) != value:
                raise UserError(
                    f"rope parameter {name}={rope.get(name)} is not supported: "
                    f"Megatron-Core fixes it to {value}"
                )


def _refuse_impossible(hf: dict[str, Any]) -> None:
    """Sizes that no model has; a folder's tensors are compared with the others when they are read."""
    for name, largest in _SIZES.items():
        value = hf.get(name, 1)
        if name == "num_experts" and value == 0:  # a dense model
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise UserError(f"{name}={value!r} in config.json is not a whole number from 1 to {largest}")
    heads, groups = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
    if heads % groups:
        raise UserError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"the size of an attention head is {head_dim}; rotary embeddings need an even one")
    if num_experts(hf) and hf["num_experts_per_tok"] > num_experts(hf):
        raise UserError(
            f"num_experts_per_tok {hf['num_experts_per_tok']} is more than num_experts {num_experts(hf)}"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
