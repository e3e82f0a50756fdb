"""The settings of a vLLM engine, derived once for the engine in this process and for a server.

What is not chosen by the user follows from the task, from the sizes of the model and from the machine.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import psutil

from lopd_megatron.config import EngineConfig
from lopd_megatron.inference.sizes import ModelShape, cpu_kv_cache_bytes, scoring_batch_tokens

Task = Literal["generate", "score"]

CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
QUIET_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def engine_dtype(config: EngineConfig, *, on_cpu: bool) -> Literal["bfloat16", "float32"]:
    """The dtype of the weights; `auto` is bfloat16 on CUDA and float32 on a CPU."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if on_cpu else "bfloat16"


def engine_arguments(
    shape: ModelShape, config: EngineConfig, task: Task, *, gpu_bytes: int, max_topk: int = 0
) -> dict[str, Any]:
    """Arguments for vLLM's EngineArgs. `gpu_bytes`: memory of one GPU, 0 on a CPU.

    `task` decides what the CPU build cannot do at once: "generate" needs whole prefills for its seeds,
    "score" wants prefills in chunks that bound the memory of the scores. Documents of exactly
    `config.max_model_len` tokens can be scored.
    """
    on_cpu = not gpu_bytes
    dtype = engine_dtype(config, on_cpu=on_cpu)
    # One more than the longest document: vLLM always samples one token after a scored prompt.
    longest = config.max_model_len + 1
    arguments: dict[str, Any] = {
        "tensor_parallel_size": config.tensor_parallel_size,
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "enforce_eager": config.enforce_eager or on_cpu,
        "enable_prefix_caching": task == "generate" and not on_cpu,
        "max_logprobs": max(max_topk, 1),
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    if dtype == "bfloat16":
        # A bf16 logit of 16 to 32 is rounded to 0.125; scores need the float32 head.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if task == "score":
        fitting = scoring_batch_tokens(shape.vocab_size, _free_bytes(config, gpu_bytes))
        arguments["max_num_batched_tokens"] = min(config.max_num_batched_tokens, fitting)
    if on_cpu and config.kv_cache_memory_bytes is None:
        dtype_bytes = 4 if dtype == "float32" else 2
        arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(shape, config, dtype_bytes)
    if on_cpu and task == "generate":
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(config.max_num_batched_tokens, longest)
    return arguments


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """The same arguments for the command line of vLLM's server."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _free_bytes(config: EngineConfig, gpu_bytes: int) -> float:
    """Memory for scores: what the engine leaves free of the GPU, or a quarter of what the host has free."""
    if gpu_bytes:
        return gpu_bytes * (1 - config.gpu_memory_utilization)
    return psutil.virtual_memory().available / 4
