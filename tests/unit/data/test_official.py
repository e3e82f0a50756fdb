"""The Parquet of the official release becomes a dataset with its ids untouched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, processors

from lopd_megatron.data.build_dataset import build_from
from lopd_megatron.data.filters import Filters
from lopd_megatron.data.manifest import Manifest
from lopd_megatron.data.official import OfficialFile, prompt_tokenizer
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.lineage import Lineage
from lopd_megatron.recipes import tiny_task


def official_row(response: list[int], **fields: Any) -> dict[str, Any]:
    """As the release writes it: int64 ids, float64 log-probs, an all-ones mask."""
    metadata = {
        "response_tokens": response,
        "loss_mask": [1] * len(response),
        "response": "text",
        "teacher_log_probs": [-0.5 * (i + 1) for i in range(len(response))],
        "is_lightning_opd": True,
    }
    return {
        "prompt": [{"role": "user", "content": "1 + 2"}],
        "label": "3",
        "metadata": metadata | fields,
    }


def convert(folder: Path, rows: list[dict[str, Any]], tokenize: Any = lambda prompt: [1, 2, 3]) -> Manifest:
    path = folder / "official.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return build_from(
        [OfficialFile(path, tokenize, 50)], folder / "x", filters=Filters(100), lineage=Lineage()
    )


def test_rows_become_documents(tmp_path: Path) -> None:
    manifest = convert(tmp_path, [official_row([7, 8]), official_row([]), official_row([9], loss_mask=[0])])
    assert manifest.columns == ["tokens", "loss_mask", "teacher_logprobs"]
    assert manifest.alignment is None
    assert manifest.dropped["empty"] == 2
    read = open_dataset([tmp_path / "x"]).document(0)
    assert read["tokens"].tolist() == [1, 2, 3, 7, 8]
    assert read["loss_mask"].tolist() == [0, 0, 0, 1, 1]
    assert read["teacher_logprobs"].tolist() == [0, 0, 0, -0.5, -1.0]


def test_a_mask_inside_the_response_is_kept(tmp_path: Path) -> None:
    convert(tmp_path, [official_row([7, 8, 9], loss_mask=[1, 0, 1])])
    assert open_dataset([tmp_path / "x"]).document(0)["loss_mask"].tolist() == [0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"teacher_log_probs": [-1.0]}, "2 response_tokens, 2 loss_mask and 1", id="short"),
        pytest.param({"teacher_log_probs": None}, r"no metadata\.teacher_log_probs", id="not scored"),
        pytest.param({"response_tokens": [1, 2**40]}, "does not fit int32", id="huge id"),
        pytest.param({"loss_mask": [1, 2]}, "loss_mask holds 2", id="mask of 2"),
        pytest.param(
            {"response_tokens": [1, 50]}, "row 0 has the token id 50, the vocabulary .* 50", id="id"
        ),
        pytest.param({"response_tokens": [-1, 5]}, "row 0 has the token id -1", id="negative id"),
    ],
)
def test_rows_that_cannot_be_right(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path, [official_row([7, 8], **fields)])
    assert "official.parquet" in str(caught.value)


def test_another_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "official.parquet")
    with pytest.raises(UserError, match="no column metadata; is it a Lightning OPD file"):
        build_from(
            [OfficialFile(tmp_path / "official.parquet", lambda prompt: [1])],
            tmp_path / "x",
            filters=Filters(100),
            lineage=Lineage(),
        )


def test_prompts_go_through_the_chat_template(tmp_path: Path) -> None:
    tiny_task.save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}: {% endif %}"
    )
    tokenize = prompt_tokenizer(tmp_path / "tokenizer")
    words = [tiny_task.VOCABULARY.index(word) for word in ("1", "+", "2", ":")]
    assert tokenize([{"role": "user", "content": "1 + 2"}]) == words
    assert tokenize("1 + 2 :") == words
    convert(tmp_path, [official_row([7])], tokenize)
    tokens = open_dataset([tmp_path / "x"]).document(0)["tokens"]
    assert np.array_equal(tokens, [*words, 7])


def test_text_gets_no_second_start_token(tmp_path: Path) -> None:
    """The text is a rendered template: what a tokenizer adds by itself is in it already."""
    tiny_task.save_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    words = Tokenizer.from_file(str(path))
    words.post_processor = processors.TemplateProcessing(single="1 $A", special_tokens=[("1", 5)])
    words.save(str(path))
    two = tiny_task.VOCABULARY.index("2")
    assert prompt_tokenizer(tmp_path / "tokenizer")("2") == [two]


def with_prompt(prompt: Any) -> dict[str, Any]:
    return official_row([7]) | {"prompt": prompt}


def test_metadata_as_json_text(tmp_path: Path) -> None:
    rows = [official_row([7, 8], loss_mask=[0, 1]), official_row([9])]
    convert(tmp_path, [row | {"metadata": json.dumps(row["metadata"])} for row in rows])
    text = open_dataset([tmp_path / "x"]).document(0)
    (tmp_path / "plain").mkdir()
    convert(tmp_path / "plain", rows)
    plain = open_dataset([tmp_path / "plain" / "x"]).document(0)
    assert all(np.array_equal(text[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("{", "metadata that is no JSON"),
        ("[]", "metadata that is no object"),
        (None, r"no metadata\.response"),
    ],
)
def test_damaged_metadata(tmp_path: Path, damaged: str | None, message: str) -> None:
    row = official_row([7])
    rows = [row | {"metadata": json.dumps(row["metadata"])}, row | {"metadata": damaged}]
    with pytest.raises(UserError, match=f"row 1 has {message}"):
        convert(tmp_path, rows)


@pytest.mark.parametrize("prompt", [None, []])
def test_a_row_without_a_prompt(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(UserError, match="row 1 has no prompt; remove the row"):
        convert(tmp_path, [official_row([7]), with_prompt(prompt)])


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": None}],
        [{"role": None, "content": "a"}],
        [{"from": "user"}],
        5,
        {"a": "b"},
    ],
)
def test_a_prompt_of_another_form(tmp_path: Path, prompt: Any) -> None:
    tiny_task.save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="row 0 has a prompt that is neither text nor messages"):
        convert(tmp_path, [with_prompt(prompt)], prompt_tokenizer(tmp_path / "tokenizer"))


def test_messages_as_json_text(tmp_path: Path) -> None:
    tiny_task.save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    tokenize = prompt_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "1 + 2"}]
    assert tokenize(json.dumps(messages)) == tokenize(messages) == tokenize("1 + 2")


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("PAR1")
    with pytest.raises(UserError, match=r"x.parquet cannot be read as Parquet"):
        list(OfficialFile(tmp_path / "x.parquet", lambda prompt: [1]).batches())
