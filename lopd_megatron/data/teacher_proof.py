"""What a build knows of the teacher's column: the proof that scoring left, and where the values lie.

At the end of scoring the teacher scores a sample of the finished shards again (`rollouts.teacher_proof`) and
writes `teacher_proof.json` beside them, with the hash of all shards: a shard that was changed later has none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron.errors import UserError

PROOF_FILE = "teacher_proof.json"

_LEAST_CORRELATION = 0.3
"""After the shift. SmolLM2-135M has 0.32 with itself under noise of 30 % in each weight, a model that is
hardly one any more, and at most 0.14 with itself one token off."""
_FEWEST_TOKENS = 64


def read_teacher_proof(folder: Path, shards: str) -> dict[str, Any] | None:
    """The proof of the shards whose common hash is `shards`; None where scoring left none."""
    path = folder / PROOF_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        same = found["shards"] == shards
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no proof of scoring ({error}); delete it and run lopd scores") from None
    if not same:
        raise UserError(
            f"{folder}: a shard was changed after the teacher had scored it and proved its column "
            f"({PROOF_FILE}); run lopd scores, which scores a sample of the shards again"
        )
    return found


def shift_of(stored: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> int:
    """How many tokens too late `stored` lies against another model's log-probs of the same tokens: −1, 0, 1.

    Two language models find the same tokens surprising, so their log-probs correlate where they belong to the
    same tokens, and hardly where they are one token off. Arrays are [r] each, of one response.
    """
    if sum(len(values) for values in stored) < _FEWEST_TOKENS:
        return 0
    correlation = {shift: _correlation(stored, reference, shift) for shift in (0, 1, -1)}
    best = max(correlation, key=lambda shift: correlation[shift])
    is_clear = correlation[best] > max(_LEAST_CORRELATION, 2 * correlation[0])
    return best if is_clear else 0


def check_shift(stored: Sequence[np.ndarray], reference: Sequence[np.ndarray], where: str | Path) -> None:
    """UserError where the teacher's column lies a token too late or too early."""
    shift = shift_of(stored, reference)
    if shift:
        direction = "late" if shift > 0 else "early"
        raise UserError(
            f"{where}: teacher_logprobs stand one token too {direction}: only after a shift back do they "
            "correlate with the log-probs of the student; score the rollouts again"
        )


def _correlation(stored: Sequence[np.ndarray], reference: Sequence[np.ndarray], shift: int) -> float:
    """With `stored` moved back by `shift` tokens; 0 where it is not defined."""
    one, other = [], []
    for a, b in zip(stored, reference, strict=True):
        size = max(len(a) - abs(shift), 0)
        one.append(a[max(shift, 0) :][:size])
        other.append(b[max(-shift, 0) :][:size])
    x, y = np.concatenate(one), np.concatenate(other)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() and y.std() else 0.0
