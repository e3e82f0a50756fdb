"""The tables of docs/performance.md are those that its program makes; the pure parts of the benchmarks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    return importlib.import_module


def test_the_page_holds_what_the_files_say(tool: Any) -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    assert tool("bench_page").with_tables(text) == text, "run: python tools/bench/bench_page.py"


def test_a_changed_figure_is_found(tool: Any) -> None:
    page = tool("bench_page")
    text = (ROOT / "docs" / "performance.md").read_text()
    figure = page.measured_table()[2].split(" | ")[1]
    assert page.with_tables(text.replace(figure, "9.99×", 1)) == text


def test_a_page_without_a_place_for_a_table_is_refused(tool: Any) -> None:
    with pytest.raises(UserError, match="needs one <!-- measured -->"):
        tool("bench_page").with_tables("no table")


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [(1.7, "≥ 1.7×", True), (1.69, "≥ 1.7×", False), (0.41, "≤ 0.40×", False), (99.0, "≥ 100 M", False)],
)
def test_goals(tool: Any, value: float, goal: str, met: bool) -> None:
    assert tool("bench_page").is_met(value, goal) is met


def test_the_projection_of_the_8b_student(tool: Any) -> None:
    """6 · parameters · tokens and attention, by hand: 8.02e18 FLOPs, over 989e12 · 50 %, is 4.5 GPU-hours."""
    projection = tool("bench_projection")
    rollouts, scoring, training = projection.stage_hours(projection.PAIRS["8B ← 32B"])
    assert training == pytest.approx(8.02e18 / (989e12 * 0.5) / 3600, rel=0.01)
    assert scoring == pytest.approx(5.05e18 / (989e12 * 0.55) / 3600, rel=0.01)
    # A decoding step reads the memory once, so it is the memory used over the bandwidth used.
    step_s = 0.88 * 80e9 / (0.60 * 3.35e12)
    sequences = (0.88 * 80e9 - 2 * 8.19e9) / (2198 * 147_456)
    assert rollouts == pytest.approx(17_398 * 4096 / sequences * step_s / 3600, rel=0.01)


def test_ratios_are_ours_over_theirs(tool: Any) -> None:
    lengths = np.full(16, 10)
    result = tool("bench_peers").summary(
        lengths,
        {"ours": [1.0, 1.2, 1.1], "hf_loop": [3.0, 2.0, 2.1]},
        {"ours": 25.0, "hf_loop": 100.0},
        {"ours": [2.0, 1.0], "hf_loop": [2.0, 1.0 + 1e-6]},
    )
    assert result["hf_loop"]["speed"] == pytest.approx(2.0)
    assert result["hf_loop"]["memory"] == pytest.approx(0.25)
    assert result["hf_loop"]["loss_rel_difference"] == pytest.approx(1e-6, rel=1e-3)
    assert result["spread"] == pytest.approx(0.1)
    assert result["padding_share"] == 0.0


@pytest.mark.parametrize(("difference", "refused"), [(1e-6, False), (1e-4, True)])
def test_other_losses_are_not_compared(
    tool: Any, monkeypatch: pytest.MonkeyPatch, difference: float, refused: bool
) -> None:
    class FakeWorker:
        def __init__(self, folder: Path, side: str, environment: dict[str, str]) -> None:
            self.curve = [2.0, 1.0 + difference * (side == "hf_loop")]

        def ask(self, question: str) -> tuple[float, list[float]]:
            return 1.0, self.curve

        def close(self) -> None: ...

    peers = tool("bench_peers")
    monkeypatch.setattr(peers, "Worker", FakeWorker)
    if refused:
        with pytest.raises(UserError, match=r"hf_loop: its losses differ by 1\.0e-04 from ours"):
            peers.measure_speed(Path(), ["ours", "hf_loop"], 1)
    else:
        seconds, losses = peers.measure_speed(Path(), ["ours", "hf_loop"], 1)
        assert seconds == {"ours": [1.0], "hf_loop": [1.0]}
        assert losses["ours"] == [2.0, 1.0, 2.0, 1.0]


def test_padding_of_batches(tool: Any) -> None:
    sides = tool("bench_peers_sides")
    documents = [
        {
            "tokens": np.arange(1, length + 1, dtype=np.int32),
            "loss_mask": np.ones(length, np.uint8),
            "teacher_logprobs": np.full(length, -1, np.float32),
        }
        for length in (2, 3)
    ]
    batch = sides.pad(documents)
    assert batch["tokens"].tolist() == [[1, 2, 0], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["loss_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    lengths = sides.mixed_lengths()
    batches = [lengths[sides.order()[start : start + 4]] for start in range(0, 16, 4)]
    padded = sum(4 * int(max(batch)) for batch in batches)
    assert sides.padding_share(lengths) == pytest.approx(1 - lengths.sum() / padded)
