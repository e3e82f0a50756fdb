"""Rows of the data sets people have, read as (messages or text, answer).

Understood shapes: `prompt` as text or messages (DAPO-Math-17k, our own), `messages`, `conversations` with
`from`/`value` (OpenThoughts3), `question` (GSM8K), `problem` (AIME, HMMT, MATH). Answers: `answer`,
`reward_model.ground_truth` (DAPO), `expected_answer`, `solution`; of GSM8K the part after ####.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class SourceRow:
    content: str | Messages  # messages end with the last user turn
    answer: str | None
    source: str  # file name


def read_rows(path_text: str) -> Iterator[SourceRow]:
    """All rows of a .jsonl, .json, .parquet file or a `datasets.save_to_disk` folder, streamed."""
    path = Path(path_text)
    if not path.exists():
        raise UserError(
            f"input {path_text!r} does not exist; give a jsonl or Parquet file or a dataset folder"
        )
    for number, row in enumerate(_raw_rows(path)):
        content = _content(row)
        if not content:
            raise UserError(
                f"{path} row {number} has no prompt (columns: {', '.join(sorted(row))}); "
                "it needs one of prompt, messages, conversations, question, problem"
            )
        yield SourceRow(content, _answer(row), path.name)


def _raw_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        from datasets import load_from_disk

        dataset = load_from_disk(str(path))
        if isinstance(dataset, dict):
            raise UserError(
                f"{path} holds several splits ({', '.join(dataset)}); give the folder of one split"
            )
        yield from dataset
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        with path.open() as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path} line {number} is not JSON: {error.msg}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {number} is not a JSON object; write one object per line")
                yield row
    else:
        raise UserError(
            f"{path} has an unknown ending {path.suffix!r}; use .jsonl or .parquet or a dataset folder"
        )


def _content(row: dict[str, Any]) -> str | Messages:
    for name in ("prompt", "messages", "conversations", "question", "problem"):
        value = row.get(name)
        if isinstance(value, str) and value:
            return value
        if value:
            return _up_to_last_user(value)
    return ""


def _up_to_last_user(turns: list[dict[str, str]]) -> Messages:
    """Drop what follows the last user turn: the answers that a data set brings are not part of the prompt."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = [
        {"role": roles.get(role, role), "content": turn.get("content", turn.get("value", ""))}
        for turn in turns
        for role in [turn.get("role", turn.get("from", ""))]
    ]
    users = [position for position, message in enumerate(messages) if message["role"] == "user"]
    return messages[: users[-1] + 1] if users else []


def _answer(row: dict[str, Any]) -> str | None:
    reward_model = row.get("reward_model")
    if isinstance(reward_model, dict) and reward_model.get("ground_truth") is not None:
        return str(reward_model["ground_truth"])
    for name in ("answer", "expected_answer", "solution"):
        if row.get(name) is not None:
            return str(row[name]).rpartition("####")[2].strip()
    return None
