"""`torchrun -m lopd_megatron.train` as a user starts it: kill −9, start again, one-line errors."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from lopd_megatron.cli import load_recipe
from lopd_megatron.train.metrics import read_metrics
from tests.distributed.tiny_run import write_inputs
from tests.distributed.world import ROOT, run_world

pytestmark = pytest.mark.dist

RECIPE = """
from pathlib import Path
from lopd_megatron.config import RunConfig
from tests.distributed.tiny_run import layout, tiny_config

def opd() -> RunConfig:
    settings = layout(tp=2, train__train_iters=12, train__precision="bf16")
    return tiny_config(Path({inputs!r}), Path({inputs!r}) / "run", **settings)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "recipe.py").write_text(RECIPE.format(inputs=str(folder)))
    return folder


def start(inputs: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen:
    launcher = [
        sys.executable,
        "-m",
        "lopd_megatron.launch.torchrun",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    program = ["-m", "lopd_megatron.train", "--recipe", f"{inputs}/recipe.py:opd", *overrides]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(inputs),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*launcher, *program],
        cwd=ROOT,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, errors = process.communicate(timeout=240)
    return process.returncode, output + errors


def train_straight(recipe: str, run_dir: str) -> None:
    from lopd_megatron.train.loop import run

    config = load_recipe(recipe)
    config.run_dir = run_dir
    assert run(config) == 0


def final_tensors(folders: list[str]) -> list[dict[str, torch.Tensor]]:
    from megatron.core import dist_checkpointing

    return [
        {
            k: v
            for k, v in dist_checkpointing.load_plain_tensors(folder).items()
            if isinstance(v, torch.Tensor)
        }
        for folder in folders
    ]


def test_kill_9_and_start_again(inputs: Path) -> None:
    run_dir, straight = inputs / "killed", inputs / "straight"
    process = start(inputs, f"run_dir={run_dir}")
    pointer = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    while not pointer.exists() and process.poll() is None:
        time.sleep(0.01)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    finish(process)
    assert int(pointer.read_text()) < 12
    code, text = finish(start(inputs, f"run_dir={run_dir}"))
    assert code == 0, text
    assert "resumed from" in text
    run_world(train_straight, 2, f"{inputs}/recipe.py:opd", str(straight))
    folders = [str(folder / "checkpoints" / "iter_0000012") for folder in (run_dir, straight)]
    killed, whole = run_world(final_tensors, 1, folders)[0]
    assert killed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (run_dir, straight)]
    one, other = ([(line["iteration"], line["loss"]) for line in part] for part in lines)
    assert one == other


@pytest.mark.parametrize(
    ("overrides", "ranks", "needed"),
    [
        ((), 1, "world size 1 is not a multiple of TP·PP·CP = 2·1·1 = 2"),
        (("data.prefixes=[nowhere/train]",), 2, "nowhere/train"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    inputs: Path, overrides: tuple[str, ...], ranks: int, needed: str
) -> None:
    code, text = finish(start(inputs, *overrides, ranks=ranks))
    assert code == 2, text
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1, text
    assert needed in errors[0]
    assert "Traceback" not in text
    assert not (inputs / "run").exists()
