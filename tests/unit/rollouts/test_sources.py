"""The forms in which people have their prompts: each is read, or refused in one line with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd_megatron.errors import UserError
from lopd_megatron.rollouts.input_files import short_names
from lopd_megatron.rollouts.sources import read_rows

ROW = {"prompt": "What is 1+1?"}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
LINES = b'{"prompt": "a"}\n{"prompt": "b"}\n'


def contents(path: Path | str) -> list[Any]:
    return [row.content for row in read_rows(str(path))]


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", b"\xef\xbb\xbf" + LINES),
        ("x.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("x.ndjson", LINES),
        ("x.jsonl.gz", gzip.compress(LINES)),
        ("x.json.zst", pa.compress(LINES, "zstd", asbytes=True)),
        ("x.json", b'[{"prompt": "a"}, {"prompt": "b"}]'),
        ("x.json", b'\xef\xbb\xbf\n [\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n'),
        ("x.jsonl.gz", gzip.compress(b'[{"prompt": "a"},\n{"prompt": "b"}]')),
    ],
)
def test_files_of_text(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert contents(tmp_path / name) == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"messages": json.dumps(MESSAGES)}, MESSAGES),
        ({"prompt": json.dumps(MESSAGES)}, MESSAGES),
        ({"prompt": str(MESSAGES)}, MESSAGES),
        ({"prompt": "[{x} is a set]"}, "[{x} is a set]"),
        ({"prompt": '[{"a": 1}]'}, '[{"a": 1}]'),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}]}, MESSAGES[1:]),
        ({"messages": [], "prompt": "", "question": "q"}, "q"),
        ({"prompt": [*MESSAGES, {"role": "assistant", "content": "It"}]},
         [*MESSAGES, {"role": "assistant", "content": "It"}]),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "<think>\n"}]},
         [*MESSAGES, {"role": "assistant", "content": "<think>\n"}]),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "<think>a</think>2"}]}, MESSAGES),
        ({"prompt": [*MESSAGES, {"role": "assistant", "content": ""}]}, MESSAGES),
    ],
)  # fmt: skip
def test_forms_of_a_prompt(tmp_path: Path, row: dict, content: Any) -> None:
    assert contents(write(tmp_path / "x.jsonl", row)) == [content]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 123}, "prompt is int 123, not text"),
        ({"prompt": {"role": "user", "content": "a"}}, "prompt is an object, not text"),
        ({"prompt": ["a"]}, r"prompt\[0\] is text, not a message"),
        ({"prompt": None}, "has no prompt"),
        ({"messages": "hello"}, "messages is text that is not a JSON list"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] has a content that is null"),
        ({"messages": [{"role": "user", "content": 5}]}, "content that is int 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content part 'image_url'"),
        ({"messages": [{"content": "a"}]}, "has the role None"),
        ({"messages": [{"role": "Customer", "content": "a"}]}, "has the role 'Customer'"),
        ({"messages": [MESSAGES[0]]}, "has no user turn"),
        ({"messages": [MESSAGES[1], MESSAGES[0]]}, "ends with a system turn"),
        (
            {"messages": [MESSAGES[1], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "calls a tool",
        ),
        ({"prompt": "cut \ud83d"}, r"holds half of a character \(\\ud83d at position 4\)"),
        ({"prompt": "a", "answer": "\udc00"}, "half of a character"),
        ({"prompt": "a", "tools": "no"}, "tools is text that is not JSON"),
        ({"prompt": "a", "tools": [1]}, "tools is a list, not a list of objects"),
    ],
)
def test_rows_that_are_no_prompt(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        contents(write(tmp_path / "x.jsonl", ROW, row))
    assert f"{tmp_path}/x.jsonl line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", LINES + b'{"prompt": "caf\xe9"}', r"line 3 is not UTF-8 \(byte 0xe9\)"),
        ("x.jsonl.gz", gzip.compress(LINES)[:20], "cannot be unpacked at line 1"),
        ("x.jsonl.gz", LINES, "cannot be unpacked"),
        ("x.jsonl.zst", LINES, "cannot be unpacked"),
        ("x.parquet", b"PAR1 no PAR1", "cannot be read as Parquet from row 0"),
        ("x.json", b'{"prompt":\n "a"}', "line 1 is not JSON"),
        ("x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', r"is not JSON: .* \(line 2\)"),
        ("x.jsonl", b"[" * 100_000, "is not usable JSON"),
        ("x.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", "is not usable JSON"),
        ("x.csv", b"prompt\na\n", "unknown ending '.csv'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        contents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_page(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": [f"text {i}" for i in range(5000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:400] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        contents(path)


def test_columns_of_parquet(tmp_path: Path) -> None:
    text = pa.array(["a", "b", "a"]).dictionary_encode()
    answers = pa.array([1.0, None, float("nan")])
    pq.write_table(pa.table({"prompt": text, "answer": answers}), tmp_path / "x.parquet")
    rows = list(read_rows(str(tmp_path / "x.parquet")))
    assert [(row.content, row.answer) for row in rows] == [("a", "1"), ("b", None), ("a", None)]
    pairs = pa.array([[("role", "user"), ("content", "Q")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"messages": pairs}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"row 0: messages\[0\] is an entry of a map"):
        contents(tmp_path / "x.parquet")
    tools = [[{"name": "f", "x": None}, {"name": None, "x": 1}], None]
    pq.write_table(pa.table({"prompt": ["a", "b"], "tools": tools}), tmp_path / "x.parquet")
    assert [row.tools for row in read_rows(str(tmp_path / "x.parquet"))] == [[{"name": "f"}, {"x": 1}], []]


def test_folder_of_a_downloaded_data_set(tmp_path: Path) -> None:
    for index, text in enumerate("ab"):
        (tmp_path / "data").mkdir(exist_ok=True)
        table = pa.table({"prompt": [text]})
        pq.write_table(table, tmp_path / "data" / f"train-{index:05d}-of-00002.parquet")
    (tmp_path / "README.md").write_text("card")
    write(tmp_path / "dataset_infos.json", {})
    write(tmp_path / ".cache" / "x.jsonl", ROW)
    assert contents(tmp_path) == ["a", "b"]
    pq.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=r"several splits \(test, train\); give one, as in .*/data/train\*.parquet"
    ):
        contents(tmp_path)
    assert contents(tmp_path / "data" / "train*.parquet") == ["a", "b"]
    write(tmp_path / "data" / "train.jsonl", ROW)
    with pytest.raises(UserError, match="Parquet and JSON files"):
        contents(tmp_path)
    write(tmp_path / "socratic" / "train.jsonl", ROW)
    with pytest.raises(UserError, match=r"several folders \(data, socratic\)"):
        contents(tmp_path)


def test_folders_without_data(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"holds no .parquet"):
        contents(tmp_path / "x")
    with pytest.raises(UserError, match="does not exist"):
        contents(tmp_path / "y*.jsonl")


def test_damaged_and_split_dataset_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([ROW, ROW])
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=r"several splits \(train, test\)"):
        contents(tmp_path / "splits")
    assert len(contents(tmp_path / "splits" / "train")) == 2
    for file in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
        data.save_to_disk(tmp_path / file)
        (tmp_path / file / file).write_bytes(b"{")
        with pytest.raises(UserError, match="damaged dataset folder"):
            contents(tmp_path / file)


def test_short_names() -> None:
    assert short_names(["d/aime24/test.jsonl", "d/aime25/test.jsonl", "e/gsm.jsonl"]) == [
        "aime24/test.jsonl",
        "aime25/test.jsonl",
        "gsm.jsonl",
    ]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": 33}, "33"),
        ({"answer": 70.0}, "70"),
        ({"answer": 0.5}, "0.5"),
        ({"answer": ["2"]}, "2"),
        ({"answer": ["2", 4]}, "2, 4"),
        ({"answer": ""}, None),
        ({"answer": None, "solution": r"so \boxed{4}"}, r"so \boxed{4}"),
        ({"answer": {"value": 1}}, None),
        ({"reward_model": {"ground_truth": 5}}, "5"),
    ],
)
def test_answers(tmp_path: Path, row: dict, answer: str | None) -> None:
    (found,) = read_rows(str(write(tmp_path / "x.jsonl", {"prompt": "a", **row})))
    assert found.answer == answer
