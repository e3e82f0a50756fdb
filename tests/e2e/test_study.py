"""A study in small: cells trained and measured in one process, and the report made of their results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
CELLS = ("sft", "lightning", "standard", "lightning_effopd_topk_kl")

PROGRAM = """
import shutil, sys
from pathlib import Path
from lopd_megatron.files import write_json
from lopd_megatron.inference.requests import ScoreRequest
from lopd_megatron.study.runner import StudyRunner
from lopd_megatron.study.workbench import LocalModel
from lopd_megatron.recipes.study.tiny import Study

study = Study(0, sys.argv[1])
problems = f"{study.models}/task/problems"
runner = StudyRunner(
    Path(study.root),
    0,
    study.cells()[0].parts[0].config,
    study.held_out,
    valid=f"{problems}/valid.jsonl",
    test=f"{problems}/test.jsonl",
)
for cell in study.cells():
    if cell.name in sys.argv[2:]:
        for part in cell.parts:
            part.config.train.train_iters = 5
        write_json(cell.result_path, runner.run(cell))

model = LocalModel(runner.bench, f"{study.root}/swapped")
scores = []
for source in ("sft", "lightning"):
    shutil.copytree(f"{study.root}/{source}/hf", model.folder, dirs_exist_ok=True)
    (score,) = model.score([ScoreRequest((0, 0), [1, 5, 6, 7], 1)], topk=0)
    scores.append(score.logprobs.tolist())
write_json(Path(study.root) / "swapped.json", scores)
"""


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose teacher and base student are the random models."""
    folder = tmp_path_factory.mktemp("study")
    task = folder / "models" / "task"
    sizes = [
        "--teacher-samples=8",
        "--base-samples=8",
        "--sft-prompts=64",
        "--opd-prompts=64",
        "--problems=24",
    ]
    run(sys.executable, "tools/make_tiny_task.py", "--output", str(task), *sizes)
    for name, source in (("teacher", "teacher_init"), ("base", "student_init")):
        shutil.copytree(task / source, folder / "models" / name / "hf")
    run(sys.executable, "-c", PROGRAM, str(folder), *CELLS)
    return folder


def test_every_cell_is_measured_with_its_cost(root: Path) -> None:
    for name in CELLS:
        result = json.loads((root / "seed_0" / name / "result.json").read_text())
        assert set(result["test"]) == {"greedy", "sampled", "reverse_kl"}
        stages = {"generate", "scores", "sync"} if name == "standard" else {"rollouts", "scores", "dataset"}
        assert set(result["seconds"]) == stages | {"train"}
        assert all(seconds >= 0 for seconds in result["seconds"].values())
        assert [point["iteration"] for point in result["curve"]] == [5]
    assert [search["iteration"] for search in result["effopd"]] == [1, 2, 4]


def test_new_weights_under_an_old_name_are_read_again(root: Path) -> None:
    """A curve is measured in one folder, written over each time: its name does not say what is in it."""
    first, second = json.loads((root / "seed_0" / "swapped.json").read_text())
    assert first != second


def test_the_report_comes_from_the_results(root: Path, tmp_path: Path) -> None:
    from lopd_megatron.recipes.study.claims import CLAIMS
    from lopd_megatron.study.report import collect, write_report

    results = collect(root, tmp_path / "study" / "results.json", lambda result: True)
    groups = {"Core: a": ["sft", "lightning", "standard", "more_sft"]}
    write_report(tmp_path / "study.md", results, groups, CLAIMS, "# Study")
    text = (tmp_path / "study.md").read_text()
    assert "one seed: open" in text
    assert "not run" in text
    assert "`more_sft`" in text.split("## What was not run")[1]
    assert (tmp_path / "study" / "core.png").stat().st_size > 0
    kept = tmp_path / "study" / "results.json"
    assert collect(tmp_path, kept, lambda result: True) == results  # without the runs
    assert collect(root, kept, lambda result: result["cell"] != "sft").keys() == results.keys() - {"sft"}
