"""The chart of a run, or of several over each other, as SVG. Curves in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, Literal

from fluxgui.language import say
from fluxgui.run_state import NUM_LEVELS, RunState, StepPoint, extremes, smoothed, thinned

MAX_POINTS: Final = 500
"""Of a line. More than a screen has columns for; the chart of a long run stays small enough to send every second."""
MAX_POINTS_OF_MANY: Final = 300
MAX_TOOLTIPS: Final = 80
WIDTH, HEIGHT = 1000.0, 300.0

Chart = Literal["loss", "levels", "rate"]
Window = tuple[int, int] | None
"""First and last step to draw; None for the whole run."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: its class in the style sheet, its name in the key (none when empty), its points."""

    kind: str
    name: str
    points: Sequence[StepPoint]
    has_dots: bool = False


def draw_chart(state: RunState, chart: Chart, *, smoothing: float, window: Window = None) -> str:
    """One chart of a run as HTML. `smoothing` is 0 (none) to 0.99."""
    last = max(state.num_steps, state.step)
    if chart == "rate":
        if len(state.rates) < 2:
            return _nothing(say("runs.no_rate"))
        line = Line("smooth", say("runs.rate"), thinned(_within(state.rates, window), MAX_POINTS))
        spoken = f"{say('runs.rate')}: {_number(state.rates[0].value)} - {_number(state.rates[-1].value)}"
        return _figure([line], spoken, window or (0, last), window is not None)
    if chart == "levels":
        if not any(state.levels):
            return _nothing(say("runs.no_levels"))
        lines = [
            Line(
                f"hue-{number}",
                say("runs.level", low=25 * number, high=25 * (number + 1)),
                thinned(_within(smooth_line(points, smoothing), window), MAX_POINTS_OF_MANY),
            )
            for number, points in enumerate(state.levels)
            if points
        ]
        assert len(lines) <= NUM_LEVELS
        return _figure(lines, say("runs.levels_spoken"), window or (0, last), window is not None)
    return loss_plot(
        state.points, smoothing=smoothing, num_steps=state.num_steps, validation=state.validation, window=window
    )


def loss_plot(
    points: tuple[StepPoint, ...],
    *,
    smoothing: float,
    num_steps: int,
    validation: tuple[StepPoint, ...] = (),
    window: Window = None,
) -> str:
    """The loss as HTML: raw values faint, smoothed ones bold. `num_steps` is the length of the whole run.

    `validation` is drawn as it is: each value is a mean over the same pictures, noise and noise levels.
    """
    if len(points) < 2:
        return _nothing(say("runs.no_loss"))
    # Smooth first and cut and thin afterwards: the average must not depend on what is drawn.
    averages = smooth_line(points, smoothing)
    spoken = (
        f"Loss by step, {len(points)} steps: smoothed from {averages[0].value:.4g} to {averages[-1].value:.4g}, "
        f"now {points[-1].value:.4g}"
    )
    drawn, drawn_averages = _within(points, window), _within(averages, window)
    if len(drawn) < 2:
        return _figure([], spoken, window or (0, num_steps), is_zoomed=True)
    lines = [
        Line("raw", say("runs.each_step"), extremes(drawn, MAX_POINTS)),
        Line("smooth", say("runs.smoothed"), thinned(drawn_averages, MAX_POINTS)),
    ]
    if validation:
        spoken += f"; on held back pictures from {validation[0].value:.4g} to {validation[-1].value:.4g}"
        shown = thinned(_within(validation, window), MAX_POINTS)
        lines.append(Line("validation", say("runs.held_back"), shown, has_dots=True))
    span = window or (0, max(num_steps, points[-1].step))
    return _figure(lines, spoken, span, window is not None, tooltips=(drawn, drawn_averages))


def overlay(curves: Sequence[tuple[str, tuple[StepPoint, ...]]], *, smoothing: float) -> str:
    """The smoothed losses of several runs in one chart, by the names given."""
    lines = [
        Line(f"hue-{number % 8}", name, thinned(smooth_line(points, smoothing), MAX_POINTS_OF_MANY))
        for number, (name, points) in enumerate(curves)
        if len(points) > 1
    ]
    if not lines:
        return _nothing(say("runs.no_loss"))
    last = max(line.points[-1].step for line in lines)
    return _figure(lines, say("runs.overlay_spoken", names=", ".join(line.name for line in lines)), (0, last), None)


def smooth_line(points: tuple[StepPoint, ...], smoothing: float) -> tuple[StepPoint, ...]:
    averages = smoothed((point.value for point in points), smoothing)
    return tuple(StepPoint(p.step, average) for p, average in zip(points, averages, strict=True))


def _within(points: tuple[StepPoint, ...], window: Window) -> tuple[StepPoint, ...]:
    if window is None:
        return points
    return tuple(point for point in points if window[0] <= point.step <= window[1])


def _nothing(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _figure(
    lines: Sequence[Line],
    spoken: str,
    span: tuple[int, int],
    is_zoomed: bool | None,
    tooltips: tuple[tuple[StepPoint, ...], tuple[StepPoint, ...]] | None = None,
) -> str:
    # Nothing to zoom with where `is_zoomed` is None.
    first, last = span
    raw = [p.value for line in lines if line.kind == "raw" for p in line.points]
    steady = [p.value for line in lines if line.kind != "raw" for p in line.points]
    low, high, ticks = _axis(_visible_range(raw, steady))

    def x(step: int) -> float:
        return WIDTH * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return HEIGHT * (1 - (min(max(value, low), high) - low) / (high - low))

    drawn = "".join(_polyline(line, x, y) for line in lines)
    grid = "".join(f'<line x1="0" x2="{WIDTH:.0f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>' for tick in ticks)
    y_labels = "".join(f'<span style="top:{100 * y(tick) / HEIGHT:.1f}%">{_number(tick)}</span>' for tick in ticks)
    x_labels = "".join(
        f"<span>{'step ' if part == 0 else ''}{round(first + (last - first) * part / 4)}</span>" for part in range(5)
    )
    zoom = "whole" if is_zoomed else "latest"
    button = (
        ""
        if is_zoomed is None
        else (
            f'<button type="button" data-action="{zoom}" title="{escape(say("runs.zoom_help"))}">'
            f"{escape(say('runs.whole') if is_zoomed else say('runs.latest'))}</button>"
        )
    )
    key = "".join(f'<span class="key {line.kind}">{escape(line.name)}</span>' for line in lines if line.name)
    return (
        f'<figure class="plot" data-first="{first}" data-last="{last}"><div class="plot-y">{y_labels}</div>'
        f'<svg role="img" aria-label="{escape(spoken)}" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" '
        f'preserveAspectRatio="none"><g class="grid">{grid}</g>{drawn}'
        f"{_tooltips(*tooltips, x) if tooltips else ''}{''.join(_dots(line, x, y) for line in lines if line.has_dots)}"
        f'</svg><div class="plot-x">{x_labels}</div><figcaption>{key}{button}</figcaption></figure>'
    )


def _polyline(line: Line, x: Callable[[int], float], y: Callable[[float], float]) -> str:
    path = " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in line.points)
    return f'<polyline class="{line.kind}" points="{path}"/>'


def _dots(line: Line, x: Callable[[int], float], y: Callable[[float], float]) -> str:
    # Lines of no length: their round ends stay round where the chart is stretched.
    dots = "".join(
        f'<line class="{line.kind}" x1="{x(p.step):.1f}" x2="{x(p.step):.1f}" y1="{y(p.value):.1f}" '
        f'y2="{y(p.value):.1f}"><title>step {p.step}: {p.value:.4g} {escape(line.name)}</title></line>'
        for p in thinned(tuple(line.points), MAX_TOOLTIPS)
    )
    return f'<g class="dots">{dots}</g>'


def _tooltips(points: Sequence[StepPoint], averages: Sequence[StepPoint], x: Callable[[int], float]) -> str:
    """Invisible columns whose title a browser shows under the pointer."""
    shown = range(0, len(points), math.ceil(len(points) / MAX_TOOLTIPS))
    columns: list[str] = []
    for position, index in enumerate(shown):
        left = x(points[index].step)
        following = shown[position + 1] if position + 1 < len(shown) else None
        right = x(points[following].step) if following is not None else left + 8
        text = f"step {points[index].step}: {points[index].value:.4g}, {averages[index].value:.4g}"
        columns.append(
            f'<rect x="{left:.1f}" y="0" width="{max(right - left, 1):.1f}" height="{HEIGHT:.0f}">'
            f"<title>{text}</title></rect>"
        )
    return f'<g class="columns">{"".join(columns)}</g>'


def _visible_range(raw: list[float], bold: list[float]) -> tuple[float, float]:
    """All of the smoothed lines, and of the raw one what is not an outlier."""
    ordered = sorted(raw)
    ends = (
        [ordered[math.floor(0.01 * (len(ordered) - 1))], ordered[math.ceil(0.99 * (len(ordered) - 1))]] if raw else []
    )
    values = [*ends, *bold] or [0.0]
    return min(values), max(values)


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
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    # Short enough to stand beside a narrow chart, as 0.000125 would not.
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
