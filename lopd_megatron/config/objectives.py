"""The table of objectives: what each reads and needs. All other code asks the table, never the name.

Free of torch, because every command line reads it. The functions are in `lopd_megatron.loss`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lopd_megatron import plugins
from lopd_megatron.errors import UserError


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is minimised on the trained tokens, and what that takes.

    `function(student_logprobs, tokens, config)` returns a `lopd_megatron.loss.TokenLoss` for c tokens: the
    loss [c] in nats and its derivative by the student's log-probs. `tokens` is a `TrainedTokens` with the
    columns of these tokens, `config` the `LossConfig`.
        classes False: `student_logprobs` is float64 [c], of the sampled token
        classes True:  it is float64 [c, n], of the token classes: the sampled token, the teacher's
                       `loss.topk` tokens, and all others as one; `tokens.teacher_class_logprobs` are the
                       teacher's
    """

    function: Callable[..., Any] | str
    """The function, or where it is: `package.module:NAME`, imported when the loss is built."""
    columns: frozenset[str] = frozenset({"teacher_logprobs"})
    """Columns of the dataset that the function reads beside the tokens."""
    classes: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores the responses; without one, training is on the responses as they are."""
        return any(column.startswith("teacher_") for column in self.columns) or self.classes

    @property
    def needed_columns(self) -> frozenset[str]:
        """All columns of the dataset that the function and its token classes read."""
        topk = {"teacher_logprobs", "teacher_topk_ids", "teacher_topk_logprobs"}
        return self.columns | (topk if self.classes else set())


_ADAPTERS = "lopd_megatron.loss.adapters"

OBJECTIVES: dict[str, ObjectiveSpec] = {
    "sft": ObjectiveSpec(f"{_ADAPTERS}:sft", frozenset()),
    "lightning_opd": ObjectiveSpec(f"{_ADAPTERS}:lightning_opd"),
    "opd_importance": ObjectiveSpec(
        f"{_ADAPTERS}:opd_importance", frozenset({"teacher_logprobs", "rollout_logprobs"})
    ),
    "topk_forward_kl": ObjectiveSpec(f"{_ADAPTERS}:topk_forward_kl", classes=True),
    "topk_reverse_kl": ObjectiveSpec(f"{_ADAPTERS}:topk_reverse_kl", classes=True),
    "topk_jsd": ObjectiveSpec(f"{_ADAPTERS}:topk_jsd", classes=True),
}
"""Name → what it takes. A new objective of this package is one line here and one function."""


@functools.cache
def objective_spec(name: str) -> ObjectiveSpec:
    """The entry of a name, or the `ObjectiveSpec` that `package.module:NAME` leads to."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if plugins.is_own(name):
        return plugins.load(name, ObjectiveSpec, "loss.objective")
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    raise UserError(
        f"loss.objective={name} is unknown{f'; did you mean {near[0]!r}?' if near else ';'} there are "
        f"{', '.join(OBJECTIVES)}, and your own as package.module:NAME"
    )
