"""Sections of the offline stages: models, prompts, rollouts, scores, dataset, evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lopd_megatron.config.section import Section


class ModelConfig(Section):
    """Student, teacher and how attention is computed."""

    student: str = ""
    """Hugging Face folder that training starts from; Lightning rollouts must come from these weights."""
    teacher: str = ""
    """Hugging Face folder of the teacher."""
    attention: Literal["auto", "transformer_engine", "varlen", "sdpa"] = "auto"
    """Packed attention: Transformer Engine, torch's varlen flash attention, or torch SDPA per sequence."""
    trust_remote_code: bool = False
    """Run Python code that a model folder brings. Off: such folders are refused."""


class PromptsConfig(Section):
    """From data sets to prompt shards."""

    input: list[str] = []
    """jsonl, JSON or Parquet files, patterns such as `train-*.parquet`, or folders of a data set."""
    num_shards: int = Field(default=1, ge=1)
    """Files the prompts are split into; as many workers can share the stages that follow."""
    apply_chat_template: bool = True
    """Off: `prompt` is tokenized as it is (base models, the tiny task)."""
    enable_thinking: bool = True
    """Passed to the chat template of models that know it (Qwen3)."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts are dropped and counted."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Use at most this many prompts; null: all."""
    sample_seed: int | None = None
    """Draw max_prompts at random with this seed; None: the first ones."""
    contamination_files: list[str] = []
    """Evaluation problems; a prompt that shares an n-gram with one is dropped and counted."""
    contamination_ngram: int = Field(default=13, ge=2)
    """Words in a row that a prompt and an evaluation problem may not share."""


class EngineConfig(Section):
    """A vLLM engine: one per tensor-parallel group of GPUs."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share one copy of the model."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU."""
    max_model_len: int = Field(default=5376, ge=2)
    """Longest prompt and response together, in tokens."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences the engine works on at a time; lower it when memory runs out."""
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Tokens of one forward pass; lower it when memory runs out."""
    gpu_memory_utilization: float = Field(default=0.88, gt=0, lt=1)
    """Share of the GPU that weights and KV cache take; scores need what is left."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1 << 20)
    """Fixed KV-cache size; on CPU the default of vLLM takes most of the memory, so CPU runs set it."""
    enforce_eager: bool = False
    """Do not capture CUDA graphs: a quicker start and slower decoding."""


class RolloutsConfig(Section):
    """Sampling of responses with vLLM."""

    generator: Literal["student", "teacher"] = "student"
    """Which model writes the responses: the student for distillation, the teacher for SFT."""
    num_samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to every prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy. Stored log-probs are those at temperature 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 samples from the whole distribution, which distillation assumes."""
    max_response_tokens: int = Field(default=4096, ge=1)
    """Also the longest response that training keeps: nothing is generated to be cut off."""
    stop_token_ids: list[int] = []
    """Stop tokens beside those of the generation config."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the sampling; every response has its own, from this and its id."""
    engine: EngineConfig = EngineConfig()


class ScoresConfig(Section):
    """Teacher log-probs of the rollouts."""

    topk: int = Field(default=0, ge=0)
    """Teacher's most likely tokens kept per position beside the sampled one; 0: the sampled token only."""
    path: Literal["auto", "native", "flat", "stock"] = "auto"
    """How vLLM scores; `auto` takes the fastest way that passes a self-test on this machine."""
    engine: EngineConfig = EngineConfig()


class DataConfig(Section):
    """The dataset for training."""

    prefixes: list[str] = []
    """Datasets to train on; empty: the one this run built."""
    valid_prefixes: list[str] = []
    """Held-out datasets for validation and EffOPD; empty: validation takes what this run held out."""
    valid_fraction: float = Field(default=0.02, ge=0, le=0.25)
    """Share of the rollouts, by whole prompts and at least 32, that the build keeps back for validation as
    `dataset/valid`; 0: none. A dataset of which 32 are more than a quarter keeps none back."""
    valid_seed: int = 1234
    """Enters the hash that chooses the prompts; with one value all runs hold out the same ones."""
    seq_length: int = Field(default=16384, ge=2)
    """Tokens per packed row."""
    drop_truncated: bool = False
    """Leave out responses that were cut at `rollouts.max_response_tokens`."""
    drop_repeated: bool = False
    """Leave out responses that end in a loop of the same tokens."""
    alignment_sample: int = Field(default=16, ge=0)
    """Documents re-scored with the generating student before training; 0 switches the proof off."""
    alignment_tolerance: float = Field(default=0.05, gt=0)
    """Largest accepted mean |difference| in nats between stored and re-computed log-probs."""


class EvaluationConfig(Section):
    """Accuracy on problems with known answers."""

    input: list[str] = []
    """Problem files (jsonl) with a question and an answer."""
    grader: Literal["math_verify", "exact", "tiny"] = "math_verify"
    """How an answer is compared: mathematically, as text, or the one of the tiny task."""
    num_samples_per_problem: int = Field(default=32, ge=1)
    """Responses to every problem; accuracy is their mean."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature of the responses; 0 is greedy."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling of the responses."""
    max_response_tokens: int = Field(default=32768, ge=1)
    """Longer responses are cut, and count as wrong when the answer is missing."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the sampling."""
    engine: EngineConfig = EngineConfig(max_model_len=34816)
