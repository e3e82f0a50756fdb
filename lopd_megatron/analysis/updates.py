"""Weight updates between a base and a series of checkpoints, one matrix at a time.

Memory is a few copies of the largest matrix. One JSON line per tensor is written as soon as it is known, so a
stopped analysis goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lopd_megatron.analysis import metrics
from lopd_megatron.analysis.modules import module_of
from lopd_megatron.analysis.spectrum import Spectrum, spectrum
from lopd_megatron.errors import UserError
from lopd_megatron.hf_folder import HfFolder
from lopd_megatron.progress import log_line, progress

Row = dict[str, Any]
"""One tensor at one checkpoint: `checkpoint`, `tensor`, `group`, `module`, `layer`, norms, spectrum."""


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on beside the weights."""

    top: int = 16
    """K of the subspace alignment."""
    exact_limit: int = 2048
    """Matrices whose shorter side is longer are decomposed by randomized methods."""


def analyze(
    base: Path, checkpoints: Sequence[Path], output: Path, settings: Settings, device: str = "cpu"
) -> list[Row]:
    """Rows of every tensor at every checkpoint; `checkpoints` in the order of training.

    Writes and reuses `output/tensors.jsonl`. UserError where the folders do not hold the same tensors.
    """
    folders = [HfFolder(path) for path in checkpoints]
    base_folder = HfFolder(base)
    for folder in folders:
        check_same_tensors(base_folder, folder)
    journal = _Journal(output / "tensors.jsonl", _key([base, *checkpoints], settings))
    names = sorted(base_folder.names())
    labels = checkpoint_labels(checkpoints)
    with progress(len(names), "analyzing updates", "tensors", initial=len(journal.done)) as bar:
        for name in names:
            if name in journal.done:
                continue
            journal.add(name, tensor_rows(name, base_folder, folders, labels, settings, device))
            bar.update(1)
    return [row for name in names for row in journal.done[name]]


def tensor_rows(
    name: str,
    base: HfFolder,
    folders: Sequence[HfFolder],
    labels: Sequence[str],
    settings: Settings,
    device: str = "cpu",
) -> list[Row]:
    """The rows of one tensor. The last checkpoint is decomposed first: the others are compared with it."""
    where = module_of(name)
    old = base.read(name).to(device, torch.float32)
    decompose = where.group in ("attention", "mlp") and old.dim() == 2
    rows: list[Row] = []
    final: Spectrum | None = None
    vectors = []
    for label, folder in zip(reversed(labels), reversed(folders), strict=True):
        stored = folder.read(name).to(device)
        delta = stored.float() - old
        row: Row = {"checkpoint": label, "tensor": name, **asdict(where), "shape": list(old.shape)}
        row["module"] = row.pop("name")
        row |= _norms(delta, old, stored)
        found = spectrum(delta, top=settings.top, exact_limit=settings.exact_limit) if decompose else None
        if found is not None:
            final = final or found
            row |= found.numbers() | {"exact": found.exact} | _against_final(found, final)
            vectors.append(found.left)
        rows.append(row)
    if len(vectors) >= 3:
        in_order = vectors[::-1]
        rows[0]["trajectory_concentration"] = metrics.trajectory_concentration(in_order)
    return rows[::-1]


def _norms(delta: torch.Tensor, old: torch.Tensor, stored: torch.Tensor) -> Row:
    norm = frobenius(delta)
    rounding = rounding_norm(stored)
    return {
        "frobenius": norm,
        "relative_frobenius": norm / (frobenius(old) or 1.0),
        "rounding_share": rounding / norm if norm > 0 else 0.0,
        "unchanged_share": float((delta == 0).double().mean()),
    }


def rounding_norm(stored: torch.Tensor) -> float:
    """The expected ‖·‖_F of what storing these weights in 16 bits rounded away: one ulp/√12 per element.

    0 for float32. Rounding noise is full-rank, so where it is a good part of ‖ΔW‖ the effective rank is
    that of the noise. A step smaller than half an ulp is lost altogether.
    """
    if stored.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    _, exponent = torch.frexp(stored.float())
    ulp = torch.finfo(stored.dtype).eps * torch.exp2(exponent - 1.0)
    return frobenius(ulp * (stored != 0)) / 12**0.5


def frobenius(tensor: torch.Tensor) -> float:
    """‖·‖_F, summed in float64 without a float64 copy of the whole."""
    return sum(float(rows.double().square().sum()) for rows in tensor.split(4096)) ** 0.5


def _against_final(found: Spectrum, final: Spectrum) -> Row:
    kept = min(found.right.shape[1], final.right.shape[1])
    return {
        "subspace_alignment": metrics.subspace_alignment(found.right[:, :kept], final.right[:, :kept]),
        "rank1_cosine": metrics.vector_cosine(found.left, final.left),
    }


def check_same_tensors(base: HfFolder, other: HfFolder) -> None:
    """UserError naming a tensor that only one folder has, or that has two shapes."""
    alone = sorted(base.names() ^ other.names())
    if alone:
        raise UserError(
            f"{other.folder} and {base.folder} do not hold the same tensors: {len(alone)} are in one only, "
            f"first {alone[0]!r}; compare checkpoints of one model"
        )
    for name in sorted(base.names()):
        if base.shape(name) != other.shape(name):
            raise UserError(
                f"{name} is {other.shape(name)} in {other.folder} and {base.shape(name)} in {base.folder}; "
                "compare checkpoints of one model"
            )


def checkpoint_labels(checkpoints: Sequence[Path]) -> list[str]:
    """The shortest distinct ends of the paths."""
    for depth in range(1, max(len(path.resolve().parts) for path in checkpoints)):
        labels = ["/".join(path.resolve().parts[-depth:]) for path in checkpoints]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"a checkpoint is given twice: {', '.join(map(str, checkpoints))}; name each once")


class _Journal:
    """Finished tensors, one JSON line each after a line that says what they are of."""

    def __init__(self, path: Path, key: str) -> None:
        self.done: dict[str, list[Row]] = {}
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        if lines and lines[0] == key + "\n":
            whole = [line for line in lines[1:] if line.endswith("\n")]  # a kill may have cut the last one
            self.done = {rows[0]["tensor"]: rows for rows in map(json.loads, whole)}
            if self.done:
                log_line(f"{path} holds {len(self.done)} tensors already")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join([key + "\n", *(json.dumps(rows) + "\n" for rows in self.done.values())]))

    def add(self, name: str, rows: list[Row]) -> None:
        self.done[name] = rows
        with self._path.open("a") as handle:
            handle.write(json.dumps(rows, allow_nan=False) + "\n")


def _key(folders: Sequence[Path], settings: Settings) -> str:
    """One line that changes when a folder's files or the settings do."""
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for folder in folders
        for file in sorted(folder.glob("*.safetensors"))
    ]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"weights": digest, **asdict(settings)})
