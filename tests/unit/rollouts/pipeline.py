"""A small prompts → rollouts → scored pipeline on the FakeEngine, for the tests of the worker."""

from __future__ import annotations

from pathlib import Path

from lopd_megatron.config import EngineConfig
from lopd_megatron.files import sha256_file
from lopd_megatron.inference.requests import Sampling
from lopd_megatron.lineage import Lineage
from lopd_megatron.rollouts.prompts import prompt_id, write_prompts
from lopd_megatron.rollouts.rollout_stage import RolloutJob
from lopd_megatron.rollouts.score_stage import ScoreJob
from lopd_megatron.rollouts.worker import Worker
from tests.unit.rollouts.fake_engine import EOS, FakeEngine

NUM_PROMPTS, NUM_SHARDS, NUM_SAMPLES = 16, 4, 2
CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=1024)


def make_prompts(root: Path) -> None:
    rows = []
    for number in range(NUM_PROMPTS):
        tokens = [3 + number, 4, 5 + number % 7][: 1 + number % 3]
        tokens[0] = 3 + number
        rows.append({"prompt_id": prompt_id(tokens), "prompt_tokens": tokens, "answer": None, "source": "t"})
    write_prompts(root / "prompts", rows, NUM_SHARDS, Lineage(prompts={"test": 1}))


def rollout_stage(seed: int = 1) -> RolloutJob:
    lineage = Lineage(sampling={"seed": seed})
    return RolloutJob(Sampling(1.0, 1.0, 6, (EOS,)), NUM_SAMPLES, seed, lineage)


def rollout_worker(root: Path, **options: object) -> Worker:
    return Worker(rollout_stage(), root / "prompts", root / "rollouts", NUM_SHARDS, **options)  # type: ignore


def score_worker(root: Path, topk: int = 2, **options: object) -> Worker:
    stage = ScoreJob(topk, Lineage(scoring={"topk": topk}))
    return Worker(stage, root / "rollouts", root / "scores", NUM_SHARDS, **options)  # type: ignore


def run_all(root: Path) -> None:
    make_prompts(root)
    for worker in (rollout_worker, score_worker):
        assert worker(root).run(FakeEngine(), CONFIG, lambda config: FakeEngine()) == 0


def hashes(root: Path) -> dict[str, str]:
    """Hash of every shard file below `root`, JSON and Parquet."""
    return {
        path.relative_to(root).as_posix(): sha256_file(path)
        for path in sorted(root.rglob("shard-*"))
        if path.suffix in (".json", ".parquet")
    }
