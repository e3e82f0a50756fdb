"""Texts of tokens add up to the text; gaps have the sign and the size of the two log-probs."""

from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.recipes import tiny_task
from lopd_megatron.report import gaps
from lopd_megatron.report.run_folder import read_run


def test_pieces_add_up_to_the_text(tmp_path: Path) -> None:
    tiny_task.save_tokenizer(tmp_path)
    pieces = gaps.open_tokenizer(["", str(tmp_path)])
    ids = [1, 4, 21, 5, 2]
    assert "".join(pieces(ids)) == tiny_task.text(np.array(ids))
    assert pieces(ids)[1].startswith(" ")
    assert pieces([]) == []


def test_pieces_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    """The kind that Qwen3 has: a token carries its own blank."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "so that 2 + 2 = 4, as was to be shown"
    tokenizer.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=320))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces = gaps.open_tokenizer([str(tmp_path)])
    assert "".join(pieces(tokenizer.encode(text).ids)) == text


def test_ids_are_shown_where_no_tokenizer_is(tmp_path: Path) -> None:
    assert "".join(gaps.open_tokenizer([str(tmp_path)])([7, 8])) == "7 8 "


def test_gap_is_teacher_minus_rollout(whole_run: Path) -> None:
    scored = read_run(whole_run).scored
    assert scored is not None
    sample = gaps.read_gaps(scored, gaps.open_tokenizer([]), 3)
    assert [rollout.document_id for rollout in sample.rollouts][::2] == ["problem0000/0", "problem0047/0"]
    token = sample.rollouts[0].tokens[4]
    assert token.gap == pytest.approx(token.teacher - token.rollout)
    assert sample.sampled_kl == pytest.approx(-float(sample.gaps.mean()), rel=1e-5)
    edges = np.linspace(-0.01, 0.01, 5)
    assert sum(sample.histogram(edges)) == len(sample.gaps)  # nothing falls out at the ends


def test_long_rollouts_are_cut_and_say_so(whole_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = read_run(whole_run).scored
    assert scored is not None
    monkeypatch.setattr(gaps, "SHOWN_TOKENS", 10)
    rollout = gaps.read_gaps(scored, gaps.open_tokenizer([]), 1).rollouts[0]
    assert (len(rollout.tokens), rollout.left_out) == (10, tiny_task.SOLUTION_LENGTH - 10)
