"""The whole pipeline on its real parts, small: every program of the demo with few steps and few prompts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from lopd_megatron.config import RunConfig
from lopd_megatron.recipes import tiny

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]

SFT = (sys.executable, "-m", "lopd_megatron", "run", "--stages=prompts,rollouts,dataset,train,export")
RECIPES = """
from lopd_megatron.config import RunConfig
from lopd_megatron.recipes import tiny

def sft() -> RunConfig:
    config = tiny.sft({root!r})
    config.parallel.tensor_model_parallel_size = 1
    config.parallel.pipeline_model_parallel_size = 1
    config.train.train_iters = 4
    config.train.log_interval = 1
    return config
"""


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished small pipeline, whose teacher and base student are random models.

    A shell runs SFT on one rank, NeMo-Run's local executor the distillation on TP2 × PP2, by NeMo-Run's own
    command line, where every recipe is a factory; two workers take turns to roll out.
    """
    root = tmp_path_factory.mktemp("pipeline")
    sizes = ["--teacher-samples=64", "--base-samples=64", "--sft-prompts=64", "--opd-prompts=200"]
    run(sys.executable, "tools/make_tiny_task.py", "--output", f"{root}/task", "--problems=64", *sizes)
    for name, source in (("teacher", "teacher_init"), ("base", "student_init")):
        shutil.copytree(root / "task" / source, root / name / "hf")
    (root / "recipes.py").write_text(RECIPES.format(root=str(root)))
    run(*SFT, "--recipe", f"{root}/recipes.py:sft")

    task = root / "task"
    overrides = [
        f"run_dir={root}/lightning_opd",
        f"model.student={root}/sft/hf",
        f"model.teacher={root}/teacher/hf",
        f"prompts.input=[{task}/prompts/opd.jsonl]",
        f"prompts.contamination_files=[{task}/problems/valid.jsonl,{task}/problems/test.jsonl]",
        f"evaluation.input=[{task}/problems/test.jsonl]",
        "prompts.num_shards=2",
        "launch.stages.rollouts.array=2",
        "train.train_iters=12",
        "train.global_batch_size=32",
        "train.log_interval=1",
    ]
    factory = ["lopd_megatron.launch.nemo_run", "--factory", "tiny_lightning_opd", "--yes"]
    run(sys.executable, "-m", *factory, f"overrides={' '.join(overrides)}")
    return root


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_training_moves_towards_the_teacher(pipeline: Path) -> None:
    rows = metrics(pipeline / "lightning_opd")
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    first, last = rows[:3], rows[-3:]
    assert np.mean([r["k2"] for r in last]) < np.mean([r["k2"] for r in first])
    assert all(np.isfinite(r["grad_norm"]) and r["grad_norm"] > 0 for r in rows)


def test_held_out_prompts_are_validated_and_lie_apart(pipeline: Path) -> None:
    """Of 200 rollouts 32 are held out; 100 answers for SFT are too few to spare any."""
    dataset = pipeline / "lightning_opd" / "dataset"
    train, valid = (
        json.loads((dataset / f"{part}.manifest.json").read_text()) for part in ("train", "valid")
    )
    assert (train["documents"], valid["documents"], train["dropped"]["held_out"]) == (168, 32, 32)
    assert train["stops"]["stopped"] > 0
    lines = (pipeline / "lightning_opd" / "validation.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["iteration"] for line in found] == [0, 10, 12]
    assert {(line["metric"], line["documents"]) for line in found} == {("k2", 32)}
    assert not (pipeline / "sft" / "dataset" / "valid.manifest.json").exists()
    assert not (pipeline / "sft" / "validation.jsonl").exists()


def test_the_first_log_probs_are_those_of_the_files(pipeline: Path) -> None:
    """vLLM's scores on disk and Megatron's log-probs at step 1 speak of the same tokens.

    Step 1 sees 32 of the 200 rollouts before any update. Its student log-probs must be the sampler's:
    the importance ratio is 1 up to fp32 noise between two engines (1e-4); a shift by one would be far off.
    """
    row = metrics(pipeline / "lightning_opd")[0]
    assert row["importance_ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert row["importance_ratio_std"] < 1e-3


def test_every_stage_left_its_files(pipeline: Path) -> None:
    opd = pipeline / "lightning_opd"
    rollouts, scored = (
        [row for i in (0, 1) for row in pq.read_table(opd / part / f"shard-0000{i}.parquet").to_pylist()]
        for part in ("rollouts", "scores")
    )
    assert len(rollouts) == 200
    for before, after in zip(rollouts, scored, strict=True):
        assert before["response_tokens"] == after["response_tokens"]
        assert len(after["teacher_logprobs"]) == len(after["response_tokens"]) > 0
        assert (before["finish_reason"] == "stop") == (before["response_tokens"][-1] == 2)  # <eos> is kept
    assert (opd / "logs/nemorun/experiments").exists()  # and not in the home folder
    manifest = json.loads((opd / "dataset" / "train.manifest.json").read_text())
    assert manifest["lineage"]
    evaluation = json.loads((opd / "evaluation" / "lightning_opd.json").read_text())
    assert 0 <= evaluation["accuracy"] <= 1


def test_the_export_is_a_hugging_face_model(pipeline: Path) -> None:
    """transformers loads it and it differs from the student it started from."""
    model = AutoModelForCausalLM.from_pretrained(pipeline / "lightning_opd" / "hf", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(pipeline / "sft" / "hf", dtype=torch.float32)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in start.named_parameters()}
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(moved)


def test_logits_of_the_export_equal_megatron(pipeline: Path) -> None:
    out = run(
        sys.executable,
        "tools/convert_checkpoint.py",
        "verify",
        f"--hf={pipeline}/lightning_opd/hf",
        f"--checkpoint={pipeline}/lightning_opd/checkpoints",
    )
    assert "SAME" in out


def test_a_second_run_does_nothing(pipeline: Path) -> None:
    """Every program of the chain sees that its output is there, and writes none of it again."""
    products = ("*.safetensors", "*.parquet", "*.bin", "*.json", "*.distcp")

    def written() -> dict[Path, int]:
        files = [p for name in products for p in (pipeline / "sft").rglob(name)]
        return {p: p.stat().st_mtime_ns for p in files if p.name != "config.json"}  # of the last call

    before = written()
    assert len(before) > 5
    run(*SFT, "--recipe", f"{pipeline}/recipes.py:sft")
    assert written() == before


def test_the_demo_is_made_of_the_same_recipes() -> None:
    assert isinstance(tiny.lightning_opd(), RunConfig)
    out = run(sys.executable, "tools/demo.py", "--dry-run")
    assert "torchrun" in out
    assert "recipes/tiny.py:lightning_opd" in out
