"""Kills the rollout and scoring stages with SIGKILL while vLLM works, and starts them again.

    python -m tests.e2e.kill_engine FOLDER KILLS_OF_ROLLOUTS KILLS_OF_SCORING

Every run is forked from this process, which has imported vLLM once. Prints one JSON object: how often a
stage was killed, and whether the shards are those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.imports import quick_imports
from lopd_megatron.inference.engine_settings import CPU_ENVIRONMENT, QUIET_ENVIRONMENT
from lopd_megatron.rollouts import programs
from lopd_megatron.rollouts.prompts import run_prompts
from lopd_megatron.rollouts.share import Share
from tests.e2e.random_models import VOCABULARY, save_model
from tests.unit.rollouts.pipeline import hashes

STAGES = {"rollouts": programs.run_rollouts, "scores": programs.run_scoring}


def make_config(root: Path, run: str) -> RunConfig:
    config = RunConfig(run_dir=str(root / run))
    config.model.student, config.model.teacher = str(root / "student"), str(root / "teacher")
    config.prompts.input = [str(root / "prompts.jsonl")]
    config.prompts.apply_chat_template = False
    config.prompts.num_shards = 12
    config.prompts.max_prompt_tokens = 40
    config.rollouts.max_response_tokens = 100
    config.rollouts.num_samples_per_prompt = 2
    for section in (config.rollouts, config.scores):
        section.engine = EngineConfig(max_model_len=150, max_num_seqs=8, max_num_batched_tokens=256)
    return config


def main(root: Path, kills: dict[str, int]) -> None:
    save_model(root / "student", 0)
    save_model(root / "teacher", 1)
    random = np.random.default_rng(0)
    with (root / "prompts.jsonl").open("w") as lines:
        for _ in range(60):
            words = [f"w{token}" for token in random.integers(4, VOCABULARY, random.integers(1, 30))]
            lines.write(json.dumps({"prompt": " ".join(words)}) + "\n")
    runs = {name: make_config(root, name) for name in ("undisturbed", "killed")}
    for config in runs.values():
        run_prompts(config)
    os.environ |= CPU_ENVIRONMENT | QUIET_ENVIRONMENT
    with quick_imports():  # what an engine imports when it starts, or each fork below would pay for it
        import vllm.model_executor.models.qwen3
        import vllm.v1.worker.cpu_worker  # noqa: F401
    done, killed = 0, dict.fromkeys(STAGES, 0)
    for name, stage in STAGES.items():
        _wait(_fork(lambda stage=stage: stage(runs["undisturbed"], Share())))  # type: ignore[misc]
        folder = root / "killed" / name
        for _ in range(kills[name]):
            child = _fork(lambda stage=stage: stage(runs["killed"], Share()))  # type: ignore[misc]
            before = _committed(folder)
            while _committed(folder) == before and _is_running(child):
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.05))
            if _is_running(child):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed[name] += 1
        _wait(_fork(lambda stage=stage: stage(runs["killed"], Share())))  # type: ignore[misc]
        done += _committed(folder)
    same = hashes(root / "undisturbed") == hashes(root / "killed")
    print(json.dumps({"killed": killed, "shards": done, "same": same}))


def _committed(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def _fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def _is_running(child: int) -> bool:
    """Whether the child goes on; a finished one is left for `waitpid`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _wait(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a stage ended with status {status}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"rollouts": int(sys.argv[2]), "scores": int(sys.argv[3])})
