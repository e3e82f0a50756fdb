"""Students of true width with random weights and one packed row of random rollouts (for `bench_train.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd_megatron.cli import apply_override
from lopd_megatron.config import RunConfig
from lopd_megatron.data.loader import StepBatch
from lopd_megatron.errors import UserError
from lopd_megatron.recipes.models import QWEN3_4B, QWEN3_8B
from lopd_megatron.records import MicroBatch

QWEN3_1_7B = QWEN3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
TINY = QWEN3_8B | {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
RECOMPUTE_MLP = {"train.recompute_granularity": "selective", "train.recompute_modules": "[mlp]"}
PRECISION_AWARE = {"optimizer.use_precision_aware_optimizer": "true"}


@dataclass(frozen=True)
class Case:
    student: dict[str, Any]
    tokens: int
    """Of the packed row; one row is one step."""
    settings: dict[str, str] = field(default_factory=dict)


CASES = {
    "slice_8b": Case(QWEN3_8B | {"num_hidden_layers": 8}, 16_384),
    "slice_8b_16_layers": Case(QWEN3_8B | {"num_hidden_layers": 16}, 16_384),
    "step_1_7b": Case(QWEN3_1_7B, 16_384),
    "step_4b": Case(QWEN3_4B, 16_384, RECOMPUTE_MLP),
    "full_8b": Case(QWEN3_8B, 8192, PRECISION_AWARE | {"train.recompute_granularity": "full"}),
    "full_8b_recompute_mlp": Case(QWEN3_8B, 8192, PRECISION_AWARE | RECOMPUTE_MLP),
    "tiny": Case(TINY, 512, PRECISION_AWARE | RECOMPUTE_MLP),
}


def case_config(case: Case, folder: Path) -> RunConfig:
    """The configuration of a case; its student's config.json is written to `folder`."""
    (folder / "config.json").write_text(json.dumps(case.student))
    config = RunConfig(name="bench", run_dir=str(folder))
    config.model.student = str(folder)
    config.data.seq_length = case.tokens
    config.train.global_batch_size = len(row_lengths(case.tokens))
    for key, text in case.settings.items():
        apply_override(config, key, text)
    return config


def refuse_what_cannot_fit(config: RunConfig, device_bytes: float) -> float:
    """Bytes that the memory model predicts for one GPU; a UserError where the device has less."""
    from lopd_megatron.model.memory_estimate import OVERHEAD_BYTES, estimate_memory
    from lopd_megatron.model.student_spec import student_spec

    spec = student_spec(config.model.student, config)
    predicted = estimate_memory(spec, config, 1).total
    if predicted + OVERHEAD_BYTES > device_bytes:
        raise UserError(
            f"needs {predicted / 2**30:.0f} GiB and an allowance of {OVERHEAD_BYTES / 2**30:.0f}; "
            f"this device has {device_bytes / 2**30:.0f} GiB; take a larger GPU or another --case"
        )
    return predicted


def row_lengths(tokens: int, seed: int = 0) -> list[int]:
    """Lengths that fill a row exactly: prompts of 80 to 300 tokens and responses like those of a math model
    cut at 4,096 (log-normal, median 7,000, σ 0.9), in proportion for a short row; the last one is cut."""
    rng = np.random.default_rng(seed)
    scale = min(1.0, tokens / 8192)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        response = min(4096.0, rng.lognormal(math.log(7000), 0.9))
        length = max(2, int(scale * (rng.integers(80, 301) + response)))
        left = tokens - sum(lengths) - length
        # A remainder too short to hold a prompt joins the document before it.
        lengths.append(length if left >= scale * 400 else length + left)
    return lengths


class RandomRow:
    """Every step is the same packed row, without padding; every data-parallel rank has its own copy."""

    def __init__(self, case: Case, data_parallel_size: int) -> None:
        lengths = np.array(row_lengths(case.tokens))
        self._batch = random_microbatch(lengths, case.student["vocab_size"])
        self._copies = data_parallel_size
        self._lengths = np.tile(lengths, data_parallel_size).astype(np.int32)

    def step(self, consumed: int) -> StepBatch:
        return StepBatch(
            microbatches=[self._batch],
            seq_length=int(self._batch.cu_seqlens[-1]),
            num_sequences=len(self._lengths),
            num_tokens=self._copies * int(self._batch.response_lengths.sum()),
            num_total_tokens=int(self._lengths.sum()),
            sequence_lengths=self._lengths,
        )


def random_microbatch(lengths: np.ndarray, vocab_size: int) -> MicroBatch:
    """Documents of random tokens, a twentieth of each a prompt, with log-probs of a likely teacher."""
    generator = torch.Generator().manual_seed(0)
    total = int(lengths.sum())
    position = torch.cat([torch.arange(int(length)) for length in lengths])
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths))
    length_of = torch.from_numpy(lengths)[index]
    tokens = torch.randint(vocab_size, (1, total), generator=generator)
    # Label-aligned: the last position of a document predicts nothing.
    trained = (position + 1 >= (length_of // 20).clamp(min=1)) & (position + 1 < length_of)
    logprobs = -torch.empty(1, total).exponential_(2.0, generator=generator)
    return MicroBatch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        loss_mask=trained.float()[None],
        position_ids=position[None],
        teacher_logprobs=logprobs,
        rollout_logprobs=logprobs.roll(1, 1),
        teacher_topk_ids=None,
        teacher_topk_logprobs=None,
        sequence_index=index.int()[None],
        response_lengths=torch.zeros(len(lengths)).index_add_(0, index, trained.float()).int(),
        cu_seqlens=torch.cat([torch.zeros(1), torch.from_numpy(lengths).cumsum(0)]).int(),
        max_seqlen=int(lengths.max()),
        document_indices=tuple(range(len(lengths))),
    )


def random_weights(chunks: Sequence[torch.nn.Module]) -> None:
    """Matrices as an untrained model has them, norms at one."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
                else:
                    parameter.fill_(1.0)
