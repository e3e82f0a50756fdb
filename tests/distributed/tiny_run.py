"""A student, a dataset and runs small enough to train in milliseconds, for tests of the trainer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.data.writer import DatasetWriter
from lopd_megatron.lineage import Lineage
from lopd_megatron.train.state import Hook, Trainer
from tests.distributed import tiny_hf

COLUMNS = ["tokens", "loss_mask", "teacher_logprobs", "rollout_logprobs"]


def write_inputs(folder: Path, family: str = "qwen3") -> Path:
    """`folder/student`, a random model with a tokenizer, and `folder/train`, 60 scored random rollouts."""
    from lopd_megatron.recipes import tiny_task

    tiny_hf.save_model(family, folder / "student")
    tiny_task.save_tokenizer(folder / "student")
    write_dataset(folder / "train", seed=3)
    return folder


def write_dataset(prefix: Path, *, seed: int, documents: int = 60) -> None:
    """Documents of 6 to 40 tokens with prompts of 2 to 4."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 41, documents)
    prompts = rng.integers(2, 5, documents)
    mask = np.concatenate(
        [np.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)]
    )
    teacher = -rng.exponential(2.0, len(mask)).astype(np.float32) * mask
    values = {
        "tokens": rng.integers(0, tiny_hf.VOCABULARY, len(mask)),
        "loss_mask": mask.astype(np.uint8),
        "teacher_logprobs": teacher,
        "rollout_logprobs": (1.1 * teacher).astype(np.float32),
    }
    with DatasetWriter(prefix, COLUMNS, 0, {"seed": seed}) as writer:
        writer.append(lengths, values)
        writer.commit(Lineage())


def tiny_config(inputs: Path, run_dir: Path, **settings: Any) -> RunConfig:
    """fp32, six steps of twelve sequences, a checkpoint every third; settings: `section__field=value`."""
    config = RunConfig()
    config.name = "tiny"
    config.model.student = str(inputs / "student")
    config.data.prefixes = [str(inputs / "train")]
    config.run_dir = str(run_dir)
    config.prompts.max_prompt_tokens, config.rollouts.max_response_tokens = 4, 36
    config.data.seq_length = 64
    config.train.precision = "fp32"
    config.train.global_batch_size = 12
    config.train.train_iters = 6
    config.optimizer.lr = 1e-3
    config.optimizer.lr_decay_style = "cosine"
    config.checkpoint.save_interval = 3
    for name, value in settings.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, **more: Any) -> dict[str, Any]:
    """Settings of a layout; sequence parallelism goes with TP."""
    return {
        "parallel__tensor_model_parallel_size": tp,
        "parallel__pipeline_model_parallel_size": pp,
        "parallel__virtual_pipeline_model_parallel_size": vpp,
        "parallel__expert_model_parallel_size": ep,
        "parallel__sequence_parallel": tp > 1,
        **more,
    }


def tiny_trainer(config: RunConfig, *, hooks: list[Hook] | None = None) -> Trainer:
    """A trainer at iteration 0; ends the layout that was there before."""
    from lopd_megatron.parallel import topology as grid
    from lopd_megatron.train.setup import build_trainer

    grid.destroy()
    return build_trainer(config, hooks=hooks or [])


def advance(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """Train some steps without hooks: (loss, gradient norm) of each."""
    from lopd_megatron.train.step import train_step

    seen = []
    for _ in range(steps):
        result = train_step(trainer, trainer.batches.step(trainer.consumed_train_samples))
        trainer.iteration += 1
        trainer.consumed_train_samples += trainer.config.train.global_batch_size
        loss = result.metric_sums["loss"]
        seen.append((float(loss[0] / loss[1]), result.grad_norm))
    return seen


def state_hash(trainer: Trainer) -> str:
    """Of everything this rank would need to go on: weights, optimizer, schedule, random state, counters."""
    from lopd_megatron.train import checkpoint_state

    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    checkpoint_state.parameters_are_current(trainer)
    for chunk in trainer.model:
        add(dict(chunk.named_parameters()))
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                add(parameter)
                add(part.optimizer.state[parameter])
    add([trainer.scheduler.num_steps, trainer.iteration, trainer.consumed_train_samples])
    add(torch.get_rng_state())
    return digest.hexdigest()
