"""Weights go to Megatron and back bit for bit, in every layout, from the live model and from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from lopd_megatron.config import RunConfig
from lopd_megatron.model.student_spec import student_spec
from lopd_megatron.parallel import topology as grid
from tests.distributed.tiny_hf import FAMILIES, save_model
from tests.distributed.world import run_world

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp4": {"tensor_model_parallel_size": 4},  # more ranks than the 2 query groups
    "pp2_vp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "pp4": {"pipeline_model_parallel_size": 4},
    "ep4": {"expert_model_parallel_size": 4},
    "tp2_ep2_pp2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}
CASES = [
    ("qwen3", "tp2_pp2", "fp32"),
    ("qwen3", "tp4", "bf16"),
    ("qwen3", "pp2_vp2", "fp32"),
    ("qwen3_tied", "tp2_pp2", "bf16"),
    ("qwen3_tied", "pp4", "fp32"),
    ("qwen2", "tp2_pp2", "fp32"),
    ("llama31", "tp2_pp2", "fp32"),
    ("qwen3_moe", "ep4", "fp32"),
    ("qwen3_moe", "tp2_ep2_pp2", "bf16"),
    ("qwen3_moe_mixed", "tp2_ep2_pp2", "fp32"),
]


def run_config(layout: str, precision: str) -> RunConfig:
    config = RunConfig()
    config.train.precision = precision  # type: ignore[assignment]
    for name, value in LAYOUTS[layout].items():
        setattr(config.parallel, name, value)
    return config


def save_checkpoint(chunks: list, folder: Path, topology: grid.Topology) -> None:
    """The model part of a checkpoint as the training loop writes it."""
    from megatron.core import dist_checkpointing

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": topology.dp_cp_group,
    }
    if topology.rank == 0:
        folder.mkdir()
    dist.barrier()
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    state = {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)
    }
    dist_checkpointing.save(state, str(folder))


def there_and_back(root: str, cases: list[tuple[str, str, str]]) -> None:
    from lopd_megatron.model.student import build_student
    from lopd_megatron.model.weights import export_hf, load_hf

    for family, layout, precision in cases:
        config = run_config(layout, precision)
        topology = grid.initialize(config.parallel, seed=1)
        source = f"{root}/{family}"
        spec = student_spec(source, config)
        chunks = build_student(spec, topology)
        load_hf(chunks, source, spec, topology)
        name = f"{root}/{family}-{layout}-{precision}"
        export_hf(chunks, spec, topology, f"{name}-live", source)
        save_checkpoint(chunks, Path(f"{name}-checkpoint"), topology)
        grid.destroy()


def from_checkpoint(root: str, cases: list[tuple[str, str, str]]) -> None:
    from lopd_megatron.model.checkpoint_reader import CheckpointTensors
    from lopd_megatron.model.export import write_hf_folder

    for family, layout, precision in cases:
        source = Path(f"{root}/{family}")
        name = f"{root}/{family}-{layout}-{precision}"
        spec = student_spec(source, RunConfig())
        reader = CheckpointTensors(f"{name}-checkpoint", spec)
        write_hf_folder(reader, spec, Path(f"{name}-exported"), source, max_shard_bytes=50_000)


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.dist
def test_round_trip_is_bitwise_in_every_layout(tmp_path: Path) -> None:
    for family in FAMILIES:
        save_model(family, tmp_path / family)
    run_world(there_and_back, 4, str(tmp_path), CASES)
    run_world(from_checkpoint, 1, str(tmp_path), CASES)
    for family, layout, precision in CASES:
        original = folder_tensors(tmp_path / family)
        if precision == "bf16":
            original = {name: tensor.bfloat16() for name, tensor in original.items()}
        for way in ("live", "exported"):
            folder = tmp_path / f"{family}-{layout}-{precision}-{way}"
            found = folder_tensors(folder)
            assert found.keys() == original.keys(), folder
            for name, tensor in original.items():
                assert found[name].dtype == tensor.dtype, (folder, name)
                assert torch.equal(found[name], tensor), (folder, name)


def other_configs(model: str, folder: str) -> list[str]:
    """What an export says of a checkpoint under configurations that are not its own."""
    from lopd_megatron.errors import UserError
    from lopd_megatron.model.checkpoint_reader import CheckpointTensors
    from lopd_megatron.model.checkpoint_writer import write_checkpoint
    from lopd_megatron.model.names import weight_table
    from lopd_megatron.model.weights import HfTensors

    config = run_config("tp4", "fp32")
    config.parallel.tensor_model_parallel_size = 1
    grid.initialize(config.parallel, seed=1)
    spec = student_spec(model, config)
    checkpoint = Path(folder) / "checkpoint"
    write_checkpoint(HfTensors(Path(model), spec), spec, checkpoint)
    CheckpointTensors(checkpoint, spec)
    stored = json.loads((Path(model) / "config.json").read_text())
    messages = []
    for name, change in (("num_hidden_layers", -1), ("intermediate_size", 8), ("vocab_size", -8)):
        other = Path(folder) / name
        other.mkdir()
        (other / "config.json").write_text(
            json.dumps(stored | {name: stored[name] + change, "layer_types": None})
        )
        spec = student_spec(str(other), config)
        with pytest.raises(UserError) as error:
            CheckpointTensors(checkpoint, spec).read(next(iter(weight_table(spec).values())))
        messages.append(str(error.value))
    return messages


def test_a_checkpoint_is_not_read_under_another_configuration(tmp_path: Path) -> None:
    save_model("qwen3", tmp_path / "model")
    ((layers, sizes, vocabulary),) = run_world(other_configs, 1, str(tmp_path / "model"), str(tmp_path))
    assert "layers, the configuration" in layers
    assert "linear_fc1.weight has shape" in sizes
    assert "are no padding" in vocabulary
