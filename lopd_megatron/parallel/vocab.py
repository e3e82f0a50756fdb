"""Which part of the vocabulary a tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class VocabRange:
    """Half-open range of token ids whose output-layer rows live on this rank.

    The range is of the padded vocabulary: ids ≥ `vocab_size` inside it are padding and take no probability.
    """

    vocab_start_index: int
    vocab_end_index: int
    vocab_size: int
    padded_vocab_size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, vocab_size: int, padded_vocab_size: int, group: dist.ProcessGroup | None) -> VocabRange:
        """The range of this rank in `group` (None: one rank holds all)."""
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        if padded_vocab_size % size or vocab_size > padded_vocab_size:
            raise ValueError(
                f"padded_vocab_size {padded_vocab_size} is no multiple of {size} or below {vocab_size}"
            )
        shard = padded_vocab_size // size
        return cls(rank * shard, (rank + 1) * shard, vocab_size, padded_vocab_size, group)

    @property
    def shard_size(self) -> int:
        """Rows of the weight shard, padding included."""
        return self.vocab_end_index - self.vocab_start_index

    @property
    def num_real(self) -> int:
        """Rows of the shard that are tokens; they come first, the padding rows after them."""
        return max(0, min(self.vocab_end_index, self.vocab_size) - self.vocab_start_index)

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else self.group.size()
