"""A recipe for 64 GPUs in a container, with every launch setting in use."""

from __future__ import annotations

from lopd_megatron.config import RunConfig, StageResources


def opd_64gpu() -> RunConfig:
    config = RunConfig(name="opd", run_dir="runs/opd")
    config.model.student, config.model.teacher = "models/student-32b", "models/teacher-235b"
    config.prompts.input = ["data/prompts.jsonl"]
    config.evaluation.input = ["data/aime24.jsonl"]
    config.parallel.tensor_model_parallel_size = 8
    config.parallel.pipeline_model_parallel_size = 2
    launch = config.launch
    launch.account, launch.partition = "llm", "batch"
    launch.sbatch_options = ["--exclusive", "--mem=0"]
    launch.container_image = "nvcr.io/nvidia/nemo:25.09"
    launch.container_mounts = ["/lustre/models:/lustre/models:ro"]
    launch.stages.rollouts = StageResources(gpus_per_node=8, array=16)
    launch.stages.score = StageResources(gpus_per_node=8, array=8)
    launch.stages.train = StageResources(nodes=8, gpus_per_node=8, time="1-00:00:00")
    launch.stages.evaluate = StageResources(gpus_per_node=8)
    return config
