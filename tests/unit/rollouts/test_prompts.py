"""From the data sets people have to prompt shards."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd_megatron.config import PromptsConfig, RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.records import PROMPT_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.prompts import Contamination, Template, collect, load_tokenizer, run_prompts
from lopd_megatron.rollouts.sources import read_rows

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is false %} <think> </think>{% endif %}{% endif %}"
)
WORDS = [
    "<pad>",
    "<unk>",
    "<eos>",
    "<user>",
    "<system>",
    "<assistant>",
    "<think>",
    "</think>",
    *"abcdefghijklmnop",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a word-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


DAPO = {
    "prompt": [{"role": "user", "content": "a b"}],
    "reward_model": {"ground_truth": "34", "style": "rule"},
}
OPEN_THOUGHTS = {
    "conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}],
}
GSM8K = {"question": "a b", "answer": "so 48/2 = <<48/2=24>>24\n#### 72"}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "p"},
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
    ]
}


@pytest.mark.parametrize(
    ("row", "content", "answer"),
    [
        (DAPO, [{"role": "user", "content": "a b"}], "34"),
        (OPEN_THOUGHTS, [{"role": "user", "content": "a b"}], None),
        (GSM8K, "a b", "72"),
        (MESSAGES, MESSAGES["messages"][:2], None),
        ({"problem": "a", "answer": 70, "id": "0"}, "a", "70"),
        ({"prompt": "a", "answer": "1"}, "a", "1"),
    ],
    ids=["dapo", "openthoughts", "gsm8k", "messages", "aime", "own"],
)
def test_shapes_of_data_sets(tmp_path: Path, row: dict, content: object, answer: str | None) -> None:
    (found,) = read_rows(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert (found.content, found.answer, found.source) == (content, answer, "x.jsonl")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (found,) = read_rows(str(tmp_path / "x.parquet"))
    assert (found.content, found.answer) == (content, answer)


def test_dataset_folder(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([GSM8K, GSM8K]).save_to_disk(tmp_path / "set")
    assert [row.answer for row in read_rows(str(tmp_path / "set"))] == ["72", "72"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n', r"row 0 has no prompt \(columns: text\)"),
        ('{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_unreadable_input_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / "x.jsonl")))


def test_templates(model: str) -> None:
    tokenizer = load_tokenizer(model)
    thinking = Template(tokenizer, apply_chat_template=True, enable_thinking=True)
    quick = Template(tokenizer, apply_chat_template=True, enable_thinking=False)
    raw = Template(tokenizer, apply_chat_template=False, enable_thinking=True)
    assert words(thinking.tokens("a b")) == "<user> a b <assistant>"
    assert words(quick.tokens("a b", " c")) == "<user> a b c <assistant> <think> </think>"
    assert words(thinking.tokens(MESSAGES["messages"][:2], " c")) == "<system> p <user> a b c <assistant>"
    assert words(raw.tokens("a b")) == "a b"
    with pytest.raises(UserError, match="needs `prompt` as text"):
        raw.tokens([{"role": "user", "content": "a"}])


def test_filters_and_counts(tmp_path: Path, model: str) -> None:
    tokenizer = load_tokenizer(model)
    template = Template(tokenizer, apply_chat_template=False, enable_thinking=True)
    prompts = ["a b c", "a b c", "a b c d e f", "e f g", "h i", "x A B c y"]
    config = PromptsConfig(
        input=[write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in prompts])],
        contamination_files=[
            write_jsonl(tmp_path / "e.jsonl", [{"problem": "k e f g l"}, {"problem": "h i"}])
        ],
        contamination_ngram=3,
        max_prompt_tokens=5,
    )
    rows, counts = collect(config, template)
    assert [words(row["prompt_tokens"]) for row in rows] == ["a b c", "<unk> <unk> <unk> c <unk>"]
    assert counts == {"read": 6, "kept": 2, "too_long": 1, "duplicate": 1, "contaminated": 2}
    assert len({row["prompt_id"] for row in rows}) == 2
    config.max_prompts = 1
    assert len(collect(config, template)[0]) == 1


def test_contamination_ignores_case_and_space() -> None:
    checker = Contamination([], 3)
    assert not checker.touches("anything at all")


def test_prompt_shards_are_stable_and_skipped_when_done(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.model.student = model
    rows = [{"prompt": f"{a} {b}"} for a in "abcdefg" for b in "hijk"]
    config.prompts.input = [write_jsonl(tmp_path / "p.jsonl", rows)]
    config.prompts.num_shards = 3
    assert run_prompts(config) == 0
    folder = config.paths.prompts
    manifests = shard_files.complete_manifests(folder, "prompts")
    assert sum(manifest["rows"] for manifest in manifests) == 28
    assert json.loads((folder / "counts.json").read_text())["kept"] == 28
    shard_of = {
        row["prompt_id"]: index
        for index in range(3)
        for row in shard_files.read_table(folder, index, PROMPT_SCHEMA).to_pylist()
    }
    assert run_prompts(config) == 0
    assert "is complete" in capsys.readouterr().err
    config.run_dir = str(tmp_path / "reversed")
    config.prompts.input = [write_jsonl(tmp_path / "p.jsonl", rows[::-1])]
    assert run_prompts(config) == 0
    for index in range(3):
        for row in shard_files.read_table(config.paths.prompts, index, PROMPT_SCHEMA).to_pylist():
            assert shard_of[row["prompt_id"]] == index
    config.prompts.enable_thinking = False
    with pytest.raises(UserError, match=r"another prompts \(enable_thinking was True, now False\)"):
        run_prompts(config)
