"""The page of a run: everything that is there is shown, everything that is missing is named."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.errors import UserError
from lopd_megatron.report.page import render
from lopd_megatron.report.run_folder import read_run

SECTIONS = (
    "lineage",
    "data",
    "held-out",
    "training",
    "position",
    "staleness",
    "rollouts",
    "evaluation",
    "cost",
    "configuration",
)
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects text and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.addresses += [found[key] or "" for key in ("href", "src") if key in found]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy to break, beside the same other runs."""
    shutil.copytree(whole_run.parent, tmp_path / "runs")
    config = tmp_path / "runs" / whole_run.name / "config.json"
    config.write_text(config.read_text().replace(str(whole_run.parent), str(tmp_path / "runs")))
    return config.parent


def test_a_whole_run(whole_run: Path) -> None:
    page = Page(render(read_run(whole_run)))
    assert set(SECTIONS) <= set(page.ids)
    for shown in (
        "12% of the rollouts are truncated",
        "mean |difference| 2.10e-07 nats",
        "48 documents with",
        "52 read, 48 kept",
        "Before training",
        "After training",
        "log_ratio_mean",
        "not a KL once the student has moved",
        "k2 (½ squared log-ratio to the teacher), held out: ",
        "KL to the teacher over the whole vocabulary, fresh responses",
        "stop by themselves",
        "effective_sample_fraction",
        "Over the student at the start",
        "seconds.json",
    ):
        assert shown in page.text, shown
    assert page.text.count("✓ holds") == 3
    assert page.text.count("better") == 4
    assert "not there yet" not in page.text


@pytest.mark.parametrize(("change", "verdict"), [(0.5, "worse"), (0.0, "no change")])
def test_the_headline_says_what_validation_says(run: Path, change: float, verdict: str) -> None:
    shutil.rmtree(run / "measure")
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(0)
    moved = [
        s + (change + rng.normal(0, 0.01)) * n
        for s, n in zip(lines[0]["sums"], lines[0]["tokens"], strict=True)
    ]
    lines[-1]["sums"] = moved
    (run / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(render(read_run(run)))
    assert f"{verdict}k2 (½ squared log-ratio to the teacher), held out" in page.text
    assert "the best held-out k2 was" in page.text  # in between it was better


def test_a_run_that_held_nothing_out_says_so(run: Path) -> None:
    shutil.rmtree(run / "measure")
    (run / "validation.jsonl").unlink()
    assert "Better or worse? Not known" in Page(render(read_run(run))).text


def test_a_log_ratio_of_an_older_version_is_not_called_a_kl(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    old = [line | {"reverse_kl": -0.2, "opd_reverse_kl": -0.2} for line in lines]
    for line in old:
        line.pop("log_ratio_mean")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    found = read_run(run)
    assert found.metrics[0]["log_ratio_mean"] == -0.2
    assert not {"reverse_kl", "opd_reverse_kl"} & found.metrics[0].keys()


def test_no_network_and_no_scripts(whole_run: Path) -> None:
    text = render(read_run(whole_run))
    page = Page(text)
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert not re.search(r"https?:|@import|url\((?!#head\))|<script|<link", text)


def test_numbers_are_finite(whole_run: Path) -> None:
    assert not re.search(r"\b(nan|inf)\b", render(read_run(whole_run)))


@pytest.mark.parametrize(
    ("first", "named"),
    [
        ("metrics.jsonl", "No metrics yet"),
        ("dataset", "No dataset is finished"),
        ("scores", "no scored rollouts"),
        ("rollouts", "not there yet"),
    ],
)
def test_a_run_that_has_not_come_to(run: Path, first: str, named: str) -> None:
    later = ("rollouts", "scores", "dataset", "metrics.jsonl", "config.json", "hf", "evaluation")
    for name in later[later.index(first) :]:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(render(read_run(run)))
    assert named in page.text
    assert set(SECTIONS) <= set(page.ids)


@pytest.mark.parametrize(
    ("name", "named"),
    [("dataset", "No dataset is finished"), ("hf", "? unknown"), ("evaluation", "Not evaluated")],
)
def test_one_stage_was_deleted(run: Path, name: str, named: str) -> None:
    shutil.rmtree(run / name)
    assert named in Page(render(read_run(run))).text


def test_nothing_to_compare_with(run: Path) -> None:
    for name in ("after", "sft", "teacher"):
        shutil.rmtree(run.parent / name)
    (run.parent / "seconds.json").unlink()
    page = Page(render(read_run(run)))
    assert "no fresh responses of the exported student are scored" in page.text
    assert "worker logs, without start-up" in page.text
    assert "Over the student" not in page.text


def test_an_sft_run(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["loss"]["objective"] = "sft"
    (run / "config.json").write_text(json.dumps(config))
    shutil.rmtree(run / "scores")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("iteration", "loss", "entropy", "drift_kl", "lr", "iteration_time_ms")
    (run / "metrics.jsonl").write_text("".join(json.dumps({k: r[k] for k in kept}) + "\n" for r in lines))
    page = Page(render(read_run(run)))
    assert "SFT scores none" in page.text
    assert page.text.count("Not shown: SFT") == 2


def test_text_of_a_rollout_is_escaped(run: Path) -> None:
    """A model can write `<script>`; the tokenizer's own `<bos>` shows it."""
    text = render(read_run(run))
    assert "&lt;bos&gt;" in text
    assert "<bos>" not in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no output of any stage"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        read_run(tmp_path / "nothing")
