"""Sections of training: loss, layout, optimizer, loop, checkpoints, and what watches or replaces the data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lopd_megatron.config.section import Section
from lopd_megatron.errors import UserError


class LossConfig(Section):
    """What is minimised; docs/method.md has the equations."""

    objective: str = "lightning_opd"
    """An objective of the table in `config/objectives.py`, or your own as package.module:NAME."""
    advantage_clip: float | None = Field(default=10.0, gt=0)
    """τ: advantages are clipped to [−τ, τ] nats; None: not clipped (the released code)."""
    normalization: Literal["token_mean", "per_sequence"] = "token_mean"
    """Divide by all trained tokens, or average per sequence first (the released code)."""
    topk: int = Field(default=0, ge=0)
    """Teacher tokens used by the top-k objectives; at most the k that was scored."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `topk_jsd`."""
    importance_clip: float = Field(default=5.0, gt=0)
    """Upper truncation of π_θ/π_rollout in `opd_importance`."""
    ppo_clip: float = Field(default=0.2, gt=0)
    """Clip range of the probability ratio in `opd_importance`."""
    head: Literal["fused", "plain"] = "fused"
    """`plain` keeps the whole logits and is the reference."""
    head_chunk_tokens: int = Field(default=4096, ge=1)
    """Rows whose logits exist at a time; fewer rows take less memory."""


class ParallelConfig(Section):
    """How the student is spread over the ranks; docs/parallelism.md says how to choose."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """TP: ranks that share every layer."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """PP: groups of layers on ranks of their own."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """VPP: model chunks per pipeline rank, for a smaller bubble; null: one."""
    context_parallel_size: int = Field(default=1, ge=1)
    """CP: ranks that share every sequence."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """EP: ranks that share the experts of a mixture."""
    expert_tensor_parallel_size: int = Field(default=1, ge=1)
    """TP inside the experts."""
    sequence_parallel: bool = False
    """Share norms and residuals over the tensor-parallel ranks as well; less memory. Needs TP > 1."""

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
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=2e-6, gt=0)
    """Largest learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "cosine", "linear", "inverse-square-root"] = "constant"
    """Form of the decay from `lr` to `min_lr`."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    """Iterations over which the learning rate rises from 0."""
    lr_decay_iters: int | None = Field(default=None, ge=1)
    """None: train_iters."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; vectors have none."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0: not clipped."""
    use_distributed_optimizer: bool = True
    """Share the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather new parameters while the next forward pass runs."""
    use_precision_aware_optimizer: bool = False
    """bf16 moments and gradients beside fp32 main parameters: an 8B student on one 141 GB GPU."""


class TrainConfig(Section):
    """The training loop."""

    train_iters: int = Field(default=150, ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(default=256, ge=1)
    """Sequences (rollouts) per optimizer step, over all data-parallel ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Packed rows of `seq_length` tokens per forward and data-parallel rank."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the data order and of dropout."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; main parameters are fp32 in both."""
    deterministic_mode: bool = False
    """Only deterministic kernels: slower, the same bits in every run."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass: nothing, some modules, or whole layers."""
    recompute_modules: list[str] = ["core_attn"]
    """Modules that `selective` recomputes."""
    recompute_num_layers: int = Field(default=1, ge=1)
    """Layers per recomputed block with `full`."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the load-balancing loss of mixtures; 0: none."""
    exit_duration_in_mins: float | None = Field(default=None, gt=0)
    """Save and stop with the requeue code after this long."""
    log_interval: int = Field(default=1, ge=1)
    """Iterations between two lines of the log."""
    eval_interval: int = Field(default=10, ge=0)
    """Validate before the first step and every so many iterations, where there is held-out data; 0: never."""
    eval_documents: int = Field(default=256, ge=1)
    """Largest number of held-out documents of one validation, which costs a third of a step with as many."""
    profile_iters: list[int] = []
    """[first, last) iterations recorded by the torch profiler; empty: none."""
    hooks: list[str] = []
    """Your own hooks, each package.module:CLASS; they act before those that log and save."""
    tensorboard: bool = False
    """Also write TensorBoard files below `run_dir/logs`."""
    wandb_project: str = ""
    """Also log to this project of Weights & Biases; empty: do not."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    save_interval: int = Field(default=50, ge=1)
    """Iterations between two checkpoints."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(default=0, ge=0)
    """Iterations divisible by this are never deleted; 0: none."""
    async_save: bool = False
    """Write checkpoints while training runs on."""
    save_optimizer: bool = True
    """Without it a checkpoint is smaller and a resumed run starts Adam from zero."""


class EffOPDConfig(Section):
    """Extrapolation along the update direction after iterations 1, 2, 4, 8, … (lopd_megatron.effopd)."""

    enabled: bool = False
    """Search for a longer step after iterations 1, 2, 4, 8, …"""
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
    """Train on fresh rollouts of live servers instead of a dataset."""
    overlap_steps: int = Field(default=0, ge=0, le=1)
    """1: the rollouts of the next step are made while this one trains, by weights one update older."""
    student_url: str = ""
    """A running vLLM server for the student; empty: the run starts one. So for the teacher."""
    teacher_url: str = ""
    """A running vLLM server for the teacher; empty: the run starts one."""
    key_file: str = ""
    """File with the key of servers on other nodes, readable by its owner only; `lopd serve` writes it."""
    student_devices: str = ""
    """CUDA_VISIBLE_DEVICES of a server that is started; the training takes those of its own environment."""
    teacher_devices: str = ""
    """CUDA_VISIBLE_DEVICES of the teacher server that is started."""
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
