"""Runs the cells of a study one after another on a workbench and measures them alike."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopd_megatron import estimates
from lopd_megatron.config import RunConfig
from lopd_megatron.effopd.hook import EffOPDHook
from lopd_megatron.effopd.search import HeldOutScore
from lopd_megatron.effopd.trainer_scores import HeldOutForward
from lopd_megatron.evaluation.evaluate import read_problems
from lopd_megatron.files import write_json
from lopd_megatron.online.batches import Prompt
from lopd_megatron.rollouts.templates import Template, load_tokenizer
from lopd_megatron.study.cells import Cell, Data, Part
from lopd_megatron.study.workbench import Curve, Problem, Workbench, train
from lopd_megatron.train.metrics import read_metrics
from lopd_megatron.train.state import Hook, Trainer

CURVE_ITERATIONS = (5, 10, 25, 50, 100, 150)
CURVE_PROBLEMS = 128
EFFOPD_PROBLEMS = 50
"""As in the paper (arXiv 2605.11739, 4.1): one answer each at temperature 1."""


class StudyRunner:
    """Runs cells of one seed on one workbench. `held_out` is made when a score of EffOPD asks for it."""

    def __init__(
        self, root: Path, seed: int, config: RunConfig, held_out: Data, valid: str, test: str
    ) -> None:
        """`config` says how all cells read, sample and grade problems; `valid` and `test` are their files."""
        self.bench = Workbench(config.evaluation.engine, config.evaluation.max_response_tokens)
        self.config = config
        self.root = root
        self.seed = seed
        self.held_out = held_out
        self._files = {"valid": valid, "test": test}
        self._problems: dict[str, list[Problem]] = {}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure; what result.json holds."""
        config = cell.parts[-1].config
        result: dict[str, Any] = {
            "cell": cell.name,
            "group": cell.group,
            "seed": self.seed,
            "seconds": {},
            "curve": [],
            "effopd": [],
            "load": os.getloadavg()[0],
        }
        done = 0
        for part in cell.parts:
            self._run_part(part, result, done)
            done += part.config.train.train_iters
        folder = str(config.paths.hf)
        grader = config.evaluation.grader
        result["test"] = self.bench.measure(folder, cell.teacher, self._split("test"), grader=grader)
        result["config"] = config.model_dump(mode="json")
        return result

    def _run_part(self, part: Part, result: dict[str, Any], done: int) -> None:
        """One run; adds to the seconds and the curve of `result`, whose iterations go on from `done`."""
        config, seconds = part.config.model_copy(deep=True), result["seconds"]
        if part.data is not None:
            config.data.prefixes = [str(self._prefix(part.data))]
            for stage, spent in self._dataset(part.data, config.rollouts.seed).items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
        problems = self._split("valid")[:CURVE_PROBLEMS]

        def measure(folder: str) -> dict[str, float]:
            correct, _, _ = self.bench.accuracy(
                folder, problems, grader=config.evaluation.grader, temperature=0.0
            )
            return estimates.mean(correct)._asdict()

        wanted = [i - done for i in CURVE_ITERATIONS if i > done]
        curve = Curve(wanted, measure, spent=sum(seconds.values()))
        online = None if part.data else self.bench.online(config, self._prompts(part.prompts))
        effopd = self._effopd(config)
        # The curve sees what EffOPD accepted, and its clock runs while online rollouts and transfers do.
        hooks: list[Hook] = [*effopd, curve, *([online] if online else [])]
        train(config, hooks=hooks, batches=online)
        result["curve"] += [{**point, "iteration": point["iteration"] + done} for point in curve.points]
        inside = online.seconds if online else {}
        for stage, spent in {**inside, "train": curve.total - sum(inside.values())}.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
        for hook in effopd:
            result["effopd"] += hook.extrapolation.history
        result["metrics"] = read_metrics(config.paths.metrics)

    def _effopd(self, config: RunConfig) -> list[Any]:
        if not config.effopd.enabled:
            return []
        if config.effopd.score == "accuracy":
            return [EffOPDHook(config.effopd, SampledAccuracy(self.bench, self._split("valid")))]
        self._dataset(self.held_out, config.rollouts.seed)
        config.data.valid_prefixes = [str(self._prefix(self.held_out))]
        return [EffOPDHook(config.effopd, HeldOutForward(config))]

    def _dataset(self, data: Data, seed: int) -> dict[str, float]:
        """Make the dataset unless it is there; the seconds it once took."""
        cost = Path(f"{self._prefix(data)}.seconds.json")
        if not cost.exists():
            prompts = self._prompts(data.prompts)[: data.max_prompts]
            spent = self.bench.write_dataset(
                self._prefix(data),
                data.generator,
                data.teacher,
                prompts,
                seed=seed,
                samples=data.samples,
                topk=data.topk,
            )
            write_json(cost, spent)
        return json.loads(cost.read_text())

    def _prefix(self, data: Data) -> Path:
        return self.root / "data" / data.name

    def _split(self, name: str) -> list[Problem]:
        if name not in self._problems:
            self._problems[name] = self._read(self._files[name])
        return self._problems[name]

    def _prompts(self, file: str) -> list[Prompt]:
        return [problem.prompt for problem in self._read(file)]

    def _read(self, file: str) -> list[Problem]:
        config = self.config
        tokenizer = load_tokenizer(config.model.student)
        template = Template(tokenizer, config.prompts.apply_chat_template, config.prompts.enable_thinking)
        section = config.evaluation.model_copy(update={"input": [file]})
        rows = read_problems(section, template)
        return [Problem(Prompt(row["prompt_id"], row["prompt_tokens"]), row["answer"]) for row in rows]


class SampledAccuracy:
    """EffOPD's score of the paper: one sampled answer to each of 50 validation problems."""

    def __init__(self, bench: Workbench, problems: Sequence[Problem]) -> None:
        self._bench = bench
        self._problems = problems[:EFFOPD_PROBLEMS]

    def __call__(self, trainer: Trainer) -> HeldOutScore:
        config = trainer.config
        folder = config.paths.run_dir / "candidate"
        trainer.export(folder)
        correct, _, _ = self._bench.accuracy(
            str(folder),
            self._problems,
            grader=config.evaluation.grader,
            temperature=1.0,
            seed=trainer.iteration,  # the same draws for all candidates of a search
        )
        return HeldOutScore(*estimates.mean(correct), len(correct))
