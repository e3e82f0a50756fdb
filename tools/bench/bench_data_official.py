"""The data path of the official release (oldpilluwu/Lightning-OPD, commit cd6b559), imitated.

    once a run    Parquet file → pandas → one dictionary of numpy arrays a row, kept in memory
    each step     copies → Python numbers, prompts tokenized → tensor of the teacher → columns → pickle (Ray)
                  → tensors → rows of three forwards → means for the log

Each function names the file it stands for. Both sides of `bench_data.py` are one rank alone. Left out, all in
favour of the official side: the texts of the responses (kept, copied, looked through for loops), a task per
sample, and means of what the model computes. The release's own functions, run on such documents with stubs
for Ray's actors and CUDA, take 1.13 times as long as these; docs/data.md has the figures.
"""

from __future__ import annotations

import copy
import heapq
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass
class OfficialSample:
    """A row as the official loader holds it (slime/utils/types.py): the fields that stored rollouts use."""

    prompt: Any
    metadata: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    response_length: int = 0
    rollout_log_probs: list[float] = field(default_factory=list)
    teacher_log_probs: torch.Tensor | None = None


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Ids written out as words → the ids. A prompt costs what one of a BPE does: mostly the call."""
    words = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def load_official(path: Path) -> list[OfficialSample]:
    """slime/utils/data.py: the whole file through pandas; the lists of a row come out as numpy arrays."""
    frame = pd.read_parquet(path, dtype_backend="pyarrow")
    rows = (row.to_dict() for _, row in frame.iterrows())
    return [OfficialSample(row["prompt"], row["metadata"]) for row in rows]


def walk_official(
    table: list[OfficialSample], tokenizer: PreTrainedTokenizerFast, batch: int, seq_length: int
) -> None:
    """The steps of one epoch: `batch` samples each, in rows of about `seq_length` tokens."""
    for start in range(0, len(table), batch):
        train_data = official_rollout(table[start : start + batch], tokenizer)
        # ray.put in the rollout manager, ray.get in the rank: pickle protocol 5, tensors included.
        fields = official_rank(pickle.loads(pickle.dumps(train_data, protocol=5)))
        rows = official_rows([len(tokens) for tokens in fields["tokens"]], seq_length)
        # slime/backends/megatron_utils/actor.py, train_actor: reference, old policy, training.
        for _ in range(3):
            for row in rows:
                official_row(fields, row)
        official_means(fields)


def official_rollout(rows: list[OfficialSample], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[Any]]:
    """The rollout manager: a step's samples as lists of Python numbers, the teacher's as tensors."""
    # slime/rollout/data_source.py, get_samples: the table stays as it is for the next epoch.
    samples = [copy.deepcopy(row) for row in rows]
    for sample in samples:
        # slime/rollout/sglang_rollout.py, a sample with a stored response: number by number.
        prompt = tokenizer.encode(sample.prompt, add_special_tokens=False)
        response = sample.metadata["response_tokens"].tolist()
        mask = sample.metadata["loss_mask"].tolist()
        sample.tokens = [int(token) for token in prompt] + [int(token) for token in response]
        sample.loss_mask = [int(value) for value in mask]
        sample.response_length = int(sum(mask))
        sample.rollout_log_probs = [float(value) for value in sample.metadata["student_log_probs"]]
    # slime/ray/rollout.py, the log of a step: trained tokens are counted anew for speed and for statistics.
    for _ in range(2):
        np.mean([sum(sample.loss_mask) for sample in samples])
    for sample in samples:
        # slime/rollout/on_policy_distillation.py, post_process_rewards.
        teacher = [float(value) for value in sample.metadata["teacher_log_probs"]]
        sample.teacher_log_probs = torch.tensor(teacher, dtype=torch.float32)
    # slime/ray/rollout.py: samples to columns, without the metadata.
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "loss_masks": [sample.loss_mask for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
        "teacher_log_probs": [sample.teacher_log_probs for sample in samples],
    }


def official_rank(train_data: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """slime/backends/megatron_utils/actor.py, _get_rollout_data: one tensor for each sample and field."""
    dtypes = {"tokens": torch.int64, "loss_masks": torch.int32, "rollout_log_probs": torch.float32}
    tensors = {
        name: [torch.tensor(values, dtype=dtype) for values in train_data[name]]
        for name, dtype in dtypes.items()
    }
    return train_data | tensors


def official_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """slime/utils/data.py counts micro-batches by first fit, slime/utils/seqlen_balancing.py fills as many.

    Largest differencing (Karmarkar, Karp) on tokens; a row may come out longer than `capacity`.
    """
    used: list[int] = []
    for length in lengths:
        row = next((row for row, total in enumerate(used) if total + length <= capacity), len(used))
        if row == len(used):
            used.append(0)
        used[row] += length
    empty: list[tuple[int, list[int]]] = [(0, [])] * (len(used) - 1)
    heap = [(-length, place, [(length, [place]), *empty]) for place, length in enumerate(lengths)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, _, one), (_, place, other) = heapq.heappop(heap), heapq.heappop(heap)
        pairs = zip(one, reversed(other), strict=True)
        sets = sorted(((a + b, rows + more) for (a, rows), (b, more) in pairs), reverse=True)
        heapq.heappush(heap, (sets[-1][0] - sets[0][0], place, sets))
    return [sorted(row) for _, row in heap[0][2]]


def official_row(fields: dict[str, list[Any]], row: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """slime/backends/megatron_utils/data.py, get_batch: tokens and masks end to end, padded to 128.

    Log-probs stay one tensor a sample.
    """
    tokens = torch.cat([fields["tokens"][place] for place in row])
    masks = []
    for place in row:
        prompt = len(fields["tokens"][place]) - fields["response_lengths"][place]
        masks.append(torch.nn.functional.pad(fields["loss_masks"][place], (prompt - 1, 1)))
    padding = (0, -len(tokens) % 128)
    return torch.nn.functional.pad(tokens, padding), torch.nn.functional.pad(torch.cat(masks), padding)


def official_means(fields: dict[str, list[Any]]) -> list[float]:
    """slime/backends/megatron_utils/data.py, log_rollout_data: one mean over masks, one over all."""
    rollout = torch.cat(fields["rollout_log_probs"]).clone()
    pairs = zip(rollout.split(fields["response_lengths"]), fields["loss_masks"], strict=True)
    means = [(values * mask).sum() / torch.clamp_min(mask.sum(), 1) for values, mask in pairs]
    return [float(sum(means)) / len(means), float(torch.cat(fields["teacher_log_probs"]).clone().mean())]
