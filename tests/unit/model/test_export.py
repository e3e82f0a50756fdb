"""An export is whole and complete, and a later change of it is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lopd_megatron.model.export import NOTE, companions, export_problem, write_hf_folder
from lopd_megatron.model.names import hf_shapes, weight_table
from lopd_megatron.model.student_spec import StudentSpec
from lopd_megatron.model.verify import differing_tensors
from lopd_megatron.model.weights import HfTensors
from tests.unit.model.tiny import QWEN3, spec_of

MADE_OF = {"checkpoint": "iter_0000001"}
COPIED = [
    "LICENSE.txt",
    "added_tokens.json",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
NOT_COPIED = [
    "README.md",
    "optimizer.pt",
    "pytorch_model.bin",
    "trainer_state.json",
    "checkpoint-9/tokenizer.json",
]


@pytest.fixture
def spec() -> StudentSpec:
    return spec_of(QWEN3)


@pytest.fixture
def source(tmp_path: Path, spec: StudentSpec) -> Path:
    """A model folder with everything that people keep beside the weights."""
    folder = tmp_path / "source"
    tensors = {
        name: torch.randn(shape)
        for weight in weight_table(spec).values()
        for name, shape in zip(weight.hf_names, hf_shapes(weight, spec), strict=True)
    }
    for name in (*COPIED, *NOT_COPIED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(QWEN3))
    return folder


def export(source: Path, spec: StudentSpec, out: Path, **options: Any) -> Path:
    tensors = HfTensors(source, spec)
    write_hf_folder(tensors, spec, out, source, dtype=torch.float32, made_of=MADE_OF, **options)
    return out


def test_companions_travel_and_nothing_else(source: Path, spec: StudentSpec, tmp_path: Path) -> None:
    out = export(source, spec, tmp_path / "out", max_shard_bytes=100_000)
    assert companions(source) == COPIED
    assert companions(out) == COPIED
    assert differing_tensors(source, out) == []
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    shards = {path.name for path in out.glob("model*")}
    assert len(shards) > 2
    assert written == {*COPIED, *shards, "config.json", NOTE}
    assert export_problem(out, MADE_OF) == ""


def _flip_a_byte(file: Path) -> None:
    """As a disk does it: neither size nor modification time change."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _change_note(out: Path, **changes: Any) -> None:
    (out / NOTE).write_text(json.dumps(json.loads((out / NOTE).read_text()) | changes))


CHANGES: dict[str, Callable[[Path], object]] = {
    "model.safetensors was changed": lambda out: _flip_a_byte(out / "model.safetensors"),
    "model.safetensors is missing": lambda out: (out / "model.safetensors").unlink(),
    "config.json is missing": lambda out: (out / "config.json").unlink(),
    "tokenizer_config.json was changed": lambda out: (out / "tokenizer_config.json").write_text("{}"),
    "additional_chat_templates/tools.jinja is missing": lambda out: (
        out / "additional_chat_templates/tools.jinja"
    ).unlink(),
    "export.json is damaged": lambda out: (out / NOTE).write_text("{"),
    "export.json names no files": lambda out: _change_note(out, files={}),
    "made of another checkpoint": lambda out: _change_note(out, made_of={"checkpoint": "iter_0000002"}),
    "it has no export.json": lambda out: (out / NOTE).unlink(),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_a_change_is_noticed(source: Path, spec: StudentSpec, tmp_path: Path, problem: str) -> None:
    out = export(source, spec, tmp_path / "out")
    assert export_problem(out, MADE_OF) == ""
    CHANGES[problem](out)
    assert problem in export_problem(out, MADE_OF)
    export(source, spec, out, overwrite=True)
    assert export_problem(out, MADE_OF) == ""


def test_nothing_is_left_of_an_export_that_fails(source: Path, spec: StudentSpec, tmp_path: Path) -> None:
    class Failing(HfTensors):
        def read(self, weight: Any) -> torch.Tensor:
            if weight.name.startswith("decoder.layers.2"):
                raise OSError("the disk is gone")
            return super().read(weight)

    with pytest.raises(OSError, match="the disk is gone"):
        write_hf_folder(Failing(source, spec), spec, tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
