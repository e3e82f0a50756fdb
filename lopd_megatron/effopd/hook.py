"""EffOPD as a hook of the training loop: after iterations 1, 2, 4, 8, … try longer steps the same way.

Lightning and standard OPD alike: it sees weights and a score, not where the rollouts came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lopd_megatron.config import EffOPDConfig
from lopd_megatron.effopd.checkpoint import accepted_state_dict, restore_accepted
from lopd_megatron.effopd.extrapolation import Extrapolation
from lopd_megatron.effopd.optimizer_shards import collect_shards, publish, reset_moments
from lopd_megatron.effopd.search import HeldOutScore, SearchResult
from lopd_megatron.effopd.weights import WeightLine
from lopd_megatron.errors import UserError
from lopd_megatron.progress import log_line
from lopd_megatron.train.state import Hook, StepResult, Trainer


class EffOPDHook(Hook):
    """The hook of a run with `effopd.enabled`.

    `score(trainer)` measures the weights in the model: see `Extrapolation`. The hook goes before those that
    log and save, so that a checkpoint holds the accepted weights and what the next Δ is measured from.
    """

    name = "effopd"
    may_take_long = True

    def __init__(self, config: EffOPDConfig, score: Callable[[Trainer], HeldOutScore | None]) -> None:
        self._config = config
        self._score = score
        self._is_restored = False

    def on_build(self, trainer: Trainer) -> None:
        """With the initial weights in the model: they are the first accepted ones."""
        shards = collect_shards(trainer.model, trainer.optimizer, self._config.parameters)
        self.extrapolation = Extrapolation(
            self._config,
            WeightLine(shards),
            score=lambda: self._score(trainer),
            publish=lambda: publish(trainer.model, trainer.optimizer),
            reset_moments=lambda: reset_moments(trainer.optimizer),
        )

    def on_start(self, trainer: Trainer) -> None:
        """Refuse to go on from a checkpoint without accepted weights: the next Δ would be wrong."""
        if trainer.iteration and not self._is_restored:
            raise UserError(
                f"the checkpoint of iteration {trainer.iteration} was written without EffOPD, so it does not "
                "say where the next Δ starts; resume with effopd.enabled=false, or start anew from its export"
            )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Search if the completed iteration is a trigger; what was taken joins the metrics of the step."""
        found = self.extrapolation.after_iteration(trainer.iteration)
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
            log_line(describe(trainer.iteration, found))

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
