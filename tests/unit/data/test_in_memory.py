"""Documents in memory make the very batches that the same documents make from disk."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.documents import Document
from lopd_megatron.data.in_memory import memory_dataset
from lopd_megatron.data.loader import StepLoader
from lopd_megatron.data.store import ConcatDataset, open_dataset


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

    def batches(dataset: ConcatDataset, rank: int) -> list:
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


def write_to_disk(folder: Path, documents: list[Document]) -> None:
    write_dataset(folder / "d", documents)


def keep_in_memory(folder: Path, documents: list[Document]) -> None:
    memory_dataset(documents)


@pytest.mark.parametrize("make", [write_to_disk, keep_in_memory])
@pytest.mark.parametrize("name", ["loss_mask", "teacher_logprobs", "rollout_logprobs", "teacher_topk_ids"])
def test_lengths_that_are_wrong_in_two_documents_and_right_in_sum(
    tmp_path: Path, make: Callable[[Path, list[Document]], None], name: str
) -> None:
    """Columns are written end to end: one value too many and one too few shift all between them."""
    one, other = random_documents(1, 2)[0], random_documents(2, 2)[1]
    values = getattr(one, name)
    more = dataclasses.replace(one, **{name: np.concatenate([values, values[-1:]])})
    less = dataclasses.replace(other, **{name: getattr(other, name)[:-1]})
    with pytest.raises(ValueError, match=rf"{name} has the shape .*, its document has .* tokens"):
        make(tmp_path, [more, less])


@pytest.mark.parametrize("make", [write_to_disk, keep_in_memory])
def test_another_k_is_refused(tmp_path: Path, make: Callable[[Path, list[Document]], None]) -> None:
    documents = [random_documents(1, topk)[0] for topk in (2, 1, 3)]
    with pytest.raises(ValueError, match="teacher_topk_ids has the shape"):
        make(tmp_path, documents)


@pytest.mark.parametrize("make", [write_to_disk, keep_in_memory])
@pytest.mark.parametrize(("name", "value"), [("tokens", 2**32 + 5), ("loss_mask", 257), ("tokens", 0.5)])
def test_no_value_is_cast_into_another(
    tmp_path: Path, make: Callable[[Path, list[Document]], None], name: str, value: float
) -> None:
    document = random_documents(1, 0)[0]
    wrong = np.array([*getattr(document, name)[:-1].tolist(), value])
    with pytest.raises(ValueError, match="does not fit"):
        make(tmp_path, [dataclasses.replace(document, **{name: wrong})])
