"""EffOPD between two training steps: search along the way since the last time, keep what was accepted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from lopd_megatron.config import EffOPDConfig
from lopd_megatron.effopd.agreement import agree, from_first_rank
from lopd_megatron.effopd.search import HeldOutScore, SearchResult, is_trigger, search
from lopd_megatron.effopd.weights import WeightLine


class Extrapolation:
    """Searches after every trigger and leaves the accepted weights in the model (arXiv 2605.11739, 4.1).

    Δ is measured from the last accepted weights, the initial ones at first, as in the released code; Adam's
    moments stay as they are unless `config.reset_moments`. One search costs at most `max_k + 1` scores, and
    per candidate one elementwise pass over the shards and one `publish`.

    `score()` measures the weights in the model, on all ranks together; rank 0 decides and others may return
    None. `publish()` brings main parameters that were written into the model, `reset_moments()` lets the
    optimizer start anew.
    """

    def __init__(
        self,
        config: EffOPDConfig,
        line: WeightLine,
        *,
        score: Callable[[], HeldOutScore | None],
        publish: Callable[[], None],
        reset_moments: Callable[[], None],
    ) -> None:
        self.config = config
        self.line = line
        self.history: list[dict[str, Any]] = []
        """Every search so far in plain values, the same on all ranks."""
        self._score = score
        self._publish = publish
        self._reset_moments = reset_moments
        self._placed = 0

    def after_iteration(self, iteration: int) -> SearchResult | None:
        """Search if `iteration`, the completed one, is a trigger. Collective; all ranks take the same."""
        if not is_trigger(iteration, self.config.first_trigger):
            return None
        started = time.monotonic()
        self._publish()  # with overlapped gathers the model may still hold the weights before this step
        self.line.begin()
        self._placed = 0
        found = search(self._score_at, max_k=self.config.max_k, acceptance=self.config.acceptance)
        self._place(found.multiplier)
        self.line.accept()
        if found.multiplier and self.config.reset_moments:
            self._reset_moments()
        (seconds,) = from_first_rank([time.monotonic() - started])
        self.history.append({"iteration": iteration, **dataclasses.asdict(found), "seconds": seconds})
        return found

    def _score_at(self, multiplier: int) -> HeldOutScore:
        self._place(multiplier)
        return agree(self._score())

    def _place(self, multiplier: int) -> None:
        if multiplier != self._placed:
            self.line.move(multiplier)
            self._publish()
            self._placed = multiplier
