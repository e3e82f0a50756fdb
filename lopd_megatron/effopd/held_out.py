"""Scores without generation: a loss on held-out rollouts, document by document, in one forward pass.

`topk_kl` is minus the reverse KL over the teacher's k tokens, the sampled token and the rest;
`squared_log_ratio` is minus ½·(log π_θ − log π_T)² of the sampled token, the loss of Lightning OPD itself
without its clip, which may improve while accuracy falls.
"""

from __future__ import annotations

from typing import Literal

import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.effopd.scores import HeldOutSums
from lopd_megatron.loss.fused_head import HeadRows, Objective, fused_head
from lopd_megatron.loss.make_objective import make_objective
from lopd_megatron.loss.objectives import TokenLoss
from lopd_megatron.loss.trained_tokens import TrainedTokens
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import LossOutput, MicroBatch

HeldOutScore = Literal["topk_kl", "squared_log_ratio"]


class HeldOutLoss:
    """Stands in for the loss of a run in a forward pass over held-out data and fills `sums`.

    `config` has the top k and the chunk size.
    """

    def __init__(
        self,
        score: HeldOutScore,
        config: LossConfig,
        sums: HeldOutSums,
        *,
        vocab: VocabRange,
        sequence_parallel: bool,
    ) -> None:
        self.sums = sums
        self._score = score
        self._config = config
        self._vocab = vocab
        self._sequence_parallel = sequence_parallel

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """Called by the last pipeline stage as `loss.Loss` is; collectives are those of the head."""
        tokens = TrainedTokens.of(batch)
        ids, objective = self._objective(tokens)
        ones = torch.ones(tokens.count, dtype=torch.float64, device=hidden.device)
        numerator, values = fused_head(
            hidden.view(-1, hidden.size(-1)),
            weight,
            HeadRows(tokens.rows, ids, ones, objective),
            vocab=self._vocab,
            sequence_parallel=self._sequence_parallel,
            chunk_tokens=self._config.head_chunk_tokens,
        )
        documents = torch.tensor(batch.document_indices, device=tokens.sequence.device)[tokens.sequence]
        self.sums.add(values.loss, documents)
        return LossOutput(numerator, ones.sum().int(), {})

    def _objective(self, tokens: TrainedTokens) -> tuple[torch.Tensor, Objective]:
        if self._score == "squared_log_ratio":
            return tokens.labels[:, None], _squared_log_ratio(tokens)
        reverse = self._config.model_copy(update={"objective": "topk_reverse_kl"})
        return make_objective(reverse)(tokens)


def _squared_log_ratio(tokens: TrainedTokens) -> Objective:
    teacher = tokens.teacher_logprobs
    assert teacher is not None, "the loader refuses held-out data without teacher_logprobs"

    def objective(student: torch.Tensor, part: slice) -> TokenLoss:
        gap = student[:, 0] - teacher[part]
        return TokenLoss(0.5 * gap.square(), torch.zeros_like(student))

    return objective
