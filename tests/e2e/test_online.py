"""Standard OPD on real vLLM servers: fresh rollouts, and a teacher that dies in the middle of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lopd_megatron.cli import load_recipe
from lopd_megatron.inference.server import VllmServer
from lopd_megatron.inference.server_key import KEY_VARIABLE, headers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
ITERS = 4
KEY = "the key of the servers of this test"

RECIPES = """
from lopd_megatron.config import RunConfig
from lopd_megatron.recipes import tiny

ROOT = {root!r}

def calm() -> RunConfig:
    config = tiny.standard_opd(ROOT)
    config.run_dir = ROOT + "/calm"
    config.model.student = ROOT + "/task/student_init"
    config.model.teacher = ROOT + "/task/teacher_init"
    config.train.train_iters = {iters}
    config.train.global_batch_size = 16
    config.train.log_interval = 1
    config.checkpoint.save_interval = 100
    return config

def disturbed() -> RunConfig:
    config = calm()
    config.run_dir = ROOT + "/disturbed"
    return config
"""


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    sizes = [
        "--teacher-samples=64",
        "--base-samples=64",
        "--sft-prompts=8",
        "--opd-prompts=64",
        "--problems=8",
    ]
    run(sys.executable, "tools/make_tiny_task.py", "--output", f"{folder}/task", *sizes)
    (folder / "recipes.py").write_text(RECIPES.format(root=str(folder), iters=ITERS))
    run(sys.executable, "tools/prepare_prompts.py", "--recipe", f"{folder}/recipes.py:calm")
    shutil.copytree(folder / "calm", folder / "disturbed")
    return folder


@pytest.fixture(scope="module")
def servers(root: Path) -> Iterator[tuple[VllmServer, VllmServer]]:
    config = load_recipe(f"{root}/recipes.py:calm")
    with (
        VllmServer(
            "student",
            config.model.student,
            config.rollouts.engine,
            root / "student.log",
            task="generate",
            key=KEY,
        ) as student,
        VllmServer(
            "teacher", config.model.teacher, config.scores.engine, root / "teacher.log", task="score", key=KEY
        ) as teacher,
    ):
        student.wait()
        teacher.wait()
        yield student, teacher


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(condition: Callable[[], bool], training: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert training.poll() is None, "the training ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(root: Path, recipe: str, servers: tuple[VllmServer, VllmServer]) -> subprocess.Popen[bytes]:
    urls = [f"online.{n}_url={s.url}" for n, s in zip(("student", "teacher"), servers, strict=True)]
    command = [sys.executable, "tools/train_online.py", "--recipe", f"{root}/recipes.py:{recipe}", *urls]
    with (root / f"{recipe}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", KEY_VARIABLE: KEY},
        )


@pytest.fixture(scope="module")
def runs(root: Path, servers: tuple[VllmServer, VllmServer]) -> dict[str, list[dict[str, Any]]]:
    """Metrics of a run that nothing disturbs and of one whose teacher is killed after two steps."""
    _, teacher = servers
    calm = start(root, "calm", servers)
    assert calm.wait(600) == 0, (root / "calm.log").read_text()[-3000:]

    disturbed = start(root, "disturbed", servers)
    wait_for(lambda: len(lines(root / "disturbed" / "metrics.jsonl")) >= 2, disturbed)
    teacher.kill()
    wait_for(lambda: "teacher server at" in (root / "disturbed.log").read_text(), disturbed)
    teacher.start()
    assert disturbed.wait(600) == 0, (root / "disturbed.log").read_text()[-3000:]
    return {name: lines(root / name / "metrics.jsonl") for name in ("calm", "disturbed")}


def test_every_transfer_of_weights_is_proven(root: Path, runs: dict[str, Any]) -> None:
    log = lines(root / "calm" / "online" / "log.jsonl")
    assert [line["iteration"] for line in log] == list(range(ITERS))
    assert max(line["sync_rms_nats"] for line in log) < 1e-4  # fp32 rounding gives 2e-7


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/collective_rpc"),
        ("POST", "/update_weight_version"),
        ("POST", "/pause"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/v1/completions"),
        ("GET", "/health"),
        ("GET", "/weight_info"),
        ("OPTIONS", "/collective_rpc"),
        ("GET", "/docs"),
    ],
)
def test_a_request_without_the_key_is_refused(
    servers: tuple[VllmServer, VllmServer], method: str, path: str
) -> None:
    for given in ({}, headers("another key"), {"Authorization": KEY}):
        answer = httpx.request(method, servers[0].url + path, headers=given, trust_env=False, timeout=60)
        assert answer.status_code == 401, (given, answer.text)


def test_a_key_is_on_no_command_line(servers: tuple[VllmServer, VllmServer]) -> None:
    assert all(KEY not in word for server in servers for word in server.command)


def test_rollouts_come_from_the_weights_that_train_on_them(runs: dict[str, Any]) -> None:
    assert [row["iteration"] for row in runs["calm"]] == list(range(1, ITERS + 1))
    assert all(row["importance_ratio_mean"] == pytest.approx(1, abs=1e-4) for row in runs["calm"])


def test_a_dead_teacher_costs_time_and_no_step(runs: dict[str, Any]) -> None:
    for name in ("loss", "reverse_kl", "grad_norm", "consumed_train_samples"):
        values = {run: [row[name] for row in rows] for run, rows in runs.items()}
        assert values["calm"] == values["disturbed"], name
