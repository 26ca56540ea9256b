"""Drawings as SVG that the page's style sheet colours: histograms, empirical distributions, the lineage of a run."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

__all__ = ["cdf", "histogram", "lineage"]

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
    return _svg(_WIDTH, _HEIGHT, f"distribution of {what}, from {low:.4g} to {high:.4g}", parts)


def cdf(ref_rewards: Sequence[float], marks: Sequence[tuple[float, str]]) -> Markup:
    """The empirical distribution of a prompt's reference rewards as steps, with a mark for each (reward, label)."""
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
    return _svg(_WIDTH, _HEIGHT, f"empirical distribution of {count} reference rewards {spread}", parts)


def lineage(nodes: Sequence[Mapping[str, Any]], edges: Sequence[tuple[int, int]]) -> Markup:
    """Artifacts from top to bottom (`name`, `note`, `href`), with an arrow for each (parent, child); arcs skip boxes."""
    row, box = 52, 260
    left = 150 if any(lower > upper + 1 for upper, lower in edges) else 8
    shape = 'id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    parts = [f'<defs><marker {shape}><path d="M0,0 L8,4 L0,8 z" class="tip"/></marker></defs>']
    for upper, lower in edges:
        if lower == upper + 1:
            middle = left + box / 2
            path = f"M{middle},{row * upper + 40} L{middle},{row * lower + 8}"
        else:
            start, stop, away = row * upper + 24, row * lower + 24, left - min(140, 22 * (lower - upper))
            path = f"M{left},{start} C{away},{start} {away},{stop} {left},{stop}"
        parts.append(f'<path d="{path}" class="edge" marker-end="url(#tip)"/>')
    for number, node in enumerate(nodes):
        top = row * number + 8
        parts.append(
            f'<a href="{escape(node["href"])}"><rect x="{left}" y="{top}" width="{box}" height="32" rx="6" class="box"/>'
            f'<text x="{left + 10}" y="{top + 21}" class="name">{escape(node["name"])}</text>'
            f'<text x="{left + box - 10}" y="{top + 21}" class="note" text-anchor="end">{escape(node["note"])}</text></a>'
        )
    return _svg(left + box + 8, row * len(nodes) + 8, "which artifact was made from which", parts, "lineage")


def _x(value: float, low: float, high: float) -> float:
    return _WIDTH * (value - low) / (high - low) if high > low else 0.0


def _y(share: float) -> float:
    return _HEIGHT - 6 - (_HEIGHT - 12) * share


def _svg(width: int, height: int, title: str, parts: Sequence[str], kind: str = "plot") -> Markup:
    shape = f'viewBox="0 0 {width} {height}" class="{kind}" role="img" aria-label="{escape(title)}"'
    return Markup(f"<svg {shape}>{''.join(parts)}</svg>")  # only numbers and escaped texts
