"""The part of a dataset that is held out: which prompts, how many, and a build that is killed."""

from __future__ import annotations

import functools
import signal
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.data.build_dataset import build_dataset
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.held_out import HeldOut, held_out_prefixes, split_prompts, valid_prefix
from lopd_megatron.data.manifest import Manifest, manifest_path, read_manifest
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from tests.unit.data.samples import files_of, forked, random_rows, row, write_shards
from tests.unit.data.test_kill import die_at, new_prefix

SHARE = HeldOut(0.02)


def split_sizes(documents: int, samples: int = 1, held_out: HeldOut = SHARE) -> tuple[int, int]:
    """(held-out, all) documents."""
    ids = [f"prompt {i // samples}" for i in range(documents)]
    return int(split_prompts(held_out, [ids]).is_held_out(ids).sum()), documents


def test_how_many_are_held_out() -> None:
    assert split_sizes(17_000) == (340, 17_000)
    assert split_sizes(1000) == (32, 1000)  # at least 32 …
    assert split_sizes(128) == (32, 128)
    assert split_sizes(127) == (0, 127)  # … or none, where that is more than a quarter
    assert split_sizes(0) == (0, 0)
    assert split_sizes(1000, samples=5) == (35, 1000)  # whole prompts
    assert split_sizes(1000, samples=300) == (0, 1000)
    assert split_sizes(1000, held_out=HeldOut(0.0)) == (0, 1000)


def test_a_split_does_not_depend_on_order_or_shards() -> None:
    ids = [f"prompt {i}" for i in range(5000)]
    one = split_prompts(SHARE, [ids])
    assert one == split_prompts(SHARE, [ids[3000:], ids[:3000][::-1]])
    assert one != split_prompts(HeldOut(0.02, seed=7), [ids])
    # More rollouts of the same prompts hold out the same ones.
    assert one.is_held_out(ids).tolist() == split_prompts(SHARE, [ids, ids]).is_held_out(ids).tolist()


def build(source: Path, prefix: Path, held_out: HeldOut = SHARE) -> Manifest:
    return build_dataset(source, prefix, filters=Filters(40), held_out=held_out, special_ids={5})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 60 rollouts, two of each prompt, the second in the shard after."""
    rng = np.random.default_rng(0)
    rows = [random_rows(rng, 60, "p"), random_rows(rng, 60, "p"), random_rows(rng, 60, "q")]
    return write_shards(tmp_path_factory.mktemp("source") / "scores", rows)


def prompts_of(prefix: Path) -> set[bytes]:
    dataset = open_dataset([prefix])
    dataset.verify()
    found = set()
    for index in range(len(dataset)):
        document = dataset.document(index)
        found.add(document["tokens"][: int(np.argmax(document["loss_mask"]))].tobytes())
    return found


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    rows = [
        row(f"p{i}", [1000 + i], [1, 2, 3], document_id=f"p{i}/{sample}", sample_index=sample)
        for sample in range(3)
        for i in range(100)
    ]
    folder = write_shards(tmp_path / "scores", [rows[:150], rows[150:]])
    train = tmp_path / "dataset" / "train"
    manifest = build(folder, train)
    first, second = prompts_of(train), prompts_of(valid_prefix(train))
    assert not first & second
    assert len(first | second) == 100
    assert len(second) == 11  # ⌈32 / 3⌉ prompts
    assert manifest.dropped["held_out"] == 33 == read_manifest(valid_prefix(train)).documents
    assert manifest.documents == 300 - 33


def config_of(*prefixes: Path, **data: object) -> RunConfig:
    config = RunConfig()
    config.data.prefixes = [str(prefix) for prefix in prefixes]
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def test_what_a_run_validates_on(source: Path, tmp_path: Path) -> None:
    prefix, other = tmp_path / "a" / "train", tmp_path / "b" / "train"
    build(source, prefix)
    assert held_out_prefixes(config_of(prefix)) == [str(valid_prefix(prefix))]
    assert held_out_prefixes(config_of(prefix, valid_prefixes=["mine"])) == ["mine"]
    assert held_out_prefixes(config_of(prefix, other)) == []
    # Planted: a valid part of another split beside a dataset that was built without one.
    build(source, other, HeldOut(0.0))
    for file in valid_prefix(prefix).parent.glob("valid.*"):
        (other.parent / file.name).write_bytes(file.read_bytes())
    assert held_out_prefixes(config_of(other)) == []


def test_a_finished_build_is_not_repeated(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "train"
    first = build(source, prefix)
    assert build(source, prefix) == first
    with pytest.raises(UserError, match=r"with other data\.\* settings"):
        build(source, prefix, HeldOut(0.05))
    before = files_of(valid_prefix(prefix))
    for file in tmp_path.glob("valid.*"):
        file.unlink()
    assert build(source, prefix) == first  # only the part that is missing
    assert files_of(valid_prefix(prefix)) == before


def test_a_dataset_of_an_older_version_is_taken_as_it_is(source: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "train"
    old = build_dataset(source, prefix, filters=Filters(40))
    assert old.stops is None
    assert "stops" not in old.sealed().model_dump(exclude_none=True)
    assert build(source, prefix) == old
    assert held_out_prefixes(config_of(prefix)) == []


def test_a_small_dataset_says_that_it_keeps_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "scores", [random_rows(np.random.default_rng(0), 40)])
    build(folder, tmp_path / "train")
    assert "nothing is held out" in capsys.readouterr().err
    assert not manifest_path(tmp_path / "valid").exists()


@pytest.mark.processes
def test_killed_at_every_file_system_event(source: Path, ram_path: Path) -> None:
    """Both parts come out with the bytes of an undisturbed build, wherever it was killed."""
    report = ram_path / "events"
    whole = new_prefix(ram_path / "whole")
    assert forked(lambda: die_at(None, whole, lambda: build(source, whole), report)) == 0
    events = int(report.read_text())
    expected = {part: files_of(part(whole)) for part in (Path, valid_prefix)}
    for event in range(1, events + 1, 3):
        prefix = new_prefix(ram_path / str(event))
        killed = functools.partial(die_at, event, prefix, functools.partial(build, source, prefix))
        assert forked(killed) == -signal.SIGKILL
        if manifest_path(prefix).exists():
            assert manifest_path(valid_prefix(prefix)).exists()
        build(source, prefix)
        assert {part: files_of(part(prefix)) for part in expected} == expected
        assert not list(prefix.parent.glob("*.building"))


def test_how_responses_end_is_counted(tmp_path: Path) -> None:
    rows = [
        row("a", [1], [2, 3, 5], teacher_logprobs=[-1.0, -1.0, -4.0], rollout_logprobs=[-1.0, -1.0, -2.0]),
        row("b", [1], [2, 7], teacher_logprobs=[-1.0, -6.0], rollout_logprobs=[-2.0, -6.0]),
        row("c", [1], [5, 4], finish_reason="length", teacher_logprobs=[-1, -1], rollout_logprobs=[-1, -1]),
    ]
    manifest = build(write_shards(tmp_path / "scores", [rows]), tmp_path / "train")
    assert manifest.stops == {
        "documents": 3,
        "stopped": 2,
        "last_tokens": {"5": 1, "7": 1},
        "teacher_logprob": -5.0,
        "special_tokens": 2,
        "special_k2_share": pytest.approx(2.0 / 2.5),
    }
