"""From disk to batch: the one shift, the same documents under every layout, and every token in its place."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.documents import Document
from lopd_megatron.data.loader import FIELDS, StepBatch, StepLoader
from lopd_megatron.data.store import ConcatDataset, open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.parallel.context import zigzag_indices
from lopd_megatron.records import MicroBatch
from tests.unit.data.samples import documents

SEED = 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ConcatDataset:
    """Two prefixes, 70 documents in all."""
    folder = tmp_path_factory.mktemp("loader")
    write_dataset(folder / "a", documents(50, seed=1, longest=40, topk=2))
    write_dataset(folder / "b", documents(20, seed=2, longest=40, topk=2))
    return open_dataset([folder / "a", folder / "b"])


def loader(dataset: ConcatDataset, **options: Any) -> StepLoader:
    settings: dict[str, Any] = {
        "seed": SEED,
        "global_batch_size": 16,
        "micro_batch_size": 1,
        "seq_length": 64,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
    }
    return StepLoader(dataset, **(settings | options))


def all_ranks(dataset: ConcatDataset, consumed: int, size: int, **options: Any) -> list[StepBatch]:
    return [
        loader(dataset, data_parallel_rank=rank, data_parallel_size=size, **options).step(consumed)
        for rank in range(size)
    ]


def rows_of(batches: list[StepBatch]) -> list[MicroBatch]:
    return [microbatch for batch in batches for microbatch in batch.microbatches]


def indices_of(batches: list[StepBatch]) -> list[int]:
    return [index for row in rows_of(batches) for index in row.document_indices if index >= 0]


def test_one_document_followed_by_eye(tmp_path: Path) -> None:
    """Eight tokens, three of them prompt; value t of a batch describes labels[t] = tokens[t + 1]."""
    write_dataset(
        tmp_path / "x",
        [
            Document(
                tokens=np.array([10, 11, 12, 13, 14, 15, 16, 17]),
                loss_mask=np.array([0, 0, 0, 1, 1, 0, 1, 1], np.uint8),
                teacher_logprobs=np.array([0, 0, 0, -3, -4, -5, -6, -7], np.float32),
                rollout_logprobs=np.array([0, 0, 0, -0.3, -0.4, -0.5, -0.6, -0.7], np.float32),
                teacher_topk_ids=np.arange(16).reshape(8, 2),
                teacher_topk_logprobs=-np.arange(16).reshape(8, 2).astype(np.float32),
            )
        ],
    )
    batch = loader(open_dataset([tmp_path / "x"]), global_batch_size=1, pad_to_multiple_of=5).step(0)
    (row,) = batch.microbatches
    assert batch.seq_length == 10
    assert row.tokens.tolist() == [[10, 11, 12, 13, 14, 15, 16, 17, 0, 0]]
    assert row.labels.tolist() == [[11, 12, 13, 14, 15, 16, 17, 0, 0, 0]]
    assert row.loss_mask.tolist() == [[0, 0, 1, 1, 0, 1, 1, 0, 0, 0]]
    assert row.teacher_logprobs.tolist() == [[0, 0, -3, -4, -5, -6, -7, 0, 0, 0]]
    assert row.rollout_logprobs[0, 2:7].tolist() == pytest.approx([-0.3, -0.4, -0.5, -0.6, -0.7])
    assert row.teacher_topk_ids[0, 2].tolist() == [6, 7]
    assert row.teacher_topk_logprobs[0, 2].tolist() == [-6, -7]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]]
    assert row.sequence_index.tolist() == [[0] * 8 + [1] * 2]
    assert row.cu_seqlens.tolist() == [0, 8, 10]
    assert row.response_lengths.tolist() == [4, 0]
    assert row.document_indices == (0, -1)
    assert row.max_seqlen == 8
    assert (len(batch.sequence_lengths), batch.num_tokens, batch.num_total_tokens) == (1, 4, 8)


DTYPES = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "position_ids": torch.int64,
    "teacher_logprobs": torch.float32,
    "rollout_logprobs": torch.float32,
    "teacher_topk_ids": torch.int64,
    "teacher_topk_logprobs": torch.float32,
    "sequence_index": torch.int32,
}


def test_shapes_and_dtypes_of_every_field(dataset: ConcatDataset) -> None:
    batch = loader(dataset, micro_batch_size=2).step(0)
    for row in batch.microbatches:
        for name, dtype in DTYPES.items():
            value = getattr(row, name)
            assert value.dtype == dtype
            assert value.shape == (1, batch.seq_length, 2)[: value.ndim]
        assert row.cu_seqlens.dtype == row.response_lengths.dtype == torch.int32
        assert row.cu_seqlens[-1] == batch.seq_length
        assert len(row.cu_seqlens) == len(row.response_lengths) + 1 == len(row.document_indices) + 1
        assert row.max_seqlen == int(row.cu_seqlens.diff().max())
    assert set(DTYPES) == FIELDS


@settings(max_examples=30, deadline=None)
@given(
    consumed=st.integers(0, 500),
    size=st.sampled_from([1, 2, 4, 8]),
    micro=st.sampled_from([1, 2, 4]),
    multiple_of=st.sampled_from([1, 2]),
    pad=st.sampled_from([1, 4]),
)
def test_a_step_is_the_same_under_every_layout(
    dataset: ConcatDataset, consumed: int, size: int, micro: int, multiple_of: int, pad: int
) -> None:
    """The documents follow from (seed, consumed); every token of each arrives, on one rank, once."""
    expected = loader(dataset).documents(consumed).tolist()
    batches = all_ranks(
        dataset,
        consumed,
        size,
        micro_batch_size=micro,
        num_microbatches_multiple_of=multiple_of,
        pad_to_multiple_of=pad,
    )
    assert sorted(indices_of(batches)) == sorted(expected)
    assert len({(len(b.microbatches), b.seq_length, b.num_tokens, b.num_total_tokens) for b in batches}) == 1
    assert len(batches[0].microbatches) % multiple_of == 0
    assert batches[0].seq_length % pad == 0
    assert batches[0].seq_length <= micro * 64
    for row in rows_of(batches):
        edges = row.cu_seqlens.tolist()
        for i, index in enumerate(row.document_indices):
            here = slice(edges[i], edges[i + 1])
            if index < 0:
                assert i == len(row.document_indices) - 1
                assert not row.loss_mask[0, here].any()
                continue
            disk = dataset.document(index)
            assert np.array_equal(row.tokens[0, here], disk["tokens"])
            for field, column in (("labels", "tokens"), *((c, c) for c in disk if c != "tokens")):
                assert np.array_equal(getattr(row, field)[0, here][:-1], disk[column][1:])
                assert not getattr(row, field)[0, here][-1].any()
            assert int(row.response_lengths[i]) == int(disk["loss_mask"].sum())
    assert sum(int(row.loss_mask.sum()) for row in rows_of(batches)) == batches[0].num_tokens


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=9, max_size=9))
def test_a_run_that_changes_its_ranks_sees_every_document_once_per_epoch(
    dataset: ConcatDataset, sizes: list[int]
) -> None:
    """A resume under another data-parallel size at every step, over two epoch edges."""
    seen: list[int] = []
    for step, size in enumerate(sizes):
        seen += sorted(indices_of(all_ranks(dataset, step * 16, size)))
    order = loader(dataset).order.take(0, 16 * len(sizes)).tolist()
    assert [sorted(order[i : i + 16]) for i in range(0, len(order), 16)] == [
        seen[i : i + 16] for i in range(0, len(seen), 16)
    ]
    for epoch in range(2):
        assert sorted(order[epoch * 70 : (epoch + 1) * 70]) == list(range(70))


def test_the_same_call_gives_the_same_bytes(dataset: ConcatDataset) -> None:
    """So tensor and pipeline peers, which call with the same arguments, hold identical batches."""
    first, second = loader(dataset).step(48), loader(dataset, prefetch=True).step(48)
    for a, b in zip(first.microbatches, second.microbatches, strict=True):
        for name in DTYPES:
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_prefetch_gives_the_same_steps(dataset: ConcatDataset) -> None:
    ahead, plain = loader(dataset, prefetch=True), loader(dataset)
    for consumed in (0, 16, 32, 160, 176, 0):
        first, second = ahead.step(consumed), plain.step(consumed)
        assert indices_of([first]) == indices_of([second])
        assert torch.equal(first.microbatches[-1].tokens, second.microbatches[-1].tokens)


def test_a_stage_reads_only_its_columns(dataset: ConcatDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first stage takes tokens: the files of the teacher are never looked at."""
    stage = loader(dataset, columns=frozenset({"tokens", "position_ids"}))
    for part in dataset.prefixes:
        kept = {name: part.values[name] for name in ("tokens", "loss_mask")}
        monkeypatch.setattr(part, "values", kept)
    (row, *_) = stage.step(0).microbatches
    assert row.tokens is not None
    assert row.position_ids is not None
    for name in DTYPES.keys() - {"tokens", "position_ids"}:
        assert getattr(row, name) is None


def test_more_documents_in_a_step_than_in_the_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "x", documents(3, longest=10))
    batch = loader(open_dataset([tmp_path / "x"])).step(0)
    assert len(batch.sequence_lengths) == 16
    assert sorted(np.bincount(indices_of([batch])).tolist()) == [5, 5, 6]


def test_a_rank_without_documents_gets_padding(dataset: ConcatDataset) -> None:
    batches = all_ranks(dataset, 0, 4, global_batch_size=3)
    empty = [row for row in rows_of(batches) if row.document_indices == (-1,)]
    assert empty
    assert not any(row.loss_mask.any() or row.response_lengths.any() for row in empty)
    assert sorted(indices_of(batches)) == sorted(loader(dataset, global_batch_size=3).documents(0).tolist())


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_hold_the_whole_between_them(dataset: ConcatDataset, size: int) -> None:
    ranks = [
        loader(
            dataset,
            context_parallel_rank=rank,
            context_parallel_size=size,
            pad_to_multiple_of=2,
            micro_batch_size=2,
        ).step(0)
        for rank in range(size)
    ]
    assert ranks[0].seq_length % (2 * size) == 0
    for parts in zip(*(batch.microbatches for batch in ranks), strict=True):
        lengths = parts[0].cu_seqlens.diff().numpy()
        assert not (lengths % (2 * size)).any()
        assert parts[0].tokens.shape == (1, ranks[0].seq_length // size)
        whole = {name: np.zeros((ranks[0].seq_length, 2), np.float64) for name in DTYPES}
        for rank, part in enumerate(parts):
            mine = zigzag_indices(lengths, rank, size)
            for name in DTYPES:
                whole[name][mine] += getattr(part, name)[0].numpy().reshape(len(mine), -1)
        edges = parts[0].cu_seqlens.tolist()
        for i, index in enumerate(parts[0].document_indices):
            if index < 0:
                continue
            disk = dataset.document(index)
            stop = edges[i] + len(disk["tokens"])
            assert np.array_equal(whole["tokens"][edges[i] : stop, 0], disk["tokens"])
            assert np.array_equal(whole["labels"][edges[i] : stop - 1, 0], disk["tokens"][1:])
            assert np.array_equal(whole["loss_mask"][edges[i] : stop - 1, 0], disk["loss_mask"][1:])
            assert not whole["loss_mask"][stop - 1 : edges[i + 1]].any()


def test_a_document_that_fits_no_row(dataset: ConcatDataset) -> None:
    with pytest.raises(UserError, match=r"a row has 32; raise data\.seq_length"):
        loader(dataset, seq_length=32)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    write_dataset(tmp_path / "x", documents(3))
    with pytest.raises(UserError, match=r"no column teacher_topk_ids .*set another loss\.objective"):
        loader(open_dataset([tmp_path / "x"]), columns=frozenset({"tokens", "teacher_topk_ids"}))


def test_fields_share_one_buffer_and_no_byte_of_it(dataset: ConcatDataset) -> None:
    """The loader lays a step into one allocation: every field is aligned, and a write stays in its field."""
    batch = loader(dataset, micro_batch_size=2, global_batch_size=32).step(0)
    tensors = [getattr(row, name) for row in batch.microbatches for name in sorted(FIELDS)]
    assert len(batch.microbatches) > 1
    places = sorted((tensor.data_ptr(), tensor.nbytes, tensor.element_size()) for tensor in tensors)
    assert all(start % element == 0 for start, _, element in places)
    assert all(start + size == after for (start, size, _), (after, *_) in itertools.pairwise(places))
