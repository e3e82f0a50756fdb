"""The hyper-parameters of the Lightning OPD paper (arXiv 2604.13010 v2), independent of model and cluster.

Where the paper and its released code (`oldpilluwu/Lightning-OPD`) differ, the paper is followed and the line
says so. Layouts belong to the model's own file; `place` puts one on a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lopd_megatron.config import RunConfig, StageResources
from lopd_megatron.errors import UserError

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, as folders below the checkout."""

    name: str  # of the runs: runs/<name>/<recipe>
    base: str  # the student before SFT
    teacher: str
    sft_rows: int  # packed rows of 16,384 tokens per SFT step
    teacher_gpus: int = 1  # tensor-parallel size of the teacher's vLLM engine
    student_gpus: int = 1


@dataclass(frozen=True)
class Layout:
    """How a student is spread over the GPUs of one cluster size."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    modules: tuple[str, ...] = field(default=("mlp",))


def sft(pair: Pair) -> RunConfig:
    """Stage 1: the base student learns the teacher's own answers; the same teacher scores in stage 2."""
    config = _common(pair, "sft")
    config.model.student = pair.base
    config.prompts.input = ["data/prompts/openthoughts3.jsonl"]
    config.prompts.max_prompts = 300_000
    config.prompts.sample_seed = 42  # as in the released code: drawn at random, one answer each
    config.rollouts.generator = "teacher"
    config.rollouts.temperature = 0.7  # released code; the paper does not say
    config.rollouts.top_p = 0.9
    config.rollouts.max_response_tokens = 15_360  # with the prompt a row of 16,384 tokens
    config.rollouts.engine.max_model_len = 16_384
    config.rollouts.engine.tensor_parallel_size = pair.teacher_gpus
    config.launch.stages.rollouts.gpus_per_node = pair.teacher_gpus
    config.launch.stages.rollouts.array = 32 // pair.teacher_gpus
    config.loss.objective = "sft"
    config.train.train_iters = 3000
    # The paper counts packed rows and this project sequences: two answers a row is an assumption.
    config.train.global_batch_size = 2 * pair.sft_rows
    config.optimizer.lr = 8e-5
    config.optimizer.lr_decay_style = "cosine"
    config.optimizer.lr_warmup_iters = 300  # 0.1 of the steps
    config.optimizer.weight_decay = 0.0  # with β₂ the defaults of the released trainer; not in the paper
    config.optimizer.adam_beta2 = 0.999
    config.checkpoint.save_interval = 100
    config.checkpoint.keep_every = 500
    return config


def lightning_opd(pair: Pair) -> RunConfig:
    """Stage 2: one rollout per prompt from the SFT student, scored once, then 150 steps on them."""
    config = _common(pair, "lightning_opd")
    config.model.student = f"runs/{pair.name}/sft/hf"
    config.prompts.input = ["data/prompts/dapo_math_17k.jsonl"]
    config.rollouts.temperature = 0.8  # released scripts: 0.7
    config.rollouts.top_p = 1.0  # released scripts: 0.9
    config.rollouts.max_response_tokens = 4096  # released scripts sample 16,384 and train on the first 4,096
    config.rollouts.engine.tensor_parallel_size = pair.student_gpus
    config.loss.advantage_clip = 10.0  # absent in the released code
    config.loss.normalization = "token_mean"  # released code: per_sequence
    config.train.train_iters = 150  # most of the gain comes in the first 50
    config.train.global_batch_size = 256
    config.optimizer.lr = 2e-6
    config.optimizer.lr_decay_style = "constant"  # no warm-up
    config.optimizer.weight_decay = 0.1
    config.optimizer.adam_beta2 = 0.98
    config.checkpoint.save_interval = 10
    config.checkpoint.keep_every = 50
    return config


def lightning_opd_topk(pair: Pair) -> RunConfig:
    """Beyond the paper: reverse KL on the teacher's 16 most likely tokens, the rest as one class."""
    config = lightning_opd(pair)
    _rename(config, pair, "lightning_opd_topk")
    config.loss.objective = "topk_reverse_kl"
    config.scores.topk = 16
    config.loss.topk = 16
    return config


def standard_opd(pair: Pair) -> RunConfig:
    """The baseline of the paper: at every step 64 prompts × 4 fresh rollouts and a live teacher."""
    config = lightning_opd(pair)
    _rename(config, pair, "standard_opd")
    config.online.enabled = True
    config.rollouts.num_samples_per_prompt = 4
    return config


def place(config: RunConfig, layouts: dict[int, Layout], gpus: int) -> RunConfig:
    """Spread training over `gpus` GPUs of 80 GB with the layout made for that number."""
    if gpus not in layouts:
        raise UserError(
            f"no layout for {gpus} GPUs; there are {sorted(layouts)}, or run tools/plan_layout.py"
        )
    layout = layouts[gpus]
    config.parallel.tensor_model_parallel_size = layout.tp
    config.parallel.sequence_parallel = layout.tp > 1
    config.parallel.pipeline_model_parallel_size = layout.pp
    config.parallel.expert_model_parallel_size = layout.ep
    config.train.recompute_granularity = layout.recompute
    config.train.recompute_modules = list(layout.modules)
    config.launch.stages.train = StageResources(
        nodes=max(1, gpus // GPUS_PER_NODE), gpus_per_node=min(gpus, GPUS_PER_NODE), time="1-00:00:00"
    )
    return config


def _common(pair: Pair, recipe: str) -> RunConfig:
    config = RunConfig()
    _rename(config, pair, recipe)
    config.model.teacher = pair.teacher
    config.data.seq_length = 16_384
    config.loss.head_chunk_tokens = 2048
    config.optimizer.clip_grad = 1.0
    config.scores.engine.tensor_parallel_size = pair.teacher_gpus
    stages = config.launch.stages
    stages.rollouts = StageResources(gpus_per_node=pair.student_gpus, array=8 // pair.student_gpus)
    stages.scores = StageResources(gpus_per_node=pair.teacher_gpus, array=8 // pair.teacher_gpus)
    stages.evaluate = StageResources(gpus_per_node=pair.student_gpus)
    # 32 samples a problem, temperature 0.6, top-p 0.95, 32,768 tokens: the defaults of the config.
    config.evaluation.input = ["data/problems/aime24.jsonl", "data/problems/aime25.jsonl"]
    config.evaluation.engine.tensor_parallel_size = pair.student_gpus
    return config


def _rename(config: RunConfig, pair: Pair, recipe: str) -> None:
    config.name = f"{pair.name}-{recipe}"
    config.run_dir = f"runs/{pair.name}/{recipe}"
