"""The trained tokens of a micro-batch, taken out of it: loss, gradient and metrics see no others."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from lopd_megatron.records import MicroBatch


@dataclass(frozen=True)
class TrainedTokens:
    """Columns of the n tokens whose `loss_mask` is 1, in the order of the micro-batch; log-probs float64."""

    rows: torch.Tensor  # int64 [n], where they stand in the micro-batch
    labels: torch.Tensor  # int64 [n]
    sequence: torch.Tensor  # int64 [n], document within the micro-batch
    position: torch.Tensor  # int64 [n], of the label in its document
    response_lengths: torch.Tensor  # int32 [n], trained tokens of the token's document
    teacher_logprobs: torch.Tensor | None  # [n]
    rollout_logprobs: torch.Tensor | None  # [n]
    teacher_topk_ids: torch.Tensor | None  # int64 [n, k]
    teacher_topk_logprobs: torch.Tensor | None  # [n, k]
    teacher_class_logprobs: torch.Tensor | None = None  # [n, c], for objectives over token classes

    @classmethod
    def of(cls, batch: MicroBatch) -> TrainedTokens:
        """Needs labels, loss_mask, position_ids, sequence_index. Waits for the device once, to count rows."""
        rows = _present(batch, "loss_mask").view(-1).nonzero().view(-1)

        def take(column: torch.Tensor | None) -> torch.Tensor | None:
            return None if column is None else column[0][rows]

        def take_logprobs(column: torch.Tensor | None) -> torch.Tensor | None:
            return None if column is None else column[0][rows].double()

        sequence = _present(batch, "sequence_index")[0][rows].long()
        return cls(
            rows=rows,
            labels=_present(batch, "labels")[0][rows],
            sequence=sequence,
            # Label-aligned: what stands at position t is about token t + 1.
            position=_present(batch, "position_ids")[0][rows] + 1,
            response_lengths=batch.response_lengths[sequence],
            teacher_logprobs=take_logprobs(batch.teacher_logprobs),
            rollout_logprobs=take_logprobs(batch.rollout_logprobs),
            teacher_topk_ids=take(batch.teacher_topk_ids),
            teacher_topk_logprobs=take_logprobs(batch.teacher_topk_logprobs),
        )

    def part(self, rows: slice) -> TrainedTokens:
        """The same columns of some of the tokens, without a copy."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainedTokens(**{n: None if column is None else column[rows] for n, column in columns.items()})

    def column(self, name: str) -> torch.Tensor:
        """A column that the objective's entry in the table names, so it is there."""
        found = getattr(self, name)
        assert found is not None, name
        return found

    @property
    def count(self) -> int:
        return self.rows.numel()


def _present(batch: MicroBatch, name: str) -> torch.Tensor:
    column = getattr(batch, name)
    if column is None:
        raise ValueError(f"the loss needs {name} in the micro-batch of the last pipeline stage; it is None")
    return column
