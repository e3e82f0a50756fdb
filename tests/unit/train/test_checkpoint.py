"""Which checkpoint a run continues from."""

from pathlib import Path
from typing import Any

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.train.checkpoint import (
    DESCRIPTION,
    LATEST,
    Checkpoints,
    inspect,
    list_iterations,
    newest,
    refuse_other_input,
    remove_leftovers,
)


def write(folder: Path, iteration: int) -> Path:
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"weights")
    write_json(path / DESCRIPTION, {"iteration": iteration, "files": {"__0_0.distcp": 7}})
    return path


def found(folder: Path) -> int | None:
    description = newest(folder)
    return description["iteration"] if description else None


def test_the_pointer_decides_and_its_absence_means_the_newest(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    for iteration in (3, 6, 9):
        write(tmp_path, iteration)
    assert found(tmp_path) == 9
    (tmp_path / LATEST).write_text("6\n")
    assert found(tmp_path) == 6
    (tmp_path / LATEST).write_text("six")
    assert found(tmp_path) == 9


def test_torn_checkpoints_are_skipped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [write(tmp_path, iteration) for iteration in (1, 2, 3, 4)]
    (paths[3] / DESCRIPTION).unlink()
    (paths[2] / "__0_0.distcp").write_bytes(b"weigh")
    (paths[1] / "__0_0.distcp").unlink()
    assert found(tmp_path) == 1
    warnings = capsys.readouterr().err
    for problem in ("no readable checkpoint.json", "has 5 bytes instead of 7", "__0_0.distcp is missing"):
        assert problem in warnings
    assert inspect(paths[0])[1] == ""


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".iter_0000002.1a2b3c4d.tmp", ".iter_0000000.old"):
        (tmp_path / name).mkdir()
    (tmp_path / f".{LATEST}.77.tmp").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]


def test_old_checkpoints_are_deleted_and_a_rolled_back_run_keeps_its_own(tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path))
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_every = 4
    topology: Any = None
    checkpoints = Checkpoints(config, topology)
    for iteration in (2, 4, 6, 8, 10, 20, 30):  # 20 and 30: the pointer was set back to 8
        write(checkpoints.folder, iteration)
    checkpoints._delete_old(10)
    assert list_iterations(checkpoints.folder) == [4, 8, 10, 20, 30]


def test_another_model_is_refused_by_name() -> None:
    stored = {"fingerprint": "a" * 64, "origin": "models/first"}
    refuse_other_input(Path("c"), "model", stored, {"fingerprint": "a" * 64, "origin": "moved/first"})
    refuse_other_input(Path("c"), "model", stored, None)
    with pytest.raises(UserError, match=r"another model: models/first \(a{16}\).*models/second"):
        refuse_other_input(Path("c"), "model", stored, {"fingerprint": "b" * 64, "origin": "models/second"})
