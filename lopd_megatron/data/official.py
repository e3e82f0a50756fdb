"""Reads the Parquet of the official Lightning OPD release (github.com/oldpilluwu/Lightning-OPD).

One row: `prompt` (text or chat messages), `label`, and `metadata` with `response_tokens`, `loss_mask` and
`teacher_log_probs`, [r] each, and `response` (text, not used). `metadata` may be JSON text. The response is
ids already and is kept as it is. The prompt is text there, so it is tokenized here with the student's chat
template. That format has no rollout log-probs and no finish reason: its datasets cannot pass the alignment
check; their manifests say so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.exceptions import TemplateError

from lopd_megatron.data.column_files import checked_cast
from lopd_megatron.data.shard_reader import RolloutBatch
from lopd_megatron.errors import UserError
from lopd_megatron.files import sha256_file

PromptTokenizer = Callable[[Any], list[int]]
"""`prompt` of a row → ids, as the model sees it."""

_BATCH_ROWS = 256


@dataclass(frozen=True)
class OfficialFile:
    """A `build.Source`."""

    path: Path
    tokenize: PromptTokenizer
    vocab_size: int | None = None
    """Response ids must be below it; None: not checked."""

    @functools.cached_property
    def sha256(self) -> str:
        return sha256_file(self.path)

    @property
    def tokens(self) -> int:
        """Rows: the file does not say how many tokens it has."""
        with self._readable():
            return pq.read_metadata(self.path).num_rows

    def prompt_ids(self) -> list[str]:
        """Hashes of the prompts as they are in the file."""
        with self._readable():
            prompts = pq.read_table(self.path, columns=["prompt"])["prompt"].to_pylist()
        return list(map(_prompt_id, prompts))

    def batches(self) -> Iterator[RolloutBatch]:
        row = 0
        with self._readable(), pq.ParquetFile(self.path) as file:
            missing = {"prompt", "metadata"} - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"{self.path} has no column {min(missing)}; is it a Lightning OPD file?")
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["prompt", "metadata"]):
                yield self._batch(batch.to_pylist(), row)
                row += batch.num_rows

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"{self.path} cannot be read as Parquet ({first}); download it again") from None

    def _batch(self, rows: Sequence[dict[str, Any]], first: int) -> RolloutBatch:
        prompts = [self._prompt(row["prompt"], first + i) for i, row in enumerate(rows)]
        metadata = [self._metadata(row["metadata"], first + i) for i, row in enumerate(rows)]
        fields = {
            name: [self._field(value, name, dtype, first + i) for i, value in enumerate(metadata)]
            for name, dtype in (
                ("response_tokens", np.int32),
                ("loss_mask", np.uint8),
                ("teacher_log_probs", np.float32),
            )
        }
        for i, (tokens, mask, logprobs) in enumerate(zip(*fields.values(), strict=True)):
            if not len(tokens) == len(mask) == len(logprobs):
                raise UserError(
                    f"{self.path}: row {first + i} has {len(tokens)} response_tokens, {len(mask)} loss_mask "
                    f"and {len(logprobs)} teacher_log_probs; score it again"
                )
            outside = tokens[(tokens < 0) | (tokens >= (self.vocab_size or np.inf))]
            if len(outside):
                raise UserError(
                    f"{self.path}: row {first + i} has the token id {outside[0]}, the vocabulary of "
                    f"model.student {self.vocab_size} tokens; set model.student to the model of this file"
                )
        return RolloutBatch(
            document_ids=np.array([f"{self.path.name}/{first + i}" for i in range(len(rows))], object),
            prompt_ids=np.array([_prompt_id(row["prompt"]) for row in rows], object),
            prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
            response_lengths=np.array([len(tokens) for tokens in fields["response_tokens"]], np.int32),
            is_truncated=np.zeros(len(rows), bool),
            prompt_tokens=np.concatenate(prompts),
            response_tokens=np.concatenate(fields["response_tokens"]),
            response_mask=np.concatenate(fields["loss_mask"]),
            logprobs={"teacher_logprobs": np.concatenate(fields["teacher_log_probs"])},
            topk=0,
            topk_ids=np.empty(0, np.int32),
            topk_logprobs=np.empty(0, np.float32),
        )

    def _prompt(self, prompt: Any, number: int) -> np.ndarray:
        if not prompt:
            raise UserError(f"{self.path}: row {number} has no prompt; remove the row")
        try:
            tokens = self.tokenize(prompt)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.path}: row {number} has a prompt that is neither text nor messages ({first}); "
                "mend the row"
            ) from None
        return np.array(tokens, np.int32)

    def _metadata(self, value: Any, number: int) -> dict[str, Any]:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise UserError(
                    f"{self.path}: row {number} has metadata that is no JSON; write the file again"
                ) from None
        if not isinstance(value, dict | None):
            raise UserError(f"{self.path}: row {number} has metadata that is no object; write the file again")
        return value or {}

    def _field(self, metadata: dict[str, Any], name: str, dtype: type[np.generic], number: int) -> np.ndarray:
        value = metadata.get(name)
        if value is None:
            raise UserError(f"{self.path}: row {number} has no metadata.{name}; score the file first")
        try:
            return checked_cast(np.array(value), dtype, name) if value else np.empty(0, dtype)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: row {number}: {error}; score the file again") from None


def _prompt_id(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()


def prompt_tokenizer(folder: str | Path) -> PromptTokenizer:
    """Text as it is, rendered already; chat messages through the chat template, with a generation prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(prompt: Any) -> list[int]:
        messages = _messages(prompt)
        if messages is not None:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]

    return tokenize


def _messages(prompt: Any) -> list[dict[str, str]] | None:
    """The messages of a prompt, which may be their JSON text; None of a rendered text."""
    if isinstance(prompt, str):
        if not prompt.lstrip().startswith("[{"):
            return None
        try:
            prompt = json.loads(prompt)
        except (ValueError, RecursionError):
            return None
    turns = list(prompt)
    for turn in turns:
        if not isinstance(turn["role"], str) or not isinstance(turn["content"], str):
            raise TypeError(f"a message is {turn!r}"[:100])
    return turns
