"""The example of docs/extending.md trains from a folder outside the repository; mistakes are one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.documents import Document
from lopd_megatron.loss.trained_tokens import TrainedTokens
from tests.e2e.random_models import VOCABULARY, save_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "own_objective.py"
DOCUMENTS, PROMPT, LENGTH = 32, 4, 12


def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    mask = np.repeat(np.array([0, 1], np.uint8), [PROMPT, LENGTH - PROMPT])
    found = []
    for _ in range(DOCUMENTS):
        logprobs = np.where(mask, -rng.exponential(2.0, LENGTH), 0.0).astype(np.float32)
        tokens = rng.integers(0, VOCABULARY, LENGTH).astype(np.int32)
        found.append(Document(tokens, mask, teacher_logprobs=logprobs))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(EXAMPLE, folder)
    save_model(folder / "sft" / "hf", 0)
    write_dataset(folder / "lightning_opd" / "dataset" / "train", documents())
    return folder


def train(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lopd_megatron", "train", f"own_objective.py:confident(root='{folder}')"]
    small = ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1"]
    small += ["train.train_iters=3", "train.global_batch_size=8", "train.log_interval=1", "model.teacher="]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *small, *settings],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def test_the_example_trains_from_another_folder(folder: Path) -> None:
    done = train(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "confident" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    largest = max(row["grad_norm"] for row in rows)
    assert f"largest gradient norm: {largest:.3f}" in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.objective=own_objective:WRONG", "own_objective has no 'WRONG'; it has "),
        ("loss.objective=own_objective:THRESHOLD", "is a float; it must be a ObjectiveSpec"),
        ("loss.objective=no_such_module:X", "the module must lie beside the recipe or on PYTHONPATH"),
        ("loss.objective=lightning", "did you mean 'lightning_opd'? there are sft, lightning_opd"),
        ("train.hooks=[own_objective:confident]", "is no subclass of lopd_megatron.train.state.Hook"),
        ("loss.objective=opd_importance", "no column rollout_logprobs (there are "),
    ],
)
def test_a_wrong_name_is_one_line(folder: Path, setting: str, message: str) -> None:
    done = train(folder, setting, f"run_dir={folder}/wrong")
    assert done.returncode == 2, done.stderr[-3000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_its_derivative_is_that_of_autograd() -> None:
    spec = importlib.util.spec_from_file_location("own_objective", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rng = torch.Generator().manual_seed(0)
    student = (-torch.rand(50, generator=rng, dtype=torch.float64) * 4).requires_grad_()
    teacher = -torch.rand(50, generator=rng, dtype=torch.float64) * 4
    none = torch.zeros(50, dtype=torch.int64)
    tokens = TrainedTokens(none, none, none, none, none, teacher, None, None, None)
    loss, weights = example.confident_teacher(student, tokens, LossConfig())
    loss.sum().backward()
    torch.testing.assert_close(weights, student.grad, atol=0, rtol=0)
