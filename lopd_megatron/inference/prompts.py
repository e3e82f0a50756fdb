"""Raw data sets → prompt shards: template applied, tokenized once, filtered, deduplicated, with counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd_megatron.config import PromptsConfig
from lopd_megatron.errors import UserError
from lopd_megatron.inference import shards
from lopd_megatron.inference.sources import Messages, read_rows
from lopd_megatron.progress import progress
from lopd_megatron.records import PROMPT_SCHEMA


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    if not Path(model).is_dir():
        raise UserError(f"model folder {model!r} does not exist; set model.student to a Hugging Face folder")
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model folder {model!r} has no usable tokenizer: {first}") from None


@dataclass(frozen=True)
class Template:
    """How the content of a row becomes token ids."""

    tokenizer: Any
    apply_chat_template: bool
    enable_thinking: bool

    def tokens(self, content: str | Messages, suffix: str = "") -> list[int]:
        """Token ids of one prompt; `suffix` is added to the last user turn."""
        if not self.apply_chat_template:
            if not isinstance(content, str):
                raise UserError(
                    "prompts.apply_chat_template=false needs `prompt` as text, but the input has messages"
                )
            return self.tokenizer(content + suffix, add_special_tokens=True)["input_ids"]
        if isinstance(content, str):
            messages = [{"role": "user", "content": content + suffix}]
        else:
            messages = [*content[:-1], {**content[-1], "content": content[-1]["content"] + suffix}]
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer of model.student has no chat template; set prompts.apply_chat_template=false"
            )
        return self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking=self.enable_thinking,
        )


def prompt_id(tokens: Iterable[int]) -> str:
    """A stable name for a prompt: a hash of its token ids."""
    return hashlib.sha256(np.asarray(list(tokens), np.int32).tobytes()).hexdigest()[:16]


def collect(config: PromptsConfig, template: Template) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of PROMPT_SCHEMA in the order of the input, and how many were read, kept, dropped and why."""
    if not config.input:
        raise UserError("prompts.input is empty; set it to the files with the prompts")
    kept: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter(read=0, kept=0, too_long=0, duplicate=0, contaminated=0)
    with progress(None, "prompts", "prompt") as bar:
        for path in config.input:
            for row in read_rows(path):
                if config.max_prompts is not None and len(kept) >= config.max_prompts:
                    return list(kept.values()), counts
                bar.update(1)
                counts["read"] += 1
                tokens = template.tokens(row.content)
                name = prompt_id(tokens)
                if len(tokens) > config.max_prompt_tokens:
                    counts["too_long"] += 1
                elif name in kept:
                    counts["duplicate"] += 1
                else:
                    counts["kept"] += 1
                    kept[name] = {
                        "prompt_id": name,
                        "prompt_tokens": tokens,
                        "answer": row.answer,
                        "source": row.source,
                    }
    return list(kept.values()), counts


def write_prompts(folder: Path, rows: list[dict[str, Any]], num_shards: int, lineage: dict[str, Any]) -> None:
    """Split by prompt id, so that a prompt stays in its shard when the order of the input changes."""
    folder.mkdir(parents=True, exist_ok=True)
    shards.refuse_other_lineage(folder, num_shards, lineage)
    parts: list[list[dict[str, Any]]] = [[] for _ in range(num_shards)]
    for row in rows:
        digest = hashlib.sha256(row["prompt_id"].encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % num_shards].append(row)
    for index, part in enumerate(parts):
        table = pa.Table.from_pylist(part, schema=PROMPT_SCHEMA)
        shards.write_shard(folder, index, table, kind="prompts", num_shards=num_shards, lineage=lineage)
