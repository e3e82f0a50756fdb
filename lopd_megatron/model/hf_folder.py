"""Tensors of a Hugging Face folder, read one at a time from safetensors files and nothing else.

Headers are parsed once and tensors are read by their offsets: opening a file of a mixture of experts anew for
each of its ten thousand tensors would parse as many headers, and a mapped file counts as memory.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from lopd_megatron.errors import UserError

# Buffers that old files carry and every implementation computes.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class _Stored:
    """Where the bytes of a tensor are."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def slice(self, index: int, parts: int = 1, part: int = 0) -> _Stored:
        """Entry `index` of the first dimension, and of its rows part `part` of `parts` equal ones."""
        shape = (self.shape[1] // parts, *self.shape[2:])
        size = math.prod(shape) * self.dtype.itemsize
        return _Stored(self.file, self.offset + (index * parts + part) * size, shape, self.dtype)


class HfFolder:
    """The tensors of a folder by name; experts always appear one by one, however the files store them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, _Stored] = {}
        for file in self._safetensors_files():
            for name, stored in _read_header(file).items():
                self._tensors |= _one_by_one(name, stored)

    def names(self) -> set[str]:
        """All tensor names, with one name per expert and projection."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype; only its bytes are read."""
        stored = self._tensors[name]
        data = bytearray(math.prod(stored.shape) * stored.dtype.itemsize)
        with stored.file.open("rb") as handle:
            handle.seek(stored.offset)
            if handle.readinto(data) != len(data):
                raise UserError(f"{stored.file} ends inside {name}; copy it again")
        return torch.frombuffer(data, dtype=stored.dtype).reshape(stored.shape)

    def _safetensors_files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [self.folder / name for name in names]
        else:
            files = [self.folder / "model.safetensors"]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} does not exist; the model folder {self.folder} is incomplete")
        return files


def _read_header(file: Path) -> dict[str, _Stored]:
    """Name → place of every tensor of a file."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(length))
        except ValueError:
            raise UserError(f"{file} is not a safetensors file; copy it again") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or _COMPUTED.search(name):
            continue
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{name} in {file} is {entry['dtype']}; only {', '.join(_DTYPES)} are supported")
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = _Stored(file, offset, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return tensors


def _one_by_one(name: str, stored: _Stored) -> dict[str, _Stored]:
    """A tensor under its name; fused experts [E, ...] as the projections of each expert."""
    match = _FUSED.match(name)
    if not match:
        return {name: stored}
    found = {}
    for expert in range(stored.shape[0]):
        prefix = f"{match[1]}.{expert}"
        if match[2] == "down_proj":
            found[f"{prefix}.down_proj.weight"] = stored.slice(expert)
        else:
            found[f"{prefix}.gate_proj.weight"] = stored.slice(expert, parts=2, part=0)
            found[f"{prefix}.up_proj.weight"] = stored.slice(expert, parts=2, part=1)
    return found
