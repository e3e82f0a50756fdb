"""Conversion needs memory for a few tensors, whatever the size of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.model.names import weight_table
from lopd_megatron.model.safetensors_writer import SafetensorsWriter, TensorPlan
from lopd_megatron.model.student_spec import student_spec

HF = {
    "model_type": "qwen3",
    "vocab_size": 20_000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LARGEST = 20_096 * 512 * 4  # the padded embedding, bytes

PROGRAM = """
import sys
from pathlib import Path
from lopd_megatron.config import RunConfig
from lopd_megatron.model.student_spec import student_spec
from lopd_megatron.parallel import topology
config = RunConfig(); config.train.precision = "fp32"
topology.initialize(config.parallel, seed=1)
from lopd_megatron.model.checkpoint_reader import CheckpointTensors
from lopd_megatron.model.checkpoint_writer import write_checkpoint
from lopd_megatron.model.export import write_hf_folder
from lopd_megatron.model.weights import HfTensors

def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    action()
    return field("VmHWM") - before

def convert(folder):
    folder = Path(folder)
    spec = student_spec(folder, config)
    checkpoint, out = folder / "checkpoint", folder / "out"
    importing = peak(lambda: write_checkpoint(HfTensors(folder, spec), spec, checkpoint))
    exporting = peak(lambda: write_hf_folder(CheckpointTensors(checkpoint, spec), spec, out, folder))
    return importing, exporting

convert(sys.argv[1])  # loads every module once
print(*convert(sys.argv[2]))
"""


def write_random_model(folder: Path, layers: int) -> int:
    """A model with the given layers, written tensor by tensor; returns its bytes."""
    hf = HF | {"num_hidden_layers": layers}
    spec = student_spec(hf, RunConfig())
    h, f, q, kv, v = 512, 2048, 512, 128, 20_000
    shapes = {
        "embed_tokens": (v, h), "lm_head": (v, h), "q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h),
        "o_proj": (h, q), "gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f),
        "q_norm": (64,), "k_norm": (64,),
    }  # fmt: skip
    names = [name for weight in weight_table(spec).values() for name in weight.hf_names]
    plan = [TensorPlan(name, shapes.get(name.split(".")[-2], (h,)), torch.float32) for name in names]
    writer = SafetensorsWriter(folder, plan, max_shard_bytes=100_000_000)
    for tensor in plan:
        writer.write(tensor.name, torch.randn(tensor.shape))
    writer.close()
    (folder / "config.json").write_text(json.dumps(hf))
    return sum(tensor.num_bytes for tensor in plan)


@pytest.mark.dist
def test_peak_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """Bound: 4 × the largest tensor, for the parts of a parameter, the whole, its padding and its bytes."""
    write_random_model(tmp_path / "small", layers=1)
    total = write_random_model(tmp_path / "large", layers=24)
    assert total > 10 * LARGEST
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")],
        # Freed tensors go back to the system at once, so that the peak is of live ones.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    importing, exporting = map(int, result.stdout.split())
    print(f"model {total / 1e6:.0f} MB, largest tensor {LARGEST / 1e6:.0f} MB:")
    print(f"import peak {importing / 1e6:.0f} MB, export peak {exporting / 1e6:.0f} MB")
    assert importing < 4 * LARGEST
    assert exporting < 4 * LARGEST
