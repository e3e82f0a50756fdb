"""kill −9 during a build: a rerun gives the bytes of an undisturbed one; no reader sees half a dataset."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.data.build_dataset import build_dataset, write_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.manifest import manifest_path
from lopd_megatron.data.store import open_dataset
from tests.unit.data.samples import documents, files_of, forked, random_rows, write_shards

pytestmark = pytest.mark.processes

# File-system events that Python announces to audit hooks; writes between two of them leave the same files.
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.mkdir"}


def build(source: Path, prefix: Path) -> None:
    build_dataset(source, prefix, filters=Filters(40))


def build_and_die(source: Path, prefix: Path, last_event: int | None, report: Path | None = None) -> None:
    die_at(last_event, prefix, lambda: build(source, prefix), report)


def die_at(
    last_event: int | None, prefix: Path, work: Callable[[], object], report: Path | None = None
) -> None:
    """Work in this process and kill −9 it in the middle of file-system event number `last_event`."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(prefix.parent) in str(arguments[0]):
            seen += 1
            if seen == last_event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()
    if report is not None:
        report.write_text(str(seen))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    return write_shards(
        tmp_path_factory.mktemp("source") / "scores", [random_rows(rng, 6, f"{i}-") for i in range(3)]
    )


def new_prefix(folder: Path) -> Path:
    folder.mkdir()
    return folder / "x"


def assert_resumes(source: Path, prefix: Path, expected: dict[str, bytes]) -> None:
    if manifest_path(prefix).exists():
        open_dataset([prefix]).verify()
    build(source, prefix)
    assert files_of(prefix) == expected
    assert not Path(f"{prefix}.building").exists()


def test_killed_at_every_file_system_event(source: Path, ram_path: Path) -> None:
    report = ram_path / "events"
    whole = new_prefix(ram_path / "whole")
    assert forked(lambda: build_and_die(source, whole, None, report)) == 0
    expected, events = files_of(whole), int(report.read_text())
    assert events >= 50
    for event in range(1, events + 1):
        prefix = new_prefix(ram_path / str(event))
        assert forked(functools.partial(build_and_die, source, prefix, event)) == -signal.SIGKILL
        assert_resumes(source, prefix, expected)


def test_a_replacement_is_killed_at_every_file_system_event(ram_path: Path) -> None:
    """The same lengths, so that sizes tell nothing: a reader sees old, new or none, never a mixture."""
    new = [replace(document, tokens=document.tokens + 1) for document in documents(5)]
    for event in range(1, 1000):
        prefix = new_prefix(ram_path / str(event))
        write_dataset(prefix, documents(5))
        status = forked(functools.partial(die_at, event, prefix, lambda p=prefix: write_dataset(p, new)))
        if manifest_path(prefix).exists():
            open_dataset([prefix]).verify()
        if status == 0:
            break
    assert event > 30
    assert open_dataset([prefix]).document(0)["tokens"].tolist() == new[0].tokens.tolist()


def test_killed_twice_at_random_moments(source: Path, ram_path: Path) -> None:
    whole = new_prefix(ram_path / "whole")
    start = time.perf_counter()
    assert forked(lambda: build(source, whole)) == 0
    duration = time.perf_counter() - start
    rng = np.random.default_rng(0)
    for trial in range(8):
        prefix = new_prefix(ram_path / str(trial))
        for _ in range(2):
            forked(functools.partial(build, source, prefix), kill_after=float(rng.uniform(0, duration)))
        assert_resumes(source, prefix, files_of(whole))
