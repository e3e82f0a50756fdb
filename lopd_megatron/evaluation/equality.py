"""Are two final answers equal? Around math-verify: what it misses, and what it takes for equal but is not.

An answer is cleaned of LaTeX's layout, read as a list, set, tuple, interval or single value, and compared
part by part. Numbers are compared exactly (0.333 is not 1/3, 3.14 is not π). Only single values that are
neither numbers nor words reach math-verify. Nothing here bounds the time: `grading_process` does.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import product
from typing import Any

from lopd_megatron.evaluation.quantities import (
    KNOWN_UNITS,
    MATH_WORDS,
    squeezed,
    values_of,
    without_unit,
)

_UNICODE = {
    **dict.fromkeys("−–—", "-"), "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": "", "²": "^2",
    "³": "^3", "√": r"\sqrt", "±": r"\pm ", "⁄": "/", "∅": r"\emptyset ", "’": "'",
}  # fmt: skip
_LAYOUT = (
    (r"(?<=\d)(?:\\[,!;: ]|\{,\}|~)+(?=\d{3}(?!\d))", ""),  # thousands, as LaTeX writes them
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|small)(?![a-zA-Z])", ""),
    (r"\\(?:quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,;:! ]|~", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le"),
    (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge"),
    (r"\\neq(?![a-zA-Z])", r"\\ne"),
    (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset"),
    (r"\\(?:approx|simeq|doteq)(?![a-zA-Z])", "="),
    (r"\^\{?\\circ\}?|\\degree(?![a-zA-Z])", ""),
    (r"(?<!\\)\\[()\[\]]", " "),
    (r"^\s*\\?\$\s*(\d[\d.,]*)\s*$", r"\1 dollar"),
    (r"\\?[$€£¥]|\\pounds(?![a-zA-Z])", ""),
    (r"\\%", "%"),
    (r"\*\*|`|\0", ""),
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d/])")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d)")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b", re.I)
_ASSIGNED = re.compile(
    r"^\s*(?:[^=<>!]{1,40}?(?<![\\<>!])(?:=|:=)|[A-Za-z]\s*\\in(?![a-zA-Z]))(?!=)(.+)$", re.S
)
_CHOICE = re.compile(r"^\(?([A-J])(?:\)|[.:](?!\d)|\s*$)\s*(.*)$", re.S)
_BASE = re.compile(r"^([0-9A-Za-z]+)\s*_\s*\{?\s*(\d+)\s*\}?$")
_WORDS = {"infinity": r"\infty", "pi": r"\pi", "nosolutions": "nosolution", "true": "true", "false": "false"}
_OPEN, _CLOSE = "([{", ")]}"


def same_answer(gold: str, found: str) -> bool:
    """Whether `found` is the answer `gold`; both as they stand in a data set or in a box."""
    first, second = clean(gold), clean(found)
    if not first or not second:
        return False
    if squeezed(first) == squeezed(second):
        return True
    choice = _CHOICE.match(first)
    if choice:
        other = _CHOICE.match(second) or _CHOICE.match(second.upper() if len(second) == 1 else "")
        if other:
            return other[1] == choice[1]
        return bool(choice[2]) and same_answer(choice[2], found)
    return any(_same(a, b) for a, b in product(_readings(first), _readings(second)))


def canonical(text: str) -> str:
    """One text for equal answers as far as that is cheap: what votes are counted by."""
    cleaned = clean(text)
    numbers = values_of(without_unit(_value(_readings(cleaned)[-1]))[0])
    if numbers:
        return str(max(numbers, key=abs))
    if _is_words(cleaned):
        return squeezed(cleaned).casefold()
    parsed = _parsed(_value(cleaned))
    return str(parsed) if parsed is not None else cleaned


def clean(text: str) -> str:
    """`text` without layout: `\\text{}`, sizes, spaces, currency and degree signs, a full stop at the end."""
    text = text.encode("utf-8", "ignore").decode()
    for sign, plain in _UNICODE.items():
        text = text.replace(sign, plain)
    text = re.sub(r"(\d)([½¼¾⅓⅔⅛])", r"\1 \2", text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
    for pattern, plain in _LAYOUT:
        text = re.sub(pattern, plain, text)
    for _ in range(4):  # nested
        text = _TEXT.sub(r" \1 ", text)
    text = re.sub(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;:").strip()
    while len(text) > 1 and text[0] == "{" and _closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    text = _SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    word = squeezed(text)
    return _WORDS.get(word.casefold(), text)


def _readings(text: str) -> list[str]:
    """`1,234` is a list of two and a number."""
    plain = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return [text] if plain == text else [text, plain]


def _same(gold: str, found: str) -> bool:
    golds, founds = _items(gold), _items(found)
    if len(golds) > 1 or len(founds) > 1:
        if len(golds) > 1 and len(founds) > 1:
            return _same_in_any_order(golds, founds)
        inner = _tuple(_value(golds[0] if len(golds) == 1 else founds[0]))
        items = golds if len(golds) > 1 else founds
        if inner is None or inner[0] not in ("()", "{}"):
            return False
        if inner[0] == "{}":
            return _same_in_any_order(items, inner[1])
        return len(items) == len(inner[1]) and all(map(_same, items, inner[1]))
    return _same_single(golds[0], founds[0])


def _same_single(gold: str, found: str) -> bool:
    if not (_is_assigned(gold) and _is_assigned(found)):
        gold, found = _value(gold), _value(found)
    first, second = _tuple(gold), _tuple(found)
    if first is not None and second is not None:
        if first[0] != second[0]:
            return False
        if first[0] == "{}":
            return _same_in_any_order(first[1], second[1])
        return len(first[1]) == len(second[1]) and all(map(_same, first[1], second[1]))
    unions = [_split(text, re.compile(r"\\cup(?![a-zA-Z])")) for text in (gold, found)]
    if min(map(len, unions)) > 1:
        return _same_in_any_order(*unions)
    return _same_value(gold, found)


def _same_value(gold: str, found: str) -> bool:
    """Of single values without a list, tuple or set around them."""
    if squeezed(gold) == squeezed(found):
        return True
    if ":" in gold or ":" in found:  # times and ratios
        return False
    bases = [_BASE.match(text) for text in (gold, found)]
    if any(bases):
        digits = [
            match[1] if match else squeezed(text) for match, text in zip(bases, (gold, found), strict=True)
        ]
        return (digits[0].casefold() == digits[1].casefold() and not all(bases)) or (
            all(bases) and bases[0].groups() == bases[1].groups()  # type: ignore[union-attr]
        )
    (gold, gold_unit), (found, found_unit) = without_unit(gold), without_unit(found)
    if {gold_unit, found_unit} <= KNOWN_UNITS and gold_unit != found_unit:
        return False
    values = [values_of(text) for text in (gold, found)]
    if all(values):
        return not values[0].isdisjoint(values[1])
    if _is_words(gold) or _is_words(found):
        return squeezed(gold).casefold() == squeezed(found).casefold()
    return _same_expression(gold.replace("%", r"\%"), found.replace("%", r"\%"))


def _same_expression(gold: str, found: str) -> bool:
    """By math-verify; two constants must agree to hundreds of digits, not to its six."""
    import sympy
    from math_verify import verify

    first, second = _parsed(gold), _parsed(found)
    if first is None or second is None:
        return False
    constants = [isinstance(value, sympy.Expr) and not value.free_symbols for value in (first, second)]
    if all(constants):
        return _same_constant(first, second)
    return bool(verify([first], [second], timeout_seconds=None))


def _same_constant(first: Any, second: Any) -> bool:
    import sympy

    if not (first.is_finite and second.is_finite):
        return first == second and first is not sympy.nan and first is not sympy.zoo
    if first == second:
        return True
    if first.is_Rational and second.is_Rational:
        return False
    size = max(abs(sympy.N(first, 60)), abs(sympy.N(second, 60)))
    if abs(sympy.N(first - second, 60)) > size * sympy.Float("1e-40"):
        return False
    if first.has(sympy.Integral, sympy.Sum, sympy.Product) or second.has(sympy.Integral, sympy.Sum):
        return True  # only their numerical value is known
    # 2^1000 and 2^1000 + 1 differ after 300 digits; what is equal has no digit left after a thousand.
    return bool(abs(sympy.N(first - second, 2, maxn=1000)) <= size * sympy.Float("1e-500"))


def _parsed(text: str) -> Any:
    """The sympy object of a cleaned text; None where there is none."""
    from math_verify import parse

    try:
        found = parse(f"\\boxed{{{text}}}", fallback_mode="no_fallback", parsing_timeout=None)
    except Exception:  # whatever sympy and antlr raise on a text that is no mathematics
        return None
    return found[0] if found and not isinstance(found[0], str) else None


def _same_in_any_order(first: list[str], second: list[str]) -> bool:
    if len(first) != len(second) or len(first) > 100:
        return False
    left = list(second)
    for item in first:
        match = next((other for other in left if _same(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _items(text: str) -> list[str]:
    """The parts of a list at the top level, ± written out."""
    found = []
    for item in _split(text, _SEPARATOR):
        sign = re.search(r"\\(pm|mp)(?![a-zA-Z])", item)
        if sign:
            head, tail = item[: sign.start()], item[sign.end() :]
            plus = "+" if _value(head).strip() else ""
            found += [f"{head}{plus}{tail}", f"{head}-{tail}"]
        else:
            found.append(item)
    return found or [text]


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of `text` between separators that are in no bracket and no environment."""
    depth, start, parts = 0, 0, []
    inside = [0] * (len(text) + 1)
    for position, sign in enumerate(text):
        if sign in _OPEN:
            depth += 1
        inside[position] = depth
        if sign in _CLOSE:
            depth -= 1
    if r"\begin" in text:
        return [text.strip()]
    for match in separator.finditer(text):
        if inside[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def _tuple(text: str) -> tuple[str, list[str]] | None:
    """(brackets, items) of a tuple, interval or set; None of anything else."""
    text = text.strip()
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "{}", _items(text[2:-2])
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or _closing(text, 0) != len(text) - 1:
        return None
    items = _split(text[1:-1], re.compile("[,;]"))
    return (text[0] + text[-1], items) if len(items) > 1 else None


def _closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one at `start`, of whatever form; −1 without one."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        if depth == 0:
            return position
    return -1


def _is_assigned(text: str) -> bool:
    return _ASSIGNED.match(text) is not None


def _value(text: str) -> str:
    """`5` of `x = 5`, of `a = b = 5`, of `x \\in 5`; a text in brackets without them."""
    while match := _ASSIGNED.match(text):
        text = match[1].strip()
    while len(text) > 2 and text[0] == "(" and _closing(text, 0) == len(text) - 1 and not _tuple(text):
        text = text[1:-1].strip()
    return text


def _is_words(text: str) -> bool:
    """Whether `text` is language: a word of two letters or more, and no sign of mathematics."""
    words = re.findall(r"[A-Za-z]{2,}", text)
    return (
        bool(words) and not re.search(r"[\\^_=<>+*/\d{}]", text) and not {*map(str.lower, words)} & MATH_WORDS
    )
