"""build_dataset, verify_alignment and inspect_dataset as a user runs them, on rollouts of a real model."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from lopd_megatron.data.manifest import read_manifest
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.lineage import Lineage
from tests.helpers.models import write_model_lineage
from tests.unit.data.qwen import PROMPT, sample_rollouts, save_qwen
from tests.unit.data.samples import row, save_vocabulary, write_shards

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RECIPE = """
from lopd_megatron.config import RunConfig

def opd() -> RunConfig:
    config = RunConfig()
    config.run_dir = {run!r}
    config.model.student = {student!r}
    config.model.teacher = {teacher!r}
    config.data.alignment_tolerance = 1e-3
    return config
"""
WORDS = [f"w{i}" for i in range(32)]


class Run:
    """A run directory with scored rollouts, and a way to start tools on it in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.student, self.teacher = save_qwen(folder / "student", 0), save_qwen(folder / "teacher", 1)
        for model in (self.student, self.teacher):
            save_vocabulary(model, WORDS)
        write_model_lineage(self.student, Lineage(sft_teacher=model_fingerprint(self.teacher)))
        names = {"run": str(folder / "run"), "student": str(self.student), "teacher": str(self.teacher)}
        (folder / "recipe.py").write_text(RECIPE.format(**names))
        self.write_scored()

    def write_scored(self, shift: int = 0) -> None:
        lineage = Lineage(
            generator=model_fingerprint(self.student),
            teacher=model_fingerprint(self.teacher),
            tokenizer=tokenizer_fingerprint(self.student),
        )
        rows = [
            row(
                f"p{sample.index}",
                sample.tokens[:PROMPT].tolist(),
                sample.tokens[PROMPT:].tolist(),
                rollout_logprobs=np.roll(sample.rollout_logprobs[PROMPT:], shift).tolist(),
            )
            for sample in sample_rollouts(self.student, 8)
        ]
        write_shards(self.folder / "run" / "scores", [rows[:5], rows[5:]], lineage=lineage)

    def tool(self, name: str, *arguments: str, recipe: bool = True) -> int:
        given = ["--recipe", f"{self.folder}/recipe.py:opd"] if recipe else []
        self.monkeypatch.setattr(sys, "argv", [name, *given, *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        self.out, self.err = self.capsys.readouterr()
        return int(caught.value.code or 0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Run(tmp_path, monkeypatch, capsys)


def test_build_prove_inspect(run: Run) -> None:
    prefix = run.folder / "run" / "dataset" / "train"
    assert run.tool("build_dataset.py", "--dry-run") == 0
    assert not prefix.parent.exists()
    assert run.tool("build_dataset.py") == 0, run.err
    assert "8 documents, 120 tokens, 96 trained" in run.err
    assert "aligned: mean" in run.err
    manifest = read_manifest(prefix)
    assert manifest.alignment is not None
    assert manifest.lineage.teacher == model_fingerprint(run.teacher)
    assert run.tool("build_dataset.py") == 0
    assert "already built" in run.err
    assert run.tool("verify_alignment.py", "--documents", "0") == 0
    assert json.loads(run.out)["documents"] == 8
    assert run.tool("inspect_dataset.py", str(prefix), "--verify", recipe=False) == 0
    assert f"teacher    {manifest.lineage.teacher['fingerprint'][:16]}" in run.out


def test_a_shift_by_one_ends_the_build(run: Run) -> None:
    run.write_scored(shift=1)
    assert run.tool("build_dataset.py") == 2
    assert "one token too late; do not train on it" in run.err.splitlines()[-1]
    run.write_scored()
    assert run.tool("build_dataset.py") == 0, run.err
    assert run.tool("verify_alignment.py", "--scorer", "transformers") == 0


def test_another_teacher_is_refused_and_the_override_is_recorded(run: Run) -> None:
    write_model_lineage(run.student, Lineage(sft_teacher=model_fingerprint(run.student)))
    assert run.tool("build_dataset.py") == 2
    assert "the SFT data was written by" in run.err
    assert run.tool("build_dataset.py", "lineage.allow_mismatch=an ablation") == 0, run.err
    manifest = read_manifest(run.folder / "run" / "dataset" / "train")
    assert manifest.lineage.allow_mismatch == "an ablation"


def test_the_official_release_is_imported(run: Run) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"response_tokens": [5, 6], "loss_mask": [1, 1], "teacher_log_probs": [-1.0, -2.0]}
    path = run.folder / "official.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "w1 w2", "label": "", "metadata": metadata}]), path)
    missing = run.tool("build_dataset.py", "--from-official", str(run.folder / "nothing.parquet"))
    assert (missing, "does not exist" in run.err) == (2, True)
    save_real_tokenizer(run.student)
    save_real_tokenizer(run.teacher)
    assert run.tool("build_dataset.py", "--from-official", str(path)) == 0, run.err
    manifest = read_manifest(run.folder / "run" / "dataset" / "train")
    assert (manifest.documents, manifest.tokens, manifest.alignment) == (1, 4, None)
    assert run.tool("verify_alignment.py") == 2
    assert "has no rollout_logprobs" in run.err


def save_real_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
