"""Raw data sets → prompt shards: template applied, tokenized once, filtered, deduplicated, with counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd_megatron.config import PromptsConfig, RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file, write_json
from lopd_megatron.fingerprints import tokenizer_fingerprint
from lopd_megatron.lineage import Lineage
from lopd_megatron.progress import progress, say
from lopd_megatron.records import PROMPT_SCHEMA
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.sources import Messages, read_rows


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


class Contamination:
    """Word n-grams of evaluation problems. A shorter problem counts as one n-gram of its own length."""

    def __init__(self, files: Iterable[str], ngram: int) -> None:
        self._grams: dict[int, set[str]] = {}
        for file in files:
            for row in read_rows(file):
                words = _words(row.content)
                for gram in _ngrams(words, min(ngram, len(words))):
                    self._grams.setdefault(min(ngram, len(words)), set()).add(gram)

    def touches(self, content: str | Messages) -> bool:
        words = _words(content)
        return any(not grams.isdisjoint(_ngrams(words, n)) for n, grams in self._grams.items())


def _words(content: str | Messages) -> list[str]:
    text = content if isinstance(content, str) else " ".join(message["content"] for message in content)
    return text.lower().split()


def _ngrams(words: list[str], n: int) -> Iterator[str]:
    return (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def collect(config: PromptsConfig, template: Template) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of PROMPT_SCHEMA in the order of the input, and how many were read, kept, dropped and why."""
    if not config.input:
        raise UserError("prompts.input is empty; set it to the files with the prompts")
    contamination = Contamination(config.contamination_files, config.contamination_ngram)
    kept: dict[str, dict[str, Any]] = {}
    seen: set[bytes] = set()
    counts: Counter[str] = Counter(read=0, kept=0, too_long=0, duplicate=0, contaminated=0)
    rows = (row for path in config.input for row in read_rows(path))
    with progress(None, "prompts", "prompt") as bar:
        for row in rows:
            if config.max_prompts is not None and len(kept) >= config.max_prompts:
                break
            bar.update(1)
            counts["read"] += 1
            content = hashlib.sha256(str(row.content).encode()).digest()
            if content in seen:  # a release of DAPO-Math holds every prompt a hundred times: do not tokenize
                counts["duplicate"] += 1
                continue
            seen.add(content)
            tokens = template.tokens(row.content)
            name = prompt_id(tokens)
            if len(tokens) > config.max_prompt_tokens:
                counts["too_long"] += 1
            elif name in kept:
                counts["duplicate"] += 1
            elif contamination.touches(row.content):
                counts["contaminated"] += 1
            else:
                counts["kept"] += 1
                kept[name] = {
                    "prompt_id": name,
                    "prompt_tokens": np.asarray(tokens, np.int32),
                    "answer": row.answer,
                    "source": row.source,
                }
    return list(kept.values()), counts


def write_prompts(folder: Path, rows: list[dict[str, Any]], num_shards: int, lineage: Lineage) -> None:
    """Split by prompt id, so that a prompt stays in its shard when the order of the input changes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[dict[str, Any]]] = [[] for _ in range(num_shards)]
    for row in rows:
        digest = hashlib.sha256(row["prompt_id"].encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % num_shards].append(row)
    for index, part in enumerate(parts):
        table = pa.Table.from_pylist(part, schema=PROMPT_SCHEMA)
        shard_files.write_shard(folder, index, table, kind="prompts", num_shards=num_shards, lineage=lineage)


def run_prompts(config: RunConfig) -> int:
    """Input files → prompt shards. Returns the exit code."""
    section, folder, model = config.prompts, config.paths.prompts, config.model.student
    settings = section.model_dump(mode="json", exclude={"input", "contamination_files"})
    for name in ("input", "contamination_files"):
        settings[name] = {Path(path).name: input_hash(path) for path in getattr(section, name)}
    lineage = Lineage(tokenizer=tokenizer_fingerprint(model), prompts=settings)
    shard_files.refuse_other_lineage(folder, section.num_shards, lineage)
    if len(shard_files.manifests(folder, section.num_shards)) == section.num_shards:
        say(f"{folder} is complete")
        return 0
    tokenizer = load_tokenizer(model, trust_remote_code=config.model.trust_remote_code)
    template = Template(tokenizer, section.apply_chat_template, section.enable_thinking)
    rows, counts = collect(section, template)
    if not rows:
        raise UserError(f"no prompt is left of {counts['read']} ({_listed(counts)}); look at prompts.*")
    write_prompts(folder, rows, section.num_shards, lineage)
    write_json(folder / "counts.json", dict(counts))
    say(f"{folder}: {_listed(counts)}")
    return 0


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def input_hash(path_text: str) -> str:
    """Hash of a file, or of the files of a dataset folder."""
    path = Path(path_text)
    if not path.exists():
        raise UserError(f"input {path_text!r} does not exist; give a jsonl or Parquet file or dataset folder")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(" ".join(map(sha256_file, files)).encode()).hexdigest()
