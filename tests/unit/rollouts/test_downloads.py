"""`lopd data`: rows of the hub become the files that the recipes read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lopd_megatron.errors import UserError
from lopd_megatron.recipes import paper
from lopd_megatron.recipes.qwen3_8b import PAIR
from lopd_megatron.rollouts.downloads import DATA, write_data
from lopd_megatron.rollouts.sources import read_rows

ROWS: dict[str, dict[str, Any]] = {
    "openthoughts3": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "dapo_math": {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2"},
        "ability": "MATH",
    },
    "aime24": {"problem": "p", "answer": 7, "id": 1},
    "aime25": {"problem": "q", "answer": "8"},
}


@pytest.mark.parametrize("name", DATA)
def test_rows_are_written_once_and_read_by_the_stages(name: str, tmp_path: Path) -> None:
    file = tmp_path / "data" / "x.jsonl"
    assert write_data(name, file, [ROWS[name], ROWS[name]]) == 1
    assert len(list(read_rows(str(file)))) == 1
    assert [path.name for path in file.parent.iterdir()] == ["x.jsonl"]


def test_the_recipes_look_where_the_files_are_written() -> None:
    found = {*paper.sft(PAIR).prompts.input, *paper.lightning_opd(PAIR).prompts.input}
    found |= set(paper.sft(PAIR).evaluation.input)
    assert found == {data.output for data in DATA.values()}


def test_other_columns_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has other columns than expected \(text"):
        write_data("aime24", tmp_path / "x.jsonl", [{"text": "?"}])
    with pytest.raises(UserError, match="gave no row"):
        write_data("aime24", tmp_path / "x.jsonl", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_without_a_network_it_is_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "lopd_megatron", "data", "aime24", "--output", str(tmp_path / "x.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: math-ai/aime24 cannot be read from the Hugging Face hub")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.jsonl").exists()
