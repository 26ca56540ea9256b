"""Drawings as SVG that the page's style sheet colours: histograms, curves and empirical
distributions."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 320, 96


def histogram(sides: Sequence[Mapping[str, Any]], labels: Sequence[str] = ("",)) -> Markup:
    """One distribution as bars, or a second one as a line on the same scale, from `numbers_of`."""
    low = min(side["histogram"]["low"] for side in sides)
    high = max(side["histogram"]["high"] for side in sides)
    shapes = []  # (left and right ends of each bin, height of each bin)
    for bins in (side["histogram"] for side in sides):
        count = len(bins["counts"])
        width = (bins["high"] - bins["low"]) / count or 1.0
        edges = [_x(bins["low"] + place * width, low, high) for place in range(count + 1)]
        unit = sum(bins["counts"]) * (width if len(sides) > 1 else 1.0)
        ends = list(itertools.pairwise(edges))
        shapes.append((ends, [value / unit for value in bins["counts"]]))
    top = max(max(heights) for _, heights in shapes)
    parts = []
    for number, (ends, heights) in enumerate(shapes):
        bars = [
            (*end, _HEIGHT - 2 - (_HEIGHT - 6) * value / top)
            for end, value in zip(ends, heights, strict=True)
        ]
        if number:
            line = " ".join(f"{left:.1f},{y:.1f} {right:.1f},{y:.1f}" for left, right, y in bars)
            parts.append(f'<polyline points="{line}" class="line"/>')
            continue
        for left, right, y in bars:
            width = max(1.0, (right - left if high > low else _WIDTH) - 1)
            box = f'x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_HEIGHT - y:.1f}"'
            parts.append(f'<rect {box} class="bar"/>')
    what = " and ".join(filter(None, labels)) or "histogram"
    return _svg(f"distribution of {what}, from {low:.4g} to {high:.4g}", parts)


def curve(points: Sequence[tuple[float, float]], label: str) -> Markup:
    """One value over training steps."""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    spread = (high - low) or 1.0
    line = " ".join(f"{_x(x, left, right):.1f},{_y((y - low) / spread):.1f}" for x, y in points)
    title = f"{label} over {len(points)} logged steps, from {points[0][1]:.4g} to {points[-1][1]:.4g}"
    return _svg(title, [f'<polyline points="{line}" class="steps"/>'])


def cdf(ref_rewards: Sequence[float], marks: Sequence[tuple[float, str]]) -> Markup:
    """The empirical distribution of a prompt's reference rewards as steps, with a mark for each
    (reward, label)."""
    rewards = sorted([*ref_rewards, *(reward for reward, _ in marks)])
    margin = 0.05 * (rewards[-1] - rewards[0]) or 1.0
    low, high = rewards[0] - margin, rewards[-1] + margin
    count = len(ref_rewards)
    points = [(0.0, _y(0.0))]
    for number, reward in enumerate(sorted(ref_rewards)):
        x = _x(reward, low, high)
        points += [(x, _y(number / count)), (x, _y((number + 1) / count))]
    points.append((float(_WIDTH), points[-1][1]))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{line}" class="steps"/>']
    for reward, label in marks:
        share = sum(other <= reward for other in ref_rewards) / count
        x, y = _x(reward, low, high), _y(share)
        title = f"{escape(label)}: reward {reward:.4g}, at or above {share:.0%} of the reference"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(0):.1f}" y2="{y:.1f}" class="rise"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="mark"><title>{title}</title></circle>')
    spread = f"from {min(ref_rewards):.4g} to {max(ref_rewards):.4g}"
    return _svg(f"empirical distribution of {count} reference rewards {spread}", parts)


def _x(value: float, low: float, high: float) -> float:
    return _WIDTH * (value - low) / (high - low) if high > low else 0.0


def _y(share: float) -> float:
    return _HEIGHT - 6 - (_HEIGHT - 12) * share


def _svg(title: str, parts: Sequence[str]) -> Markup:
    shape = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" class="plot" role="img" aria-label="{escape(title)}"'
    return Markup(f"<svg {shape}>{''.join(parts)}</svg>")  # only numbers and escaped texts
