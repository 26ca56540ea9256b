"""Small drawings as SVG that a page's style sheet colours: histograms, empirical distributions, the lineage of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

__all__ = ["cdf", "histogram", "lineage"]

_WIDTH, _HEIGHT = 320, 96


def histogram(sides: Sequence[Mapping[str, Any]], labels: Sequence[str] = ("",)) -> Markup:
    """One distribution, or two on one scale, from `summarise`'s histograms; a second one is drawn as a line."""
    low = min(side["histogram"]["low"] for side in sides)
    high = max(side["histogram"]["high"] for side in sides)
    shapes = []
    for number, side in enumerate(sides):
        bins = side["histogram"]
        total = sum(bins["counts"])
        width = (bins["high"] - bins["low"]) / len(bins["counts"]) or 1.0
        densities = [count / total / (width if len(sides) > 1 else 1.0) for count in bins["counts"]]
        edges = [_across(bins["low"] + place * width, low, high) for place in range(len(bins["counts"]) + 1)]
        shapes.append((number, edges, densities))
    most = max(max(densities) for _, _, densities in shapes)
    parts = []
    for number, edges, densities in shapes:
        tops = [_HEIGHT - 2 - (_HEIGHT - 6) * density / most for density in densities]
        if number == 0:
            for left, right, top in zip(edges, edges[1:], tops, strict=False):
                width = max(1.0, (right - left if high > low else _WIDTH) - 1)
                parts.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_HEIGHT - top:.1f}" class="bar"/>'
                )
        else:
            line = " ".join(
                f"{left:.1f},{top:.1f} {right:.1f},{top:.1f}"
                for left, right, top in zip(edges, edges[1:], tops, strict=False)
            )
            parts.append(f'<polyline points="{line}" class="line"/>')
    said = " and ".join(filter(None, labels)) or "histogram"
    return _svg(_WIDTH, _HEIGHT, f"distribution of {said}, from {low:.4g} to {high:.4g}", parts)


def cdf(ref_rewards: Sequence[float], marks: Sequence[tuple[float, str]]) -> Markup:
    """The empirical distribution of a prompt's reference rewards as steps, with a mark for each (reward, label)."""
    rewards = sorted([*ref_rewards, *(reward for reward, _ in marks)])
    low, high = rewards[0], rewards[-1]
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    count = len(ref_rewards)
    points, share = [(0.0, 0.0)], 0.0
    for number, reward in enumerate(sorted(ref_rewards), start=1):
        at = _across(reward, low, high)
        points += [(at, share), (at, number / count)]
        share = number / count
    points.append((float(_WIDTH), share))
    line = " ".join(f"{x:.1f},{_up(y):.1f}" for x, y in points)
    parts = [f'<polyline points="{line}" class="steps"/>']
    for reward, label in marks:
        at = _across(reward, low, high)
        height = sum(other <= reward for other in ref_rewards) / count
        title = (
            f"<title>{escape(label)}: reward {reward:.4g}, at or above {height:.0%} of the reference</title>"
        )
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_up(0):.1f}" y2="{_up(height):.1f}" class="rise"/>'
        )
        parts.append(f'<circle cx="{at:.1f}" cy="{_up(height):.1f}" r="4" class="mark">{title}</circle>')
    said = f"empirical distribution of {count} reference rewards from {min(ref_rewards):.4g} to {max(ref_rewards):.4g}"
    return _svg(_WIDTH, _HEIGHT, said, parts)


def lineage(nodes: Sequence[Mapping[str, Any]], edges: Sequence[tuple[int, int]]) -> Markup:
    """Artifacts from above to below (each with `name`, `note`, `href`), and which was made from which, as arcs where they skip."""
    row, box = 52, 260
    left = 150 if any(lower > upper + 1 for upper, lower in edges) else 8
    height = row * len(nodes) + 8
    shape = 'id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    parts = [f'<defs><marker {shape}><path d="M0,0 L8,4 L0,8 z" class="tip"/></marker></defs>']
    for upper, lower in edges:
        start, stop = row * upper + 40, row * lower + 8
        if lower == upper + 1:
            parts.append(
                f'<line x1="{left + box / 2}" y1="{start}" x2="{left + box / 2}" y2="{stop}" class="edge" marker-end="url(#tip)"/>'
            )
        else:
            away = left - min(140, 22 * (lower - upper))
            start, stop = row * upper + 24, row * lower + 24
            parts.append(
                f'<path d="M{left},{start} C{away},{start} {away},{stop} {left},{stop}" class="edge" marker-end="url(#tip)"/>'
            )
    for number, node in enumerate(nodes):
        top = row * number + 8
        parts.append(
            f'<a href="{escape(node["href"])}"><rect x="{left}" y="{top}" width="{box}" height="32" rx="6" class="box"/>'
            f'<text x="{left + 10}" y="{top + 21}" class="name">{escape(node["name"])}</text>'
            f'<text x="{left + box - 10}" y="{top + 21}" class="note" text-anchor="end">{escape(node["note"])}</text></a>'
        )
    return _svg(left + box + 8, height, "which artifact was made from which", parts, "lineage")


def _across(value: float, low: float, high: float) -> float:
    return _WIDTH * (value - low) / (high - low) if high > low else 0.0


def _up(share: float) -> float:
    return _HEIGHT - 6 - (_HEIGHT - 12) * share


def _svg(width: int, height: int, title: str, parts: Sequence[str], kind: str = "plot") -> Markup:
    shape = f'viewBox="0 0 {width} {height}" class="{kind}" role="img" aria-label="{escape(title)}"'
    return Markup(f"<svg {shape}>{''.join(parts)}</svg>")  # numbers and escaped texts alone
