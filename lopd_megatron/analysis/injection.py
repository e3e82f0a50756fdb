"""Models between a base and a checkpoint, as Hugging Face folders to be evaluated.

Two experiments of EffOPD (arXiv 2605.11739): put the update of a few neighbouring layers alone into the base
(which layers carry the gain?), and keep only a part of every update's spectrum (how low-rank is it?).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from lopd_megatron.analysis.metrics import top_fraction_count
from lopd_megatron.analysis.modules import module_of
from lopd_megatron.analysis.updates import check_same_tensors
from lopd_megatron.errors import UserError
from lopd_megatron.hf_folder import HfFolder
from lopd_megatron.model.safetensors_writer import SafetensorsWriter, TensorPlan
from lopd_megatron.progress import progress

Modules = Literal["attention", "mlp", "both"]
Edit = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(name, base tensor, trained tensor) → the tensor to write."""

MAX_SHARD_BYTES = 5 * 1000**3


def layer_window(first: int, last: int, modules: Modules) -> Edit:
    """The trained tensors of layers first … last, both included, and the base ones elsewhere: exact."""

    def choose(name: str, base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        where = module_of(name)
        inside = where.layer is not None and first <= where.layer <= last
        groups = ("attention", "mlp") if modules == "both" else (modules,)
        return trained if inside and where.group in groups else base

    return choose


def keep_components(part: Literal["top", "bottom"], share: float) -> Edit:
    """base + a part of ΔW of every attention and MLP matrix; everything else as trained.

    "top": the leading ⌈r·share⌉ components, scaled to the Frobenius norm of the whole ΔW, so that only the
    direction differs. "bottom": the last ⌊r·share⌋ as they are. One full SVD per matrix.
    """

    def edit(name: str, base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        if module_of(name).group not in ("attention", "mlp") or base.dim() != 2:
            return trained
        delta = trained.double() - base.double()
        return (base.double() + spectral_part(delta, part, share)).to(trained.dtype)

    return edit


def spectral_part(delta: torch.Tensor, part: Literal["top", "bottom"], share: float) -> torch.Tensor:
    """ΔW with some of its singular components: see `keep_components`."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rank = int(torch.linalg.matrix_rank(delta))
    if rank == 0:
        return delta
    if part == "bottom":
        chosen = slice(rank - int(rank * share), rank)
        return left[:, chosen] * values[chosen] @ right[chosen]
    chosen = slice(0, top_fraction_count(rank, share))
    return left[:, chosen] * values[chosen] @ right[chosen] * (values.norm() / values[chosen].norm())


def write_model(base: Path, checkpoint: Path, output: Path, edit: Edit) -> None:
    """A whole Hugging Face folder, tensor by tensor, or none. Config and tokenizer are the checkpoint's."""
    if output.exists():
        raise UserError(f"output {output} exists; remove it or choose another folder")
    sources = HfFolder(base), HfFolder(checkpoint)
    check_same_tensors(*sources)
    names = sorted(sources[0].names())
    plan = [TensorPlan(name, sources[1].shape(name), sources[1].dtype(name)) for name in names]
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        writer = SafetensorsWriter(temporary, plan, MAX_SHARD_BYTES)
        with progress(len(names), f"writing {output}", "tensors") as bar:
            for name in names:
                writer.write(name, edit(name, *(source.read(name) for source in sources)))
                bar.update(1)
        writer.close()
        for file in checkpoint.iterdir():
            if file.is_file() and "safetensors" not in file.name:
                shutil.copyfile(file, temporary / file.name)
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
