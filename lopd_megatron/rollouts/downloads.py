"""The data sets of the paper from the Hugging Face hub, as the jsonl files that the recipes read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError
from lopd_megatron.files import atomic_path
from lopd_megatron.progress import log_line, progress

Row = dict[str, Any]


def _first_user_turn(row: Row) -> Row:
    turns = row["conversations"]
    return {"prompt": next(turn["value"] for turn in turns if turn["from"] in ("human", "user"))}


def _dapo(row: Row) -> Row:
    return {"messages": row["prompt"], "answer": str(row["reward_model"]["ground_truth"])}


def _problem(row: Row) -> Row:
    return {"problem": row["problem"], "answer": str(row["answer"])}


@dataclass(frozen=True)
class HubData:
    """One data set of the hub and how its rows become ours."""

    repository: str
    split: str
    output: str
    licence: str
    row: Callable[[Row], Row]


DATA = {
    "openthoughts3": HubData(
        "open-thoughts/OpenThoughts3-1.2M",
        "train",
        "data/prompts/openthoughts3.jsonl",
        "Apache-2.0",
        _first_user_turn,
    ),
    "dapo_math": HubData(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "train",
        "data/prompts/dapo_math_17k.jsonl",
        "Apache-2.0",
        _dapo,
    ),
    "aime24": HubData("math-ai/aime24", "test", "data/problems/aime24.jsonl", "see the hub", _problem),
    "aime25": HubData("math-ai/aime25", "test", "data/problems/aime25.jsonl", "see the hub", _problem),
}
"""Names of `lopd data`. Licences are as the hub states them; check them before you publish a model."""


def write_data(name: str, output: Path, rows: Iterable[Row] | None = None) -> int:
    """Write a data set as jsonl, one unique prompt or problem per line. Returns the number of lines.

    A complete file is never left half-written: the rows go to a temporary file first.
    """
    data = DATA[name]
    seen: set[str] = set()
    with (
        atomic_path(output) as temporary,
        temporary.open("w") as file,
        progress(None, name, "row") as bar,
    ):
        for row in rows if rows is not None else _hub_rows(data):
            bar.update(1)
            line = json.dumps(_converted(data, row), ensure_ascii=False)
            if line not in seen:  # DAPO-Math-17k repeats its 17,000 problems a hundred times
                seen.add(line)
                file.write(line + "\n")
        if not seen:
            raise UserError(f"{data.repository} ({data.split}) gave no row; nothing was written")
    log_line(f"wrote {output}: {len(seen)} rows from {data.repository} (licence: {data.licence})")
    return len(seen)


def _converted(data: HubData, row: Row) -> Row:
    try:
        return data.row(row)
    except (KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"{data.repository} has other columns than expected ({', '.join(row)}; {error!r}); "
            "convert it by hand, see docs/your-data.md"
        ) from None


def _hub_rows(data: HubData) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        yield from load_dataset(data.repository, split=data.split, streaming=True)
    except Exception as error:  # the hub's client has its own error for every way in which a network fails
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{data.repository} cannot be read from the Hugging Face hub ({reason}); "
            f"check the network, or put the file at {data.output} by hand"
        ) from error
