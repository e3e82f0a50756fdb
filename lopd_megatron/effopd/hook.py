"""EffOPD as a hook of the training loop: after iterations 1, 2, 4, 8, … try longer steps the same way.

Lightning and standard OPD alike: it sees weights and a score, not where the rollouts came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lopd_megatron.config import EffOPDConfig
from lopd_megatron.effopd.checkpoint import accepted_state_dict, restore_accepted
from lopd_megatron.effopd.extrapolation import Extrapolation
from lopd_megatron.effopd.optimizer_shards import collect_shards, publish, reset_moments
from lopd_megatron.effopd.search import Score, SearchResult
from lopd_megatron.effopd.weights import WeightLine
from lopd_megatron.errors import UserError
from lopd_megatron.progress import say


class Run(Protocol):
    """What the hook needs of a training run."""

    model: list[Any]
    optimizer: Any
    iteration: int


class Step(Protocol):
    """The outcome of an optimizer step; `metric_sums` is name → float64 [2], numerator and denominator."""

    metric_sums: dict[str, torch.Tensor]


class EffOPDHook:
    """Has the methods of a training hook; stages do not import each other.

    `score(run)` measures the weights in the model: see `Extrapolation`. The hook goes before those that log
    and save, so that a checkpoint holds the accepted weights and what the next Δ is measured from.
    """

    name = "effopd"

    def __init__(self, config: EffOPDConfig, score: Callable[[Any], Score | None]) -> None:
        self._config = config
        self._score = score
        self._is_restored = False

    def on_build(self, run: Run) -> None:
        """With the initial weights in the model: they are the first accepted ones."""
        shards = collect_shards(run.model, run.optimizer, self._config.parameters)
        self.extrapolation = Extrapolation(
            self._config,
            WeightLine(shards),
            score=lambda: self._score(run),
            publish=lambda: publish(run.model, run.optimizer),
            reset_moments=lambda: reset_moments(run.optimizer),
        )

    def on_start(self, run: Run) -> None:
        """Refuse to go on from a checkpoint without accepted weights: the next Δ would be wrong."""
        if run.iteration and not self._is_restored:
            raise UserError(
                f"the checkpoint of iteration {run.iteration} was written without EffOPD, so it does not say "
                "where the next Δ starts; resume with effopd.enabled=false, or start anew from its export"
            )

    def after_step(self, run: Run, result: Step) -> None:
        """Search if the completed iteration is a trigger; what was taken joins the metrics of the step."""
        found = self.extrapolation.after_iteration(run.iteration)
        if found is None:
            return
        numbers = {
            "multiplier": found.multiplier,
            "score": found.score.value,
            "seconds": self.extrapolation.history[-1]["seconds"],
        }
        for name, number in numbers.items():
            result.metric_sums[f"effopd_{name}"] = torch.tensor([number, 1.0], dtype=torch.float64)
        if dist.get_rank() == 0:
            say(describe(run.iteration, found))

    def on_end(self, run: Run) -> None:
        """Nothing: the accepted weights are in the model."""

    def state_dict(self, model_state: Any, *, is_loading: bool) -> dict[str, Any]:
        """What was tried, and the accepted weights; `accepted_state_dict` has the costs."""
        accepted = accepted_state_dict(self.extrapolation.line, model_state, is_loading=is_loading)
        return {"accepted": accepted} | ({} if is_loading else {"history": self.extrapolation.history})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of the run that is resumed, under any layout."""
        restore_accepted(self.extrapolation.line, state["accepted"])
        self.extrapolation.history = list(state["history"])
        self._is_restored = True


def describe(iteration: int, result: SearchResult) -> str:
    """One line for a log: every multiplier with its score, and the one taken."""
    tried = ", ".join(
        f"{trial.multiplier}: {trial.score.value:.4g} ± {trial.score.standard_error:.2g}"
        for trial in result.trials
    )
    return f"EffOPD after iteration {iteration}: took multiplier {result.multiplier} of {{{tried}}}"
