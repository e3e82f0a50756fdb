"""vLLM's RequestOutput as our answers, with every check that a wrong answer can fail.

Alignment, once and for all: row i of `prompt_logprob_token_ids` is token start + i; entry i of vLLM's
dictionaries is token i, the first being None; row i of its tensors is token i + 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lopd_megatron.inference.requests import Generation, GenerationRequest, ScoreRequest, TokenScores


class BadAnswer(Exception):
    """The engine answered something that cannot be right."""


def read_generation(request: GenerationRequest, output: Any) -> Generation:
    sample = output.outputs[0]
    logprobs = np.fromiter(sample.logprobs.logprobs, np.float32)
    tokens = list(sample.token_ids)
    if sample.finish_reason not in ("stop", "length"):
        raise BadAnswer(f"vLLM ended the response with {sample.finish_reason!r}")
    if not len(tokens) == len(logprobs) > 0 or not np.isfinite(logprobs).all():
        raise BadAnswer(f"{len(tokens)} tokens with the log-probs {logprobs}")
    return Generation(request.key, tokens, logprobs, sample.finish_reason)


def read_native(request: ScoreRequest, output: Any) -> TokenScores:
    return _score(request, None, output.prompt_token_id_logprobs, 0)


def read_tensors(request: ScoreRequest, output: Any, *, topk: int) -> TokenScores:
    kept = output.prompt_logprobs
    rows = slice(request.start - 1, None)
    return _score(request, kept.logprob_token_ids[rows].numpy(), kept.logprobs[rows].numpy(), topk)


def read_stock(request: ScoreRequest, output: Any, *, topk: int) -> TokenScores:
    """Of {id: Logprob} per position."""
    given = request.tokens[request.start :]
    ids = np.empty((len(given), 1 + topk), np.int64)
    logprobs = np.empty((len(given), 1 + topk), np.float32)
    positions = output.prompt_logprobs[request.start :]
    for row, (token, entries) in enumerate(zip(given, positions, strict=True)):
        # The given token is there besides the k most likely, or is one of them: then it has rank ≤ k.
        likely = sorted((entry.rank, key) for key, entry in entries.items())[:topk]
        columns = [token, *(key for _, key in likely)]
        ids[row] = columns
        logprobs[row] = [entries[key].logprob for key in columns]
    return _score(request, ids, logprobs, topk)


def _score(request: ScoreRequest, ids: np.ndarray | None, logprobs: np.ndarray, topk: int) -> TokenScores:
    """Split [r, 1 + k], the sampled token first and then the k most likely; check the alignment."""
    given = request.tokens[request.start :]
    if logprobs is None or logprobs.shape != (len(given), 1 + topk):
        shape = None if logprobs is None else logprobs.shape
        raise BadAnswer(f"scores of shape {shape} for {len(given)} tokens and k = {topk}")
    if ids is None:
        ids = np.asarray(given, np.int32)[:, None]
    if ids[:, 0].tolist() != given:
        raise BadAnswer("the scores are not of the given token ids")
    if not np.isfinite(logprobs).all():
        raise BadAnswer(f"not finite: the log-prob at position {int(np.argmin(np.isfinite(logprobs[:, 0])))}")
    logprobs = logprobs.astype(np.float32)
    return TokenScores(
        request.key, logprobs[:, 0].copy(), ids[:, 1:].astype(np.int32), np.ascontiguousarray(logprobs[:, 1:])
    )
