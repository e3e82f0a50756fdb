"""A rank that hangs or is stopped ends the whole job, with a line that names it; its peers wait for ever.

Each rank has a thread with a file, `run_dir/logs/ranks/00003.json`, rewritten at every beat: iteration, what
it does and where in the code. The thread works while the main thread sits in a collective, and files outlive
the rank that hosts the store of torch.distributed. Two things raise the alarm within `train.hang_timeout_s`:

* the file of the next rank stops changing: that process is stopped or gone (any phase);
* a rank has been in a phase with a limit for too long, and no rank is behind it: it hangs, and all others
  wait for it. Saving, validation, EffOPD's search, live servers, start and first step have no limit.

The alarm is a file too. Every rank that sees it prints the stacks of its threads and exits.
Only this process's own clock is used, and a gap in it (the whole job was suspended) counts as one beat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lopd_megatron.errors import EXIT_FAILURE
from lopd_megatron.files import explained
from lopd_megatron.run_lock import start_ticks, this_process

MAX_BEAT_S = 10.0
ALARM = "alarm.json"
MAX_NAMED = 8
RECORD_BYTES = 1024
"""Records have one size and are rewritten in place: that works on a full disk."""

_current: Watchdog | None = None


def enter(phase: str, iteration: int, *, limited: bool = True) -> None:
    """This rank begins something; without a limit it may take as long as it likes. Costs a microsecond."""
    if _current is not None:
        _current.enter(phase, iteration, limited=limited)


@contextlib.contextmanager
def watch(folder: Path, rank: int, world_size: int, timeout_s: float) -> Iterator[None]:
    """A watchdog while the program inside runs; see the module."""
    global _current
    _current = Watchdog(folder, rank, world_size, timeout_s)
    try:
        yield
    finally:
        _current.stop()
        _current = None


class Watchdog:
    """One rank's thread; the main thread calls `enter`."""

    def __init__(self, folder: Path, rank: int, world_size: int, timeout_s: float) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.timeout_s = timeout_s
        self.beat_s = min(MAX_BEAT_S, timeout_s / 10)
        self.main_thread = threading.main_thread().ident
        self._phase = ("starting", 0, False, 0)  # name, iteration, limited, how many came before
        self._next = Silence()
        self._stalled = Silence()
        self._beats = 0
        self._identity = this_process()
        self._stopped = threading.Event()
        if rank == 0:  # the others wait for the folder: rank 0 may refuse the run, and then nothing is left
            with explained(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.json"):  # by an earlier run
                left.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self._thread.start()

    def enter(self, phase: str, iteration: int, *, limited: bool) -> None:
        self._phase = (phase, iteration, limited, self._phase[3] + 1)
        if self._phase[3] == 1:  # all ranks have met by now, so the folder is there
            with contextlib.suppress(OSError):
                self._write()

    def stop(self) -> None:
        """The rank has ended by itself; its neighbour stops looking for it."""
        self._stopped.set()
        self._thread.join(timeout=self.beat_s)
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # by the last one

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank:05d}.json"

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.beat_s):
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * self.beat_s), now
            # A file system that does not answer is no reason to end a job that may outlive it.
            with contextlib.suppress(OSError):
                self._beat(elapsed)

    def _beat(self, elapsed: float) -> None:
        self._write()
        # While the ranks start, the alarm may be that of an earlier run.
        alarm = read_record(self.folder / ALARM) if self._phase[3] else {}
        if alarm:
            self._leave(alarm, first=False)
        # Two beats are needed to see what the others do, and one for the alarm to reach them.
        limit = self.timeout_s - 3 * self.beat_s
        neighbour = (self.rank + 1) % self.world_size
        if neighbour != self.rank:
            record = read_record(self._path(neighbour))
            # Before the ranks have met, a file that never changed may be that of an earlier run.
            is_ours = self._next.was_seen or self._phase[3] > 0
            if self._next.grows(record.get("beat"), elapsed) > limit and is_ours:
                self._raise_alarm([neighbour], f"{self._silent(record)} for {self._next.seconds:.0f} s")
        phase, _, limited, sequence = self._phase
        if self._stalled.grows(sequence, elapsed) > limit and limited:
            hung = self._least_advanced()
            if self.rank in hung:
                self._raise_alarm(hung, f"has been {phase} for {self._stalled.seconds:.0f} s")

    def _write(self) -> None:
        self._beats += 1
        phase, iteration, limited, sequence = self._phase
        where, in_collective = position(sys._current_frames().get(self.main_thread or 0))
        record = {
            **{name: self._identity[name] for name in ("host", "boot", "namespace", "pid", "ticks")},
            "rank": self.rank,
            "beat": f"{self._identity['pid']}:{self._beats}",
            "iteration": iteration,
            "phase": phase,
            "limited": limited,
            "sequence": sequence,
            "where": where[:200],
            "in_collective": in_collective,
        }
        path = self._path(self.rank)
        with path.open("r+b" if path.exists() else "wb") as handle:
            handle.write(json.dumps(record).encode()[:RECORD_BYTES].ljust(RECORD_BYTES))

    def _least_advanced(self) -> list[int]:
        """Ranks that have begun the fewest phases: all others may be waiting for them.

        Of several, those outside of a collective: the others have come to wait already. A rank that is
        saving or searching is no suspect, and then nobody is.
        """
        records = [read_record(self._path(rank)) for rank in range(self.world_size)]
        records = [record for record in records if record]
        fewest = min(record["sequence"] for record in records)
        last = [record for record in records if record["sequence"] == fewest]
        if not all(record["limited"] for record in last):
            return []
        outside = [record for record in last if not record["in_collective"]]
        return [record["rank"] for record in outside or last]

    def _silent(self, record: dict[str, Any]) -> str:
        """What keeps a process from writing its file."""
        if all(record.get(name) == self._identity[name] for name in ("boot", "namespace")):
            if start_ticks(record["pid"]) != record["ticks"]:
                return "is gone"
            return f"is stopped (kill -CONT {record['pid']} continues such a process)"
        return "gives no sign of life"

    def _raise_alarm(self, ranks: list[int], what: str) -> None:
        """Name the ranks once: the first rank to create the file prints, the others read it."""
        records = [read_record(self._path(rank)) for rank in range(self.world_size)]
        alarm = {"ranks": ranks, "line": alarm_line(ranks, records, what, self.timeout_s)}
        try:
            with (self.folder / ALARM).open("x") as handle:
                handle.write(json.dumps(alarm))
        except FileExistsError:
            self._leave(read_record(self.folder / ALARM), first=False)
        except OSError:  # a full disk: the launcher ends the others when this rank leaves
            pass
        print(f"error: {alarm['line']}", file=sys.stderr, flush=True)
        self._leave(alarm, first=True)

    def _leave(self, alarm: dict[str, Any], *, first: bool) -> None:
        """Stacks of all threads, then out; a stopped process of this host would keep the launcher waiting."""
        print(f"rank {self.rank}: stacks of all threads", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if first:
            time.sleep(3 * self.beat_s)  # when this rank leaves, the launcher ends the others
        for rank in alarm.get("ranks", []):
            record = read_record(self._path(rank))
            same_host = all(record.get(name) == self._identity[name] for name in ("boot", "namespace"))
            if rank != self.rank and same_host and start_ticks(record["pid"]) == record["ticks"]:
                os.kill(record["pid"], signal.SIGKILL)
        os._exit(EXIT_FAILURE)


class Silence:
    """How long a value has not changed; a value that has never changed says nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.was_seen = False
        self._last: Any = None

    def grows(self, value: Any, elapsed: float) -> float:
        """Seconds of silence up to now, after `elapsed` more; None: the other has not begun, or has ended."""
        if value != self._last or value is None:
            self.was_seen = value is not None and self._last is not None
            self._last, self.seconds = value, 0.0
        else:
            self.seconds += elapsed
        return self.seconds


def alarm_line(ranks: list[int], records: list[dict[str, Any]], what: str, timeout_s: float) -> str:
    """Rank, host, iteration and phase of who hangs, and where every other rank is."""
    by_rank = {record["rank"]: record for record in records if record}
    first = by_rank.get(ranks[0], {})
    others = [record for rank, record in sorted(by_rank.items()) if rank != ranks[0]]
    places = [
        f"rank {record['rank']} is {record['phase']} of iteration {record['iteration']}, {record['where']}"
        for record in others[:MAX_NAMED]
    ]
    places += [f"{len(others) - MAX_NAMED} more"] if len(others) > MAX_NAMED else []
    return (
        f"rank {', '.join(map(str, ranks[:MAX_NAMED]))} on {first.get('host')} {what} (iteration "
        f"{first.get('iteration')}, {first.get('phase')}, {first.get('where')}); "
        + "".join(f"{place}; " for place in places)
        + f"train.hang_timeout_s={timeout_s:g}: raise it if this is slow and not hung; the last checkpoint "
        "is good"
    )


def position(frame: FrameType | None) -> tuple[str, bool]:
    """Innermost line of a stack that is ours, or else of all, and whether it waits in torch.distributed."""
    innermost = "unknown"
    in_collective = False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        here = f"{'/'.join(Path(file).parts[-3:])}:{frame.f_lineno} {name}"
        if innermost == "unknown":
            innermost = here
        in_collective |= "torch/distributed/" in file
        if "lopd_megatron" in file:
            return here, in_collective
        frame = frame.f_back
    return innermost, in_collective


def read_record(path: Path) -> dict[str, Any]:
    """{} where there is none; also while it is being rewritten."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
