"""The study's statistics, and its cells: every one starts from something that exists by then."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.recipes import tiny
from lopd_megatron.recipes.study.claims import CLAIMS
from lopd_megatron.recipes.study.tiny import Study
from lopd_megatron.study.report import table
from lopd_megatron.study.statistics import Claim, interval, quality


def results(**cells: list[float]) -> dict[str, dict[int, Any]]:
    return {
        name: {seed: {"test": {"greedy": {"value": v}}} for seed, v in enumerate(values)}
        for name, values in cells.items()
    }


def claim(margin: float = 0.0, less: tuple[str, str] | None = None) -> Claim:
    return Claim("paper", "a beats b", "a", "b", quality("greedy"), "points", 100.0, margin, less)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    """2,000 draws of five values: 95 % ± 1.5 %, three standard errors of that share."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        found = interval(rng.normal(1.0, 2.0, 5).tolist())
        assert found is not None
        assert found.half is not None
        covered += abs(found.mean - 1.0) <= found.half
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_verdicts() -> None:
    assert claim().verdict(results(a=[0.9, 0.91, 0.92], b=[0.5, 0.51, 0.5])) == "**holds**"
    assert claim().verdict(results(a=[0.5, 0.51, 0.5], b=[0.9, 0.91, 0.92])) == "**does not hold**"
    assert claim().verdict(results(a=[0.5, 0.9], b=[0.6, 0.6])) == "open"
    assert claim().verdict(results(a=[0.9], b=[0.5])) == "one seed: open"
    assert claim().verdict(results(a=[0.9])) == "not run"


def test_pairs_are_made_by_seed() -> None:
    """Seeds differ far more than the two cells do; the paired difference is exactly one point."""
    b = [0.1, 0.5, 0.9]
    found = claim().difference(results(a=[v + 0.01 for v in b], b=b))
    assert found is not None
    assert found.mean == pytest.approx(0.01)
    assert found.half == pytest.approx(0.0, abs=1e-12)


def test_a_margin_and_a_difference_of_differences() -> None:
    close = results(a=[0.895, 0.894, 0.896], b=[0.9, 0.9, 0.9])
    assert claim(margin=0.01).verdict(close) == "**holds**"
    assert claim().verdict(close) == "**does not hold**"
    both = results(a=[0.9, 0.9], b=[0.5, 0.5], c=[0.9, 0.9], d=[0.8, 0.8])
    found = claim(less=("c", "d")).difference(both)
    assert found is not None
    assert found.mean == pytest.approx(0.3)


def test_cells_can_run_in_their_order() -> None:
    cells = Study(3).cells()
    done: set[str] = set()
    for cell in cells:
        assert set(cell.needs) <= done, cell.name
        assert cell.name not in done
        done.add(cell.name)
    folders = [str(part.config.paths.run_dir) for cell in cells for part in cell.parts]
    assert len(folders) == len(set(folders))
    for cell in cells:
        for part in cell.parts:
            part.config.check()


def test_claims_speak_of_cells_that_exist() -> None:
    names = {cell.name for cell in Study(0).cells()}
    assert {cell for one in CLAIMS for cell in one.cells()} <= names


def test_tables_are_markdown() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert table(("a",), []) == ""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`lopd study` in an empty folder, asked for the groups core and clip."""
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("lopd_megatron.commands.study")


def test_a_kept_result_is_not_made_again_and_a_stale_one_is(tool: Any) -> None:
    arguments = argparse.Namespace(groups=["clip"], quick=False)
    study = Study(0)
    names = [cell.name for cell in study.cells() if cell.group == "clip"]
    assert [cell.name for cell in tool.to_run(study, arguments)] == ["sft", *names]
    kept = {name: {"0": {"cell": name, "seed": 0, "recipe": study.recipes()[name]}} for name in names}
    write_json(tool.RESULTS, {"cells": kept})
    assert tool.to_run(study, arguments) == []  # and nothing is trained only to start from it
    assert [cell.name for cell in tool.to_run(Study(1), arguments)] == ["sft", *names]
    kept[names[0]]["0"]["recipe"] = "another"
    write_json(tool.RESULTS, {"cells": kept})
    assert [cell.name for cell in tool.to_run(study, arguments)] == ["sft", names[0]]
    assert [r["cell"] for r in tool.read_kept(tool.RESULTS) if tool.is_current(r)] == names[1:]


def test_a_quick_study_runs_here_what_was_kept_from_another_machine(tool: Any) -> None:
    study = Study(0)
    recipes = study.recipes()
    kept = {name: {"0": {"cell": name, "seed": 0, "recipe": recipe}} for name, recipe in recipes.items()}
    write_json(tool.RESULTS, {"cells": kept})
    assert tool.to_run(study, argparse.Namespace(groups=list(tool.GROUPS), quick=False)) == []
    quick = tool.to_run(study, argparse.Namespace(groups=list(tool.GROUPS), quick=True))
    assert {cell.name for cell in quick} == set(tool.QUICK_CELLS)


def test_a_model_that_no_cell_needs_is_refused(tool: Any) -> None:
    with pytest.raises(UserError, match="--prepare teacher_x: no such model; there are base, teacher, "):
        tool.prepare(["teacher_x"])


def test_settings_of_every_model_behind_a_cell_are_part_of_its_recipe(
    tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Study(0).recipes()
    base = tiny.base

    def longer(root: str) -> RunConfig:
        config = base(root)
        config.train.train_iters += 1
        return config

    monkeypatch.setattr(tiny, "base", longer)
    after = Study(0).recipes()
    assert all(before[name] != after[name] for name in before)
    monkeypatch.setattr(tiny, "base", base)
    monkeypatch.setattr(tiny, "teacher_soft", lambda root: longer(root))
    changed = {name for name, recipe in Study(0).recipes().items() if recipe != before[name]}
    assert changed == {cell.name for cell in Study(0).cells() if cell.group == "soft"}
