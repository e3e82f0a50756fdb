"""Texts of numbers and units, read exactly: 0.1 is a tenth, `three` is 3, `7 cm` is 7 with a unit."""

from __future__ import annotations

import re
from fractions import Fraction

_QUANTITY = re.compile(
    r"^(.*?[\d})])"
    r"( ?(?:square |cubic )?[A-Za-z]{2,}(?:[ /.\-^{}A-Za-z0-9]*)| [A-Za-z](?:\^\{?\d\}?)?(?:/[A-Za-z]+)?)$"
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_POWER_OF_TEN = re.compile(r"^(.*?)(?:\\times|\\cdot|\*|x|X)10\^(?:\{([-+]?\d{1,3})\}|(\d))$")
_REPEATING = re.compile(r"^([-+]?)(\d*)\.(\d*)\\overline\{(\d+)\}$")
MATH_WORDS = {
    "pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "mod", "lcm", "gcd",
}  # fmt: skip
_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "day": "day", "week": "week",
    "month": "month", "year": "year", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz",
    "liter": "l", "litre": "l", "milliliter": "ml", "dollar": "dollar", "cent": "cent", "degree": "degree",
    "radian": "rad",
}  # fmt: skip
KNOWN_UNITS = {*_UNITS.values()}
_DIGITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORD_VALUES = {word: value for value, word in enumerate(_DIGITS.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), start=2)
}
_FACTORS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}


def without_unit(text: str) -> tuple[str, str]:
    """`7 cm` → (`7`, `cm`); an empty unit where there is none."""
    match = _QUANTITY.match(text)
    if not match or r"\frac" in match[2] or {*re.findall("[a-z]+", match[2].lower())} & MATH_WORDS:
        return text, ""
    if re.fullmatch(r"[eE]-?\d+", match[2].strip()):
        return text, ""
    unit = match[2].strip().lower()
    scale, _, rest = unit.partition(" ")
    if scale in _FACTORS:
        return f"{match[1].strip()} {scale}", _unit(rest)
    return match[1].strip(), _unit(unit)


def _unit(unit: str) -> str:
    single = unit[:-1] if unit.endswith("s") and unit[:-1] in _UNITS else unit
    return _UNITS.get(single, single)


def values_of(text: str) -> set[Fraction]:
    """The number that `text` is; a percentage is also its hundredth."""
    whole = squeezed(text)
    plain = re.sub(r"%$|(?i:percent)$", "", whole)
    scale = next((word for word in _FACTORS if plain.endswith(word)), "")
    number = _number(plain.removesuffix(scale))
    if number is not None and scale:
        return {number * _FACTORS[scale]}
    if number is None:
        value = _word_number(text)
        return set() if value is None else {Fraction(value)}
    return {number, number / 100} if plain != whole else {number}


def _number(text: str) -> Fraction | None:
    """Exactly, of digits, decimals, fractions, mixed and repeating numbers and powers of ten."""
    if len(text) > 1000:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text.rstrip("."))
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?[eE][-+]?\d{1,3}", text):
        return Fraction(text)
    repeating = _REPEATING.match(text)
    if repeating:
        sign, whole, fixed, period = repeating.groups()
        numerator = int(f"0{whole}{fixed}{period}") - int(f"0{whole}{fixed}")
        exact = Fraction(numerator, (10 ** len(period) - 1) * 10 ** len(fixed))
        return -exact if sign == "-" else exact
    power = _POWER_OF_TEN.match(text)
    if power:
        factor = _number(power[1])
        return None if factor is None else factor * Fraction(10) ** int(power[2] or power[3])
    if text[:1] in ("-", "+"):
        value = _number(text[1:]) if text[1:2] not in ("-", "+") else None
        return -value if value is not None and text[0] == "-" else value
    mixed = re.fullmatch(r"(\d+)(?:(\\frac.+)|_(\d+/\d+))", text)
    if mixed:
        part = _number(mixed[2] or mixed[3])
        return None if part is None else int(mixed[1]) + part
    fraction = _FRACTION.fullmatch(text)
    parts = [fraction[1] or fraction[2], fraction[3] or fraction[4]] if fraction else text.split("/")
    if len(parts) == 2 and all(_NUMBER.fullmatch(part) for part in parts):
        over, under = (Fraction(part.rstrip(".")) for part in parts)
        return over / under if under else None
    return None


def _word_number(text: str) -> int | None:
    """21 of `twenty-one`."""
    words = [word for word in re.split(r"[\s-]+", text.lower()) if word and word != "and"]
    total = part = 0
    for word in words:
        if word in _WORD_VALUES:
            part += _WORD_VALUES[word]
        elif word == "hundred" and part:
            part *= 100
        elif word in _FACTORS and part:
            total, part = total + part * _FACTORS[word], 0
        else:
            return None
    return total + part if words else None


def squeezed(text: str) -> str:
    """Without spaces; one between a number and a fraction (3 1/2) is kept as `_`."""
    text = re.sub(r"(?<=\d) (?=\d+/\d+)", "_", text.strip())
    return re.sub(r"\s+", "", text)
