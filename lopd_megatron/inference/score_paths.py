"""The three ways to get scores out of vLLM, and the test at start-up that picks one.

native  `prompt_logprob_token_ids`: only the given ids, float32, logits in fixed chunks; not for top-k
flat    `prompt_logprobs`, kept as the tensors that the engine sends; memory bounded by the step's tokens
stock   `prompt_logprobs` as vLLM's dictionaries: the reference, slow and large
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from lopd_megatron.errors import UserError
from lopd_megatron.inference.requests import Engine, Failure, ScoreRequest, ScoringPath, TokenScores
from lopd_megatron.progress import log_line

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest mean |difference| in nats between two paths on one engine. fp32: rounding. bf16: kernels whose
result depends on the batch. A path that is off by one token differs by several nats."""


class ScoringEngine(Engine, Protocol):
    dtype: Literal["bfloat16", "float32"]

    @property
    def has_native_scoring(self) -> bool: ...

    @property
    def vocab_size(self) -> int: ...


def choose_path(engine: ScoringEngine, wanted: str, topk: int, longest: int) -> ScoringPath:
    """The fastest path that gives what the stock path gives on a sample of documents up to `longest` tokens.

    "auto" goes on to the next path when one disagrees; a path asked for by name is then an error.
    """
    if wanted == "native" and not engine.has_native_scoring:
        raise UserError(
            "scores.path=native needs vLLM's V2 model runner, which this engine has not; use auto"
        )
    if wanted == "native" and topk:
        raise UserError(f"scores.path=native gives no top-k of the teacher (scores.topk={topk}); use auto")
    candidates: list[ScoringPath] = ["native"] if engine.has_native_scoring and topk == 0 else []
    candidates.append("flat")
    sample = sample_requests(engine.vocab_size, longest)
    stock = _scores(engine, sample, topk, "stock")
    for path in candidates if wanted == "auto" else [path for path in candidates if path == wanted]:
        try:
            difference = mean_difference(stock, _scores(engine, sample, topk, path))
            problem = f"differs from the stock path by {difference:.3g} nats on average"
        except (AttributeError, TypeError, ValueError) as error:  # another vLLM, with other private parts
            difference = np.inf
            problem = f"{type(error).__name__}: {error}"
        if difference <= TOLERANCE[engine.dtype]:
            return path
        if wanted != "auto":
            raise UserError(f"scores.path={wanted} failed its self-test: {problem}; use auto")
        log_line(f"scoring path {path} failed its self-test: {problem}")
    return "stock"


def sample_requests(vocab_size: int, longest: int) -> list[ScoreRequest]:
    """Random documents with the awkward shapes: one-token prompt, one-token response, both, a long one."""
    random = np.random.default_rng(0)
    shapes = [(1, 1), (1, 9), (9, 1), (7, 24), (16, min(240, longest - 16))]
    fitting = [
        (prompt, response) for prompt, response in shapes if response > 0 and prompt + response <= longest
    ]
    return [
        ScoreRequest((0, row), random.integers(0, vocab_size, prompt + response).tolist(), prompt)
        for row, (prompt, response) in enumerate(fitting)
    ]


def mean_difference(reference: list[TokenScores], scores: list[TokenScores]) -> float:
    """Mean |difference| over the given tokens and the top-k columns, in nats.

    Ids of the top-k are not compared: near ties may change places.
    """

    def flat(answers: list[TokenScores]) -> np.ndarray:
        return np.concatenate([np.append(a.logprobs, a.topk_logprobs) for a in answers])

    return float(np.abs(flat(reference) - flat(scores)).mean())


def _scores(engine: Engine, requests: list[ScoreRequest], topk: int, path: ScoringPath) -> list[TokenScores]:
    found: dict[int, TokenScores] = {}
    for answer in engine.score(requests, topk=topk, path=path):
        if isinstance(answer, Failure):
            raise ValueError(answer.error)
        found[answer.key[1]] = answer
    return [found[row] for row in range(len(requests))]
