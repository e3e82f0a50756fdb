"""One typed, strict description of a run. A recipe returns a `RunConfig`; every program reads the same one.

A run is one pass through the pipeline: prompts → rollouts → scores → dataset → training → HF weights →
evaluation. SFT is the same pipeline with the teacher as generator and no scoring.

Names are Megatron's where Megatron has one. Batch sizes count sequences (rollouts), log-probs are nats.
An unknown key, a wrong type or an impossible value is an error that names the closest valid name.
Command-line side: `lopd_megatron.cli`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json


class Section(BaseModel):
    """Base of all sections: no unknown keys, every assignment is checked again."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


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
    """Files or HF dataset folders with `prompt` or `messages` (jsonl, Parquet, datasets.save_to_disk)."""
    num_shards: int = Field(default=1, ge=1)
    apply_chat_template: bool = True
    """Off: `prompt` is tokenized as it is (base models, the tiny task)."""
    enable_thinking: bool = True
    max_prompt_tokens: int = Field(default=1024, ge=1)
    max_prompts: int | None = Field(default=None, ge=1)
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


class RolloutConfig(Section):
    generator: Literal["student", "teacher"] = "student"
    num_samples_per_prompt: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_response_tokens: int = Field(default=4096, ge=1)
    """Also the longest response that training keeps: nothing is generated to be cut off."""
    stop_token_ids: list[int] = []
    seed: int = 1234
    engine: EngineConfig = EngineConfig()


class ScoringConfig(Section):
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


class LossConfig(Section):
    objective: Literal[
        "sft",
        "lightning_opd",
        "opd_importance",
        "topk_forward_kl",
        "topk_reverse_kl",
        "topk_jsd",
    ] = "lightning_opd"
    advantage_clip: float | None = Field(default=10.0, gt=0)
    """τ: advantages are clipped to [−τ, τ] nats; None: not clipped (the released code)."""
    normalization: Literal["token_mean", "per_sequence"] = "token_mean"
    """Divide by all trained tokens, or average per sequence first (the released code)."""
    topk: int = Field(default=0, ge=0)
    """Teacher tokens used by the top-k objectives; at most the k that was scored."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    importance_clip: float = Field(default=5.0, gt=0)
    """Upper truncation of π_θ/π_rollout in `opd_importance`."""
    ppo_clip: float = Field(default=0.2, gt=0)
    head: Literal["fused", "plain"] = "fused"
    """`plain` keeps the whole logits and is the reference."""
    head_chunk_tokens: int = Field(default=4096, ge=1)


class ParallelConfig(Section):
    tensor_model_parallel_size: int = Field(default=1, ge=1)
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    context_parallel_size: int = Field(default=1, ge=1)
    expert_model_parallel_size: int = Field(default=1, ge=1)
    expert_tensor_parallel_size: int = Field(default=1, ge=1)
    sequence_parallel: bool = False

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one data-parallel replica: TP · PP · CP."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """World size divided by TP · PP · CP; refused when it does not divide."""
        if world_size % self.model_parallel_size:
            raise UserError(
                f"world size {world_size} is not a multiple of "
                f"TP·PP·CP = {self.tensor_model_parallel_size}·{self.pipeline_model_parallel_size}"
                f"·{self.context_parallel_size} = {self.model_parallel_size}; "
                f"start {self.model_parallel_size} processes (or a multiple), or change parallel.*"
            )
        return world_size // self.model_parallel_size


class OptimizerConfig(Section):
    lr: float = Field(default=2e-6, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_decay_style: Literal["constant", "cosine", "linear", "inverse-square-root"] = "constant"
    lr_warmup_iters: int = Field(default=0, ge=0)
    lr_decay_iters: int | None = Field(default=None, ge=1)
    """None: train_iters."""
    weight_decay: float = Field(default=0.1, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    use_precision_aware_optimizer: bool = False
    """bf16 moments and gradients beside fp32 main parameters: an 8B student on one 141 GB GPU."""


class TrainConfig(Section):
    train_iters: int = Field(default=150, ge=1)
    global_batch_size: int = Field(default=256, ge=1)
    """Sequences (rollouts) per optimizer step, over all data-parallel ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Packed rows of `seq_length` tokens per forward and data-parallel rank."""
    seed: int = 1234
    precision: Literal["bf16", "fp32"] = "bf16"
    deterministic_mode: bool = False
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    recompute_modules: list[str] = ["core_attn"]
    recompute_num_layers: int = Field(default=1, ge=1)
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    exit_duration_in_mins: float | None = Field(default=None, gt=0)
    """Save and stop with the requeue code after this long."""
    log_interval: int = Field(default=1, ge=1)
    eval_interval: int = Field(default=0, ge=0)
    """Validate on `data.valid_prefixes` every so many iterations; 0: never."""
    eval_documents: int = Field(default=256, ge=1)
    profile_iters: list[int] = []
    """[first, last) iterations recorded by the torch profiler; empty: none."""
    tensorboard: bool = False
    wandb_project: str = ""


class CheckpointConfig(Section):
    save_interval: int = Field(default=50, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int = Field(default=0, ge=0)
    """Iterations divisible by this are never deleted; 0: none."""
    async_save: bool = False
    save_optimizer: bool = True


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


class EffOPDConfig(Section):
    """Extrapolation along the update direction after iterations 1, 2, 4, 8, … (lopd_megatron.effopd)."""

    enabled: bool = False
    max_k: int = Field(default=5, ge=1)
    """Candidates are W + 2k·Δ for k = 1 … max_k."""
    first_trigger: int = Field(default=1, ge=1)
    """No search before this iteration: Adam's first step is nearly lr·sign(g), whatever its scale."""
    acceptance: Literal["at_least", "strict"] = "at_least"
    """A candidate passes when it is as good as the best so far (the paper), or better (the released code)."""
    score: Literal["accuracy", "topk_kl", "squared_log_ratio"] = "topk_kl"
    """`accuracy` samples answers to `accuracy_problems` with vLLM; the others read `data.valid_prefixes`."""
    accuracy_problems: list[str] = []
    """Validation problems; `evaluation.*` says how they are sampled and graded."""
    parameters: Literal["all", "attention_mlp"] = "attention_mlp"
    """Which move: all, or what is inside attention and MLP modules (the released code)."""
    reset_moments: bool = False
    """Let Adam start anew after an accepted candidate."""


class OnlineConfig(Section):
    """Standard OPD: fresh rollouts of the current student at every step, a live teacher (launch.online)."""

    enabled: bool = False
    overlap_steps: int = Field(default=0, ge=0, le=1)
    """1: the rollouts of the next step are made while this one trains, by weights one update older."""
    student_url: str = ""
    """A running vLLM server for the student; empty: tools/train_online.py starts one. So for the teacher."""
    teacher_url: str = ""
    student_devices: str = ""
    """CUDA_VISIBLE_DEVICES of a server that is started; the training takes those of its own environment."""
    teacher_devices: str = ""
    server_patience_s: float = Field(default=1500.0, gt=0)
    """How long the run waits for a server that went away before it gives up."""
    sync_documents: int = Field(default=4, ge=1)
    """Documents that vLLM and Megatron both score after every transfer of weights, to prove it."""
    sync_tolerance: float = Field(default=0.1, gt=0)
    """Largest accepted root mean square difference in nats of the two; bf16 engines differ by about 0.04."""


class StalenessConfig(Section):
    """When training on stored rollouts advises to sample new ones (train.staleness)."""

    window: int = Field(default=10, ge=1)
    """Iterations over which the signs of the training data are pooled."""
    min_effective_sample_fraction: float = Field(default=0.5, ge=0, le=1)
    """Of (Σ w)²/(n Σ w²) over tokens, w = π_θ/π_rollout."""
    max_drift_kl: float = Field(default=0.2, gt=0)
    """Nats per token of E[log π_rollout − log π_θ]."""
    max_held_out_rise: float = Field(default=0.1, gt=0)
    """Relative rise of valid_k2 over its smallest value."""


class LineageConfig(Section):
    allow_mismatch: str = ""
    """A reason, recorded in every artifact, to go on although lineage rules are broken."""


class StageResources(Section):
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    """0: CPU only, and training starts TP·PP·CP processes, shared out over the nodes."""
    time: str = Field(default="04:00:00", pattern=r"^(\d+-)?\d{1,2}:\d\d:\d\d$")
    """Slurm's limit of one attempt, [days-]hours:minutes:seconds."""
    array: int = Field(default=1, ge=1)
    """Independent workers of a sharded stage (a Slurm job array)."""


class StagesConfig(Section):
    """What each stage asks for."""

    prompts: StageResources = StageResources()
    rollouts: StageResources = StageResources()
    score: StageResources = StageResources()
    build: StageResources = StageResources()
    train: StageResources = StageResources()
    export: StageResources = StageResources()
    evaluate: StageResources = StageResources()


class LaunchConfig(Section):
    """Where and how the stages run; see docs/cluster.md."""

    account: str = ""
    partition: str = ""
    sbatch_options: list[str] = []
    """Further options of sbatch, as they are: `--exclusive`, `--mem=0`, `--qos=high`."""
    container_image: str = ""
    """Pyxis/Enroot image; empty: the virtual environment of slurm/env.sh."""
    container_mounts: list[str] = []
    """SOURCE:TARGET beside the checkout, which is always mounted."""
    max_restarts: int = Field(default=8, ge=0)
    """Requeues of one job in all: time limits, preemption and failures."""
    max_retries: int = Field(default=1, ge=0)
    """Requeues of one job because its command failed."""
    ssh_host: str = ""
    """NeMo-Run: USER@HOST of the login node; empty: submit from this machine."""
    ssh_checkout: str = ""
    """NeMo-Run: this checkout's path on the cluster behind `ssh_host`."""
    stages: StagesConfig = StagesConfig()


class RunConfig(Section):
    """The whole description of one run. `run_dir` is the only place a run writes to."""

    name: str = "run"
    run_dir: str = "runs/run"
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    effopd: EffOPDConfig = EffOPDConfig()
    online: OnlineConfig = OnlineConfig()
    staleness: StalenessConfig = StalenessConfig()
    lineage: LineageConfig = LineageConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def paths(self) -> Paths:
        return Paths(Path(self.run_dir))

    @property
    def dataset_prefixes(self) -> list[str]:
        return self.data.prefixes or [str(self.paths.dataset_prefix)]

    def check(self) -> None:
        """Facts that span sections. Called once by every program, after the overrides."""
        if self.loss.objective.startswith("topk_") and self.loss.topk < 1:
            raise UserError(
                f"loss.objective={self.loss.objective} needs loss.topk ≥ 1 (value {self.loss.topk}); "
                "set loss.topk to the number of teacher tokens that were scored"
            )
        if not self.data.prefixes and self.loss.topk > self.scoring.topk:
            raise UserError(
                f"loss.topk={self.loss.topk} is more than scoring.topk={self.scoring.topk}; "
                "raise scoring.topk and score again, or lower loss.topk"
            )
        rollout = self.rollout
        need = self.prompts.max_prompt_tokens + rollout.max_response_tokens
        if need > rollout.engine.max_model_len:
            raise UserError(
                f"prompts.max_prompt_tokens + rollout.max_response_tokens = {need} is more than "
                f"rollout.engine.max_model_len={rollout.engine.max_model_len}; raise the latter"
            )
        if need > self.data.seq_length:
            raise UserError(
                f"the longest rollout ({need} tokens) does not fit a packed row of "
                f"data.seq_length={self.data.seq_length}; raise data.seq_length to at least {need}"
            )
        if self.effopd.enabled:
            self._check_effopd()

    def _check_effopd(self) -> None:
        if self.optimizer.use_precision_aware_optimizer:
            raise UserError(
                "effopd.enabled=true writes fp32 main parameters, which "
                "optimizer.use_precision_aware_optimizer=true does not have; switch one of them off"
            )
        if self.effopd.score != "accuracy":
            if not self.data.valid_prefixes:
                raise UserError(
                    f"effopd.score={self.effopd.score} needs held-out data; set data.valid_prefixes"
                )
            return
        if not self.effopd.accuracy_problems:
            raise UserError("effopd.score=accuracy needs validation problems; set effopd.accuracy_problems")
        reported = set(self.effopd.accuracy_problems) & set(self.evaluation.input)
        if reported:
            raise UserError(
                f"{min(reported)} is in effopd.accuracy_problems and evaluation.input: what weights are "
                "chosen by cannot measure them; take another file for one of them"
            )

    def dump(self, path: Path) -> None:
        """Write the resolved configuration beside an output."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        return cls.model_validate(json.loads(path.read_text()))

    def leaves(self) -> dict[str, Any]:
        """Every field by its dotted name; a dictionary counts as one leaf."""

        def walk(section: Section, prefix: str) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name in type(section).model_fields:
                value = getattr(section, name)
                if isinstance(value, Section):
                    found |= walk(value, f"{prefix}{name}.")
                else:
                    found[f"{prefix}{name}"] = value
            return found

        return walk(self, "")


class Paths:
    """Where the stages of a run read and write, all below `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.config = run_dir / "config.json"
        self.prompts = run_dir / "prompts"
        self.rollouts = run_dir / "rollouts"
        self.scored = run_dir / "scored"
        self.dataset_prefix = run_dir / "dataset" / "train"
        self.checkpoints = run_dir / "checkpoints"
        self.metrics = run_dir / "metrics.jsonl"
        self.hf = run_dir / "hf"
        self.evaluation = run_dir / "evaluation"
        self.logs = run_dir / "logs"
        self.online_weights = run_dir / "online" / "weights"
        self.online_log = run_dir / "online" / "log.jsonl"
