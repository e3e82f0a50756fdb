"""Rows of the files that people have: jsonl, JSON lists, Parquet, compressed text, and folders of these."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any, cast

from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file

Row = dict[str, Any]

_TEXT_ENDINGS = (".jsonl", ".ndjson", ".json")
_COMPRESSIONS = (".gz", ".zst")
_FORMS = (
    "a .jsonl, .json or .parquet file (.jsonl.gz and .zst too), a pattern as train-*.parquet, or a folder"
)
_SPLIT = re.compile(r"^(train|test|validation|valid|val|dev)(?=[-_.]|$)")


def read_raw_rows(path_text: str) -> Iterator[tuple[str, Path, Row]]:
    """Streams (place, file, row) of an input; `place` names the file and the line or row for messages.

    Only a JSON list is read whole. What cannot be read is a UserError with its place.
    """
    if _is_saved_dataset(Path(path_text)):
        rows = _saved_dataset_rows(Path(path_text))
        yield from ((place, Path(path_text), row) for place, row in rows)
        return
    for file in source_files(path_text):
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _text_rows(file)
        try:
            for place, row in rows:
                yield place, file, row
        except PermissionError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); give it read permission") from None


def source_files(path_text: str) -> list[Path]:
    """The files of an input, sorted: itself, those that match a pattern, or those of a data set's folder."""
    path = Path(path_text)
    if path.is_dir():
        return _folder_files(path)
    if path.is_file():
        if not _is_data(path):
            raise UserError(f"{path} has an unknown ending {path.suffix!r}; give {_FORMS}")
        return [path]
    if "*" in path.name and path.parent.is_dir():
        found = sorted(file for file in path.parent.glob(path.name) if file.is_file() and _is_data(file))
        if found:
            return found
    raise UserError(f"input {path_text!r} does not exist; give {_FORMS}")


def input_hash(path_text: str) -> str:
    """Hash of the bytes of an input: its file, or all its files in order."""
    path = Path(path_text)
    if _is_saved_dataset(path):
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = source_files(path_text)
    try:
        return hashlib.sha256(" ".join(map(sha256_file, files)).encode()).hexdigest()
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read; give it read permission") from None


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell it from the others; a path given twice is refused."""
    parts = [Path(path).absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for index, path in enumerate(paths) if parts[index] in parts[:index])
        raise UserError(f"input {twice!r} is given twice; give every input once")

    def name(index: int) -> str:
        own = parts[index]
        for length in range(1, len(own) + 1):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                return "/".join(own[-length:])
        return "/".join(own)

    return [name(index) for index in range(len(parts))]


def _is_data(path: Path) -> bool:
    plain = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return path.suffix == ".parquet" or plain.suffix in _TEXT_ENDINGS


def _folder_files(folder: Path) -> list[Path]:
    """The data files of a downloaded data set, one split of one form; anything else is refused."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and _is_data(file)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not re.match(r"dataset_(infos?|dict)\.json$|state\.json$", file.name)
    ]
    if not files:
        raise UserError(f"folder {folder} holds no .parquet, .jsonl or .json file; give {_FORMS}")
    folders = sorted({file.parent.relative_to(folder).as_posix() for file in files})
    if len(folders) > 1:
        raise UserError(
            f"folder {folder} holds data files in several folders ({', '.join(folders)}); give one of them"
        )
    forms = sorted({"Parquet" if file.suffix == ".parquet" else "JSON" for file in files})
    if len(forms) > 1:
        raise UserError(
            f"folder {folder} holds Parquet and JSON files; give a pattern such as {folder}/*.parquet"
        )
    splits = {match[1] if (match := _SPLIT.match(file.name)) else "" for file in files}
    if len(splits) > 1:
        named = sorted(filter(None, splits))
        raise UserError(
            f"folder {folder} holds several splits ({', '.join(named)}); "
            f"give one, as in {files[0].parent}/{named[-1]}*{files[0].suffix}"
        )
    return files


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved_dataset_rows(path: Path) -> Iterator[tuple[str, Row]]:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
        if isinstance(dataset, dict):
            raise UserError(
                f"{path} holds several splits ({', '.join(dataset)}); give the folder of one split"
            )
        for number, row in enumerate(dataset):
            yield f"{path} row {number}", _without_missing_tool_fields(cast(Row, row))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is a damaged dataset folder ({_first_line(error)}); save it again") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", _without_missing_tool_fields(row)
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet from row {number} on ({_first_line(error)}); "
            "download or write it again"
        ) from None


def _without_missing_tool_fields(row: Row) -> Row:
    """Columnar files give every tool the fields of all tools; those that a tool lacks are null."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if item is not None}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return {**row, "tools": strip(row["tools"])} if "tools" in row else row


def _text_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """One JSON object per line, or one list of objects."""
    with closing(_lines(path)) as lines:
        for number, line in lines:
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                rest = "".join(text for _, text in lines)
                yield from _list_rows(path, line + rest)
                return
            place = f"{path} line {number}"
            row = _parse(line, place, "write one JSON object per line, or one list of objects")
            if not isinstance(row, dict):
                raise UserError(f"{place} is not a JSON object; write one object per line")
            yield place, row


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    rows = _parse(text, str(path), "write one list of objects, or one object per line")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} of the list is not a JSON object; write a list of objects")
        yield f"{path} row {number}", row


def _parse(text: str, place: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f" (line {error.lineno})" if error.lineno > 1 else ""
        raise UserError(f"{place} is not JSON: {error.msg}{where}; {advice}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{place} is not usable JSON: {_first_line(error)}; {advice}") from None


def _lines(path: Path) -> Generator[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 text, a byte order mark left out."""
    import pyarrow as pa

    with _open(path) as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline()
            except (EOFError, OSError, pa.ArrowException, ValueError) as error:
                raise UserError(
                    f"{path} cannot be unpacked at line {number} ({_first_line(error)}); "
                    "download or compress it again"
                ) from None
            if not line:
                return
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} line {number} is not UTF-8 (byte {line[error.start]:#04x}); "
                    "convert the file, as with iconv -f ENCODING -t UTF-8"
                ) from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
