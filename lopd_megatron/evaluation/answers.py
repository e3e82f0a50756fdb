"""The final answer in a response: its last \\boxed{}, or what it calls its answer, or its last number."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(-?\d[\d.,/]*))|\\[\\{}]|[{}]")
_EMPTY = re.compile(r"(?:[\s.…?_]|\\[lc]?dots|\\square)*|(?:(?:your|the|final)\s+)*answer(?:\s+here)?", re.I)
_JOINED = re.compile(r"[\s$,;&]*(?:and|or)?[\s$,;&]*(?:[A-Za-z]\w{0,2}\s*=\s*)?")
_MARKED = re.compile(r"answer\s*(?:is|are|was|:|=)(?:\s*(?:is|:|=))?", re.I)
_MATH = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_NUMBER = re.compile(r"[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?\\?%)?")
_TAIL = 4000
"""Characters at the end of a response without a box in which its answer is looked for."""


def find_answers(response: str) -> list[str]:
    """The last box, and those right before it that it is joined to (`\\boxed{3} and \\boxed{4}`), in order.

    One text where there is no box; empty where there is no answer. Linear in the length of the response.
    """
    found = _boxes(response)
    if not found:
        answer = _unboxed(response[-_TAIL:])
        return [answer] if answer else []
    joined = [found[-1]]
    for box in reversed(found[:-1]):
        between = response[box[1] : joined[0][0]]
        if len(between) > 40 or not _JOINED.fullmatch(re.sub(r"\\[()\[\],;: ]", " ", between)):
            break
        joined.insert(0, box)
    return [content for _, _, content in joined]


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each closed box that holds an answer; of nested boxes the innermost."""
    stack: list[tuple[int, int] | None] = []  # of each open brace: (start, start of the content) of a box
    found: list[tuple[int, int, str]] = []
    for token in _TOKEN.finditer(text):
        if token[1] is not None:
            found.append((token.start(), token.end(), token[1]))
        elif token[0].startswith("\\") and len(token[0]) > 2:
            stack.append((token.start(), token.end()))
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            box = stack.pop()
            if box is None:
                continue
            start, content = box[0], text[box[1] : token.start()]
            while found and found[-1][0] > start:
                content = found.pop()[2]
            if not _EMPTY.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", content[:200]).strip()):
                found.append((start, token.end(), content))
    return found


def _unboxed(text: str) -> str | None:
    text = re.sub(r"\\(?:boxed|fbox)\s*\{[\s.…]*\}", " ", text).replace("**", "").replace("\0", "")
    _, mark, after = text.rpartition("####")
    if mark:
        return after.strip().partition("\n")[0] or None
    marks = list(_MARKED.finditer(text))
    if marks:
        line = text[marks[-1].end() :].strip().partition("\n")[0]
        math = _MATH.search(line)
        sentence = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip()
        numbers = _NUMBER.findall(sentence)
        if math:
            return _group(math)
        if sentence and (len(sentence.split()) <= 4 or not numbers):
            return sentence
        if numbers:
            return numbers[-1]
    words = text.split()
    if len(words) == 1:
        return words[0]
    last = max([*_MATH.finditer(text), *_NUMBER.finditer(text)], key=lambda match: match.end(), default=None)
    if last is None:
        return text.strip() if 0 < len(words) <= 3 else None
    return _group(last).rpartition("=")[2] if last.re is _MATH else last[0]


def _group(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)
