"""Tensors of a Hugging Face folder, read one at a time from safetensors files and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

from lopd_megatron.errors import UserError

# Buffers that old files carry and every implementation computes.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


class HfFolder:
    """The tensors of a folder by name; experts always appear one by one, however the files store them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        for file in self._safetensors_files():
            with safe_open(file, framework="pt") as handle:
                self._files |= dict.fromkeys(handle.keys(), file)
        self._fused = self._find_fused_experts()

    def names(self) -> set[str]:
        """All tensor names, with one name per expert and projection."""
        stored = {name for name in self._files if not _COMPUTED.search(name) and not _FUSED.match(name)}
        return stored | set(self._fused)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype; only its bytes are read."""
        if name in self._fused:
            stored, expert, half = self._fused[name]
            with safe_open(self._files[stored], framework="pt") as handle:
                tensor = handle.get_slice(stored)[expert]
            return tensor if half is None else tensor.chunk(2)[half]
        with safe_open(self._files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        stored, _, half = self._fused.get(name, (name, 0, None))
        with safe_open(self._files[stored], framework="pt") as handle:
            shape = tuple(handle.get_slice(stored).get_shape())
        if name not in self._fused:
            return shape
        return shape[1:] if half is None else (shape[1] // 2, *shape[2:])

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor, from the file's header."""
        stored, _, _ = self._fused.get(name, (name, 0, None))
        with safe_open(self._files[stored], framework="pt") as handle:
            part = handle.get_slice(stored)
            return part[(slice(0, 0),) * len(part.get_shape())].dtype

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

    def _find_fused_experts(self) -> dict[str, tuple[str, int, int | None]]:
        """Name of one expert's projection → (stored tensor [E, ...], expert, half of gate_up)."""
        found: dict[str, tuple[str, int, int | None]] = {}
        for stored, file in self._files.items():
            match = _FUSED.match(stored)
            if not match:
                continue
            with safe_open(file, framework="pt") as handle:
                experts = handle.get_slice(stored).get_shape()[0]
            for expert in range(experts):
                prefix = f"{match[1]}.{expert}"
                if match[2] == "down_proj":
                    found[f"{prefix}.down_proj.weight"] = (stored, expert, None)
                else:
                    found[f"{prefix}.gate_proj.weight"] = (stored, expert, 0)
                    found[f"{prefix}.up_proj.weight"] = (stored, expert, 1)
        return found
