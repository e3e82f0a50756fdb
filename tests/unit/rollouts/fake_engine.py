"""An engine without a model: answers are functions of the request alone, in an order that mixes documents."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lopd_megatron.inference.requests import (
    EngineLost,
    Failure,
    Generation,
    GenerationRequest,
    Key,
    Sampling,
    ScoreRequest,
    ScoringPath,
    TokenScores,
)

EOS = 2


class FakeEngine:
    """`failures`: how often a document fails before it succeeds. `lose_after`: answers before the end.
    `shift`: by how many tokens the scores of a path are wrong.
    """

    has_native_scoring = True
    vocab_size = 50
    dtype = "float32"

    def __init__(
        self,
        *,
        slots: int = 5,
        failures: dict[Key, int] | None = None,
        lose_after: int | None = None,
        shift: dict[str, int] | None = None,
    ) -> None:
        self.on_step: Callable[[], None] = lambda: None
        self.slots = slots
        self.failures = Counter(failures or {})
        self.lose_after = lose_after
        self.shift = shift or {}
        self.most_in_flight = 0
        self.answered = 0
        self.closed = False

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: Sampling
    ) -> Iterator[Generation | Failure]:
        def answer(request: GenerationRequest) -> Generation:
            draw = random.Random(request.seed)
            length = draw.randrange(1, sampling.max_response_tokens + 1)
            tokens = [draw.randrange(3, self.vocab_size) for _ in range(length)]
            stopped = length < sampling.max_response_tokens
            if stopped:
                tokens[-1] = EOS
            logprobs = np.array([-draw.random() for _ in tokens], np.float32)
            return Generation(request.key, tokens, logprobs, "stop" if stopped else "length")

        yield from self._stream(requests, answer)

    def score(
        self, requests: Iterable[ScoreRequest], *, topk: int, path: ScoringPath
    ) -> Iterator[TokenScores | Failure]:
        def answer(request: ScoreRequest) -> TokenScores:
            last, shifted = len(request.tokens) - 1, self.shift.get(path, 0)
            places = range(request.start - shifted, len(request.tokens) - shifted)
            logprobs = np.array(
                [fake_logprob(request.tokens, min(max(t, 0), last)) for t in places], np.float32
            )
            ids = np.tile(np.arange(topk, dtype=np.int32), (len(logprobs), 1))
            return TokenScores(request.key, logprobs, ids, logprobs[:, None] - ids.astype(np.float32))

        yield from self._stream(requests, answer)

    def on_answer(self) -> None:
        """For tests that want to be there."""

    def close(self) -> None:
        self.closed = True

    def _stream(self, requests: Iterable[Any], answer: Callable[[Any], Any]) -> Iterator[Any]:
        assert not self.closed
        pending, in_flight, draw = iter(requests), [], random.Random(0)
        exhausted = False
        while in_flight or not exhausted:
            while not exhausted and len(in_flight) < self.slots:
                request = next(pending, None)
                exhausted = request is None
                if request is not None:
                    in_flight.append(request)
            self.most_in_flight = max(self.most_in_flight, len(in_flight))
            if not in_flight:
                break
            self.on_step()
            if self.lose_after is not None and self.answered >= self.lose_after:
                raise EngineLost("fake: out of memory")
            self.on_answer()
            self.answered += 1
            request = in_flight.pop(draw.randrange(len(in_flight)))
            if self.failures[request.key] > 0:
                self.failures[request.key] -= 1
                yield Failure(request.key, f"fake failure of {request.key}")
            else:
                yield answer(request)


def fake_logprob(tokens: list[int], position: int) -> float:
    """A function of the whole prefix and the token, so that any shift changes it."""
    return -((tokens[position] * 31 + position * 17 + sum(tokens[:position]) * 7) % 97) / 10 - 0.01
