"""Token ids outside the vocabulary are refused by the build and before training, with document and id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.data.build_dataset import build_dataset, write_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.store import open_dataset
from lopd_megatron.data.teacher_proof import shift_of
from lopd_megatron.errors import UserError
from tests.unit.data.samples import documents, row, write_shards

VOCABULARY = 50


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": [3, 50, 4]}, "row 2 (prompt p): prompt token 50 is not one of the 50 ids"),
        ({"response": [5, 6, 151_643]}, "row 2 (prompt p): response token 151643"),
        (
            {"teacher_topk_ids": [1, 2, 3, 4, 5, 64], "teacher_topk_logprobs": [-0.1, -3.0] * 3},
            "row 2 (prompt p): top-k token of the teacher 64",
        ),
    ],
)
def test_the_build_names_row_and_id(tmp_path: Path, changes: dict, named: str) -> None:
    topk = {"teacher_topk_ids": [1, 49, 3, 4, 5, 6], "teacher_topk_logprobs": [-0.1, -3.0] * 3}
    good = [row(f"g{i}", [1, 49], [3, 4, 5], **topk) for i in range(2)]
    prompt, response = changes.pop("prompt", [1, 2, 4]), changes.pop("response", [3, 4, 5])
    folder = write_shards(tmp_path / "scores", [[*good, row("p", prompt, response, **(topk | changes))]])
    with pytest.raises(UserError) as error:
        build_dataset(folder, tmp_path / "train", filters=Filters(64), vocab_size=VOCABULARY)
    assert named in str(error.value)
    assert build_dataset(folder, tmp_path / "train", filters=Filters(64)).vocab_size is None


@pytest.mark.parametrize("column", ["tokens", "teacher_topk_ids"])
def test_a_dataset_is_held_against_the_vocabulary_before_training(tmp_path: Path, column: str) -> None:
    """Also one that a program wrote, or an older version."""
    made = documents(30, topk=2)
    for document in made:
        document.tokens[:] %= VOCABULARY
        assert document.teacher_topk_ids is not None
        document.teacher_topk_ids[:] %= VOCABULARY
    write_dataset(tmp_path / "good", made)
    open_dataset([tmp_path / "good"]).verify(VOCABULARY)
    getattr(made[17], column)[-1] = VOCABULARY
    write_dataset(tmp_path / "bad", made)
    last = len(made[17].tokens) - 1
    with pytest.raises(UserError, match=f"bad, document 17, token {last}: {column} holds 50, the vocabulary"):
        open_dataset([tmp_path / "bad"]).verify(VOCABULARY)


def two_models(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probs of two models of one text: what surprises the one surprises the other."""
    rng = np.random.default_rng(seed)
    texts = [rng.exponential(1.0, 40) for _ in range(8)]
    return [-text - rng.exponential(0.5, 40) for text in texts], [-text for text in texts]


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_is_found_and_none_is_invented(seed: int) -> None:
    teacher, student = two_models(seed)
    assert shift_of(teacher, student) == 0
    assert shift_of([np.append(0, values[:-1]) for values in teacher], student) == 1
    assert shift_of([np.append(values[1:], 0) for values in teacher], student) == -1
    unrelated, _ = two_models(seed + 100)
    assert shift_of(unrelated, student) == 0


@pytest.mark.parametrize(("by", "named"), [(1, "late"), (-1, "early")])
def test_the_build_refuses_a_shifted_teacher(tmp_path: Path, by: int, named: str) -> None:
    teacher, rollout = two_models(0)
    rows = [
        row(
            f"p{i}",
            [1, 2],
            list(range(40)),
            rollout_logprobs=s.tolist(),
            teacher_logprobs=np.roll(t, by).tolist(),
        )
        for i, (t, s) in enumerate(zip(teacher, rollout, strict=True))
    ]
    folder = write_shards(tmp_path / "scores", [rows])
    with pytest.raises(UserError, match=f"teacher_logprobs stand one token too {named}"):
        build_dataset(folder, tmp_path / "train", filters=Filters(64))
    assert not (tmp_path / "train.manifest.json").exists()
