"""Sections of the offline stages: models, prompts, rollouts, scores, dataset, evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lopd_megatron.config.section import Section


class ModelConfig(Section):
    student: str = ""
    """Hugging Face folder that training starts from; Lightning rollouts must come from these weights."""
    teacher: str = ""
    """Hugging Face folder of the teacher."""
    attention: Literal["auto", "transformer_engine", "varlen", "sdpa"] = "auto"
    """Packed attention: Transformer Engine, torch's varlen flash attention, or torch SDPA per sequence."""
    trust_remote_code: bool = False


class PromptsConfig(Section):
    input: list[str] = []
    """jsonl, JSON or Parquet files, patterns such as `train-*.parquet`, or folders of a data set."""
    num_shards: int = Field(default=1, ge=1)
    apply_chat_template: bool = True
    """Off: `prompt` is tokenized as it is (base models, the tiny task)."""
    enable_thinking: bool = True
    max_prompt_tokens: int = Field(default=1024, ge=1)
    max_prompts: int | None = Field(default=None, ge=1)
    sample_seed: int | None = None
    """Draw max_prompts at random with this seed; None: the first ones."""
    contamination_files: list[str] = []
    """Evaluation problems; a prompt that shares an n-gram with one is dropped and counted."""
    contamination_ngram: int = Field(default=13, ge=2)


class EngineConfig(Section):
    """A vLLM engine: one per tensor-parallel group of GPUs."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU."""
    max_model_len: int = Field(default=5376, ge=2)
    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    gpu_memory_utilization: float = Field(default=0.88, gt=0, lt=1)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1 << 20)
    """Fixed KV-cache size; on CPU the default of vLLM takes most of the memory, so CPU runs set it."""
    enforce_eager: bool = False


class RolloutsConfig(Section):
    generator: Literal["student", "teacher"] = "student"
    num_samples_per_prompt: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_response_tokens: int = Field(default=4096, ge=1)
    """Also the longest response that training keeps: nothing is generated to be cut off."""
    stop_token_ids: list[int] = []
    seed: int = 1234
    engine: EngineConfig = EngineConfig()


class ScoresConfig(Section):
    topk: int = Field(default=0, ge=0)
    """Teacher's most likely tokens kept per position beside the sampled one; 0: the sampled token only."""
    path: Literal["auto", "native", "flat", "stock"] = "auto"
    engine: EngineConfig = EngineConfig()


class DataConfig(Section):
    prefixes: list[str] = []
    """Datasets to train on; empty: the one this run built."""
    valid_prefixes: list[str] = []
    """Held-out datasets for validation metrics and EffOPD scores."""
    seq_length: int = Field(default=16384, ge=2)
    """Tokens per packed row."""
    drop_truncated: bool = False
    drop_repeated: bool = False
    alignment_sample: int = Field(default=16, ge=0)
    """Documents re-scored with the generating student before training; 0 switches the proof off."""
    alignment_tolerance: float = Field(default=0.05, gt=0)
    """Largest accepted mean |difference| in nats between stored and re-computed log-probs."""


class EvaluationConfig(Section):
    input: list[str] = []
    """Problem files (jsonl) with a question and an answer."""
    grader: Literal["math_verify", "exact", "tiny"] = "math_verify"
    num_samples_per_problem: int = Field(default=32, ge=1)
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_response_tokens: int = Field(default=32768, ge=1)
    seed: int = 1234
    engine: EngineConfig = EngineConfig(max_model_len=34816)
