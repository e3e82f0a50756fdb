"""The column files are those of Megatron's IndexedDataset, and its traps are closed."""

import gc
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.column_files import checked_cast, open_column
from lopd_megatron.data.documents import Document
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.records import COLUMNS
from tests.unit.data.samples import documents, forked


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "train", documents(40, topk=3))
    return tmp_path / "train"


@pytest.mark.parametrize("name", COLUMNS)
def test_files_are_those_that_megatron_writes(prefix: Path, name: str, tmp_path: Path) -> None:
    column = COLUMNS[name]
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=column.dtype)
    dataset = open_dataset([prefix])
    for index in range(len(dataset)):
        values = dataset.document(index)[name].reshape(-1)
        bits = values.view(np.uint16).astype(np.int32) if values.dtype == np.float16 else values.copy()
        builder.add_item(torch.from_numpy(bits))
        builder.end_document()
    builder.finalize(str(tmp_path / "stock.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"stock.{suffix}").read_bytes() == Path(f"{prefix}.{name}.{suffix}").read_bytes()


def test_megatron_reads_our_files(prefix: Path) -> None:
    stock = IndexedDataset(f"{prefix}.tokens")
    ours = open_dataset([prefix])
    assert len(stock) == len(ours) == len(stock.document_indices) - 1
    for index in range(len(ours)):
        assert np.array_equal(stock[index], ours.document(index)["tokens"])


@pytest.mark.processes
def test_a_view_outlives_its_dataset(prefix: Path) -> None:
    """Megatron unmaps under the views it gave out. When its line fails here, upstream has cured it."""
    assert forked(lambda: IndexedDataset(f"{prefix}.tokens")[3].sum()) == -signal.SIGSEGV
    assert forked(lambda: open_dataset([prefix]).document(3)["tokens"].sum()) == 0


def test_views_are_read_only_and_stay_after_the_files_are_gone(prefix: Path) -> None:
    dataset = open_dataset([prefix])
    tokens = dataset.document(0)["tokens"]
    expected = tokens.tolist()
    assert not tokens.flags.writeable
    del dataset
    gc.collect()
    for path in prefix.parent.iterdir():
        path.unlink()
    assert tokens.tolist() == expected


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        pytest.param([1, 70_000], np.uint16, id="too large"),
        pytest.param([-1], np.uint8, id="negative"),
        pytest.param([0.7, -1.9], np.int32, id="fraction"),
        pytest.param([float("nan")], np.int32, id="nan"),
        pytest.param([1e300], np.float32, id="overflow"),
        pytest.param([2**31], np.int32, id="32 bits"),
    ],
)
def test_a_cast_that_changes_a_value_is_refused(values: list, dtype: type) -> None:
    """Megatron's builder writes 4464 for 70000 and −1 for −1.9."""
    with pytest.raises(ValueError, match="does not fit"):
        checked_cast(np.array(values), dtype, "value")


def test_a_cast_that_keeps_values_passes() -> None:
    assert checked_cast(np.array([1, 2**31 - 1]), np.int32, "x").dtype == np.int32
    assert checked_cast(np.array([0.1, -3e-5]), np.float32, "x").dtype == np.float32  # rounding is meant


def test_float16_keeps_its_bits(tmp_path: Path) -> None:
    """IndexedDataset has no float16; the bits travel as uint16."""
    values = -np.geomspace(6e-8, 6e4, 64).astype(np.float16).reshape(8, 8)
    mask = np.array([0] + [1] * 7, np.uint8)
    ids = np.zeros((8, 8), np.int32)
    write_dataset(
        tmp_path / "x",
        [Document(tokens=np.arange(8), loss_mask=mask, teacher_topk_ids=ids, teacher_topk_logprobs=values)],
    )
    read = open_dataset([tmp_path / "x"]).document(0)["teacher_topk_logprobs"]
    assert read.dtype == np.float16
    assert np.array_equal(read.view(np.uint16), values.view(np.uint16))


def test_a_column_of_another_dtype_is_refused(prefix: Path) -> None:
    with pytest.raises(UserError, match=r"tokens\.idx has version 1, dtype code 4"):
        open_column(f"{prefix}.tokens", np.float32)
