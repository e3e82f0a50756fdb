"""From a `LossConfig` to the function that turns hidden states and a micro-batch into a `LossOutput`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from lopd_megatron.config import LossConfig
from lopd_megatron.loss.fused_head import HeadRows, TokenValues, fused_head
from lopd_megatron.loss.make_objective import ClassDivergence, make_objective, with_divergence
from lopd_megatron.loss.metrics import kl_estimate, token_metric_sums
from lopd_megatron.loss.nonfinite import FiniteCheck
from lopd_megatron.loss.plain_head import plain_head
from lopd_megatron.loss.trained_tokens import TrainedTokens
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import LossOutput, MicroBatch


class TokenSignals(NamedTuple):
    """What one micro-batch says of its n trained tokens."""

    values: TokenValues
    tokens: TrainedTokens
    reverse_kl: torch.Tensor | None  # [n]
    kl_estimate: torch.Tensor | None  # [n]


class Loss:
    """Called once per micro-batch on the last pipeline stage.

    `finite.raise_if_any(pooled metric sums)` belongs between the pooling of a step and its optimizer step.
    `observe` sees the tokens of every micro-batch and, int64 [n], the dataset index of their documents.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        vocab: VocabRange,
        sequence_parallel: bool,
        cp_group: dist.ProcessGroup | None = None,
    ) -> None:
        """`vocab.group` is the tensor-parallel group, None where there is one rank."""
        self.finite = FiniteCheck()
        self.observe: Callable[[TokenSignals, torch.Tensor], None] | None = None
        self._config = config
        self._objective = make_objective(config)
        self._vocab = vocab
        self._sequence_parallel = sequence_parallel
        self._cp_group = cp_group if cp_group is not None and cp_group.size() > 1 else None

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """Sums of one micro-batch.

        `hidden` [s, 1, h] as the last stage returns it ([s/TP, 1, h] under sequence parallelism), `weight`
        [padded_vocab/TP, h] of the output layer or the tied embedding. The batch needs labels, loss_mask,
        position_ids, sequence_index and the columns of the objective. Collectives: those of the head over TP;
        over CP one all-reduce of [documents] int64.
        """
        tokens = TrainedTokens.of(batch)
        ids, objective = self._objective(tokens)
        divergence: ClassDivergence | None = None
        if tokens.teacher_topk_ids is not None:
            ids, objective, divergence = with_divergence(self._config, tokens, objective)
        per_sequence = self._config.normalization == "per_sequence"
        if per_sequence:
            token_weights = tokens.response_lengths.double().reciprocal()
            denominator = self._num_sequences(batch)
        else:
            token_weights = torch.ones_like(tokens.rows, dtype=torch.float64)
            denominator = token_weights.sum()

        numerator, values = self._head(hidden, weight, HeadRows(tokens.rows, ids, token_weights, objective))
        reverse_kl = divergence.reverse_kl if divergence else None
        estimate = kl_estimate(tokens, values.student_logprobs, divergence)
        metric_sums = token_metric_sums(
            tokens,
            student_logprobs=values.student_logprobs,
            entropy=values.entropy,
            reverse_kl=reverse_kl,
            estimate=estimate,
            relative_position=self._relative_position(batch, tokens),
            advantage_clip=self._config.advantage_clip,
        )
        metric_sums["loss"] = torch.stack([(values.loss * token_weights).sum(), denominator.double()])
        metric_sums |= self.finite.record(torch.stack(values), tokens, batch.document_indices)
        if self.observe is not None:
            documents = torch.tensor(batch.document_indices, device=tokens.sequence.device)
            self.observe(TokenSignals(values, tokens, reverse_kl, estimate), documents[tokens.sequence])
        return LossOutput(numerator, denominator.int(), metric_sums)

    def _head(
        self, hidden: torch.Tensor, weight: torch.Tensor, rows: HeadRows
    ) -> tuple[torch.Tensor, TokenValues]:
        flat = hidden.view(-1, hidden.size(-1))
        if self._config.head == "plain":
            return plain_head(
                flat, weight, rows, vocab=self._vocab, sequence_parallel=self._sequence_parallel
            )
        return fused_head(
            flat,
            weight,
            rows,
            vocab=self._vocab,
            sequence_parallel=self._sequence_parallel,
            chunk_tokens=self._config.head_chunk_tokens,
        )

    def _num_sequences(self, batch: MicroBatch) -> torch.Tensor:
        """Documents with a trained token; under context parallelism every rank sees all, one counts them."""
        count = (batch.response_lengths > 0).sum()
        first = self._cp_group is None or self._cp_group.rank() == 0
        return count if first else torch.zeros_like(count)

    def _relative_position(self, batch: MicroBatch, tokens: TrainedTokens) -> torch.Tensor:
        """Where each token stands in its response, [n] in [0, 1), counted from the first trained token."""
        first = torch.full_like(batch.response_lengths, torch.iinfo(torch.int32).max, dtype=torch.int64)
        first.scatter_reduce_(0, tokens.sequence, tokens.position, "amin")
        if self._cp_group is not None:
            dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self._cp_group)
        return (tokens.position - first[tokens.sequence]) / tokens.response_lengths
