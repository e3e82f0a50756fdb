"""Prompts → token ids: the chat template, with special tokens of its own and plain text of everybody else."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lopd_megatron.errors import UserError
from lopd_megatron.rollouts.sources import Messages, SourceRow, Tools

_MODEL_MARKS = ("<think>", "</think>")
"""Special tokens that stay special in an assistant turn: templates look for them there."""


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    if not Path(model).is_dir():
        raise UserError(f"model folder {model!r} does not exist; set model.student to a Hugging Face folder")
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises Exception itself on a damaged file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model folder {model!r} has no usable tokenizer: {first}") from None


@dataclass(frozen=True)
class Template:
    """How the content of a row becomes token ids."""

    tokenizer: Any
    apply_chat_template: bool
    enable_thinking: bool

    def row_tokens(self, row: SourceRow, suffix: str = "") -> list[int]:
        """`tokens` of a row that was read; an error names its place."""
        try:
            return self.tokens(row.content, suffix, tools=row.tools)
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from None

    def tokens(self, content: str | Messages, suffix: str = "", *, tools: Sequence[Any] = ()) -> list[int]:
        """Token ids of one prompt; `suffix` is added to the last user turn.

        A special token that is written in a message or a tool stays text, as with `split_special_tokens` of
        transformers; those of the template and of a last assistant turn are special. That turn follows the
        generation prompt and is continued. Without a chat template the text is taken as it is rendered
        already, so its special tokens are special.
        """
        if not self.apply_chat_template:
            if not isinstance(content, str) or tools:
                raise UserError(
                    "prompts.apply_chat_template=false needs `prompt` as text, "
                    f"but the input has {'tools' if tools else 'messages'}"
                )
            return self.tokenizer(content + suffix, add_special_tokens=True)["input_ids"]
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        messages[-1] = {**messages[-1], "content": messages[-1]["content"] + suffix}
        special = self._special_tokens
        escaped = [
            {**message, "content": special.escape(message["content"], message["role"])}
            for message in messages
        ]
        text = self._rendered(escaped, special.escape_all(list(tools)))
        if begun.startswith("<think>") and text.rstrip().endswith("<think>"):
            text = text.rstrip().removesuffix("<think>")  # both the template and the turn open the thinking
        return special.encode(text + begun)

    def _rendered(self, messages: Messages, tools: Tools) -> str:
        """The chat with the generation prompt; refused where the template leaves something out."""
        self._refuse_blind_template()
        text = self._render(messages, tools)
        for message in messages:
            role, content = message["role"], message["content"].strip()
            if role not in ("assistant", "tool") and content not in text:
                raise UserError(
                    f"the chat template of model.student leaves out the {role} turn {content[:40]!r}; "
                    "remove the turn or the row"
                )
        if tools and text == self._render(messages, []):
            raise UserError(
                "the chat template of model.student does not use tools; take a model whose template does, "
                "or remove the column tools"
            )
        return text

    def _render(self, messages: Messages, tools: Tools) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=self.enable_thinking,
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the chat template of model.student refuses the messages ({first}); "
                "change the messages or the template"
            ) from None

    def _refuse_blind_template(self) -> None:
        """Every prompt would become the same tokens."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer of model.student has no chat template; copy chat_template.jinja or "
                "tokenizer_config.json of the model, or set prompts.apply_chat_template=false"
            )
        if not self._shows_user_text:
            raise UserError(
                "the chat template of model.student leaves out the user's text; "
                "copy chat_template.jinja or tokenizer_config.json of the model again"
            )

    @cached_property
    def _shows_user_text(self) -> bool:
        return "7 plus 5" in self._render([{"role": "user", "content": "7 plus 5"}], [])

    @cached_property
    def _special_tokens(self) -> _SpecialTokens:
        return _SpecialTokens(self.tokenizer)


class _SpecialTokens:
    """Keeps special tokens in the text of users as text, and those that a template writes special.

    Before the template is rendered, marks replace the special tokens in messages. Those that the rendered
    text then holds are the template's. A copy of the tokenizer, in which every special token has a secret
    name, encodes the text: the template's tokens get these names, the marks become the user's text again.
    The tokenizer sees the whole text at once, so spaces and merges are as always.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._texts = sorted(filter(None, texts), key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        key = secrets.token_hex(8)  # private-use characters and a key that no text can hold
        self._marks = {text: f"\ue000{key}m{i}\ue001" for i, text in enumerate(self._texts)}
        self._names = {text: f"\ue000{key}n{i}\ue001" for i, text in enumerate(self._texts)}
        self._mark_pattern = re.compile(f"\ue000{key}m([0-9]+)\ue001")

    def escape(self, text: str, role: str = "user") -> str:
        """`text` with a mark in the place of every special token."""

        def mark(match: re.Match[str]) -> str:
            is_model_mark = role == "assistant" and match[0] in _MODEL_MARKS
            return match[0] if is_model_mark else self._marks[match[0]]

        return self._pattern.sub(mark, text)

    def escape_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, dict):
            return {self.escape(str(key)): self.escape_all(item) for key, item in value.items()}
        return [self.escape_all(item) for item in value] if isinstance(value, list) else value

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, the marks being text again."""
        found = self._mark_pattern.search(text)
        if found is None:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._renamed is None:
            raise UserError(
                f"the prompt holds the special token {self._texts[int(found[1])]!r}, which this kind of "
                "tokenizer cannot keep as text; remove it from the prompt"
            )
        text = self._pattern.sub(lambda match: self._names[match[0]], text)
        text = self._mark_pattern.sub(lambda match: self._texts[int(match[1])], text)
        return self._renamed.encode(text, add_special_tokens=False).ids

    @cached_property
    def _renamed(self) -> Any:
        """The tokenizer with secret names for its special tokens; None unless it is one of `tokenizers`."""
        from tokenizers import Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        state = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._names.get(text, text): i for text, i in model["vocab"].items()}
        else:  # unigram: [token, score]
            model["vocab"] = [[self._names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._names.get(model["unk_token"], model["unk_token"])
        state["post_processor"] = state["truncation"] = state["padding"] = None
        renamed = Tokenizer.from_str(json.dumps(state))
        same = all(
            renamed.token_to_id(name) == backend.token_to_id(text) for text, name in self._names.items()
        )
        return renamed if same else None
