"""Whole tensors, one at a time, into a complete Hugging Face folder."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from lopd_megatron.errors import UserError
from lopd_megatron.files import fsync_path, sha256_file, write_json
from lopd_megatron.hf_folder import read_json
from lopd_megatron.model.names import Weight, split, weight_table
from lopd_megatron.model.safetensors_writer import SafetensorsWriter, TensorPlan
from lopd_megatron.model.student_spec import StudentSpec
from lopd_megatron.progress import progress

MAX_SHARD_BYTES = 5 * 1000**3

NOTE = "export.json"
"""What an export was made of, and the hash of each of its files."""

_TEMPLATES = "additional_chat_templates"
# What travels along with the weights, where the source folder has it; names in any case.
_COMPANIONS = (
    "generation_config.json",
    "*token*.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*processor_config.json",
    "licen[cs]e*",
    "notice*",
    "use_policy*",
)


class WholeTensors(Protocol):
    """A source of whole Megatron tensors: the live model or a checkpoint."""

    dtype: torch.dtype

    def shape(self, weight: Weight) -> tuple[int, ...]: ...

    def read(self, weight: Weight) -> torch.Tensor: ...


def write_hf_folder(
    source: WholeTensors,
    spec: StudentSpec,
    out_folder: Path,
    source_hf_folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    lineage: dict[str, Any] | None = None,
    made_of: dict[str, Any] | None = None,
) -> None:
    """Write every weight of the table from `source`, with config, tokenizer and the other companions.

    Memory: the largest parameter and its parts, whatever the size of the model. The folder appears whole or
    not at all. `dtype` None keeps the dtype of `source`. With `made_of`, `export_problem` can tell later
    whether the folder is still what was written; the files are then read once more, to be hashed.
    """
    check_output(out_folder, source_hf_folder, overwrite=overwrite)
    dtype = dtype or source.dtype
    temporary = out_folder.with_name(f".{out_folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        writer = SafetensorsWriter(temporary, list(_plan(source, spec, dtype)), max_shard_bytes)
        table = weight_table(spec)
        with progress(len(table), f"writing {out_folder}", "tensors") as bar:
            for weight in table.values():
                parts = split(weight, source.read(weight), spec)
                for name, tensor in zip(weight.hf_names, parts, strict=True):
                    writer.write(name, tensor)
                bar.update(1)
        writer.close()
        copy_companions(source_hf_folder, temporary, spec, dtype)
        if lineage is not None:
            write_json(temporary / "lineage.json", lineage)
        if made_of is not None:
            files = [path for path in temporary.rglob("*") if path.is_file()]
            names = sorted(path.relative_to(temporary).as_posix() for path in files)
            write_json(temporary / NOTE, {"made_of": made_of, "files": _hashes(temporary, names)})
        _replace(temporary, out_folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_output(out_folder: Path, source_hf_folder: Path, *, overwrite: bool) -> None:
    """Refuse to write over the source, or over anything unless asked to."""
    if out_folder.resolve() == source_hf_folder.resolve():
        raise UserError(f"output {out_folder} is the source model itself; choose another folder")
    if out_folder.exists() and any(out_folder.iterdir()) and not overwrite:
        raise UserError(f"output {out_folder} is not empty; remove it, choose another or pass --overwrite")


def copy_companions(source: Path, target: Path, spec: StudentSpec, dtype: torch.dtype) -> None:
    """config.json with the dtype of the weights, and the files that the weights alone are useless without."""
    config = {key: value for key, value in spec.hf_config.items() if key not in ("dtype", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)
    for name in companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def companions(source: Path) -> list[str]:
    """The files of a model folder that an export copies, by their path in it, sorted."""
    names = [path.name for path in source.iterdir() if path.is_file()]
    found = [name for name in names if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _COMPANIONS)]
    templates = [f"{_TEMPLATES}/{path.name}" for path in (source / _TEMPLATES).glob("*.jinja")]
    return sorted(found + templates)


def export_problem(folder: Path, made_of: dict[str, Any]) -> str:
    """Why a folder is not the export of `made_of` that was written, or "" where it is. Reads every byte."""
    if not (folder / NOTE).is_file():
        return f"it has no {NOTE}"
    try:
        note = read_json(folder / NOTE)
    except UserError:
        return f"{NOTE} is damaged"
    if note.get("made_of") != made_of:
        return "it was made of another checkpoint, or with other files of the model"
    written = note.get("files")
    if not isinstance(written, dict) or not written:
        return f"{NOTE} names no files"
    present = [name for name in written if (folder / name).is_file()]
    if missing := sorted(written.keys() - set(present)):
        return f"{missing[0]} is missing"
    hashes = _hashes(folder, present)
    return next((f"{name} was changed" for name in present if hashes[name] != written[name]), "")


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
        return dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names), strict=True))


def _plan(source: WholeTensors, spec: StudentSpec, dtype: torch.dtype) -> Iterator[TensorPlan]:
    for weight in weight_table(spec).values():
        whole = torch.empty(source.shape(weight), device="meta")
        for name, part in zip(weight.hf_names, split(weight, whole, spec), strict=True):
            yield TensorPlan(name, tuple(part.shape), dtype)


def _replace(temporary: Path, out_folder: Path) -> None:
    """Put the finished folder in place; an old one is moved aside first and then dropped."""
    for path in [*temporary.rglob("*"), temporary]:
        fsync_path(path)
    old = out_folder.with_name(f".{out_folder.name}.{os.getpid()}.old")
    if out_folder.exists():
        os.replace(out_folder, old)
    os.replace(temporary, out_folder)
    fsync_path(out_folder.parent)
    shutil.rmtree(old, ignore_errors=True)
