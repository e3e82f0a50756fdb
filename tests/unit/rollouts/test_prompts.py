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
from lopd_megatron.rollouts.prompts import Contamination, collect, run_prompts
from lopd_megatron.rollouts.sources import read_rows
from lopd_megatron.rollouts.templates import Template, load_tokenizer

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
        ('{"text": "a"}\n', r"line 1 has no prompt \(columns: text\)"),
        ('{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        ("1\n", "line 1 is not a JSON object"),
        ("[1]\n", "row 0 of the list is not a JSON object"),
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


def prepared(tmp_path: Path, model: str, **settings: object) -> tuple[dict[str, int], list[dict]]:
    """The counts and the rows of a run of the stage."""
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.model.student = model
    for name, value in settings.items():
        setattr(config.prompts, name, value)
    assert run_prompts(config) == 0
    tables = [
        shard_files.read_table(config.paths.prompts, index, PROMPT_SCHEMA)
        for index in range(config.prompts.num_shards)
    ]
    counts = json.loads((config.paths.prompts / "counts.json").read_text())
    return counts, [row for table in tables for row in table.to_pylist()]


def test_inputs_of_one_file_name_are_kept_apart(tmp_path: Path, model: str) -> None:
    inputs = []
    for folder, text in (("a", "a b"), ("b", "c d")):
        (tmp_path / folder).mkdir()
        inputs.append(write_jsonl(tmp_path / folder / "train.jsonl", [{"prompt": text}]))
    _, rows = prepared(tmp_path, model, input=inputs)
    assert sorted(row["source"] for row in rows) == ["a/train.jsonl", "b/train.jsonl"]
    write_jsonl(tmp_path / "a" / "train.jsonl", [{"prompt": "e f"}])
    with pytest.raises(UserError, match=r"another prompts \(input was .* delete the folder"):
        prepared(tmp_path, model, input=inputs)
    with pytest.raises(UserError, match=r"a/train.jsonl' is given twice"):
        prepared(tmp_path / "other", model, input=[inputs[0], inputs[0]])


def test_moved_inputs_are_the_same_prompts(tmp_path: Path, model: str) -> None:
    first = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a b"}])
    prepared(tmp_path, model, input=[first])
    prepared(tmp_path, model, input=[str(Path(first).rename(tmp_path / "y.jsonl"))])


def ids(rows: list[dict]) -> set[str]:
    return {row["prompt_id"] for row in rows}


def test_a_seeded_sample(tmp_path: Path, model: str) -> None:
    """Drawn from the whole input, the same whatever the shards, the order and the repetitions."""
    rows = [{"prompt": f"{a} {b}"} for a in WORDS[8:] for b in WORDS[8:]]
    sample = {"max_prompts": 20, "apply_chat_template": False, "sample_seed": 42}
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    counts, drawn = prepared(tmp_path / "1", model, input=[file], **sample)
    assert counts == {
        "read": 256, "kept": 20, "too_long": 0, "duplicate": 0, "contaminated": 0, "not_drawn": 236
    }  # fmt: skip
    assert ids(prepared(tmp_path / "2", model, input=[file], num_shards=5, **sample)[1]) == ids(drawn)
    mixed = write_jsonl(tmp_path / "q.jsonl", rows[::-1] + rows)
    assert ids(prepared(tmp_path / "3", model, input=[mixed], **sample)[1]) == ids(drawn)
    other = prepared(tmp_path / "4", model, input=[file], **{**sample, "sample_seed": 43})[1]
    assert len(ids(other) & ids(drawn)) < 10  # 1.6 are expected


def test_a_seeded_sample_takes_every_row_equally_often(model: str, tmp_path: Path) -> None:
    config = PromptsConfig(
        input=[write_jsonl(tmp_path / "p.jsonl", [{"prompt": word} for word in WORDS[8:]])], max_prompts=4
    )
    template = Template(load_tokenizer(model), apply_chat_template=False, enable_thinking=True)
    drawn = []
    for config.sample_seed in range(400):
        drawn += [row["prompt_tokens"][0] for row in collect(config, template)[0]]
    # Each of the 16 rows is expected 100 times with a deviation of √(400·¼·¾) = 8.7; five of these.
    assert all(abs(drawn.count(8 + index) - 100) < 44 for index in range(16))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "solve"}] * 60, "all 60 rows hold one prompt"),
        ([{"prompt": ""}] * 6 + [{"prompt": "a"}], "6 of 7 prompts are empty"),
        (
            [{"prompt": f"unknown{i}"} for i in range(60)],
            "59 of 60 different texts have the tokens of another .*kept 1, .* duplicate 59",
        ),
    ],
)
def test_a_collapse_is_refused(tmp_path: Path, model: str, rows: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, model, input=[write_jsonl(tmp_path / "p.jsonl", rows)])


def test_repeated_prompts_are_no_collapse(tmp_path: Path, model: str) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": " "}] * 100)
    counts, _ = prepared(tmp_path, model, input=[file])
    assert counts == {
        "read": 300, "kept": 2, "too_long": 0, "duplicate": 198, "contaminated": 0, "empty": 100
    }  # fmt: skip


def test_answers_left_out_are_counted(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(tmp_path, model, input=[write_jsonl(tmp_path / "p.jsonl", [OPEN_THOUGHTS, MESSAGES, GSM8K])])
    assert "the last assistant turn of 2 conversations is an answer" in capsys.readouterr().err
