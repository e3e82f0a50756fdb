"""Hugging Face configuration → Megatron configuration, in one table.

Supported: Qwen3 and Qwen3-MoE, Qwen2/2.5, Llama 3. Whatever Megatron-Core would compute differently from
transformers is refused by name instead of approximated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lopd_megatron.config import ParallelConfig, RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.hf_folder import read_config
from lopd_megatron.parallel import prepare_megatron

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen2", "llama")
VOCABULARY_MULTIPLE = 128
"""Padded vocabularies are multiples of this, so every power-of-two TP up to it gives the same padded size."""

# What Megatron-Core hard-codes in RotaryEmbedding._apply_scaling.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class StudentSpec:
    """Everything that defines the student: Megatron's configuration and what GPTModel takes beside it."""

    transformer_config: TransformerConfig
    hf_config: dict[str, Any]  # as it is written in config.json; an export writes it again
    attention: str  # "transformer_engine" | "varlen" | "sdpa"
    vocab_size: int  # rows that mean a token
    padded_vocab_size: int  # rows that exist; those from vocab_size on are zero and masked in the loss
    tied_embeddings: bool
    max_position_embeddings: int
    rotary_base: float
    rotary_percent: float
    rope_scaling: bool  # Llama-3.1 frequencies
    rope_scaling_factor: float

    @property
    def num_layers(self) -> int:
        return self.transformer_config.num_layers

    @property
    def num_experts(self) -> int:
        return self.transformer_config.num_moe_experts or 0

    @property
    def moe_layers(self) -> list[bool]:
        """For each layer, whether its MLP is a mixture of experts."""
        pattern = self.transformer_config.moe_layer_freq
        if not self.num_experts:
            return [False] * self.num_layers
        if isinstance(pattern, list):
            return [bool(flag) for flag in pattern]
        return [layer % pattern == 0 for layer in range(self.num_layers)]


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
    from transformers import CONFIG_MAPPING

    # The dtype of the files counts, not what the config says of it.
    known = {key: value for key, value in stored.items() if key not in ("dtype", "torch_dtype")}
    try:
        return CONFIG_MAPPING[stored["model_type"]](**known).to_dict()
    except Exception as error:
        raise UserError(
            f"{source}: transformers does not accept config.json ({type(error).__name__}: {error})"
        ) from error


def student_spec(
    source: str | Path | dict[str, Any], config: RunConfig, *, attention: str | None = None
) -> StudentSpec:
    """The student of a Hugging Face folder (or config dictionary) under the layout of `config`.

    `attention` None asks this host (`attention_backend`); a planner names that of another one.
    A model or layout that cannot be represented is a UserError that names the field.
    """
    prepare_megatron()
    from megatron.core.transformer import TransformerConfig

    hf = read_hf_config(source)
    _refuse_unsupported(hf)
    stored = source if isinstance(source, dict) else read_config(source)
    attention = attention or attention_backend(config.model.attention, config.train.precision)
    rope = rope_parameters(hf)
    arguments = {
        **_architecture(hf),
        **_moe(hf, config),
        **_execution(config, attention),
    }
    _check_layout(arguments, hf, config.parallel, attention)
    tp = config.parallel.tensor_model_parallel_size
    return StudentSpec(
        transformer_config=TransformerConfig(**arguments),
        hf_config=stored,
        attention=attention,
        vocab_size=hf["vocab_size"],
        padded_vocab_size=padded_vocab_size(hf["vocab_size"], tp),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=float(rope["rope_theta"]),
        rotary_percent=float(rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))),
        rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=float(rope.get("factor", 8.0)),
    )


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The smallest multiple of VOCABULARY_MULTIPLE and the tensor-parallel size that holds the vocabulary."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple


def attention_backend(choice: str, precision: str = "bf16") -> str:
    """Resolve `model.attention`: SDPA, but for bf16 on CUDA Transformer Engine, or varlen without it."""
    cuda = torch.cuda.is_available()
    if choice == "auto":
        if not cuda or precision != "bf16":  # packed flash attention has no float32 kernel
            return "sdpa"
        return "transformer_engine" if _has_transformer_engine() else "varlen"
    if choice in ("varlen", "transformer_engine") and not cuda:
        raise UserError(f"model.attention={choice} needs CUDA; use sdpa or auto")
    if choice in ("varlen", "transformer_engine") and precision != "bf16":
        raise UserError(
            f"model.attention={choice} has no packed attention for train.precision={precision}; "
            "use sdpa or auto, or train.precision=bf16"
        )
    if choice == "transformer_engine" and not _has_transformer_engine():
        raise UserError(
            "model.attention=transformer_engine but Transformer Engine does not import; use varlen"
        )
    return choice


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in the transformers-5 form, from either form of config.json."""
    stored = hf.get("rope_parameters") or {}
    old = hf.get("rope_scaling") or {}
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **stored, **old}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def num_experts(hf: dict[str, Any]) -> int:
    """Experts per mixture layer; 0 for a dense model."""
    return hf.get("num_experts") or hf.get("num_local_experts") or 0


def _has_transformer_engine() -> bool:
    from megatron.core.extensions import transformer_engine

    return transformer_engine.HAVE_TE


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    kind = hf.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {hf['hidden_act']!r} is not supported; only 'silu' is")
    # transformers lists the kind of every layer; the flag alone may concern none of them.
    if set(hf.get("layer_types") or ["sliding"]) != {"full_attention"} and hf.get("use_sliding_window"):
        raise UserError("use_sliding_window=true is not supported: the student attends to the whole sequence")
    if hf.get("mlp_bias"):
        raise UserError("mlp_bias=true is not supported")
    if kind == "llama" and hf.get("attention_bias"):
        raise UserError(
            "attention_bias=true is not supported for llama: its output projection has a bias too"
        )
    if kind in ("qwen3", "qwen3_moe") and hf.get("attention_bias"):
        raise UserError(f"attention_bias=true is not supported for {kind}")
    rope = rope_parameters(hf)
    if not isinstance(rope.get("rope_theta"), int | float):
        raise UserError(f"rope_theta={rope.get('rope_theta')} in config.json is no number")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise UserError(f"partial_rotary_factor is not supported for {kind}: all of a head is rotated")
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


def _architecture(hf: dict[str, Any]) -> dict[str, Any]:
    heads = hf["num_attention_heads"]
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "qk_layernorm": hf["model_type"].startswith("qwen3"),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": hf["model_type"] == "qwen2",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": hf.get("initializer_range", 0.02),
    }


def _moe(hf: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    # "alltoall" also for dense models: the default dispatcher forbids variable sequence lengths.
    common = {"moe_token_dispatcher_type": "alltoall"}
    experts = num_experts(hf)
    if not experts:
        return common
    dense = set(hf.get("mlp_only_layers") or [])
    step = hf.get("decoder_sparse_step", 1)
    pattern = [int(i not in dense and (i + 1) % step == 0) for i in range(hf["num_hidden_layers"])]
    auxiliary = config.train.moe_aux_loss_coeff
    return common | {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        # A list gives every layer its own checkpoint keys; an all-MoE model keeps the stacked ones.
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": "aux_loss" if auxiliary else "none",
        "moe_aux_loss_coeff": auxiliary,
        "moe_permute_fusion": False,
    }


def _execution(config: RunConfig, attention: str) -> dict[str, Any]:
    parallel, train = config.parallel, config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    te = attention == "transformer_engine"
    recompute: dict[str, Any] = {}
    if train.recompute_granularity == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": train.recompute_num_layers,
        }
    elif train.recompute_granularity == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": list(train.recompute_modules)}
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "bf16": train.precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": True,
        "deterministic_mode": train.deterministic_mode,
        "transformer_impl": "transformer_engine" if te else "local",
        "moe_grouped_gemm": te,
        # Every weight comes from Hugging Face or a checkpoint, and loading proves that each was set.
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "batch_p2p_comm": False,
        # SwiGLU as one autograd function: it keeps its input and not what is computed on the way.
        "bias_activation_fusion": True,
        # These kernels need apex or Transformer Engine.
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": te,
        "attention_softmax_in_fp32": True,
        **recompute,
    }


def _check_layout(
    arguments: dict[str, Any], hf: dict[str, Any], parallel: ParallelConfig, attention: str
) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    stages = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    ep, experts = parallel.expert_model_parallel_size, num_experts(hf)
    for value, name, divisor, what in (
        (arguments["num_attention_heads"], "num_attention_heads", tp, "tensor_model_parallel_size"),
        (arguments["hidden_size"], "hidden_size", tp, "tensor_model_parallel_size"),
        (arguments["ffn_hidden_size"], "intermediate_size", tp, "tensor_model_parallel_size"),
        (arguments["num_layers"], "num_hidden_layers", stages, "pipeline (· virtual pipeline) size"),
        (experts, "num_experts", ep, "expert_model_parallel_size"),
    ):
        if value % divisor:
            raise UserError(f"{name} {value} is not divisible by {what} {divisor}; choose another layout")
    groups = arguments["num_query_groups"]
    if max(groups, tp) % min(groups, tp):
        raise UserError(
            f"num_key_value_heads {groups} and tensor_model_parallel_size {tp} do not divide each other; "
            "choose another tensor_model_parallel_size"
        )
    if ep > 1 and not experts:
        raise UserError(f"expert_model_parallel_size {ep} on a dense model; set it to 1")
    etp = parallel.expert_tensor_parallel_size
    if experts and ep == 1 and etp != tp:
        # Megatron-Core reduces expert gradients like dense ones when EP is 1: with other expert TP they would
        # miss the tokens of the other tensor-parallel ranks, silently (measured: 140 % off).
        raise UserError(
            f"expert_model_parallel_size 1 needs expert_tensor_parallel_size = tensor_model_parallel_size "
            f"({etp} ≠ {tp}); set it to {tp} or use expert_model_parallel_size ≥ 2"
        )
    if attention == "varlen" and parallel.context_parallel_size > 1:
        raise UserError(
            f"model.attention=varlen has no context parallelism (context_parallel_size "
            f"{parallel.context_parallel_size}); use transformer_engine, or sdpa for a test"
        )
    if experts and tp > 1 and not parallel.sequence_parallel:
        raise UserError("a mixture of experts with tensor parallelism needs parallel.sequence_parallel=true")
