"""Makes everything the tiny pipeline starts from: tokenizer, problems, gold datasets, two random models.

    lopd tiny-task --output runs/demo/task

    tokenizer files                in every model folder
    teacher_init/ student_init/    random Qwen3 models, Hugging Face format
    gold/{teacher,base}.*          datasets: right solutions in style A; half-right ones in both styles
    gold/teacher_{b,hard_b,soft}.* with --all-teachers: right solutions in other styles
    prompts/{sft,opd}.jsonl        prompts without solutions
    problems/{valid,test}.jsonl    held-out problems with answers
All splits are disjoint and follow from the seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.documents import Document
from lopd_megatron.errors import UserError
from lopd_megatron.files import atomic_path, write_json
from lopd_megatron.progress import log_line
from lopd_megatron.recipes import tiny_task as task

STYLE_A, STYLE_BOTH = 0.9, 0.5
OTHER_TEACHERS = {"teacher_b": 0.1, "teacher_hard_b": 0.0, "teacher_soft": 0.5}
"""Their probability of style A."""
CORRUPTED_SHARE = 0.32
TEACHER = {"hidden_size": 64, "intermediate_size": 192}
STUDENT = {"hidden_size": 48, "intermediate_size": 144}


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--teacher-samples", type=int, default=64_000)
    arguments.add_argument("--base-samples", type=int, default=96_000)
    arguments.add_argument("--sft-prompts", type=int, default=100)
    arguments.add_argument("--opd-prompts", type=int, default=2_000)
    arguments.add_argument("--problems", type=int, default=512)
    arguments.add_argument("--all-teachers", action="store_true", help="also what the study's teachers learn")
    arguments.add_argument("--dry-run", action="store_true")
    args = arguments.parse_args()
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "dry_run")}
    done = args.output / "task.json"
    if args.dry_run:
        print(json.dumps(settings, indent=2), f"would write: {args.output}", sep="\n")
        return 0
    if done.exists() and json.loads(done.read_text()) == settings:
        log_line(f"tiny task: {args.output} is already made")
        return 0
    if file := next((path for path in (args.output, *args.output.parents) if path.is_file()), None):
        raise UserError(f"--output {args.output}: {file} is a file; give a folder that is new or this task's")
    make(args)
    write_json(done, settings)
    return 0


def make(args: argparse.Namespace) -> None:
    """Write all parts; the same arguments give the same bytes."""
    out, rng, taken = args.output, np.random.default_rng(args.seed), set[bytes]()
    log_line("tiny task: problems")
    for split in ("valid", "test"):
        problems = task.sample_problems(args.problems, rng, taken)
        write_problems(out / "problems" / f"{split}.jsonl", problems, split)
    for split, count in (("sft", args.sft_prompts), ("opd", args.opd_prompts)):
        write_problems(out / "prompts" / f"{split}.jsonl", task.sample_problems(count, rng, taken), split)
    log_line("tiny task: gold solutions")
    corruption = task.corrupted_facts(CORRUPTED_SHARE, rng)
    for name, count, style in (
        ("teacher", args.teacher_samples, STYLE_A),
        ("base", args.base_samples, STYLE_BOTH),
    ):
        problems = task.sample_problems(count, rng, taken)
        solutions = task.solution_tokens(problems, style, rng, corruption if name == "base" else None)
        prompts = task.prompt_tokens(problems)
        write_dataset(out / "gold" / name, documents(prompts, solutions))
    for name, style in OTHER_TEACHERS.items() if args.all_teachers else ():
        problems = task.sample_problems(args.teacher_samples, rng, taken)
        solutions = task.solution_tokens(problems, style, rng)
        write_dataset(out / "gold" / name, documents(task.prompt_tokens(problems), solutions))
    log_line("tiny task: random models")
    for name, shape in (("teacher_init", TEACHER), ("student_init", STUDENT)):
        save_random_model(out / name, shape, args.seed)


def documents(prompts: np.ndarray, solutions: np.ndarray) -> Iterator[Document]:
    """Gold documents: the loss is on the solution only."""
    mask = np.repeat(np.array([0, 1], np.uint8), [prompts.shape[1], solutions.shape[1]])
    for prompt, solution in zip(prompts, solutions, strict=True):
        yield Document(tokens=np.concatenate([prompt, solution]), loss_mask=mask)


def write_problems(path: Path, problems: task.Problems, split: str) -> None:
    """jsonl with `id`, `prompt` and `answer`."""
    with atomic_path(path) as temporary, temporary.open("w") as file:
        rows = zip(task.prompt_tokens(problems), task.answers(problems), strict=True)
        for index, (prompt, answer) in enumerate(rows):
            record = {"id": f"{split}-{index:05d}", "prompt": task.text(prompt), "answer": str(answer)}
            file.write(json.dumps(record) + "\n")


def save_random_model(folder: Path, shape: dict[str, int], seed: int) -> None:
    """A Qwen3 model with random fp32 weights, and the tokenizer."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    eos = task.VOCABULARY.index("<eos>")
    config = Qwen3Config(
        vocab_size=len(task.VOCABULARY),
        initializer_range=0.06,  # at this width 0.02 learns half as fast
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the least that vLLM's CPU attention knows
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=task.VOCABULARY.index("<bos>"),
        eos_token_id=eos,
        pad_token_id=task.VOCABULARY.index("<pad>"),
        dtype="float32",
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, bos_token_id=config.bos_token_id)
    model.save_pretrained(folder)
    task.save_tokenizer(folder)
