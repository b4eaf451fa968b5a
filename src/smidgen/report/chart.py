"""Charts as inline SVG, drawn by ourselves: a page that needs no library and no network.

Colours, line widths and type come from the page's style sheet by class, so that they follow light and dark.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

__all__ = ["Series", "bars", "line_chart", "smoothed", "thinned", "ticks"]

_WIDTH, _HEIGHT = 480, 250  # in the drawing's own units; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 32
_MOST_POINTS = 400  # more than there are pixels help nobody

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """name: for the legend, "" for none. look: 'line', 'faint' (a thin line behind) or 'dots' (a line with points);
    colour: the style sheet's, 'a' or 'b'.
    """

    name: str
    points: Sequence[Point]
    look: str = "line"
    colour: str = "a"


def line_chart(title: str, series: Sequence[Series], number: Callable[[float], str], *, from_zero: bool = False) -> str:
    """A <figure> over optimizer steps. number: how a value on the upright axis is written."""
    drawn = [Series(s.name, [p for p in s.points if math.isfinite(p[1])], s.look, s.colour) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs, ys = ([point[axis] for s in drawn for point in s.points] for axis in (0, 1))
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 5) if tick.is_integer() and min(xs) <= tick <= max(xs)]
    y_ticks = ticks(0.0, max(ys) or 1.0, 5) if from_zero else ticks(min(ys), max(ys), 5)
    if not x_ticks or max(xs) - x_ticks[-1] > (max(xs) - min(xs)) / 8:
        x_ticks.append(max(xs))  # where it ends, if there is room for the number
    across = _scale((min(xs), max(xs)), (_LEFT, _WIDTH - _RIGHT))
    up = _scale((min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))), (_HEIGHT - _BOTTOM, _TOP))
    parts = []
    for tick in y_ticks:
        y = f"{up(tick):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy=".35em" text-anchor="end">{escape(number(tick))}</text>')
    for tick in x_ticks:
        anchor = "end" if tick == max(xs) else "middle"
        at = f'x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 20}"'
        parts.append(f'<text {at} text-anchor="{anchor}">{tick:,.0f}</text>')
    parts.append(f'<text x="{_LEFT - 16}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="end">step</text>')
    for one in drawn:
        places = [(across(x), up(y)) for x, y in one.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="{one.look} {one.colour}" d="{path}"/>')
        if one.look == "dots" or len(places) == 1:
            parts += [f'<circle class="{one.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
    named = [one for one in drawn if one.name]
    legend = "".join(f'<span class="key {one.colour}">{escape(one.name)}</span>' for one in named)
    last = ", ".join(f"{one.name or title} {number(one.points[-1][1])}" for one in drawn if one.look != "faint")
    said = escape(f"{title}, from step {min(xs):,.0f} to {max(xs):,.0f}; at the end: {last}", quote=True)
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{said}">{"".join(parts)}</svg></figure>'
    )


def bars(title: str, buckets: Sequence[tuple[str, int]], number: Callable[[int], str] = "{:,}".format) -> str:
    """A <figure> of counts, a bar for each, with its label and its number, as `number` writes it, beside it."""
    most = max((count for _, count in buckets), default=0) or 1
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td><div class="bar" style="width:{100 * count / most:.1f}%"></div>'
        f"</td><td>{escape(number(count))}</td></tr>"
        for label, count in buckets
    )
    return f'<figure><figcaption>{escape(title)}</figcaption><table class="bars">{rows}</table></figure>'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers around low..high, 1, 2 or 5 times a power of ten apart; all steps of it within and one beyond."""
    if high <= low:
        low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def smoothed(points: Sequence[Point], most: float = 0.9) -> list[Point]:
    """The running mean that forgets by a weight a step, without the start's pull to zero (as Adam corrects it).

    It looks back on a tenth of the points: with the weight `most`, or less where they are few, or it would lag behind.
    """
    weight = min(most, 1 - 10 / max(10, len(points)))
    found: list[Point] = []
    mean = total = 0.0
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + 1 - weight
        found.append((x, mean / total))
    return found


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` points: means of neighbours where there are more."""
    if len(points) <= most:
        return list(points)
    edges = [number * len(points) // most for number in range(most + 1)]
    groups = [points[start:stop] for start, stop in pairwise(edges)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _scale(values: tuple[float, float], places: tuple[float, float]) -> Callable[[float], float]:
    width = values[1] - values[0] or 1.0
    return lambda value: places[0] + (value - values[0]) / width * (places[1] - places[0])
