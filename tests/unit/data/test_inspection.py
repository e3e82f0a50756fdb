"""The tool that shows a dataset: every command of its docstring, on a small one."""

import runpy
import sys
from pathlib import Path

import pytest

from lopd_megatron.data.build_dataset import write_dataset
from lopd_megatron.data.inspection import document_lines
from lopd_megatron.data.store import open_dataset
from lopd_megatron.lineage import Lineage
from lopd_megatron.recipes import tiny_task
from tests.unit.data.samples import documents

TOOL = Path(__file__).resolve().parents[3] / "tools" / "inspect_dataset.py"


class Tool:
    """Runs the tool in this process; `out` and `err` of the last run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> int:
        self.monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOL), run_name="__main__")
        self.out, self.err = self.capsys.readouterr()
        return int(caught.value.code or 0)


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    teacher = {"kind": "model", "fingerprint": "f" * 64, "origin": "models/teacher"}
    write_dataset(tmp_path / "train", documents(30), Lineage(teacher=teacher, allow_mismatch="because"))
    return tmp_path / "train"


@pytest.mark.processes  # Matplotlib asks for the fonts of a machine once
def test_everything_at_once(inspect: Tool, prefix: Path, tmp_path: Path) -> None:
    assert inspect(prefix, "--verify", "--documents", "0,29", "--plots", tmp_path / "plots") == 0
    assert "30 documents" in inspect.out
    assert "teacher    ffffffffffffffff  models/teacher" in inspect.out
    assert "allowed mismatch: because" in inspect.out
    assert "data.seq_length=1024" in inspect.out
    assert "document 29: " in inspect.out
    assert "verified: 30 documents" in inspect.err
    for name in ("lengths.png", "logprob_gap.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_a_damaged_dataset_and_a_wrong_index(inspect: Tool, prefix: Path) -> None:
    assert inspect(prefix, "--documents", "30") == 2
    assert "write indices from 0 to 29" in inspect.err
    path = Path(f"{prefix}.tokens.bin")
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert inspect(prefix, "--verify") == 2
    assert inspect.err.splitlines()[-1].startswith(f"error: {path} was changed after it was written")


def test_a_dry_run_writes_nothing(inspect: Tool, prefix: Path, tmp_path: Path) -> None:
    assert inspect(prefix, "--plots", tmp_path / "plots", "--dry-run") == 0
    assert "would write" in inspect.out
    assert not (tmp_path / "plots").exists()


def test_tokens_are_shown_as_text_and_coloured_by_the_gap(prefix: Path) -> None:
    dataset = open_dataset([prefix])
    lines = list(document_lines(dataset, 0, lambda token: tiny_task.VOCABULARY[token % 27], colour=True))
    trained = int(dataset.document(0)["loss_mask"].sum())
    assert sum("\x1b[38;5;" in line for line in lines[3:]) == trained
    plain = list(document_lines(dataset, 0, None, colour=False))
    assert not any("\x1b" in line for line in plain)
    assert len(plain) == 3 + len(dataset.document(0)["tokens"])
