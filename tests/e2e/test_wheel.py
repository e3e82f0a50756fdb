"""The wheel, installed where the checkout is not: the command works from any folder."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def lopd(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script in an environment that sees the packages of this one but not the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = ["install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    site = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment / "bin" / "lopd"


def run(lopd: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(lopd), *words], cwd=folder, capture_output=True, text=True, timeout=120, env=environment
    )


def test_the_wheel_holds_one_package_and_its_recipes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lopd_megatron"}
    assert {"lopd_megatron/recipes/qwen3_32b.py", "lopd_megatron/recipes/study/tiny.py"} <= set(names)
    assert "lopd_megatron/report/page.html" in names


def test_it_is_the_installed_package_that_runs(lopd: Path, tmp_path: Path) -> None:
    code = "import lopd_megatron, lopd_megatron.recipes.tiny as t; print(lopd_megatron.__file__, t.__file__)"
    command = [str(lopd.parent / "python"), "-c", code]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert all(str(lopd.parents[1]) in file for file in found), found


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], "prompts → rollouts"),
        (["recipes"], "recipes/qwen3_32b.py"),
        (["settings"], "parallel.tensor_model_parallel_size"),
        (["settings", "loss"], "loss.advantage_clip = 10.0"),
        (
            ["show", "recipes/qwen3_32b.py:lightning_opd(gpus=64)", "--diff"],
            "pipeline_model_parallel_size   4",
        ),
        (["show", "recipes/tiny.py:sft"], '"train_iters": 50'),
        (
            ["run", "recipes/qwen3_8b.py:lightning_opd", "--dry-run"],
            "-m lopd_megatron rollouts recipes/qwen3_8b.py",
        ),
        (["run", "recipes/qwen3_8b.py:lightning_opd(gpus=16)", "--on", "slurm", "--dry-run"], "--nodes=2"),
        (["train", "recipes/tiny.py:lightning_opd", "--dry-run"], "would write: runs/demo/lightning_opd"),
        (["completion", "bash"], "complete -F _lopd lopd"),
    ],
)
def test_verbs_from_another_folder(lopd: Path, tmp_path: Path, words: list[str], shown: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(lopd, tmp_path, *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert list(tmp_path.iterdir()) == []
    print(f"{' '.join(words)}: {after.ru_utime - before.ru_utime:.2f} CPU s")


def test_submitting_needs_the_checkout_and_says_which_file(lopd: Path, tmp_path: Path) -> None:
    done = run(lopd, tmp_path, "run", "recipes/qwen3_8b.py:lightning_opd", "--on", "slurm")
    assert done.returncode == 2
    assert done.stderr == (
        "error: slurm/job.sh is not below this folder; submit from a checkout of lopd_megatron\n"
    )


def test_a_closed_pipe_is_no_traceback(lopd: Path, tmp_path: Path) -> None:
    command = f"{lopd} show recipes/tiny.py:sft | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_unknown_verb_lists_the_verbs(lopd: Path, tmp_path: Path) -> None:
    done = run(lopd, tmp_path, "rollout")
    assert done.returncode == 2
    assert done.stderr.startswith("error: lopd has no verb 'rollout'; did you mean 'rollouts'?")
