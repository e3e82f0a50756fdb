"""The whole method on a task that two CPU cores solve in minutes: `recipes/tiny_task.py`.

teacher() and base() train on gold data, sft() fits the base to answers the teacher wrote, lightning_opd()
distils the teacher into it from rollouts written once. `make demo` runs them in this order.
Everything lies below `root`, which `lopd tiny-task` fills first.
"""

from __future__ import annotations

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.refresh import refresh_rounds

from . import tiny_task as task

DEMO = "runs/demo"
LONGEST = task.PROMPT_LENGTH + task.SOLUTION_LENGTH + 9


def _base(root: str) -> RunConfig:
    """What all tiny runs share: fp32 on CPU, 1,024-token rows, one-word tokens."""
    config = RunConfig()
    config.prompts.apply_chat_template = False
    config.prompts.max_prompt_tokens = task.PROMPT_LENGTH
    config.prompts.contamination_files = [
        f"{root}/task/problems/valid.jsonl",
        f"{root}/task/problems/test.jsonl",
    ]
    config.prompts.contamination_ngram = task.PROMPT_LENGTH
    engine = EngineConfig(
        max_model_len=LONGEST + 8,
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
    )
    for section in (config.rollouts, config.scores, config.evaluation):
        section.engine = engine.model_copy()
    config.rollouts.max_response_tokens = LONGEST - task.PROMPT_LENGTH
    config.evaluation.max_response_tokens = LONGEST - task.PROMPT_LENGTH
    config.data.seq_length = 1024
    config.data.alignment_sample = 64
    config.data.alignment_tolerance = 1e-3
    config.train.precision = "fp32"
    config.train.global_batch_size = 64
    config.optimizer.adam_beta2 = 0.95
    config.optimizer.lr_decay_style = "cosine"
    config.checkpoint.save_interval = 500
    config.evaluation.input = [f"{root}/task/problems/test.jsonl"]
    config.evaluation.grader = "tiny"
    config.evaluation.num_samples_per_problem = 1
    config.evaluation.temperature = 0.0
    config.evaluation.top_p = 1.0
    return config


def _pretrain(root: str, name: str, model: str, train_iters: int) -> RunConfig:
    config = _base(root)
    config.name = name
    config.run_dir = f"{root}/{name}"
    config.model.student = f"{root}/task/{model}"
    config.loss.objective = "sft"
    config.data.prefixes = [f"{root}/task/gold/{name}"]
    config.data.seq_length = 4096  # a whole step in one row: on a CPU one process then beats two stages
    config.optimizer.lr = 4e-3
    config.optimizer.min_lr = 4e-4
    config.optimizer.lr_warmup_iters = 20
    config.train.train_iters = train_iters
    config.train.log_interval = 50
    return config


def teacher(root: str = DEMO) -> RunConfig:
    """The teacher: right solutions, mostly in style A."""
    return _pretrain(root, "teacher", "teacher_init", 1300)


def base(root: str = DEMO) -> RunConfig:
    """The base student: both styles, a third of the facts corrupted."""
    config = _pretrain(root, "base", "student_init", 2400)
    config.evaluation.input = []
    return config


def sft(root: str = DEMO) -> RunConfig:
    """SFT on 100 answers of the teacher: the style is learnt, most of the errors stay."""
    config = _base(root)
    config.name = "sft"
    config.run_dir = f"{root}/sft"
    config.model.student = f"{root}/base/hf"
    config.model.teacher = f"{root}/teacher/hf"
    config.prompts.input = [f"{root}/task/prompts/sft.jsonl"]
    config.rollouts.generator = "teacher"
    config.loss.objective = "sft"
    config.optimizer.lr = 1e-3
    config.optimizer.lr_warmup_iters = 20
    config.train.train_iters = 50
    config.train.log_interval = 10
    return config


def lightning_opd(root: str = DEMO) -> RunConfig:
    """Lightning OPD from 2,000 rollouts, one per prompt, with TP2 × PP2."""
    config = sft(root)
    config.name = "lightning_opd"
    config.run_dir = f"{root}/lightning_opd"
    config.model.student = f"{root}/sft/hf"
    config.prompts.input = [f"{root}/task/prompts/opd.jsonl"]
    config.rollouts.generator = "student"
    config.loss.objective = "lightning_opd"
    # The loss is a regression of log-ratios, and rare tokens with log π_T near −15 would rule it:
    # here the clip is the strongest lever (59 → 94 % with 0.5, 81 % without, in plain PyTorch).
    config.loss.advantage_clip = 0.5
    config.parallel.tensor_model_parallel_size = 2
    config.parallel.pipeline_model_parallel_size = 2
    config.optimizer.min_lr = 1e-4
    config.optimizer.lr_warmup_iters = 10
    config.optimizer.weight_decay = 0.0
    config.train.train_iters = 150
    return config


def lightning_opd_topk(root: str = DEMO) -> RunConfig:
    """The same rollouts, and the teacher's most likely token beside the sampled one: 8 bytes more a token."""
    config = lightning_opd(root)
    config.name = "lightning_opd_topk"
    config.run_dir = f"{root}/lightning_opd_topk"
    config.loss.objective = "topk_reverse_kl"
    config.scores.topk = 1
    config.loss.topk = 1
    return config


def standard_opd(root: str = DEMO) -> RunConfig:
    """Standard OPD from the same student: fresh rollouts at every step, the teacher as a live server."""
    config = lightning_opd(root)
    config.name = "standard_opd"
    config.run_dir = f"{root}/standard_opd"
    config.online.enabled = True
    config.online.sync_tolerance = 1e-3
    config.parallel.tensor_model_parallel_size = 1
    return config


def standard_opd_topk(root: str = DEMO) -> RunConfig:
    """Standard OPD with the loss of lightning_opd_topk: the top-k of the live teacher."""
    config = standard_opd(root)
    config.name = "standard_opd_topk"
    config.run_dir = f"{root}/standard_opd_topk"
    config.loss.objective = "topk_reverse_kl"
    config.scores.topk = 1
    config.loss.topk = 1
    return config


def teacher_b(root: str = DEMO) -> RunConfig:
    """A teacher that is as right as the first one and writes style A with probability 0.1."""
    return _other_teacher(root, "teacher_b")


def teacher_hard_b(root: str = DEMO) -> RunConfig:
    """A teacher that never writes style A: it thinks little of every step of the first one's students."""
    return _other_teacher(root, "teacher_hard_b")


def teacher_soft(root: str = DEMO) -> RunConfig:
    """A teacher that writes both styles alike: one more bit of entropy in every step."""
    return _other_teacher(root, "teacher_soft")


def _other_teacher(root: str, name: str) -> RunConfig:
    """Needs `lopd tiny-task --all-teachers`."""
    config = _pretrain(root, name, "teacher_init", 1300)
    config.train.seed = 2
    return config


def sft_b(root: str = DEMO) -> RunConfig:
    """SFT on answers of teacher B."""
    config = sft(root)
    config.name = "sft_b"
    config.run_dir = f"{root}/sft_b"
    config.model.teacher = f"{root}/teacher_b/hf"
    return config


def lightning_opd_mismatch(root: str = DEMO) -> RunConfig:
    """SFT by teacher A, distillation from teacher B: what the rule of one teacher is there to prevent."""
    config = lightning_opd(root)
    config.name = "lightning_opd_mismatch"
    config.run_dir = f"{root}/lightning_opd_mismatch"
    config.model.teacher = f"{root}/teacher_b/hf"
    config.lineage.allow_mismatch = "measures what a second teacher costs"
    return config


def lightning_opd_round_1(root: str = DEMO) -> RunConfig:
    """Lightning OPD in two rounds: half of the iterations on rollouts of the SFT student …"""
    return refresh_rounds(lightning_opd(root), 2)[0]


def lightning_opd_round_2(root: str = DEMO) -> RunConfig:
    """… and half on rollouts of the student that the first round left."""
    return refresh_rounds(lightning_opd(root), 2)[1]
