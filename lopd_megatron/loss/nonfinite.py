"""A non-finite loss or log-prob stops the step before the optimizer, and says where it came from.

Looking at a value on the accelerator waits for it. So each micro-batch only leaves its count of bad tokens in
the metric sums and their place here; both are read once a step, when the sums are pooled anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from lopd_megatron.loss.metrics import NONFINITE
from lopd_megatron.loss.trained_tokens import TrainedTokens


class NonFiniteLoss(Exception):
    """The loss or a student log-prob of a trained token is NaN or infinite; the message names the token."""


class _Seen(NamedTuple):
    bad: torch.Tensor  # bool [n]
    tokens: TrainedTokens
    document_indices: tuple[int, ...]


class FiniteCheck:
    """Remembers where the micro-batches of a step were not finite."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def record(
        self, values: torch.Tensor, tokens: TrainedTokens, document_indices: tuple[int, ...]
    ) -> dict[str, torch.Tensor]:
        """Note the bad ones of `values` [m, n], m values for each of the n tokens. No wait for the device.

        Returns the pair for the metric sums: bad tokens, trained tokens.
        """
        bad = ~values.isfinite().all(0)
        self._seen.append(_Seen(bad, tokens, document_indices))
        count = torch.full((), tokens.count, dtype=torch.float64, device=bad.device)
        return {NONFINITE: torch.stack([bad.sum().double(), count])}

    def raise_if_any(
        self, pooled: Mapping[str, torch.Tensor], document_label: Callable[[int], str] = str
    ) -> None:
        """Call with the pooled metric sums of a step, on every rank, before the optimizer step.

        Raises `NonFiniteLoss` on all ranks if any of them saw a bad token, and forgets the step.
        `document_label` gives the index of a document and its id, for the message.
        """
        seen, self._seen = self._seen, []
        if not float(pooled[NONFINITE][0]):
            return
        for batch in seen:
            if batch.bad.any():
                first = int(batch.bad.nonzero()[0])
                index = batch.document_indices[int(batch.tokens.sequence[first])]
                token = int(batch.tokens.position[first])
                raise NonFiniteLoss(
                    f"the loss or log-prob of document {document_label(index)}, token {token} is not "
                    f"finite ({int(batch.bad.sum())} such tokens in its micro-batch); "
                    "the weights have not been updated"
                )
        raise NonFiniteLoss("another rank has a token whose loss or log-prob is not finite; see its log")
