"""Build a trainer from a configuration: groups, model, optimizer, data, loss."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.config.objectives import objective_spec
from lopd_megatron.data.loader import StepLoader
from lopd_megatron.data.store import Dataset, open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.loss import Loss
from lopd_megatron.model.flops import forward_flops
from lopd_megatron.parallel import topology as grid
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.train.checkpoint import Checkpoints
from lopd_megatron.train.precision_aware_adam import precision_aware
from lopd_megatron.train.state import BatchSource, Hook, Trainer

if TYPE_CHECKING:
    from lopd_megatron.model.student_spec import StudentSpec
    from lopd_megatron.parallel.topology import Topology


def build_trainer(
    config: RunConfig,
    *,
    hooks: Sequence[Hook] = (),
    batches: BatchSource | None = None,
    weights: Callable[[Sequence[torch.nn.Module]], None] | None = None,
) -> Trainer:
    """A trainer at iteration 0 with the weights of `config.model.student`. Collective over the world.

    `batches` replaces the dataset of the configuration (standard OPD makes its own); `weights` fills the
    model chunks in place of the files of the student, of which then only `config.json` is read.
    """
    _set_environment(config)
    topology = grid.initialize(config.parallel, seed=config.train.seed)
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.student_spec import student_spec
    from lopd_megatron.model.weights import load_hf

    spec = student_spec(config.model.student, config)
    chunks = build_student(spec, topology)
    # Before the optimizer: it copies the fp32 main parameters when it is made.
    if weights is None:
        load_hf(chunks, config.model.student, spec, topology)
    else:
        weights(chunks)
    model = wrap_model(chunks, spec, config)
    optimizer, scheduler = build_optimizer(model, spec, config)
    refuse_padded_buckets(model)
    _connect_schedule(spec.transformer_config, model, optimizer, config)
    trainer = Trainer(
        config=config,
        topology=topology,
        spec=spec,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        batches=batches or build_loader(config, spec, topology),
        loss=loss_of_run(config, spec, topology),
        checkpoints=Checkpoints(config, topology),
        hooks=list(hooks),
    )
    for hook in trainer.hooks:
        hook.on_build(trainer)
    return trainer


def build_loader(
    config: RunConfig,
    spec: StudentSpec,
    topology: Topology,
    dataset: Dataset | None = None,
    *,
    measured: bool = False,
) -> StepLoader:
    """The dataset of this run (or another one), read step by step as this rank needs it.

    `measured`: also the columns that no loss needs and metrics are made of.
    """
    dataset = dataset or open_dataset(config.dataset_prefixes)
    parallel = config.parallel
    return StepLoader(
        dataset,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seq_length=config.data.seq_length,
        data_parallel_rank=topology.dp_rank,
        data_parallel_size=topology.dp_size,
        context_parallel_rank=topology.cp_rank,
        context_parallel_size=topology.cp_size,
        # The interleaved schedule walks over groups of PP micro-batches.
        num_microbatches_multiple_of=topology.pp_size if topology.virtual_size > 1 else 1,
        pad_to_multiple_of=topology.tp_size if parallel.sequence_parallel else 1,
        columns=needed_columns(config, topology, dataset.columns, measured),
        flop_crossover=crossover_length(spec),
        prefetch=topology.device.type == "cuda",
    )


def needed_columns(
    config: RunConfig, topology: Topology, present: frozenset[str], measured: bool = False
) -> frozenset[str]:
    """What this pipeline stage reads: tokens on the first, what the objective compares on the last."""
    needed = {"tokens"} if topology.is_first_stage else set()
    if topology.is_last_stage:
        needed |= {"labels", "loss_mask", "position_ids", "sequence_index"}
        needed |= objective_spec(config.loss.objective).needed_columns
        # Only reported: how far the student has moved from the one that wrote the rollouts.
        needed |= {"rollout_logprobs"} & present
        if config.needs_teacher:
            needed.add("teacher_logprobs")
        if measured and config.needs_teacher:
            needed |= {"teacher_topk_ids", "teacher_topk_logprobs"} & present
    return frozenset(needed)


def crossover_length(spec: StudentSpec) -> float:
    """Document length at which attention costs as much as everything else, from two exact FLOP counts."""
    one, two = (forward_flops(spec, [length]) for length in (1, 2))
    per_pair = two - 2 * one  # f(s) = linear · s + pair · s (s + 1) / 2
    return 2 * (one - per_pair) / per_pair + 1


def loss_of_run(config: RunConfig, spec: StudentSpec, topology: Topology) -> Loss:
    """The objective over this rank's part of the vocabulary."""
    vocab = VocabRange.of(spec.vocab_size, spec.padded_vocab_size, topology.tp_group)
    return Loss(
        config.loss,
        vocab=vocab,
        sequence_parallel=config.parallel.sequence_parallel,
        cp_group=topology.cp_group,
    )


def wrap_model(chunks: Sequence[torch.nn.Module], spec: StudentSpec, config: RunConfig) -> list[Any]:
    """Megatron's data-parallel wrapper around each chunk; gradients accumulate and reduce in fp32 unless
    the optimizer is precision-aware."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        overlap_param_gather=config.optimizer.overlap_param_gather,
        # The precision-aware optimizer takes bfloat16 main gradients, which is half of what it saves.
        grad_reduce_in_fp32=not config.optimizer.use_precision_aware_optimizer,
    )
    # Only the first chunk is cut into buckets: gradients of the later ones are ready together.
    model = [
        DistributedDataParallel(spec.transformer_config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in model:
        chunk.broadcast_params()
    return model


def build_optimizer(model: Sequence[Any], spec: StudentSpec, config: RunConfig) -> tuple[Any, Any]:
    """Adam with fp32 main parameters, and its schedule, which counts in sequences.

    No weight decay on vectors (norms, biases). As in Megatron, the schedule moves after each update, so with
    a warm-up the first update has learning rate 0.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = config.optimizer
    megatron_settings = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        # Megatron computes the norm, which is logged and checked, only where it clips.
        clip_grad=settings.clip_grad or math.inf,
        bf16=config.train.precision == "bf16",
        params_dtype=spec.transformer_config.params_dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    aware = settings.use_precision_aware_optimizer
    with precision_aware(megatron_settings) if aware else contextlib.nullcontext():
        optimizer = get_megatron_optimizer(megatron_settings, list(model))
    batch = config.train.global_batch_size
    warmup = settings.lr_warmup_iters * batch
    decay = (settings.lr_decay_iters or config.train.train_iters) * batch
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(decay, warmup + 1),  # a short trial run may end within the warm-up
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run follows its configuration; a checkpoint only says how far along it is.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def refuse_padded_buckets(model: Sequence[Any]) -> None:
    """A UserError where a checkpoint would hold shifted optimizer state: see `parallel/fixes.py`.

    It depends on sizes alone, so it is said before the first step and not at the first save.
    """
    for chunk in model:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets[:-1]:
                if bucket.grad_data.numel() != bucket.numel_unpadded:
                    raise UserError(
                        f"optimizer.overlap_grad_reduce=true makes a bucket of {bucket.numel_unpadded} "
                        f"numbers that is padded to {bucket.grad_data.numel()}, and Megatron-Core would save "
                        "shifted optimizer state; set optimizer.overlap_grad_reduce=false"
                    )


def _connect_schedule(transformer: Any, model: Sequence[Any], optimizer: Any, config: RunConfig) -> None:
    """What Megatron's pipeline schedules call back; one callable per chunk under virtual stages."""
    from megatron.core.distributed import finalize_model_grads

    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    if config.optimizer.overlap_grad_reduce:
        transformer.no_sync_func = _per_chunk([chunk.no_sync for chunk in model])
    if config.optimizer.overlap_param_gather:
        transformer.param_sync_func = _per_chunk([chunk.start_param_sync for chunk in model])


def _per_chunk(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]


def _set_environment(config: RunConfig) -> None:
    """What CUDA libraries read once, when they start."""
    if config.parallel.tensor_model_parallel_size > 1:
        # Collectives are issued before the kernels that they overlap with, and start in that order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.use_deterministic_algorithms(config.train.deterministic_mode)
    if config.train.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
        os.environ.setdefault("NCCL_ALGO", "Ring")


def standard_hooks(config: RunConfig) -> list[Hook]:
    """In the order in which they act after a step: what ends the run, what is measured, what is kept."""
    from lopd_megatron.data.held_out import held_out_prefixes
    from lopd_megatron.train.hooks import SaveHook, StopHook
    from lopd_megatron.train.log import LogHook
    from lopd_megatron.train.profile import ProfileHook
    from lopd_megatron.train.staleness import StalenessHook
    from lopd_megatron.train.validate import ValidateHook
    from lopd_megatron.train.warning_log import WarningLog
    from lopd_megatron.train.watch import WatchHook

    warnings = WarningLog(config.paths.warnings)
    validates = config.train.eval_interval > 0 and bool(held_out_prefixes(config))
    trains_on_stored_rollouts = config.needs_teacher and not config.online.enabled
    hooks: list[Hook] = [
        warnings,
        WatchHook(warnings),
        *([ValidateHook(config, warnings)] if validates else []),
        *([StalenessHook(config.staleness, warnings)] if trains_on_stored_rollouts else []),
        LogHook(config),
        SaveHook(),
        *([ProfileHook(config)] if config.train.profile_iters else []),
    ]
    # Made last: it takes over the signals that should still end a process whose settings are wrong.
    return [StopHook(config.train.exit_duration_in_mins), *hooks]
