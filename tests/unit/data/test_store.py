"""What is written is what is read; what is not whole is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.documents import Document
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from tests.unit.data.samples import document, documents, files_of


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=12),
    topk=st.sampled_from([0, 1, 5]),
    split=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], topk: int, split: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    written = [document(rng, prompt, response, topk) for prompt, response in sizes]
    folder = tmp_path_factory.mktemp("store")
    middle = len(written) // 2 if split and len(written) > 1 else len(written)
    parts = [part for part in (written[:middle], written[middle:]) if part]
    prefixes = [folder / f"part{i}" for i in range(len(parts))]
    for prefix, part in zip(prefixes, parts, strict=True):
        manifest = write_dataset(prefix, part)
        assert manifest.documents == len(part)
        assert manifest.tokens == sum(len(d.tokens) for d in part)
        assert manifest.trained_tokens == sum(int(d.loss_mask.sum()) for d in part)
    dataset = open_dataset(prefixes)
    dataset.verify()
    assert dataset.lengths.tolist() == [len(d.tokens) for d in written]
    for index, expected in enumerate(written):
        read = dataset.document(index)
        assert set(read) == dataset.columns
        for name in read:
            value = getattr(expected, name)
            if name == "teacher_topk_logprobs":
                value = value.astype(np.float16)
            assert np.array_equal(read[name], value)


def test_the_tail_mass_of_topk_is_recoverable(tmp_path: Path) -> None:
    """1 − Σ top-k − (sampled where it is not among them), from the stored columns alone."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (30, 1000))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :8].astype(np.int32)
    tokens = rng.integers(0, 1000, 30).astype(np.int32)
    tokens[::2] = ids[::2, 3]
    sampled = np.take_along_axis(logprobs, tokens[:, None], 1)[:, 0]
    mask = np.array([0] * 5 + [1] * 25, np.uint8)
    topk = np.take_along_axis(logprobs, ids, 1)
    write_dataset(
        tmp_path / "x",
        [Document(tokens, mask, sampled.astype(np.float32), sampled.astype(np.float32), ids, topk)],
    )
    read = open_dataset([tmp_path / "x"]).document(0)
    listed = (read["teacher_topk_ids"] == read["tokens"][:, None]).any(axis=1)
    known = np.exp(read["teacher_topk_logprobs"].astype(np.float64)).sum(1)
    known += np.where(listed, 0.0, np.exp(read["teacher_logprobs"].astype(np.float64)))
    true = np.exp(topk).sum(1) + np.where((ids == tokens[:, None]).any(axis=1), 0.0, np.exp(sampled))
    # float16 keeps 11 bits: a probability p = e^l is off by at most p·|l|·2⁻¹¹, and p·|l| ≤ 1/e.
    np.testing.assert_allclose(1 - known, 1 - true, atol=8 * 2**-11 / np.e)


def test_a_prefix_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no dataset .*run lopd dataset"):
        open_dataset([tmp_path / "train"])
    (tmp_path / "train.building").mkdir()
    with pytest.raises(UserError, match="is running or was stopped"):
        open_dataset([tmp_path / "train"])


def test_no_prefix_at_all() -> None:
    with pytest.raises(UserError, match=r"set data\.prefixes"):
        open_dataset([])


def test_parts_of_different_k(tmp_path: Path) -> None:
    for topk in (1, 2):
        write_dataset(tmp_path / f"k{topk}", documents(3, topk=topk))
    with pytest.raises(UserError, match=r"k2 has k = 2 .*k1 has 1"):
        open_dataset([tmp_path / "k1", tmp_path / "k2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"loss_mask": np.array([1, 0, 1], np.uint8)}, "first token", id="first token trained"),
        pytest.param({"loss_mask": np.zeros(3, np.uint8)}, "no trained token", id="nothing trained"),
        pytest.param({"loss_mask": np.array([0, 2, 1], np.uint8)}, "0 and 1", id="mask of 2"),
        pytest.param({"tokens": np.array([1, -5, 2])}, "negative", id="negative token"),
        pytest.param({"tokens": np.array([1, 2**40, 2])}, "does not fit int32", id="huge token"),
        pytest.param({"tokens": np.array([1.0, 2.5, 2.0])}, "does not fit int32", id="fractional token"),
        pytest.param({"teacher_logprobs": np.array([0, np.nan, -1], np.float32)}, "no log-prob", id="nan"),
        pytest.param({"teacher_logprobs": np.array([0, 0.5, -1], np.float32)}, "no log-prob", id="above 0"),
        pytest.param(
            {"teacher_logprobs": np.array([0, -1], np.float32)},
            r"teacher_logprobs has the shape \(2,\), its document has 3 tokens",
            id="short column",
        ),
        pytest.param({"teacher_logprobs": None}, "lacks teacher_logprobs", id="missing column"),
    ],
)
def test_documents_that_cannot_be_trained_on(tmp_path: Path, change: dict, message: str) -> None:
    good = {
        "tokens": np.array([1, 2, 3]),
        "loss_mask": np.array([0, 1, 1], np.uint8),
        "teacher_logprobs": np.array([0, -1, -2], np.float32),
    }
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "x", [Document(**good), Document(**(good | change))])
    assert not files_of(tmp_path / "x").get("x.manifest.json")


def test_write_again_replaces(tmp_path: Path) -> None:
    write_dataset(tmp_path / "x", documents(5, seed=1, topk=2))
    write_dataset(tmp_path / "x", documents(7, seed=2, topk=2))
    dataset = open_dataset([tmp_path / "x"])
    dataset.verify()
    assert len(dataset) == 7
    assert not (tmp_path / "x.building").exists()
