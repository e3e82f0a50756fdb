"""EffOPD wired into a training run: what measures the candidates, in terms of the trainer and of vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.data.loader import StepBatch
from lopd_megatron.data.store import open_dataset
from lopd_megatron.effopd.hook import EffOPDHook
from lopd_megatron.effopd.search import HeldOutScore
from lopd_megatron.estimates import ratio
from lopd_megatron.train.held_out import DocumentSums, HeldOutMetric
from lopd_megatron.train.setup import build_loader
from lopd_megatron.train.state import Hook, Trainer
from lopd_megatron.train.validate import held_out_pass

EVALUATION_HOURS = 12
"""How long ranks wait for an evaluation on rank 0."""


def effopd_hooks(config: RunConfig, arguments: Sequence[str]) -> list[Hook]:
    """The hook that `config.effopd` asks for, if any. It goes before hooks that publish or save the weights.

    `arguments`: recipe and overrides of this run's command line, for the evaluation it may start.
    """
    if not config.effopd.enabled:
        return []
    score = AccuracyScore(config, arguments) if config.effopd.score == "accuracy" else HeldOutForward(config)
    return [EffOPDHook(config.effopd, score)]


class HeldOutForward:
    """Score by one forward pass over the first `train.eval_documents` of `data.valid_prefixes`.

    `topk_kl` is minus KL(π_θ ‖ π_T) over the token classes. `squared_log_ratio` is minus
    ½ (log π_θ − log π_T)² of the sampled token, the loss of Lightning OPD without its clip; it may improve
    while accuracy falls.
    """

    def __init__(self, config: RunConfig) -> None:
        self._dataset = open_dataset(config.data.valid_prefixes)
        by_classes = config.effopd.score == "topk_kl"
        self._metric: HeldOutMetric = "reverse_kl" if by_classes else "k2"
        self._config = config.model_copy(deep=True)
        # Decides which columns are read.
        self._config.loss.objective = "topk_reverse_kl" if by_classes else "lightning_opd"
        self._config.loss.topk = config.loss.topk or self._dataset.topk
        self._config.train.global_batch_size = min(config.train.eval_documents, len(self._dataset))
        self._batch: StepBatch | None = None

    def __call__(self, trainer: Trainer) -> HeldOutScore:
        """The same documents at every call, kept in host memory. Collective over the world."""
        if self._batch is None:
            loader = build_loader(self._config, trainer.spec, trainer.topology, self._dataset)
            self._batch = loader.step(0)
        by_document = DocumentSums(self._metric, len(self._dataset), trainer.topology.device)
        held_out_pass(trainer, self._config, self._batch, by_document)
        topology = trainer.topology
        sums, tokens, _ = by_document.pooled([topology.dp_cp_group, topology.pp_group])
        found = ratio(sums, tokens)
        return HeldOutScore(-found.value, found.standard_error, len(sums))


class AccuracyScore:
    """Score by `lopd evaluate` on rank 0: a process of its own, because vLLM has its own process groups.

    On GPUs it shares memory with the training process: `evaluation.engine.gpu_memory_utilization` has to fit
    in what training leaves.
    """

    def __init__(self, config: RunConfig, arguments: Sequence[str]) -> None:
        self._config = config
        self._arguments = list(arguments)
        self._group: dist.ProcessGroup | None = None

    def __call__(self, trainer: Trainer) -> HeldOutScore | None:
        """Export, evaluate, read the accuracy; None on other ranks. Collective over the world."""
        if self._group is None:  # NCCL gives up after minutes
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=EVALUATION_HOURS))
        folder = Path(self._config.run_dir) / "effopd" / "candidate"
        trainer.export(folder)
        score = self._evaluate(folder) if trainer.topology.rank == 0 else None
        dist.barrier(self._group)
        return score

    def _evaluate(self, folder: Path) -> HeldOutScore:
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
        return HeldOutScore(found["accuracy"], found["standard_error"], found["num_problems"])


def _outside_of_torchrun() -> dict[str, str]:
    """The environment without what would make vLLM join this run's process group."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
    dropped = {*names, "MASTER_ADDR", "MASTER_PORT"}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and not name.startswith("TORCHELASTIC_")
    }
