"""Which prompts are held out: the training part and the valid part of a dataset share none of them.

    hash = 64 bits of BLAKE2b("seed/prompt_id");  held out: the prompts with the smallest hashes

So one prompt lies on one side with all its samples, and datasets of the same prompts hold out the same ones,
up to the size of the share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron.config import RunConfig
from lopd_megatron.data.manifest import manifest_path, read_manifest

SMALLEST = 32
"""Documents that a valid part has at least: fewer give a standard error that decides nothing."""
LARGEST_SHARE = 0.25
"""A dataset of which the valid part would take more keeps no valid part."""
TRAIN, VALID = "train", "valid"


@dataclass(frozen=True)
class HeldOut:
    """The share of documents that is kept back, 0: none. `seed` enters the hash of the prompts."""

    fraction: float = 0.0
    seed: int = 1234


NONE = HeldOut()


@dataclass(frozen=True)
class Split:
    """A decided split. Prompts with a hash of at most `cutoff` are held out; None: none are."""

    fraction: float
    seed: int
    cutoff: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def is_held_out(self, prompt_ids: Sequence[str]) -> np.ndarray:
        """bool [n]"""
        if self.cutoff is None:
            return np.zeros(len(prompt_ids), bool)
        return _hashes(prompt_ids, self.seed) <= np.uint64(self.cutoff)


def split_prompts(wanted: HeldOut, prompt_ids: Iterable[Sequence[str]]) -> Split:
    """Decide the split from the prompt ids of all rollouts, before any is left out.

    As many prompts are held out as give max(32, ⌈fraction · documents⌉) rollouts; none where that is more
    than a quarter of all. Memory: 8 bytes a rollout.
    """
    if not wanted.fraction:
        return Split(0.0, wanted.seed, None)
    hashes = np.concatenate([np.empty(0, np.uint64), *(_hashes(ids, wanted.seed) for ids in prompt_ids)])
    values, counts = np.unique(hashes, return_counts=True)
    target = max(SMALLEST, math.ceil(wanted.fraction * len(hashes)))
    covered = np.cumsum(counts)
    place = int(np.searchsorted(covered, target))
    if place >= len(values) or covered[place] > LARGEST_SHARE * len(hashes):
        return Split(wanted.fraction, wanted.seed, None)
    return Split(wanted.fraction, wanted.seed, int(values[place]))


def valid_prefix(prefix: str | Path) -> Path:
    """Where the valid part of the dataset at `prefix` lies: `dataset/train` → `dataset/valid`."""
    return Path(prefix).with_name(VALID)


def held_out_prefixes(config: RunConfig) -> list[str]:
    """The datasets that a run validates on: `data.valid_prefixes`, else the valid part of its one dataset.

    [] where there is neither. A folder that only looks like the valid part (of other rollouts, of another
    split) is not taken.
    """
    if config.data.valid_prefixes:
        return config.data.valid_prefixes
    if len(config.dataset_prefixes) != 1 or config.online.enabled:
        return []
    train = config.dataset_prefixes[0]
    own = valid_prefix(train)
    if not (manifest_path(own).is_file() and manifest_path(train).is_file()):
        return []
    first, second = read_manifest(train), read_manifest(own)
    belongs = "held_out" in first.filters and first.filters == second.filters
    return [str(own)] if belongs and first.lineage.parents == second.lineage.parents else []


def _hashes(prompt_ids: Sequence[str], seed: int) -> np.ndarray:
    """uint64 [n]"""

    def values() -> Iterator[int]:
        for prompt_id in prompt_ids:
            digest = hashlib.blake2b(f"{seed}/{prompt_id}".encode(), digest_size=8).digest()
            yield int.from_bytes(digest, "big")

    return np.fromiter(values(), np.uint64, len(prompt_ids))
