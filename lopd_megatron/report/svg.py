"""Small charts as inline SVG. Colours are CSS classes of `page.html`, so a chart follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 26
MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One curve. `spread` draws a band of ± that much around it."""

    label: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] | None = None


def number(value: float) -> str:
    """A number with four significant digits, thousands separated."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def line_chart(
    lines: Sequence[Line],
    *,
    limit: float | None = None,
    x_label: str = "iteration",
    from_zero: bool = False,
    markers: bool = False,
) -> Markup:
    """Curves over one x axis; `limit` is a dashed horizontal line. A curve is thinned to 400 points."""
    lines = [_thinned(line) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    for line in lines:
        for (_, y), s in zip(line.points, line.spread or [0.0] * len(line.points), strict=True):
            ys += [max(0.0, y - s), y + s] if line.spread else []
    ys += [limit] if limit is not None else []
    ys += [0.0] if from_zero else []
    frame = _Frame((min(xs), max(xs)), (min(ys), max(ys)))
    parts = [frame.axes(x_label)]
    if limit is not None:
        y = frame.y(limit)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for index, line in enumerate(lines):
        parts.append(_curve(frame, line, index, markers))
    return _svg(parts, WIDTH, HEIGHT)


def histogram(edges: Sequence[float], counts: Sequence[int], x_label: str) -> Markup:
    """Bars between edges."""
    frame = _Frame((edges[0], edges[-1]), (0.0, float(max(counts))))
    parts = [frame.axes(x_label)]
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, width = frame.x(left), frame.x(right) - frame.x(left)
        y = frame.y(count)
        height = frame.y(0) - y
        parts.append(
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(width - 1, 0.8):.1f}" '
            f'height="{height:.1f}"><title>{number(left)} – {number(right)}: {count:,}</title></rect>'
        )
    return _svg(parts, WIDTH, HEIGHT)


def error_bars(rows: Sequence[tuple[str, float, float]], unit: str) -> Markup:
    """One row per (label, value, error): a dot and a bar of ± error."""
    width, row_height, left = 720, 30, 190
    height = row_height * len(rows) + 34
    low = min(value - error for _, value, error in rows)
    high = max(value + error for _, value, error in rows)
    pad = 0.08 * (high - low) or 0.5
    frame = _Frame((low - pad, high + pad), (0, 1), width, height, left)
    parts = []
    for tick in _ticks(frame.x_range, 6):
        x = frame.x(tick)
        if x > width - 24:
            continue  # its label would be cut off
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 28}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 12}" text-anchor="middle">{number(tick)}{unit}</text>')
    for index, (label, value, error) in enumerate(rows):
        y = row_height * (index + 0.5) + 4
        a, x, b = frame.x(value - error), frame.x(value), frame.x(value + error)
        parts.append(
            f'<text class="strong" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
            f'<path class="error" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 5}v10M{b:.1f} {y - 5}v10"/>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y}" r="4.5"><title>{number(value)} ± {number(error)}'
            f"{unit}</title></circle>"
        )
    return _svg(parts, width, height)


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str]) -> Markup:
    """Horizontal bars of shares that add up to 1."""
    width, left, row_height = 720, 130, 40
    parts = []
    for index, (name, shares) in enumerate(rows):
        x, y = float(left), index * row_height + 6
        parts.append(
            f'<text class="strong" x="{left - 12}" y="{y + 18}" text-anchor="end">{escape(name)}</text>'
        )
        for part, (label, share) in enumerate(zip(labels, shares, strict=True)):
            w = share * (width - left - RIGHT)
            parts.append(
                f'<rect class="part{part}" x="{x:.1f}" y="{y}" width="{max(w - 2, 0):.1f}" height="26">'
                f"<title>{escape(label)} {share:.0%}</title></rect>"
            )
            if w > 34:
                text = f"{label} {share:.0%}" if w > 90 else f"{share:.0%}"
                parts.append(_text(x + 8, y + 17, text, kind="on"))
            x += w
    return _svg(parts, width, row_height * len(rows) + 6)


class _Frame:
    """Maps values to the picture and draws the axes."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        width: int = WIDTH,
        height: int = HEIGHT,
        left: int = LEFT,
    ) -> None:
        self.x_range, self.y_range = _widened(x_range), _widened(y_range)
        self.width, self.height, self.left = width, height, left

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def axes(self, x_label: str) -> str:
        parts = []
        for tick in _ticks(self.y_range, 5):
            y = self.y(tick)
            parts.append(
                f'<line class="{"zero" if tick == 0 else "grid"}" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
            )
        room = WIDTH - RIGHT - 6 * len(x_label) - 16
        for tick in _ticks(self.x_range, 5):
            if self.x(tick) < room:
                parts.append(_text(self.x(tick), HEIGHT - 9, number(tick), anchor="middle"))
        parts.append(_text(WIDTH - RIGHT, HEIGHT - 9, x_label, anchor="end"))
        return "".join(parts)


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _curve(frame: _Frame, line: Line, index: int, markers: bool) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in line.points]
    parts = []
    if line.spread:
        upper = [(x, y + s) for (x, y), s in zip(line.points, line.spread, strict=True)]
        lower = [(x, max(0.0, y - s)) for (x, y), s in zip(line.points, line.spread, strict=True)]
        outline = [(frame.x(x), frame.y(y)) for x, y in [*upper, *reversed(lower)]]
        parts.append(f'<path class="band{index}" d="M{_path(outline)}Z"/>')
    parts.append(f'<path class="line{index}" d="M{_path(places)}"/>')
    radius = 2.5 if markers or len(places) == 1 else 0
    for (x, y), (at, value) in zip(places, line.points, strict=True):
        dot = f'<circle class="dot{index}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' if radius else ""
        parts.append(
            f'{dot}<circle class="hover" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(line.label)} at {number(at)}: {number(value)}</title></circle>"
        )
    return "".join(parts)


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _thinned(line: Line) -> Line:
    """Every n-th point and the last."""
    step = -(-len(line.points) // MOST_POINTS)
    keep = sorted({*range(0, len(line.points), step), len(line.points) - 1})
    spread = [line.spread[i] for i in keep] if line.spread else None
    return Line(line.label, [line.points[i] for i in keep], spread)


def _widened(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    if low == high:
        half = abs(low) / 2 or 0.5
        return low - half, high + half
    return low, high


def _ticks(span: tuple[float, float], wanted: int) -> list[float]:
    """About `wanted` multiples of 1, 2, 2.5 or 5 times a power of ten inside the span."""
    low, high = span
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _svg(parts: Iterable[str], width: int, height: int) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>')
