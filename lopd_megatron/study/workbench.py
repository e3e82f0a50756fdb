"""A whole study in one process: engines, trainer and data side by side, at world size 1.

On a small task starting processes costs more than the work they do. The parts are those of the pipeline
(vLLM, datasets on disk, Megatron-Core, the loop and its hooks); only the programs around them are missing.
Seconds are CPU seconds of the process, which has one thread: other work on the machine does not add to them.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron import estimates
from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.manifest import manifest_path
from lopd_megatron.errors import UserError
from lopd_megatron.evaluation.grading import GRADERS
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.requests import (
    Failure,
    Generation,
    GenerationRequest,
    Sampling,
    ScoreRequest,
    TokenScores,
    document_seed,
)
from lopd_megatron.online.batches import Engines, OnlineRollouts, Prompt, documents_of, score
from lopd_megatron.rollouts.rollout_stage import stop_token_ids
from lopd_megatron.rollouts.templates import load_tokenizer
from lopd_megatron.train.state import BatchSource, Hook, StepResult, Trainer

MAX_TOPK = 32

Stamp = tuple[str, tuple[tuple[str, int], ...]]
"""A folder and the modification times of its weights: the same name gets new weights all the time."""


@dataclass(frozen=True)
class Problem:
    """A prompt whose answer is known."""

    prompt: Prompt
    answer: str


class LocalModel:
    """One model of the workbench with the interface of a server.

    A call has the bench to itself: rollouts made ahead in another thread share the engine with whatever
    measures meanwhile, and each of the two wants its own weights in it.
    """

    def __init__(self, bench: Workbench, folder: str) -> None:
        self.bench = bench
        self.folder = folder

    def reload(self, folder: str, version: str) -> None:
        self.folder = folder
        with self.bench.lock:
            self.bench.engine(folder)

    def generate(self, requests: Iterable[GenerationRequest], sampling: Sampling) -> list[Generation]:
        with self.bench.lock:
            return _in_order(self.bench.engine(self.folder).generate(requests, sampling))

    def score(self, requests: Iterable[ScoreRequest], *, topk: int) -> list[TokenScores]:
        with self.bench.lock:
            return _in_order(self.bench.engine(self.folder).score(requests, topk=topk, path="flat"))


class Workbench:
    """Engines by architecture: models of one shape share an engine and swap their weights in place."""

    def __init__(self, config: EngineConfig, max_response_tokens: int) -> None:
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._engines: list[tuple[VllmEngine, Stamp]] = []
        self.lock = threading.Lock()
        """Held by a call from the choice of an engine to its last answer."""

    def engine(self, folder: str) -> VllmEngine:
        """An engine with the weights that are in `folder` now."""
        stamp = _stamp(folder)
        for place, (engine, loaded) in enumerate(self._engines):
            if loaded == stamp:
                return engine
            if engine.reload(folder):
                self._engines[place] = (engine, stamp)
                return engine
        engine = VllmEngine(folder, self._config, task="generate", max_topk=MAX_TOPK)
        self._engines.append((engine, stamp))
        # An engine is a million Python objects that stay; every collection would look at all of them.
        gc.collect()
        gc.freeze()
        return engine

    def sampling(self, folder: str, temperature: float) -> Sampling:
        return Sampling(temperature, 1.0, self._max_response_tokens, stop_token_ids(folder))

    def rollouts(
        self, folder: str, prompts: Sequence[Prompt], *, seed: int, samples: int = 1, temperature: float = 1.0
    ) -> tuple[list[GenerationRequest], list[Generation]]:
        """`samples` responses to every prompt, and the requests they answer."""
        requests = [
            GenerationRequest(
                (0, place * samples + sample),
                prompt.tokens,
                document_seed(seed, f"{prompt.prompt_id}/{sample}"),
                f"{prompt.prompt_id}/{sample}",
            )
            for place, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        return requests, LocalModel(self, folder).generate(requests, self.sampling(folder, temperature))

    def write_dataset(
        self,
        prefix: Path,
        generator: str,
        teacher: str | None,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        samples: int = 1,
        topk: int = 0,
    ) -> dict[str, float]:
        """Rollouts of `generator`, scored by `teacher` (None: for SFT), as a dataset; seconds by stage.

        A dataset that is there is kept, and then nothing was spent.
        """
        if manifest_path(prefix).exists():
            return {}
        for model in (teacher or generator, generator):  # starting an engine is not what a rollout costs
            self.engine(model)
        start = time.process_time()
        requests, rollouts = self.rollouts(generator, prompts, seed=seed, samples=samples)
        sampled = time.process_time()
        if teacher is None:
            scores = [TokenScores(r.key, r.logprobs, *_no_topk(len(r.logprobs))) for r in rollouts]
        else:
            scores = score(LocalModel(self, teacher), requests, rollouts, topk)
        scored = time.process_time()
        documents = documents_of(requests, rollouts, scores)
        if teacher is None:
            documents = [dataclasses.replace(d, teacher_logprobs=None) for d in documents]
        write_dataset(prefix, documents)
        return {
            "rollouts": sampled - start,
            "scores": scored - sampled,
            "dataset": time.process_time() - scored,
        }

    def online(self, config: RunConfig, prompts: Sequence[Prompt]) -> OnlineRollouts:
        """The batches of standard OPD from this bench's engines."""
        for model in (config.model.teacher, config.model.student):
            self.engine(model)
        student, teacher = LocalModel(self, config.model.student), LocalModel(self, config.model.teacher)
        return OnlineRollouts(
            config,
            prompts,
            Engines(student, teacher, self.sampling(config.model.student, 1.0)),
            clock=time.thread_time,  # with overlap the training goes on in another thread
        )

    def accuracy(
        self, folder: str, problems: Sequence[Problem], *, grader: str, temperature: float, seed: int = 0
    ) -> tuple[list[bool], list[GenerationRequest], list[Generation]]:
        """Which problems are solved by one response each, and the responses."""
        prompts = [problem.prompt for problem in problems]
        requests, rollouts = self.rollouts(folder, prompts, seed=seed, temperature=temperature)
        tokenizer = load_tokenizer(folder)
        grade = GRADERS[grader]
        correct = [
            grade(
                tokenizer.decode(r.response_tokens, skip_special_tokens=True), r.finish_reason, problem.answer
            )[1]
            for problem, r in zip(problems, rollouts, strict=True)
        ]
        return correct, requests, rollouts

    def measure(
        self, folder: str, teacher: str, problems: Sequence[Problem], *, grader: str
    ) -> dict[str, dict[str, float]]:
        """Greedy and T = 1 accuracy, and reverse KL to `teacher` in nats per token on the T = 1 responses."""
        greedy, _, _ = self.accuracy(folder, problems, grader=grader, temperature=0.0)
        sampled, requests, rollouts = self.accuracy(folder, problems, grader=grader, temperature=1.0)
        scores = score(LocalModel(self, teacher), requests, rollouts, 0)
        gaps = [(r.logprobs - s.logprobs).astype(np.float64) for r, s in zip(rollouts, scores, strict=True)]
        return {
            "greedy": estimates.mean(greedy)._asdict(),
            "sampled": estimates.mean(sampled)._asdict(),
            "reverse_kl": estimates.ratio([gap.sum() for gap in gaps], [len(gap) for gap in gaps])._asdict(),
        }


def train(config: RunConfig, *, hooks: Sequence[Hook] = (), batches: BatchSource | None = None) -> Path:
    """Train without checkpoints, in this process, and export. Returns the folder of the trained weights."""
    from lopd_megatron.parallel import prepare_megatron
    from lopd_megatron.parallel import topology as grid
    from lopd_megatron.train.log import LogHook
    from lopd_megatron.train.loop import train as run_loop
    from lopd_megatron.train.setup import build_trainer

    prepare_megatron()
    grid.destroy()
    config.paths.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, hooks=[*hooks, LogHook(config)], batches=batches)
    run_loop(trainer)
    trainer.export(config.paths.hf)
    return config.paths.hf


class Curve(Hook):
    """What `measure` says of the exported weights after some iterations, with the CPU seconds spent before.

    `spent` are the seconds before training began. All threads of the process count, but for what measuring
    takes in this one.
    """

    def __init__(
        self, iterations: Iterable[int], measure: Callable[[str], dict[str, float]], *, spent: float = 0.0
    ) -> None:
        self.points: list[dict[str, float]] = []
        self._iterations = set(iterations)
        self._measure = measure
        self._spent = spent
        self._measuring = 0.0
        self.total = 0.0
        """Seconds of training, measuring not counted."""

    def on_start(self, trainer: Trainer) -> None:
        self._start = time.process_time()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.total = time.process_time() - self._start - self._measuring
        if trainer.iteration in self._iterations:
            start = time.thread_time()
            folder = trainer.config.paths.run_dir / "curve"
            trainer.export(folder)
            spent = self._spent + self.total
            self.points.append(
                {"iteration": trainer.iteration, "seconds": spent, **self._measure(str(folder))}
            )
            self._measuring += time.thread_time() - start


def _stamp(folder: str) -> Stamp:
    files = sorted(Path(folder).glob("*.safetensors"))
    return folder, tuple((file.name, file.stat().st_mtime_ns) for file in files)


def _in_order(answers: Iterable[Any]) -> list[Any]:
    found = sorted(answers, key=lambda answer: answer.key)
    for answer in found:
        if isinstance(answer, Failure):
            raise UserError(f"document {answer.key[1]}: {answer.error}")
    return found


def _no_topk(length: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty((length, 0), np.int32), np.empty((length, 0), np.float32)
