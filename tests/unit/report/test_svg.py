"""Charts place values where the axes say."""

import re

import pytest

from lopd_megatron.report import svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (0.12345, "0.1235"), (-2.5, "-2.5"), (5e-4, "5e-4"), (2e-6, "2e-6")],
)
def test_numbers(value: float, text: str) -> None:
    assert svg.number(value) == text


@pytest.mark.parametrize("span", [(0.0, 1.0), (-3.2e-6, 7e-5), (1e8, 3.3e9), (5.0, 5.1)])
def test_ticks_are_few_round_and_inside(span: tuple[float, float]) -> None:
    ticks = svg._ticks(span, 5)
    assert 2 <= len(ticks) <= 6
    assert span[0] * (1 - 1e-9) <= ticks[0] or span[0] <= ticks[0]
    assert ticks[-1] <= span[1] * (1 + 1e-9)


def test_a_line_runs_from_edge_to_edge() -> None:
    chart = svg.line_chart([svg.Line("loss", [(1, 2.0), (2, 1.0)])])
    (path,) = re.findall(r'class="line0" d="M([^"]*)"', chart)
    assert path == f"{svg.LEFT:.1f} {svg.TOP:.1f}L{svg.WIDTH - svg.RIGHT:.1f} {svg.HEIGHT - svg.BOTTOM:.1f}"


def test_constant_single_and_many_points_are_drawn() -> None:
    for points in ([(1, 0.0)], [(1, 3.0), (9, 3.0)], [(i, i % 7) for i in range(5000)]):
        chart = svg.line_chart([svg.Line("x", points)])
        assert "nan" not in chart
        assert chart.count("<title>") <= svg.MOST_POINTS + 2
        assert f"x at {svg.number(points[-1][0])}" in chart  # the last point is never left out


def test_labels_are_escaped() -> None:
    assert "<b>" not in svg.error_bars([("<b>", 1.0, 0.1)], " %")


def test_bars_of_shares_fill_the_width() -> None:
    chart = svg.stacked_bars([("run", [0.25, 0.25, 0.5])], ["a", "b", "c"])
    widths = [float(width) for width in re.findall(r'<rect[^>]*width="([\d.]+)"', chart)]
    assert widths[2] / widths[0] == pytest.approx(2, rel=0.02)
