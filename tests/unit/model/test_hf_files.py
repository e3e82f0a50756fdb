"""Reading and writing Hugging Face folders tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopd_megatron.errors import UserError
from lopd_megatron.hf_folder import HfFolder
from lopd_megatron.model.export import check_output
from lopd_megatron.model.safetensors_writer import SafetensorsWriter, TensorPlan
from lopd_megatron.model.weights import HfTensors
from tests.unit.model.tiny import QWEN3, spec_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_shards_are_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{i}": torch.randn(3, i + 1).to(dtype) for i in range(5)}
    plan = [TensorPlan(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(tmp_path, plan, max_shard_bytes=30)
    for name, tensor in tensors.items():
        writer.write(name, tensor.float())  # converted to the planned dtype
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        found = load_file(tmp_path / index["weight_map"][name])[name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, [TensorPlan("t", (2,), torch.float32)], max_shard_bytes=100)
    writer.write("t", torch.ones(2))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_order_and_the_shapes_are_held(tmp_path: Path) -> None:
    plan = [TensorPlan("a", (2,), torch.float32), TensorPlan("b", (2,), torch.float32)]
    writer = SafetensorsWriter(tmp_path, plan, max_shard_bytes=100)
    with pytest.raises(AssertionError):
        writer.write("b", torch.ones(2))
    writer.write("a", torch.ones(2))
    with pytest.raises(AssertionError, match="1 planned tensors not written"):
        writer.close()


def test_fused_experts_read_one_by_one(tmp_path: Path) -> None:
    gate_up, down = torch.randn(4, 6, 5), torch.randn(4, 5, 3)
    prefix = "model.layers.0.mlp.experts"
    save_file(
        {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}, tmp_path / "model.safetensors"
    )
    folder = HfFolder(tmp_path)
    assert len(folder.names()) == 12
    for expert in range(4):
        gate, up = gate_up[expert].chunk(2)
        assert torch.equal(folder.read(f"{prefix}.{expert}.gate_proj.weight"), gate)
        assert torch.equal(folder.read(f"{prefix}.{expert}.up_proj.weight"), up)
        assert torch.equal(folder.read(f"{prefix}.{expert}.down_proj.weight"), down[expert])
    assert folder.shape(f"{prefix}.0.gate_proj.weight") == (3, 5)
    assert folder.shape(f"{prefix}.0.down_proj.weight") == (5, 3)


def test_missing_and_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(211, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks \d+ tensor\(s\): lm_head.weight"):
        HfTensors(tmp_path, spec_of(QWEN3))
    spec = spec_of(QWEN3)
    from lopd_megatron.model.names import weight_table

    names = [name for weight in weight_table(spec).values() for name in weight.hf_names]
    tensors = {name: torch.zeros(1) for name in [*names, "model.layers.9.extra.weight"]}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has unknown 1 tensor\(s\): model.layers.9.extra.weight"):
        HfTensors(tmp_path, spec)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors does not exist"):
        HfFolder(tmp_path)


def test_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    spec = spec_of(QWEN3)
    from lopd_megatron.model.names import weight_table

    table = weight_table(spec)
    names = [name for weight in table.values() for name in weight.hf_names]
    save_file({name: torch.zeros(200, 64) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has 200 rows and config.json says vocab_size 211"):
        HfTensors(tmp_path, spec).read(table["embedding.word_embeddings.weight"])


def test_outputs_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    check_output(out, source, overwrite=False)
    (out / "x").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        check_output(out, source, overwrite=False)
    check_output(out, source, overwrite=True)
    with pytest.raises(UserError, match="is the source model itself"):
        check_output(source, source, overwrite=True)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
        HfFolder(tmp_path).read("a")
    file.write_bytes(b"\x20\0\0\0\0\0\0\0 not a header at all, only text ")
    with pytest.raises(UserError, match="is no whole safetensors file"):
        HfFolder(tmp_path)
    save_file({"a": torch.ones(3, dtype=torch.int64)}, file)
    with pytest.raises(UserError, match=r"a in .* is I64; only F32, BF16, F16 are supported"):
        HfFolder(tmp_path)
