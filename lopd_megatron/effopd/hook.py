"""EffOPD in a training loop: after iterations 1, 2, 4, 8, … try longer steps along the way since the last time.

Lightning and standard OPD alike: it sees weights and a score, not where the rollouts came from.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lopd_megatron.config import EffOPDConfig
from lopd_megatron.effopd.checkpoint import accepted_state_dict, restore_accepted
from lopd_megatron.effopd.scores import agree
from lopd_megatron.effopd.search import Score, SearchResult, is_trigger, search
from lopd_megatron.effopd.weights import WeightLine
from lopd_megatron.progress import say


class EffOPDHook:
    """Searches after every trigger and leaves the accepted weights in the model (arXiv 2605.11739, 4.1).

    Δ is measured from the last accepted weights, the initial ones at first, as in the released code; Adam's
    moments stay as they are unless `config.reset_moments`. One search costs at most `max_k + 1` scores, and
    per candidate one elementwise pass over the shards and one `publish`.

    The callables come from whoever wires the run, because stages do not import each other:
    `score()` measures the weights in the model, on all ranks together; the value of the first rank of `group`
    decides, others may return None. `publish()` brings written main parameters into the model
    (`optimizer_shards.publish`). `reset_moments()` lets the optimizer start anew. A run calls `after_step`
    before it saves the checkpoint of the same iteration.
    """

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

    def after_step(self, iteration: int) -> SearchResult | None:
        """Search if `iteration`, the completed one, is a trigger. Collective; the same result on all ranks."""
        if not is_trigger(iteration, self.config.first_trigger):
            return None
        started = time.monotonic()
        self.line.begin()
        self._placed = 0
        result = search(self._score_at, max_k=self.config.max_k, acceptance=self.config.acceptance)
        self._place(result.multiplier)
        self.line.accept()
        if result.multiplier and self.config.reset_moments:
            self._reset_moments()
        self.history.append(
            {
                "iteration": iteration,
                "multiplier": result.multiplier,
                "trials": [dataclasses.asdict(trial) for trial in result.trials],
                "seconds": time.monotonic() - started,
            }
        )
        if self._group is None or dist.get_rank(self._group) == 0:
            say(describe(iteration, result))
        return result

    def _score_at(self, multiplier: int) -> Score:
        self._place(multiplier)
        return agree(self._score(), self._group)

    def _place(self, multiplier: int) -> None:
        if multiplier != self._placed:
            self.line.move(multiplier)
            self._publish()
            self._placed = multiplier

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank: what was tried and what was taken."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict` of the run that is resumed."""
        self.history = list(state["history"])

    def sharded_state_dict(self, model_state: Any, *, is_loading: bool) -> Any:
        """The accepted weights, sharded as the model is; `checkpoint.accepted_state_dict` has the costs."""
        return accepted_state_dict(self.line, model_state, is_loading=is_loading)

    def load_sharded_state_dict(self, loaded: dict[str, Any]) -> None:
        """Take this rank's part of the accepted weights out of a checkpoint."""
        restore_accepted(self.line, loaded)


def describe(iteration: int, result: SearchResult) -> str:
    """One line for a log: every multiplier with its score, and the one taken."""
    tried = ", ".join(f"{t.multiplier}: {t.score.value:.4g} ± {t.score.standard_error:.2g}" for t in result.trials)
    return f"EffOPD after iteration {iteration}: took multiplier {result.multiplier} of {{{tried}}}"
