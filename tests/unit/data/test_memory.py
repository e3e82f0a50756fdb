"""Documents in memory make the very batches that the same documents make from disk."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lopd_megatron.data.build import Document, write_dataset
from lopd_megatron.data.loader import StepLoader
from lopd_megatron.data.memory import memory_dataset
from lopd_megatron.data.store import Dataset, open_dataset


def random_documents(count: int, topk: int) -> list[Document]:
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(count):
        prompt, response = rng.integers(1, 5), rng.integers(1, 9)
        mask = np.repeat(np.array([0, 1], np.uint8), [prompt, response])
        length = len(mask)
        ids = np.where(mask[:, None], rng.integers(0, 50, (length, topk)), -1).astype(np.int32)
        documents.append(
            Document(
                tokens=rng.integers(0, 50, length).astype(np.int32),
                loss_mask=mask,
                teacher_logprobs=(-rng.random(length) * mask).astype(np.float32),
                rollout_logprobs=(-rng.random(length) * mask).astype(np.float32),
                teacher_topk_ids=ids if topk else None,
                teacher_topk_logprobs=-rng.random((length, topk)) * mask[:, None] if topk else None,
            )
        )
    return documents


@pytest.mark.parametrize("topk", [0, 3])
def test_memory_and_disk_give_the_same_batches(tmp_path: Path, topk: int) -> None:
    documents = random_documents(12, topk)
    write_dataset(tmp_path / "d", documents)

    def batches(dataset: Dataset, rank: int) -> list:
        loader = StepLoader(
            dataset,
            seed=1,
            global_batch_size=8,
            micro_batch_size=1,
            seq_length=24,
            data_parallel_rank=rank,
            data_parallel_size=2,
        )
        return loader.pack(np.array([3, 0, 11, 5, 7])).microbatches

    for rank in range(2):
        pairs = zip(
            batches(memory_dataset(documents), rank),
            batches(open_dataset([tmp_path / "d"]), rank),
            strict=True,
        )
        for one, other in pairs:
            for field in dataclasses.fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
