"""The loss chart as SVG: raw values faint, smoothed ones bold. Text in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from fluxgui.run_state import StepPoint, extremes, smoothed, thinned

MAX_POINTS: Final = 600
"""More than a screen has columns for; the chart of a long run stays small enough to send every second."""
MAX_TOOLTIPS: Final = 120
WIDTH, HEIGHT = 1000.0, 300.0


def loss_plot(
    points: tuple[StepPoint, ...], *, smoothing: float, num_steps: int, validation: tuple[StepPoint, ...] = ()
) -> str:
    """The chart as HTML. `smoothing` is 0 (none) to 0.99; `num_steps` is the length of the whole run.

    `validation` is drawn as it is: each value is a mean over the same pictures, noise and noise levels.
    """
    if len(points) < 2:
        return '<p class="empty">The loss appears here once the first steps are done.</p>'
    # Smooth first and thin afterwards: the average must not depend on how many points are drawn.
    averages = smoothed((point.loss for point in points), smoothing)
    average_points = tuple(StepPoint(p.step, a) for p, a in zip(points, averages, strict=True))
    raw, bold = extremes(points, MAX_POINTS), thinned(average_points, MAX_POINTS)

    first, last = 0, max(num_steps, points[-1].step)
    steady = [p.loss for p in (*bold, *validation)]
    low, high, ticks = _axis(_visible_range([p.loss for p in raw], steady))

    def x(step: int) -> float:
        return WIDTH * (step - first) / max(last - first, 1)

    def y(loss: float) -> float:
        return HEIGHT * (1 - (min(max(loss, low), high) - low) / (high - low))

    def line(kind: str, shown: list[StepPoint]) -> str:
        path = " ".join(f"{x(p.step):.1f},{y(p.loss):.1f}" for p in shown)
        return f'<polyline class="{kind}" points="{path}"/>'

    grid = "".join(f'<line x1="0" x2="{WIDTH:.0f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>' for tick in ticks)
    y_labels = "".join(f'<span style="top:{100 * y(tick) / HEIGHT:.1f}%">{_number(tick)}</span>' for tick in ticks)
    x_labels = "".join(
        f"<span>{'step ' if part == 0 else ''}{round(first + (last - first) * part / 4)}</span>" for part in range(5)
    )
    spoken = (
        f"Loss by step, {len(points)} steps: smoothed from {averages[0]:.4g} to {averages[-1]:.4g}, "
        f"now {points[-1].loss:.4g}"
    )
    checked, key = "", ""
    if validation:
        spoken += f"; on held back pictures from {validation[0].loss:.4g} to {validation[-1].loss:.4g}"
        dots = "".join(
            # A line of no length: its round ends stay round where the chart is stretched.
            f'<line class="validation" x1="{x(p.step):.1f}" x2="{x(p.step):.1f}" y1="{y(p.loss):.1f}" '
            f'y2="{y(p.loss):.1f}">'
            f"<title>step {p.step}: {p.loss:.4g} on held back pictures</title></line>"
            for p in thinned(validation, MAX_TOOLTIPS)
        )
        checked = f'{line("validation", thinned(validation, MAX_POINTS))}<g class="dots">{dots}</g>'
        key = '<span class="key validation">held back pictures</span>'
    return (
        f'<figure class="plot"><div class="plot-y">{y_labels}</div>'
        f'<svg role="img" aria-label="{spoken}" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none">'
        f'<g class="grid">{grid}</g>{line("raw", raw)}{line("smooth", bold)}{_tooltips(points, averages, x)}{checked}</svg>'
        f'<div class="plot-x">{x_labels}</div>'
        '<figcaption><span class="key raw">each step</span><span class="key smooth">smoothed</span>'
        f"{key}</figcaption></figure>"
    )


def _tooltips(points: tuple[StepPoint, ...], averages: list[float], x: Callable[[int], float]) -> str:
    """Invisible columns whose title a browser shows under the pointer."""
    shown = range(0, len(points), math.ceil(len(points) / MAX_TOOLTIPS))
    columns: list[str] = []
    for position, index in enumerate(shown):
        left = x(points[index].step)
        following = shown[position + 1] if position + 1 < len(shown) else None
        right = x(points[following].step) if following is not None else left + 8
        text = f"step {points[index].step}: {points[index].loss:.4g}, smoothed {averages[index]:.4g}"
        columns.append(
            f'<rect x="{left:.1f}" y="0" width="{max(right - left, 1):.1f}" height="{HEIGHT:.0f}">'
            f"<title>{text}</title></rect>"
        )
    return f'<g class="columns">{"".join(columns)}</g>'


def _visible_range(raw: list[float], bold: list[float]) -> tuple[float, float]:
    """All of the smoothed line, and of the raw one what is not an outlier."""
    ordered = sorted(raw)
    low = ordered[math.floor(0.01 * (len(ordered) - 1))]
    high = ordered[math.ceil(0.99 * (len(ordered) - 1))]
    return min(low, *bold), max(high, *bold)


def _axis(bounds: tuple[float, float]) -> tuple[float, float, list[float]]:
    """Round ends and about four ticks for values in `bounds`."""
    low, high = bounds
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * next(factor for factor in (1, 2, 2.5, 5, 10) if rough <= factor * size * (1 + 1e-9))
    start, end = math.floor(low / step), math.ceil(high / step)
    return start * step, end * step, [tick * step for tick in range(start, end + 1)]


def _number(value: float) -> str:
    return f"{value:.4g}"
