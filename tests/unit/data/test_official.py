"""The Parquet of the official release becomes a dataset with its ids untouched."""

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
    return build_from([OfficialFile(path, tokenize)], folder / "x", filters=Filters(100), lineage=Lineage())


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
