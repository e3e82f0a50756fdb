"""Which documents a step takes: a function of (seed, consumed samples) and of nothing else."""

from __future__ import annotations

import numpy as np

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """An endless sequence of document indices: one permutation of all `size` documents after another."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def take(self, consumed: int, count: int) -> np.ndarray:
        """int64 [count]: elements consumed … consumed + count − 1 of the sequence."""
        places = np.arange(consumed, consumed + count)
        found = np.empty(count, np.int64)
        for epoch in np.unique(places // self.size):
            here = places // self.size == epoch
            found[here] = self._permutation(int(epoch))[places[here] % self.size]
        return found

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a step straddles at most a few edges; two are enough to be quick
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = permutation(self.size, self.seed, epoch)
        return self._epochs[epoch]


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [size]: indices sorted by a hash of (seed, epoch, index).

    Not numpy's shuffle: its stream may change between versions, and a resumed run must go on in its order.
    """
    key = _mix(np.array([seed], np.uint64) + _mix(np.array([epoch], np.uint64) + _INCREMENT))
    return np.argsort(_mix(np.arange(size, dtype=np.uint64) * _INCREMENT + key), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
