"""Hugging Face safetensors shards with an index, written tensor by tensor: memory is one tensor.

The names, shapes and dtypes are announced first, so a file's header is known before its first byte of data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lopd_megatron.files import fsync_path, write_json

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written: its place in the sequence is its place in the files."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Write the planned tensors in their order; `close` adds the index. The caller drops a partial folder."""

    def __init__(self, folder: Path, plan: Sequence[TensorPlan], max_shard_bytes: int) -> None:
        self._folder = folder
        self._shards = _fill_shards(plan, max_shard_bytes)
        self._queue = [(number, tensor) for number, shard in enumerate(self._shards) for tensor in shard]
        self._next = 0
        self._file: BinaryIO | None = None
        self._open_shard = -1
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor; it must be the next one of the plan, with the planned shape."""
        number, planned = self._queue[self._next]
        assert (name, tuple(tensor.shape)) == (planned.name, planned.shape), (name, tensor.shape, planned)
        if number != self._open_shard:
            self._start(number)
        assert self._file is not None
        data = tensor.detach().to(device="cpu", dtype=planned.dtype).contiguous()
        self._file.write(memoryview(data.flatten().view(torch.uint8).numpy()))
        self._next += 1

    def close(self) -> None:
        """Finish the last file and write the index where there is more than one; no tensor may be missing."""
        assert self._next == len(self._queue), f"{len(self._queue) - self._next} planned tensors not written"
        self._finish()
        if len(self._shards) > 1:
            weight_map = {tensor.name: self._name(number) for number, tensor in self._queue}
            total = sum(tensor.num_bytes for _, tensor in self._queue)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self._folder / "model.safetensors.index.json", index)

    def _start(self, number: int) -> None:
        self._finish()
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self._shards[number]:
            end = offset + tensor.num_bytes
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data begins aligned
        self._file = (self._folder / self._name(number)).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._open_shard = number

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            fsync_path(self._folder / self._name(self._open_shard))
            self._file = None

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _fill_shards(plan: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards
