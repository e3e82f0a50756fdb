"""Files are whole or absent, and what the file system refuses is one line."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lopd_megatron.errors import EXIT_USER_ERROR, UserError
from lopd_megatron.files import ADVICE, atomic_path, explained, write_json

WRITE = """
import resource, signal, sys
from pathlib import Path
from lopd_megatron.errors import run_program
from lopd_megatron.files import write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
{what}
"""


def run(what: str, path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WRITE.format(what=what), path]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.processes
@pytest.mark.parametrize(
    "what",
    [
        'run_program(lambda: write_json(Path(sys.argv[1]), "x" * 100_000))',
        'run_program(lambda: Path(sys.argv[1] + ".new").write_bytes(bytes(100_000)))',
    ],
)
def test_a_full_disk_ends_a_program_with_one_line_and_leaves_the_old_file(what: str, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)
    ran = run(what, path)
    assert ran.returncode == EXIT_USER_ERROR
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert "File too large; raise the limit on file sizes" in line
    assert path.read_text() == "1\n"
    assert not list(tmp_path.glob(".*"))


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(
        UserError, match=r"run.*(Not a directory|File exists); a file has the name of a folder"
    ):
        write_json(tmp_path / "run" / "config.json", 1)


@pytest.mark.parametrize("number", sorted(ADVICE))
def test_every_refusal_names_the_file_and_what_to_do(number: int, tmp_path: Path) -> None:
    path = tmp_path / "value"

    def refused() -> None:
        with atomic_path(path) as temporary:
            temporary.touch()
            raise OSError(number, "refused")

    with pytest.raises(UserError, match=str(path)):
        refused()
    assert not list(tmp_path.iterdir())


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"), explained(tmp_path):
        raise OSError(errno.EIO, "Input/output error")
