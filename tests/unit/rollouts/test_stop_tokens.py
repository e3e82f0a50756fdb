"""Student and teacher that end with other tokens: refused or told before hours of sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lopd_megatron.errors import UserError
from lopd_megatron.rollouts.stop_tokens import check_stop_tokens


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """An instruct model that ends with <|im_end|> or <|endoftext|>."""
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 151643}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    return str(tmp_path)


def test_the_same_ids(teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_stop_tokens([151643, 151645], teacher)
    check_stop_tokens([], teacher)
    assert capsys.readouterr().err == ""


def test_a_base_model_that_ends_only_with_endoftext(teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_stop_tokens([151643], teacher)
    assert "rollouts end with the token ids [151643]" in capsys.readouterr().err


def test_nothing_in_common_is_refused(teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="none in common"):
        check_stop_tokens([2], teacher)
    check_stop_tokens([2], teacher, "a test")
    assert "warning" in capsys.readouterr().err
