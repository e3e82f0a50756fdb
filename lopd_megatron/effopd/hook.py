"""EffOPD in a training loop: after iterations 1, 2, 4, 8, … try longer steps the same way.

Lightning and standard OPD alike: it sees weights and a score, not where the rollouts came from.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lopd_megatron.config import EffOPDConfig
from lopd_megatron.effopd.checkpoint import accepted_state_dict, restore_accepted
from lopd_megatron.effopd.scores import agree, from_first_rank
from lopd_megatron.effopd.search import Score, SearchResult, is_trigger, search
from lopd_megatron.effopd.weights import WeightLine
from lopd_megatron.progress import say

Report = dict[str, torch.Tensor]


class HasIteration(Protocol):
    """A training run: how many iterations it has completed."""

    iteration: int


class HasReport(Protocol):
    """The outcome of an optimizer step: name → float64 [2], numerator and denominator."""

    report: Report


class EffOPDHook:
    """Searches after every trigger and leaves the accepted weights in the model (arXiv 2605.11739, 4.1).

    Δ is measured from the last accepted weights, the initial ones at first, as in the released code; Adam's
    moments stay as they are unless `config.reset_moments`. One search costs at most `max_k + 1` scores, and
    per candidate one elementwise pass over the shards and one `publish`.

    The callables come from whoever wires the run, because stages do not import each other:
    `score()` measures the weights in the model, on all ranks together; the value of the first rank of `group`
    decides, others may return None. `publish()` brings written main parameters into the model
    (`optimizer_shards.publish`). `reset_moments()` lets the optimizer start anew. A run calls `after_step`
    before it saves the checkpoint of the same iteration. The methods are those of the training loop's hooks.
    """

    name = "effopd"

    def __init__(
        self,
        config: EffOPDConfig,
        line: WeightLine,
        *,
        score: Callable[[], Score | None],
        publish: Callable[[], None],
        reset_moments: Callable[[], None],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.config = config
        self.line = line
        self.history: list[dict[str, Any]] = []
        self._score = score
        self._publish = publish
        self._reset_moments = reset_moments
        self._group = group
        self._placed = 0

    def on_start(self, trainer: HasIteration) -> None:
        """Nothing: the accepted weights are those the line was made with, or those of the checkpoint."""

    def after_step(self, trainer: HasIteration, result: HasReport) -> None:
        """Search if the completed iteration is a trigger; what was taken joins the report of the step.

        Collective; all ranks take the same.
        """
        if not is_trigger(trainer.iteration, self.config.first_trigger):
            return
        started = time.monotonic()
        self.line.begin()
        self._placed = 0
        found = search(self._score_at, max_k=self.config.max_k, acceptance=self.config.acceptance)
        self._place(found.multiplier)
        self.line.accept()
        if found.multiplier and self.config.reset_moments:
            self._reset_moments()
        (seconds,) = from_first_rank([time.monotonic() - started], self._group)
        self._record(trainer.iteration, found, seconds, result.report)

    def on_end(self, trainer: HasIteration) -> None:
        """Nothing: the accepted weights are in the model."""

    def state_dict(self, model_state: Any, *, is_loading: bool) -> dict[str, Any]:
        """What was tried, and the accepted weights; `checkpoint.accepted_state_dict` has the costs."""
        accepted = accepted_state_dict(self.line, model_state, is_loading=is_loading)
        return {"history": self.history, "accepted": accepted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of the run that is resumed, under any layout."""
        self.history = list(state["history"])
        restore_accepted(self.line, state["accepted"])

    def _record(self, iteration: int, found: SearchResult, seconds: float, report: Report) -> None:
        self.history.append(
            {
                "iteration": iteration,
                "multiplier": found.multiplier,
                "trials": [dataclasses.asdict(trial) for trial in found.trials],
                "seconds": seconds,
            }
        )
        numbers = {"multiplier": found.multiplier, "score": found.score.value, "seconds": seconds}
        for name, number in numbers.items():
            report[f"effopd_{name}"] = torch.tensor([number, 1.0], dtype=torch.float64)
        if self._group is None or dist.get_rank(self._group) == 0:
            say(describe(iteration, found))

    def _score_at(self, multiplier: int) -> Score:
        self._place(multiplier)
        return agree(self._score(), self._group)

    def _place(self, multiplier: int) -> None:
        if multiplier != self._placed:
            self.line.move(multiplier)
            self._publish()
            self._placed = multiplier


def describe(iteration: int, result: SearchResult) -> str:
    """One line for a log: every multiplier with its score, and the one taken."""
    tried = ", ".join(
        f"{t.multiplier}: {t.score.value:.4g} ± {t.score.standard_error:.2g}" for t in result.trials
    )
    return f"EffOPD after iteration {iteration}: took multiplier {result.multiplier} of {{{tried}}}"
