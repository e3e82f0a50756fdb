"""Standard OPD: rollouts of the current student, scored by a live teacher, made anew for every step.

    step n:   prompts(n) → student server (weights of step n) → teacher server → broadcast → packed batch
    after n:  weights → Hugging Face folder → student server, in place → log-probs of both engines compared

With `online.overlap_steps=1` the rollouts of step n + 1 are made while step n trains, by weights one update
older. The loop, the loss and the packing are those of Lightning OPD; only the source of the batches differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.data.documents import Document, document_of
from lopd_megatron.data.in_memory import memory_dataset
from lopd_megatron.data.loader import StepBatch
from lopd_megatron.data.order import Order
from lopd_megatron.errors import UserError
from lopd_megatron.inference.requests import (
    Generation,
    GenerationRequest,
    Sampling,
    ScoreRequest,
    TokenScores,
    document_seed,
)
from lopd_megatron.progress import log_line
from lopd_megatron.train.first_logprobs import own_logprobs
from lopd_megatron.train.setup import build_loader
from lopd_megatron.train.state import Hook, StepResult, Trainer


class Scorer(Protocol):
    def score(self, requests: Iterable[ScoreRequest], *, topk: int) -> list[TokenScores]: ...


class Sampler(Scorer, Protocol):
    """The current student. `generate` answers in the order of the requests."""

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> list[Generation]: ...

    def reload(self, folder: str, version: str) -> None: ...


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    tokens: list[int]


@dataclass(frozen=True)
class Engines:
    """What rank 0 talks to; the other ranks have none."""

    student: Sampler
    teacher: Scorer
    sampling: Sampling


class OnlineRollouts(Hook):
    """The `BatchSource` of standard OPD, and the hook that keeps the student server up to date.

    Everything follows from (seed, consumed samples, weights): there is no state to checkpoint, and a run
    resumed without overlap makes the same rollouts. Put it behind hooks that change the weights. Traffic per
    step: one broadcast of the documents, one gather of the weights to rank 0, one forward pass of
    `online.sync_documents`.
    """

    may_take_long = True  # a server has its own patience

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        engines: Engines | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._clock = clock
        self.prompts = prompts
        self.engines = engines
        self.seconds = {"generate": 0.0, "scores": 0.0, "sync": 0.0}
        """Of `clock`, spent on rank 0 in each part; with overlap the first two run beside the training."""
        self._group: dist.ProcessGroup | None = None
        self._order = Order(len(prompts), config.train.seed)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._ahead: tuple[int, Future[list[Document]]] | None = None
        self._probe: list[Generation] = []

    def on_start(self, trainer: Trainer) -> None:
        # NCCL gives up after minutes, and rank 0 may wait for a server much longer.
        patience = timedelta(seconds=self.config.online.server_patience_s + 600)
        self._group = dist.new_group(backend="gloo", timeout=patience)
        self._trainer = trainer
        self._sync(trainer)

    def step(self, consumed: int) -> StepBatch:
        """The rollouts of the step that follows `consumed` sequences, packed. Collective over the world."""
        documents = self._from_rank_0(lambda: self._documents(consumed))
        return pack(self.config, self._trainer, documents)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.is_done:
            return
        if self._ahead is not None:  # never change weights under a rollout that is being made
            wait([self._ahead[1]])
        self._sync(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self.engines is not None:
            spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
            log_line(f"online: {spent}")

    def _documents(self, consumed: int) -> list[Document]:
        """On rank 0: the rollouts of a step, made ahead if overlap made them; starts those of the next."""
        if self._ahead is not None and self._ahead[0] == consumed:
            documents = self._ahead[1].result()
        else:
            documents = self._make(consumed)
        self._ahead = None
        following = consumed + self.config.train.global_batch_size
        last = self.config.train.train_iters * self.config.train.global_batch_size
        if self.config.online.overlap_steps and following < last:
            self._ahead = (following, self._worker.submit(self._make, following))
        return documents

    def _make(self, consumed: int) -> list[Document]:
        """Sample and score. Seeds name prompt, sample and step: a lost request is repeated exactly."""
        assert self.engines is not None
        requests = self._requests(consumed)
        start = self._clock()
        rollouts = self.engines.student.generate(requests, self.engines.sampling)
        sampled = self._clock()
        scores = score(self.engines.teacher, requests, rollouts, self.config.loss.topk)
        self.seconds["generate"] += sampled - start
        self.seconds["scores"] += self._clock() - sampled
        return documents_of(requests, rollouts, scores)

    def _requests(self, consumed: int) -> list[GenerationRequest]:
        rollouts, count = self.config.rollouts, self.config.train.global_batch_size
        samples = rollouts.num_samples_per_prompt
        first, last = consumed // samples, -(-(consumed + count) // samples)
        chosen = self._order.take(first, last - first)
        requests = []
        for place in range(consumed, consumed + count):
            prompt = self.prompts[chosen[place // samples - first]]
            name = f"{prompt.prompt_id}/{place % samples}/{place}"
            seed = document_seed(rollouts.seed, name)
            requests.append(GenerationRequest((0, place), prompt.tokens, seed, name))
        return requests

    def _sync(self, trainer: Trainer) -> None:
        """Bring the weights to the student server and prove it: both engines must score tokens alike."""
        start = self._clock()
        folder = self.config.paths.online_weights
        trainer.export(folder)
        version = f"iteration {trainer.iteration}"
        probe = self._from_rank_0(lambda: self._scored_probe(str(folder.resolve()), version))
        difference = self._difference(trainer, probe)
        self.seconds["sync"] += self._clock() - start
        tolerance = self.config.online.sync_tolerance
        if trainer.topology.rank == 0:
            self._note(trainer.iteration, difference)
        if not difference <= tolerance:
            raise UserError(
                f"iteration {trainer.iteration}: after the weights were sent, vLLM and Megatron differ by "
                f"{difference:.2e} nats (root mean square; online.sync_tolerance={tolerance}); the server "
                "has other weights or another dtype than the trainer"
            )

    def _scored_probe(self, folder: str, version: str) -> list[Document]:
        """On rank 0: reload, then the same few documents with the log-probs of the server's student."""
        assert self.engines is not None
        student = self.engines.student
        student.reload(folder, version)
        requests = [
            GenerationRequest((0, place), prompt.tokens, document_seed(0, prompt.prompt_id), prompt.prompt_id)
            for place, prompt in enumerate(self.prompts[: self.config.online.sync_documents])
        ]
        self._probe = self._probe or student.generate(requests, self.engines.sampling)
        return documents_of(requests, self._probe, score(student, requests, self._probe, topk=0))

    def _difference(self, trainer: Trainer, probe: list[Document]) -> float:
        """Root mean square of log π_vLLM − log π_Megatron over the responses, in nats."""
        texts, stored = [], []
        for document in probe:
            prompt = int((document.loss_mask == 0).sum())
            texts.append((document.tokens[:prompt].tolist(), document.tokens[prompt:].tolist()))
            assert document.teacher_logprobs is not None  # of the server's student
            stored.append(document.teacher_logprobs[prompt:])
        difference = np.concatenate(stored) - np.concatenate(own_logprobs(trainer, texts))
        return float(np.sqrt(np.square(difference).mean()))

    def _note(self, iteration: int, difference: float) -> None:
        line = {"iteration": iteration, "sync_rms_nats": difference, "seconds": self.seconds}
        with self.config.paths.online_log.open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _from_rank_0(self, make: Callable[[], list[Document]]) -> list[Document]:
        """What `make` returns on rank 0, on all ranks; its UserError is raised on all of them."""
        box: list[Any] = [None, None]
        if self.engines is not None:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]


def pack(config: RunConfig, trainer: Trainer, documents: list[Document]) -> StepBatch:
    """One step of these documents, in their order, with the columns that the loss of `config` reads."""
    loader = build_loader(config, trainer.spec, trainer.topology, memory_dataset(documents))
    return loader.pack(np.arange(len(documents)))


def score(
    scorer: Scorer, requests: Sequence[GenerationRequest], rollouts: Sequence[Generation], topk: int
) -> list[TokenScores]:
    """Scores of rollouts, in their order."""
    return scorer.score(
        [
            ScoreRequest(
                request.key, [*request.prompt_tokens, *rollout.response_tokens], len(request.prompt_tokens)
            )
            for request, rollout in zip(requests, rollouts, strict=True)
        ],
        topk=topk,
    )


def documents_of(
    requests: Sequence[GenerationRequest], rollouts: Sequence[Generation], scores: Sequence[TokenScores]
) -> list[Document]:
    """Scored rollouts as the columns of a dataset, token-aligned."""
    return [
        _document(request, rollout, scored)
        for request, rollout, scored in zip(requests, rollouts, scores, strict=True)
    ]


def _document(request: GenerationRequest, rollout: Generation, scored: TokenScores) -> Document:
    columns = {"teacher_logprobs": scored.logprobs, "rollout_logprobs": rollout.logprobs}
    if scored.topk_ids.shape[1]:
        columns |= {"teacher_topk_ids": scored.topk_ids, "teacher_topk_logprobs": scored.topk_logprobs}
    return document_of(request.document_id, request.prompt_tokens, rollout.response_tokens, **columns)
