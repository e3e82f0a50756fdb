"""What a Hugging Face folder holds: the one reader of `config.json` and of safetensors files.

It decides which files count, and fingerprints hash exactly these. A folder that two programs would read
differently is refused. Headers are parsed once and tensors are read by their offsets: a mixture of experts
has ten thousand tensors, and opening a file for each would parse as many headers.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lopd_megatron.errors import UserError

if TYPE_CHECKING:  # seconds of every start, and many readers need no tensor
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_POINTER = b"version https://git-lfs"
# Buffers that old files carry and every implementation computes.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. A missing or damaged file is a UserError."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a Hugging Face folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); make or download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not an object; make or download it again")
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a folder, as it is written there."""
    return read_json(Path(folder) / "config.json")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that hold the weights, sorted; all others in the folder are not read.

    transformers reads `model.safetensors` where there is one, vLLM what the index names, and without an index
    every file. A folder on which they differ is a UserError, as are names that lead out of the folder.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        if (folder / WEIGHTS).exists() and names != [WEIGHTS]:
            raise UserError(
                f"{folder} has {WEIGHTS} and an index that names {names[0]}: transformers would read "
                "the first and vLLM the second; delete what does not belong there"
            )
    else:
        names = [WEIGHTS]
        others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != WEIGHTS)
        if others:
            raise UserError(
                f"{folder} holds {others[0]} and no {INDEX}: vLLM would read it and transformers would not; "
                "move it away, or add the index"
            )
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist; the model folder {folder} is incomplete")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index} has no weight_map; download it again")
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index} names {file!r}, which is no safetensors file inside the folder; refused"
            )
    return found


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a tensor are."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: str
    """As safetensors writes it: F32, BF16, F16, …"""
    end: int = -1
    """Behind the last byte of a whole tensor."""

    @property
    def itemsize(self) -> int:
        return _DTYPES[self.kind][1]

    def slice(self, index: int, parts: int = 1, part: int = 0) -> Stored:
        """Entry `index` of the first dimension, and of its rows part `part` of `parts` equal ones."""
        shape = (self.shape[1] // parts, *self.shape[2:])
        size = math.prod(shape) * self.itemsize
        return Stored(self.file, self.offset + (index * parts + part) * size, shape, self.kind)


def read_header(file: Path) -> dict[str, Stored]:
    """Name → place of every tensor of a file. The safetensors library judges whether the file is whole."""
    try:
        with file.open("rb") as handle:
            start = handle.read(len(_POINTER))
            if start == _POINTER:
                raise UserError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull")
            with safe_open(str(file), framework="np"):
                pass  # checks the header, offsets without gaps or overlap, and the length
            handle.seek(0)
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"{file} is no whole safetensors file ({error}); download or export it again"
        ) from None
    return {
        name: Stored(
            file,
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            entry["dtype"],
            8 + length + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Name → place of every tensor of a folder; the index and the files must say the same."""
    folder = Path(folder)
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        for name, stored in read_header(file).items():
            if name in found:
                raise UserError(
                    f"{name} is in {found[name].file.name} and {file.name} of {folder}; download them again"
                )
            found[name] = stored
    index = folder / INDEX
    if index.is_file():
        mapped = _weight_map(index)
        for name, stored in found.items():
            if not _COMPUTED.search(name) and mapped.get(name) != stored.file.name:
                raise UserError(
                    f"{name} is in {stored.file.name}, but {INDEX} says {mapped.get(name, 'nothing of it')}; "
                    "download the folder again"
                )
        if missing := sorted(mapped.keys() - found.keys()):
            raise UserError(
                f"{INDEX} of {folder} names {missing[0]}, which {mapped[missing[0]]} does not hold"
            )
    return found


class HfFolder:
    """The tensors of a folder by name; experts always appear one by one, however the files store them."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, Stored] = {}
        for name, stored in stored_tensors(folder).items():
            if _COMPUTED.search(name):
                continue
            if stored.kind not in _DTYPES:
                raise UserError(
                    f"{name} in {stored.file} is {stored.kind}; only {', '.join(_DTYPES)} are supported"
                )
            self._tensors |= _one_by_one(name, stored)

    def names(self) -> set[str]:
        """All tensor names, with one name per expert and projection."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return getattr(torch, _DTYPES[self._tensors[name].kind][0])

    def kinds(self) -> set[str]:
        """The dtypes of the stored tensors as safetensors writes them: F32, BF16, F16."""
        return {stored.kind for stored in self._tensors.values()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype; only its bytes are read."""
        import torch

        stored = self._tensors[name]
        data = bytearray(math.prod(stored.shape) * stored.itemsize)
        with stored.file.open("rb") as handle:
            handle.seek(stored.offset)
            if handle.readinto(data) != len(data):
                raise UserError(f"{stored.file} ends inside {name}; copy it again")
        return torch.frombuffer(data, dtype=self.dtype(name)).reshape(stored.shape)

    def refuse_second_head(self) -> None:
        """For a model with tied embeddings: `refuse_second_head` on the bytes of head and embedding."""
        if {HEAD, EMBEDDING} <= self.names():
            refuse_second_head(self.folder, same=self.read(HEAD).equal(self.read(EMBEDDING)))


def refuse_second_head(folder: str | Path, *, same: bool) -> None:
    """UserError where a tied config comes with an output head that is not the same as the embedding.

    transformers 5 and vLLM then keep the stored head, so the model is not tied, whatever the config says.
    """
    if not same:
        raise UserError(
            f"{folder}: config.json says tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings=false to train the stored head, or delete it from the files"
        )


def _one_by_one(name: str, stored: Stored) -> dict[str, Stored]:
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
