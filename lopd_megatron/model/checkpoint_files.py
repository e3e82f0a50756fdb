"""Which checkpoint of a folder is whole: what was written is known by size and SHA-256, file by file.

run_dir/checkpoints/
    iter_0000150/                       one checkpoint; the name appears when it is whole
        __0_0.distcp … .metadata common.pt metadata.json     Megatron's files
        checkpoint.json                 iteration, layout, inputs; size and hash of every file, and its own
    latest_checkpointed_iteration.txt   written last
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import traceback
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError
from lopd_megatron.files import ADVICE, fsync_path, sha256_file, write_json
from lopd_megatron.progress import log_line

DESCRIPTION = "checkpoint.json"
LATEST = "latest_checkpointed_iteration.txt"
HASH_SUFFIX = ".sha256"
REFUSED_PREFIX = ".refused_"
PARALLEL_READS = 8


class HashingFile(io.BufferedWriter):
    """A new file that is hashed while it is written; closing it leaves the hash in `<path>.sha256`.

    `open(path, "wb")` for Megatron's writer processes. torch's serializer replaces an error of the disk by
    one of its own, so leaving the `with` block raises the first error of the disk again.
    """

    def __init__(self, path: str | Path, mode: str = "wb") -> None:
        assert mode == "wb", mode
        super().__init__(io.FileIO(path, "w"), 1 << 20)
        self._path = str(path)
        self._digest = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._digest.update(data)
            return super().write(data)
        except OSError as error:
            self._keep(error)
            raise

    def _keep(self, error: OSError) -> None:
        """The first error, also as an empty file: Megatron-Core 0.19 tells nothing of it but its class."""
        self._error = self._error or OSError(error.errno, error.strerror, self._path)
        with contextlib.suppress(OSError):
            Path(self._path).with_name(f"{REFUSED_PREFIX}{error.errno}").touch()

    def fileno(self) -> int:
        self.flush()  # Megatron calls fsync on it
        return super().fileno()

    def __exit__(self, *raised: Any) -> None:
        try:
            self.close()
        except OSError as error:
            self._keep(error)
        if self._error:
            raise self._error
        if raised[0] is None:
            Path(self._path + HASH_SUFFIX).write_text(self._digest.hexdigest())


def seal(folder: Path, description: dict[str, Any]) -> None:
    """Write `checkpoint.json` with the size and hash of every file, after all were written.

    Files of a `HashingFile` are not read again.
    """
    hashes = {path.name.removesuffix(HASH_SUFFIX): path for path in folder.glob(f"*{HASH_SUFFIX}")}
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(HASH_SUFFIX):
            continue
        if path.name in hashes:
            digest = hashes[path.name].read_text()
        else:  # Megatron writes the small ones without fsync
            fsync_path(path)
            digest = sha256_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    for path in hashes.values():
        path.unlink()
    description = description | {"files": files}
    write_json(folder / DESCRIPTION, description | {"sha256": _own_hash(description)})


def newest(folder: Path, *, skip: Collection[int] = ()) -> dict[str, Any] | None:
    """`checkpoint.json` of the checkpoint that `latest_checkpointed_iteration.txt` names, or of the newest
    whole one before it. None where there is no checkpoint at all.

    Torn ones are skipped with a warning, those of `skip` without. Without that file, the newest whole one.
    UserError when the file names a checkpoint that is gone, or when no checkpoint is whole. Hashes are not
    checked: `damage` does.
    """
    iterations = list_iterations(folder)
    limit = read_pointer(folder)
    if limit is not None and limit not in iterations:
        raise UserError(_gone(folder, limit, iterations))
    past = [iteration for iteration in iterations if limit is None or iteration <= limit]
    for iteration in reversed(past):
        if iteration in skip:
            continue
        path = folder / iteration_name(iteration)
        description, problem = inspect(path)
        if not problem:
            return description
        warn_torn(path, problem)
    if past:
        raise UserError(
            f"no checkpoint in {folder} is whole (the warnings name the files): copy one back from a backup, "
            f"or start from iteration 1 with another run_dir (or after removing {folder})"
        )
    return None


def newest_undamaged(folder: Path) -> Path:
    """Where `newest` is once every byte has been compared with its hash; UserError where there is none."""
    skip: list[int] = []
    while description := newest(folder, skip=skip):
        path = folder / iteration_name(description["iteration"])
        problem = damage(path, description)
        if not problem:
            return path
        warn_torn(path, problem)
        skip.append(description["iteration"])
    raise UserError(f"{folder} has no checkpoint")


def warn_torn(path: Path, problem: str) -> None:
    log_line(f"warning: {path} is torn ({problem}); trying the one before it")


def read_pointer(folder: Path) -> int | None:
    """The iteration that `latest_checkpointed_iteration.txt` names; None without a readable one."""
    pointer = folder / LATEST
    try:
        return int(pointer.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        log_line(f"warning: {pointer} is not a number; using the newest whole checkpoint")
        return None


def _gone(folder: Path, limit: int, iterations: list[int]) -> str:
    way_out = (
        f"to continue from the newest there is, iteration {iterations[-1]}, write {iterations[-1]} into the "
        "file"
        if iterations
        else f"to start from iteration 1, set another run_dir or remove {folder}"
    )
    return (
        f"{folder / LATEST} names iteration {limit}, but {folder / iteration_name(limit)} is gone: "
        f"copy it back, or {way_out}"
    )


def inspect(path: Path) -> tuple[dict[str, Any], str]:
    """(description, what is wrong with the checkpoint or ""), from the sizes and formats of its files."""
    from lopd_megatron.parallel.safe_pickles import load_metadata, load_object

    try:
        description = json.loads((path / DESCRIPTION).read_text())
        sealed = any(isinstance(entry, dict) for entry in description["files"].values())
        if sealed and description.get("sha256") != _own_hash(description):
            return {}, f"{DESCRIPTION} does not have the content that was written"
        if path.name.startswith("iter_") and path.name != iteration_name(description["iteration"]):
            return {}, f"{DESCRIPTION} is that of iteration {description['iteration']}"
        sizes = {name: size_and_hash(entry)[0] for name, entry in description["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, f"no readable {DESCRIPTION}"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return description, f"{name} is missing"
        if file.stat().st_size != size:
            return description, f"{name} has {file.stat().st_size} bytes instead of {size}"
    for name, load in ((".metadata", load_metadata), ("common.pt", load_object)):
        if name in sizes:
            try:
                with (path / name).open("rb") as handle:
                    load(handle)
            except Exception as error:  # a damaged pickle raises nearly anything
                return description, f"{name} cannot be read: {_first_line(error)}"
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads((path / "metadata.json").read_text())
        except ValueError:
            return description, "metadata.json is not JSON"
    return description, ""


def damage(path: Path, description: dict[str, Any], names: Iterable[str] | None = None) -> str:
    """The first file of `names` (None: all) whose bytes are not those that were written, in words, or "".

    Reads every byte, several files at a time. Checkpoints of earlier versions have no hashes: "".
    """
    wanted = {name: size_and_hash(entry)[1] for name, entry in description["files"].items()}
    chosen = [name for name in (wanted if names is None else names) if wanted[name]]
    with ThreadPoolExecutor(min(PARALLEL_READS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: sha256_file(path / name), chosen)
        try:
            for name, digest in zip(chosen, found, strict=True):
                if digest != wanted[name]:
                    return f"{name} does not have the bytes that were written"
        except OSError as error:
            return f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    return ""


def disk_problem(folder: Path, error: BaseException) -> str | None:
    """What the file system refused when `error` was raised, with advice; None where it was something else.

    An error of a writer process arrives as text, or as a file of its number; torch's serializer keeps nothing
    of it. Then a small file in `folder` shows whether the disk still takes one.
    """
    kept = [path.name for path in folder.glob(f"{REFUSED_PREFIX}*")]
    found = re.search(r"\[Errno (\d+)\]", "".join(traceback.format_exception(error)))
    number = int(kept[0].removeprefix(REFUSED_PREFIX)) if kept else int(found[1]) if found else None
    if number is None:
        try:
            with (folder / ".probe").open("wb") as probe:
                probe.write(bytes(1 << 20))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as refused:
            number = refused.errno
    if number not in ADVICE:
        return None
    return f"{folder.parent}: {os.strerror(number)}; {ADVICE[number]}"


def has_hashes(description: dict[str, Any]) -> bool:
    return "sha256" in description


def size_and_hash(entry: Any) -> tuple[int, str]:
    """Of one entry of `files`: a number alone in checkpoints of earlier versions."""
    return (entry, "") if isinstance(entry, int) else (int(entry["bytes"]), str(entry["sha256"]))


def list_iterations(folder: Path) -> list[int]:
    """Iterations that have a checkpoint folder, ascending."""
    names = [path.name.removeprefix("iter_") for path in folder.glob("iter_*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _own_hash(description: dict[str, Any]) -> str:
    content = {key: value for key, value in description.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
