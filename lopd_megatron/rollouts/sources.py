"""Rows of the data sets people have, read as a prompt and its answer.

Prompts: `prompt` as text or messages (DAPO-Math-17k, our own), `messages`, `conversations` with `from` and
`value` (OpenThoughts3), `question` (GSM8K), `problem` (AIME, HMMT, MATH). Messages may also be JSON text, and
a content may be a list of text parts. Answers: `answer`, `reward_model.ground_truth` (DAPO),
`expected_answer`, `solution`; of GSM8K the part after ####.

A last assistant turn is the beginning of the response in a `prompt` column. In `messages` and `conversations`
it is the data set's own answer and is dropped, unless it is unfinished: it ends with space or inside <think>.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lopd_megatron.errors import UserError
from lopd_megatron.rollouts.input_files import read_raw_rows

Messages = list[dict[str, str]]
Tools = list[dict[str, Any]]

_PROMPT_COLUMNS = ("prompt", "messages", "conversations", "question", "problem")
_ANSWER_COLUMNS = ("answer", "expected_answer", "solution")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class SourceRow:
    content: str | Messages
    """Messages end with the last user (or tool) turn, or with an assistant turn to continue."""
    answer: str | None
    source: str  # file name
    place: str = ""  # file and line or row, for messages
    tools: Tools = field(default_factory=list)
    answer_dropped: bool = False
    """Whether the data set's own last turn of the assistant was left out."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no text to answer."""
        if isinstance(self.content, str):
            return not self.content.strip()
        return not any(turn["content"].strip() for turn in self.content if turn["role"] in ("user", "tool"))


def read_rows(path_text: str) -> Iterator[SourceRow]:
    """All rows of an input, streamed; what is not a prompt is a UserError with file and row."""
    for place, file, row in read_raw_rows(path_text):
        column, value = _prompt_column(row, place)
        content, dropped = _content(column, value, place)
        answer = _answer(row)
        tools = _tools(row, place)
        _refuse_broken_text([content, answer, tools], place)
        yield SourceRow(content, answer, file.name, place, tools, dropped)


def _prompt_column(row: dict[str, Any], place: str) -> tuple[str, Any]:
    """The first column that holds a prompt; an empty text is a prompt only where there is nothing else."""
    present = [(name, row[name]) for name in _PROMPT_COLUMNS if row.get(name) is not None]
    for name, value in present:
        if value not in ("", []):
            return name, value
    if present:
        return present[0][0], ""
    columns = ", ".join(sorted(map(str, row))) or "none"
    raise UserError(
        f"{place} has no prompt (columns: {columns}); it needs one of {', '.join(_PROMPT_COLUMNS)}"
    )


def _content(column: str, value: Any, place: str) -> tuple[str | Messages, bool]:
    """Text or messages, and whether the data set's answer was left out."""
    if isinstance(value, str):
        turns = _turns_of_text(value)
        if turns is None and value.strip() and column in ("messages", "conversations"):
            raise UserError(
                f"{place}: {column} is text that is not a JSON list of messages; "
                "write a list of {role, content}, or name the column prompt"
            )
        if turns is None:
            return value, False
        value = turns
    if not isinstance(value, list):
        raise UserError(
            f"{place}: {column} is {_kind(value)}, not text or a list of messages; "
            "write text or a list of {role, content}"
        )
    messages = [_message(turn, f"{place}: {column}[{index}]") for index, turn in enumerate(value)]
    return _up_to_the_response(messages, column, place)


def _turns_of_text(text: str) -> list[Any] | None:
    """The messages that a text holds as JSON (or as Python prints them); None of a text that is only text."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")) or "{" not in stripped[:16]:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and value and all(map(_is_turn, value)):
            return value
    return None


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and not {"role", "from"}.isdisjoint(value)


def _message(turn: Any, place: str) -> dict[str, str]:
    """{role, content} with plain text."""
    if not isinstance(turn, dict):
        raise UserError(f"{place} is {_kind(turn)}, not a message; write {{role, content}}")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name, name) if isinstance(name, str) else None
    if role not in _KNOWN_ROLES:
        raise UserError(f"{place} has the role {name!r}; use one of {', '.join(_KNOWN_ROLES)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise UserError(f"{place} calls a tool (tool_calls); write calls as text, or leave the row out")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        raise UserError(f"{place} has a content that is {_kind(content)}, not text; give it text")
    return {"role": role, "content": content}


def _part(part: Any, place: str) -> str:
    """The text of one content part, as chat templates of multimodal models join them."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise UserError(f"{place} has a content part {kind!r}; only parts {{type: text, text: …}} can be used")


def _up_to_the_response(messages: Messages, column: str, place: str) -> tuple[Messages, bool]:
    asked = [index for index, message in enumerate(messages) if message["role"] in ("user", "tool")]
    if not asked:
        raise UserError(f"{place}: {column} has no user turn; a prompt needs one")
    end = asked[-1] + 1
    rest = messages[end:]
    if any(message["role"] != "assistant" for message in rest):
        raise UserError(f"{place}: {column} ends with a {rest[-1]['role']} turn; let it end with a user turn")
    if [message["role"] for message in rest] == ["assistant"]:
        begun = rest[0]["content"]
        is_open = begun != begun.rstrip() or "<think>" in begun.rpartition("</think>")[2]
        if begun and (column == "prompt" or is_open):
            return messages, False
    return messages[:end], any(message["role"] == "assistant" and message["content"] for message in rest)


def _tools(row: dict[str, Any], place: str) -> Tools:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UserError(f"{place}: tools is text that is not JSON; write a list of tools") from None
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: tools is {_kind(tools)}, not a list of objects; write a list of tools")
    return tools


def _answer(row: dict[str, Any]) -> str | None:
    """The reference answer as text; None where there is none."""
    reward_model = row.get("reward_model")
    values = [reward_model.get("ground_truth")] if isinstance(reward_model, dict) else []
    values += [row.get(name) for name in _ANSWER_COLUMNS]
    for value in values:
        text = _answer_text(value)
        if text:
            return text
    return None


def _answer_text(value: Any) -> str:
    if isinstance(value, list):  # all of them are asked for
        return ", ".join(filter(None, map(_answer_text, value)))
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value) if value.is_integer() else value)
    if not isinstance(value, str):
        return ""
    return value.rpartition("####")[2].strip()


def _refuse_broken_text(values: list[Any], place: str) -> None:
    """Half a surrogate pair (a cut emoji) is in no vocabulary and in no file."""
    for text in _texts(values):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place} holds half of a character (\\u{ord(text[error.start]):04x} at position "
                f"{error.start}); remove it from the text"
            ) from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value))
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _kind(value: Any) -> str:
    """What a value is, in words of JSON."""
    names = {dict: "an object", list: "a list", tuple: "an entry of a map", type(None): "null", str: "text"}
    return names.get(type(value), f"{type(value).__name__} {value!r}"[:60])
