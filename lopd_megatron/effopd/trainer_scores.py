"""EffOPD wired into a training run: what measures the candidates, in terms of the trainer and of vLLM."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.data.loader import StepBatch
from lopd_megatron.data.store import open_dataset
from lopd_megatron.effopd.held_out import HeldOutLoss
from lopd_megatron.effopd.hook import EffOPDHook
from lopd_megatron.effopd.scores import HeldOutSums
from lopd_megatron.effopd.search import Score
from lopd_megatron.model.weights import export_hf
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.train.setup import build_loader
from lopd_megatron.train.state import Hook, Trainer
from lopd_megatron.train.step import run_microbatches

EVALUATION_HOURS = 12
"""How long ranks wait for an evaluation on rank 0."""


def effopd_hooks(config: RunConfig, arguments: Sequence[str]) -> list[Hook]:
    """The hook that `config.effopd` asks for, if any. It goes before hooks that publish or save the weights.

    `arguments`: recipe and overrides of this run's command line, for the evaluation it may start.
    """
    if not config.effopd.enabled:
        return []
    score = AccuracyScore(config, arguments) if config.effopd.score == "accuracy" else HeldOutForward(config)
    return [cast(Hook, EffOPDHook(config.effopd, score))]  # a stage has no base class of another


class HeldOutForward:
    """Score by one forward pass over the first `train.eval_documents` of `data.valid_prefixes`."""

    def __init__(self, config: RunConfig) -> None:
        self._dataset = open_dataset(config.data.valid_prefixes)
        self._topk = config.effopd.score == "topk_kl"
        self._config = config.model_copy(deep=True)
        # Decides which columns are read.
        self._config.loss.objective = "topk_reverse_kl" if self._topk else "lightning_opd"
        self._config.loss.topk = config.loss.topk or self._dataset.topk
        self._config.train.global_batch_size = min(config.train.eval_documents, len(self._dataset))
        self._batch: StepBatch | None = None

    def __call__(self, trainer: Trainer) -> Score:
        """The same documents at every call, kept in host memory. Collective over the world."""
        topology, spec, config = trainer.topology, trainer.spec, self._config
        if self._batch is None:
            self._batch = build_loader(config, spec, topology, self._dataset).step(0)
        sums = HeldOutSums(len(self._dataset), topology.device)
        loss: Any = HeldOutLoss(
            "topk_kl" if self._topk else "squared_log_ratio",
            config.loss,
            sums,
            vocab=VocabRange.of(spec.vocab_size, spec.padded_vocab_size, topology.tp_group),
            sequence_parallel=config.parallel.sequence_parallel,
        )
        run_microbatches(dataclasses.replace(trainer, loss=loss), self._batch, forward_only=True)
        return sums.score([topology.dp_cp_group, topology.pp_group])


class AccuracyScore:
    """Score by `lopd evaluate` on rank 0: a process of its own, because vLLM has its own process groups.

    On GPUs it shares memory with the training process: `evaluation.engine.gpu_memory_utilization` has to fit
    in what training leaves.
    """

    def __init__(self, config: RunConfig, arguments: Sequence[str]) -> None:
        self._config = config
        self._arguments = list(arguments)
        self._group: dist.ProcessGroup | None = None

    def __call__(self, trainer: Trainer) -> Score | None:
        """Export, evaluate, read the accuracy; None on other ranks. Collective over the world."""
        if self._group is None:  # NCCL gives up after minutes
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=EVALUATION_HOURS))
        folder = Path(self._config.run_dir) / "effopd" / "candidate"
        chunks = [chunk.module for chunk in trainer.model]
        export_hf(chunks, trainer.spec, trainer.topology, folder, self._config.model.student, overwrite=True)
        score = self._evaluate(folder) if trainer.topology.rank == 0 else None
        dist.barrier(self._group)
        return score

    def _evaluate(self, folder: Path) -> Score:
        name = "effopd_candidate"
        results = self._config.paths.evaluation
        shutil.rmtree(results / name, ignore_errors=True)
        summary = results / f"{name}.json"
        summary.unlink(missing_ok=True)
        problems = f"evaluation.input={json.dumps(self._config.effopd.accuracy_problems)}"
        # What is validated on is not what is reported: `RunConfig.check` would refuse the two to be equal.
        settings = [problems, "effopd.enabled=false", "--model", str(folder), "--name", name]
        command = [sys.executable, "-m", "lopd_megatron", "evaluate", *self._arguments, *settings]
        subprocess.run(command, check=True, env=_outside_of_torchrun())
        found = json.loads(summary.read_text())
        return Score(found["accuracy"], found["standard_error"], found["num_problems"])


def _outside_of_torchrun() -> dict[str, str]:
    """The environment without what would make vLLM join this run's process group."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
    dropped = {*names, "MASTER_ADDR", "MASTER_PORT"}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith("TORCHELASTIC_")
    }
