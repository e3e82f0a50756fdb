"""The tiny recipe, small enough for a test: random models, 16 prompts, 40 iterations."""

from __future__ import annotations

import os

from lopd_megatron.config import RunConfig
from lopd_megatron.recipes import tiny


def opd() -> RunConfig:
    """Below $LOPD_TINY, where tools/make_tiny_task.py has made `task`."""
    folder = os.environ["LOPD_TINY"]
    task = f"{folder}/task"
    config = tiny.lightning_opd()
    config.name = "opd"
    config.run_dir = f"{folder}/opd"
    config.model.student = f"{task}/student_init"
    config.model.teacher = f"{task}/teacher_init"
    config.prompts.input = [f"{task}/prompts/opd.jsonl"]
    config.prompts.contamination_files = []
    config.prompts.num_shards = 2
    config.evaluation.input = [f"{task}/problems/test.jsonl"]
    config.data.seq_length = 256
    config.train.train_iters = 40
    config.train.log_interval = 1
    config.train.global_batch_size = 8
    config.checkpoint.save_interval = 10
    config.launch.stages.train.nodes = 2
    config.launch.stages.rollouts.array = 2
    return config
