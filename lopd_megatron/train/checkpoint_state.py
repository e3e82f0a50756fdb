"""The state of a trainer as a Megatron sharded state dict: what is in a checkpoint, written and read."""

from __future__ import annotations

import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException

from lopd_megatron.errors import UserError
from lopd_megatron.parallel.safe_pickles import REFUSED
from lopd_megatron.parallel.versions import save_options, save_strategy, with_own_learning_rates
from lopd_megatron.progress import log_line
from lopd_megatron.train import checkpoint_writers
from lopd_megatron.train.state import Hook, Trainer

CONTENT = {
    # The only kind that loads under another tensor- or pipeline-parallel size.
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def layout(trainer: Trainer) -> dict[str, Any]:
    """What decides which parts of a checkpoint fit."""
    config = trainer.config
    return {
        **config.parallel.model_dump(mode="json"),
        "data_parallel_size": trainer.topology.dp_size,
        "use_distributed_optimizer": config.optimizer.use_distributed_optimizer,
        "has_optimizer": config.checkpoint.save_optimizer,
        "hooks": [hook.name for hook in _stateful(trainer)],
    }


def write(trainer: Trainer, folder: Path, description: dict[str, Any], *, async_save: bool) -> Any:
    """Save into an empty folder. Returns Megatron's AsyncRequest to schedule when `async_save`, else None."""
    checkpoint_writers.prepare()
    parameters_are_current(trainer)
    strategy = save_strategy()
    if trainer.topology.dp_cp_group.size() > 1:  # every replica writes a part instead of the first one all
        strategy = FullyParallelSaveStrategyWrapper(strategy, trainer.topology.dp_cp_group)
    state = _sharded_state(trainer, description["layout"], is_loading=False)
    # Under one key: the description has a "model" too, its lineage, which must not replace the weights.
    state |= {"config": trainer.config.model_dump(mode="json"), "description": description}
    state |= {name: description[name] for name in ("iteration", "consumed_train_samples")}
    return dist_checkpointing.save(
        state,
        str(folder),
        strategy,
        async_sharded_save=async_save,
        content_metadata=dict(CONTENT),
        **save_options(),
    )


def read(trainer: Trainer, folder: Path, description: dict[str, Any]) -> None:
    """Fill model, optimizer, schedule, random generators, hooks and counters from a folder.

    Random states belong to a (pipeline, tensor) position and are left alone when those sizes changed. A
    checkpoint without an optimizer gives the weights only, and Adam starts anew.
    """
    stored = description["layout"]
    has_optimizer = stored["has_optimizer"]
    if has_optimizer:
        _refuse_other_optimizer(trainer, folder, stored)
    elif trainer.topology.rank == 0:
        log_line(
            f"warning: {folder} has no optimizer state (checkpoint.save_optimizer=false); Adam starts anew"
        )
    strategy = get_default_load_sharded_strategy(str(folder))
    if trainer.topology.dp_cp_group.size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, trainer.topology.dp_cp_group)
    wanted = _sharded_state(trainer, stored, is_loading=True)
    try:
        state = dist_checkpointing.load(wanted, str(folder), strategy)
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError) as error:
        raise UserError(_cannot_load(folder, error)) from error
    for line in changed_settings(state["config"], trainer.config.model_dump(mode="json"), state["iteration"]):
        if trainer.topology.rank == 0:
            log_line(line)
    for name, chunk in _chunks(trainer):
        _refuse_extra_state(folder, state[name])
        chunk.load_state_dict(state[name], strict=True)
    if has_optimizer:
        groups = trainer.optimizer.param_groups
        trainer.optimizer.load_state_dict(with_own_learning_rates(state["optimizer"], groups))
        _apply_settings(trainer)
    else:
        trainer.optimizer.reload_model_params()
    # The schedule goes by iteration, counted in sequences of this run's batch size; that may have changed.
    trainer.scheduler.step(increment=state["iteration"] * trainer.config.train.global_batch_size)
    if "rng_state" in state:
        _set_rng_state(state["rng_state"])
    for hook in _stateful(trainer):
        if hook.name in stored["hooks"]:
            hook.load_state_dict(state["hooks"][hook.name])
    trainer.iteration = state["iteration"]
    trainer.consumed_train_samples = state["consumed_train_samples"]


WITHOUT_EFFECT = {
    *("exit_duration_in_mins", "hang_timeout_s", "log_interval", "eval_interval", "eval_documents"),
    *("profile_iters", "tensorboard", "wandb_project"),
}
"""Settings of `train` that do not change the weights."""


def changed_settings(stored: dict[str, Any], current: dict[str, Any], iteration: int) -> list[str]:
    """What a resumed run does otherwise than the run that saved, a line each; both are whole configurations.

    The new settings hold from the next iteration on. UserError for another seed: the order of documents is a
    function of the seed and of the number of sequences consumed, so some would come twice and others never.
    """
    lines = []
    for section in ("loss", "optimizer", "train"):
        for name, now in current[section].items():
            before = stored[section].get(name, now)
            if before == now or name in WITHOUT_EFFECT:
                continue
            if (section, name) == ("train", "seed"):
                raise UserError(
                    f"train.seed={now}, but the checkpoint of iteration {iteration} was trained with "
                    f"{before}: the rest of the epoch would be shuffled otherwise; set train.seed={before}, "
                    "or another run_dir"
                )
            lines.append(f"changed from iteration {iteration + 1} on: {section}.{name} {before} -> {now}")
            if (section, name) == ("train", "global_batch_size"):
                lines[-1] += "; the schedule goes by iteration, the data go on after the last sequence"
    return lines


def _cannot_load(folder: Path, error: Exception) -> str:
    """One line from the errors of all ranks; an object that names code is the one that matters."""
    text = str(error)
    refused = re.search(rf"it names [\w.]+, {re.escape(REFUSED)}", text)
    reason = refused[0] if refused else (text.strip().splitlines() or [type(error).__name__])[-1][:300]
    return f"{folder} cannot be loaded: {reason}; remove it to continue from the checkpoint before it"


def _refuse_extra_state(folder: Path, state: dict[str, Any]) -> None:
    """Transformer Engine unpickles an `_extra_state` that is not empty, as only FP8 runs have one."""
    for key, value in state.items():
        if key.endswith("_extra_state") and value is not None:
            size = value.numel() if isinstance(value, torch.Tensor) else len(value.getbuffer())
            if size:
                raise UserError(
                    f"{folder}: {key} has {size} bytes of FP8 state, which this program never writes"
                )


def _apply_settings(trainer: Trainer) -> None:
    """Give the optimizer its own settings again: a loaded state brings those of the run that saved it."""
    settings = trainer.config.optimizer
    for group in trainer.optimizer.param_groups:
        group |= {
            "max_lr": settings.lr,
            "min_lr": settings.min_lr,
            "betas": (settings.adam_beta1, settings.adam_beta2),
            "eps": settings.adam_eps,
        }


def parameters_are_current(trainer: Trainer) -> None:
    """Wait until every rank holds the parameters of the last update.

    With overlap_param_gather they arrive during the next forward pass; until then a rank has its own shard
    of the new ones and the rest of the old.
    """
    for chunk in trainer.model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()


def _sharded_state(trainer: Trainer, stored: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The state dict to write, or the one that says what to read; `stored` is the checkpoint's layout."""
    metadata = CONTENT | {"dp_cp_group": trainer.topology.dp_cp_group}
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _chunks(trainer)
    }
    model_state = dict(state)
    hooks = {
        hook.name: hook.state_dict(model_state, is_loading=is_loading)
        for hook in _stateful(trainer)
        if hook.name in stored["hooks"]
    }
    if hooks:
        state["hooks"] = hooks
    if stored["has_optimizer"]:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=metadata
        )
        if _same_positions(trainer, stored):
            state["rng_state"] = _rng_state(trainer)
    return state


def _chunks(trainer: Trainer) -> list[tuple[str, Any]]:
    """(key, unwrapped chunk): the wrapper would prefix keys when saving and not when loading."""
    if len(trainer.model) == 1:
        return [("model", trainer.model[0].module)]
    return [(f"model{index}", chunk.module) for index, chunk in enumerate(trainer.model)]


def _stateful(trainer: Trainer) -> list[Hook]:
    return [hook for hook in trainer.hooks if hook.name]


def _same_positions(trainer: Trainer, stored: dict[str, Any]) -> bool:
    parallel = trainer.config.parallel
    return (
        stored["tensor_model_parallel_size"] == parallel.tensor_model_parallel_size
        and stored["pipeline_model_parallel_size"] == parallel.pipeline_model_parallel_size
    )


def _refuse_other_optimizer(trainer: Trainer, folder: Path, stored: dict[str, Any]) -> None:
    config = trainer.config
    if stored["use_distributed_optimizer"] != config.optimizer.use_distributed_optimizer:
        raise UserError(
            f"{folder} was written with optimizer.use_distributed_optimizer="
            f"{stored['use_distributed_optimizer']} and the two kinds do not interchange; set it to the same"
        )
    # Experts get an optimizer of their own only under expert parallelism.
    if (stored["expert_model_parallel_size"] > 1) != (config.parallel.expert_model_parallel_size > 1):
        raise UserError(
            f"{folder} was written with expert_model_parallel_size={stored['expert_model_parallel_size']}, "
            f"this run has {config.parallel.expert_model_parallel_size}: optimizer state moves among sizes > "
            "1 only; choose such a size, or export to Hugging Face and start a new run"
        )


def _rng_state(trainer: Trainer) -> ShardedObject:
    topology = trainer.topology
    state = {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng_state",
        state,
        (topology.pp_size, topology.tp_size),
        (topology.pp_rank, topology.tp_rank),
        replica_id=topology.dp_cp_group.rank(),
    )


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
