"""Sections of training: loss, layout, optimizer, loop, checkpoints, and what watches or replaces the data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lopd_megatron.config.section import Section
from lopd_megatron.errors import UserError


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
    hang_timeout_s: float = Field(default=600, gt=0)
    """A rank that hangs or is stopped for this long ends the job, with a line that names it."""
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
