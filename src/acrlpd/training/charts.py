"""The charts of a report: plain numbers in, inline SVG out, in colours that follow the page's light or dark setting."""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_POINTS = 500  # points of one curve
MAX_PANELS = 7  # dimensions of actions in one chart

POLICIES = {
    "bc": ("imitation", "the flow alone, one sample a chunk"),
    "offline": ("offline", "the trained policy, after updates on prior data"),
    "online": ("online", "the trained policy, after its own episodes too"),
}
"""The evaluated policies: their name on the page, and what acted."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Result of one evaluation, with its Wilson 95 % interval."""

    step: int | None  # updates before it; None if only the summary is left
    env_steps: int | None
    success: float
    low: float
    high: float
    episodes: int

    @property
    def successes(self) -> int:
        return round(self.success * self.episodes)


class Chart(NamedTuple):
    title: str
    caption: str
    svg: str  # an element without URLs; its ids differ from those of other titles


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes: the quantity with its unit, and the metrics with their labels."""

    label: str
    metrics: Mapping[str, str]
    log: bool = False  # if all values are positive and span two decades
    hide_zero: bool = False  # hide a loss that is not in use


@dataclasses.dataclass(frozen=True)
class Curves:
    """A chart of panels, one below the other, over the same updates."""

    title: str
    caption: str
    panels: tuple[Panel, ...]


CURVES = (
    Curves(
        "Value",
        "Q of the data's chunks, and the target it is fitted to. Above the best return that is possible, the critic "
        "overestimates. With an implicit target, V and the advantage Q − V.",
        (
            Panel("discounted return", {"q_mean": "Q", "target_q_mean": "TD target"}),
            Panel("discounted return", {"v_mean": "V", "advantage_mean": "Q − V"}),
        ),
    ),
    Curves(
        "Entropy and temperature",
        "Entropy of the candidate chunks, and the temperature that answers to it.",
        (
            Panel("entropy (nats)", {"entropy_estimate": "entropy"}),
            Panel("temperature", {"alpha_value": "temperature"}, log=True),
        ),
    ),
    Curves(
        "Losses",
        "Critic: squared TD error. Imitation: squared error of the flow's velocity. Actor, if in use: Q, normalized.",
        (
            Panel("critic (return²)", {"critic_loss": "critic"}, log=True),
            Panel("imitation", {"bc_loss": "imitation"}, log=True),
            Panel("actor", {"actor_loss": "actor"}, hide_zero=True),
        ),
    ),
    Curves(
        "Disagreement",
        "Variance of Q among the critics on one chunk, and among the candidate chunks of one observation: what best of "
        "N can choose from.",
        (
            Panel("critics (return²)", {"q_ensemble_variance": "critics"}, log=True),
            Panel("candidates (return²)", {"best_of_n_variance": "candidates"}, log=True),
        ),
    ),
)

INK, FAINT, ORANGE, PURPLE, BLUE = "#010203", "#040506", "#0a0b01", "#0a0b02", "#0a0b03"
CSS_COLOURS = {INK: "ink", FAINT: "faint", ORANGE: "orange", PURPLE: "purple", BLUE: "blue"}
"""Placeholder colours that matplotlib writes, and the variables of the page's style that replace them."""

POLICY_STYLES = {"bc": ("D", ORANGE), "offline": ("s", PURPLE), "online": ("o", BLUE)}
"""Markers and colours: policies can be told apart without colours, too."""

CHART_WIDTH = 5.0  # inches of 72 units, so that text keeps its size in one column of a phone and two of a laptop
CHART_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def results(last: Mapping[str, Evaluated]) -> Chart:
    """Draw the last evaluation of every policy."""
    return _chart(
        "Success by policy",
        "Points are success rates, bars Wilson 95 % intervals. Every policy met the same seeds.",
        lambda figure: _draw_results(figure, last),
        height=1.7,
    )


def learning(evaluations: Mapping[str, Sequence[Evaluated]], boundary: int | None) -> Chart:
    """Draw success over updates; ``boundary`` is the update at which online training began."""
    caption = "Each point is one evaluation, its bar the Wilson 95 % interval."
    if "bc" in evaluations:
        caption += " Imitation is drawn a little to the left of its update."
    if boundary is not None:
        caption += " Online training began at the dashed line."
    return _chart("Success while training", caption, lambda figure: _draw_learning(figure, evaluations, boundary))


def calibration(bins: Sequence[Mapping[str, float]]) -> Chart:
    """Draw achieved return over Q, in bins of equally many chunks."""
    return _chart(
        "Calibration of Q",
        "Each point is a tenth of the executed chunks, by rising Q: their mean Q, and the discounted return that "
        "followed. On the dashed line the critic is right; below it, it overestimates.",
        lambda figure: _draw_calibration(figure, bins),
    )


def held_out(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the action error on held-out episodes over updates, beside the better baseline."""
    caption = "Error of the executed steps, in units of the spread of the data's actions; dashed: the better baseline."

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        steps = [record["step"] for record in records]
        axes.plot(steps, [record["eval/action_error"] for record in records], color=BLUE, marker="o")
        baseline = [record["eval/action_error_baseline"] for record in records]
        axes.plot(steps, baseline, color=FAINT, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("action error")
        _finish_updates(axes, None)

    return _chart("Action error on held-out episodes", caption, draw)


def by_step(errors: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Chart:
    """Draw the action error of each predictor by the step of the chunk."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        styles = {"best": (BLUE, "-"), "sample": (ORANGE, "--"), "repeat": (PURPLE, "-."), "mean": (FAINT, ":")}
        for name, each in errors.items():
            colour, line = styles[name]
            steps = range(1, len(each["steps"]) + 1)
            axes.plot(steps, each["steps"], color=colour, linestyle=line, marker=".", label=names[name])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step of the chunk")
        axes.set_ylabel("action error")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)

    return _chart("Action error by step of the chunk", "A policy that looks ahead stays below both baselines.", draw)


def actions(recorded: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]]) -> Chart:
    """Draw predicted and recorded actions of one episode, a panel for each of the dimensions that move most."""
    one, other = np.asarray(recorded, np.float64), np.asarray(predicted, np.float64)
    shown = np.sort(np.argsort(-one.std(axis=0), kind="stable")[:MAX_PANELS])

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        for axes, dim in zip(all_axes, shown.tolist(), strict=True):
            axes.plot(one[:, dim], color=INK, label="recorded")
            axes.plot(other[:, dim], color=BLUE, linestyle="--", label="predicted")
            axes.set_ylabel(f"action {dim}")
        all_axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        all_axes[-1].set_xlabel("step")
        figure.align_ylabels()

    caption = (
        "One held-out episode, in the robot's units. Each chunk is predicted from what was recorded at its first step."
    )
    return _chart("Predicted and recorded actions", caption, draw, height=1.1 * len(shown) + 0.6)


def curves(what: Curves, records: Sequence[Mapping[str, Any]], boundary: int | None) -> Chart | None:
    """Draw ``train/`` metrics over updates; None if the records hold none of them."""
    panels = [(panel, series) for panel in what.panels if (series := _panel_series(panel, records))]
    if not panels:
        return None

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (panel, series) in zip(all_axes, panels, strict=True):
            _draw_panel(axes, panel, series)
            _finish_updates(axes, boundary, label=axes is all_axes[-1])
        figure.align_ylabels()

    broken = max(sum(not math.isfinite(y) for y in values) for _, series in panels for _, values in series.values())
    caption = what.caption
    if len(records) > MAX_POINTS:
        caption += f" {MAX_POINTS} of {len(records):,} points, evenly spaced."
    if broken:
        caption += f" Not finite and left out: up to {broken} of a curve's points."
    return _chart(what.title, caption, draw, height=2.9 if len(panels) < 2 else 1.5 * len(panels) + 0.4)


def _chart(title: str, caption: str, draw: Callable[[Any], None], *, height: float = 2.9) -> Chart:
    """Return a chart; ``draw`` gets an empty matplotlib figure, ``height`` inches high."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the charts of a report need matplotlib: pip install 'acrlpd[report]'") from error
    written = io.StringIO()
    with style.context(["default", CHART_STYLE | {"svg.hashsalt": title}]):  # the salt: ids differ between charts
        figure = Figure(figsize=(CHART_WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(written, format="svg", metadata={"Date": None})
    return Chart(title, caption, _inline_svg(written.getvalue(), title))


def _inline_svg(text: str, label: str) -> str:
    """Return matplotlib's file as an element of a page: no header, no URLs, no repeated ids, the page's colours."""
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox"
    inner = text[text.index(">", box.end()) + 1 :]
    inner = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    for colour, name in CSS_COLOURS.items():
        inner = inner.replace(colour, f"var(--{name})")
    return f'<svg {box[0]} role="img" aria-label="{html.escape(label)}">{inner}'


def _draw_results(figure: Any, last: Mapping[str, Evaluated]) -> None:
    axes = figure.subplots()
    for place, (name, result) in enumerate(last.items()):
        marker, colour = POLICY_STYLES[name]
        axes.plot([100 * result.low, 100 * result.high], [place, place], color=colour, linewidth=3, alpha=0.5)
        axes.plot([100 * result.success], [place], marker=marker, color=colour, markersize=7)
    axes.set_yticks(range(len(last)), [POLICIES[name][0] for name in last])
    axes.set_ylim(len(last) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("success rate (%)")


def _draw_learning(figure: Any, evaluations: Mapping[str, Sequence[Evaluated]], boundary: int | None) -> None:
    from matplotlib.transforms import ScaledTranslation

    axes = figure.subplots()
    aside = axes.transData + ScaledTranslation(-5 / 72, 0, figure.dpi_scale_trans)  # same update as the offline policy
    for name, points in evaluations.items():
        marker, colour = POLICY_STYLES[name]
        place = {"color": colour, "transform": aside if name == "bc" else axes.transData}
        steps = [each.step for each in points]
        rates = [100 * each.success for each in points]
        axes.vlines(steps, [100 * p.low for p in points], [100 * p.high for p in points], alpha=0.5, **place)
        axes.plot(steps, rates, marker=marker, label=POLICIES[name][0], zorder=3, **place)
    axes.set_ylim(-2, 102)
    axes.set_xlim(left=0)
    axes.set_ylabel("success rate (%)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    _finish_updates(axes, boundary)


def _draw_calibration(figure: Any, bins: Sequence[Mapping[str, float]]) -> None:
    axes = figure.subplots()
    q, returns = [each["q"] for each in bins], [each["returns"] for each in bins]
    ends = [min(q + returns), max(q + returns)]
    axes.plot(ends, ends, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
    axes.plot(q, returns, color=BLUE, marker="o")
    axes.set_xlabel("Q of the chosen chunks")
    axes.set_ylabel("discounted return")


Series = tuple[list[int], list[float]]  # updates, values


def _panel_series(panel: Panel, records: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Return thinned curves by label; a value that is not finite becomes NaN."""
    series: dict[str, Series] = {}
    for metric, label in panel.metrics.items():
        points = [(record["step"], record.get(f"train/{metric}")) for record in records]
        known = [(step, _finite(value)) for step, value in points if isinstance(value, (int, float))]
        if known and not (panel.hide_zero and all(value == 0 for _, value in known)):
            kept = thin(known, MAX_POINTS)
            series[label] = [step for step, _ in kept], [value for _, value in kept]
    return series


def thin(points: Sequence[Any], limit: int) -> list[Any]:
    """Return at most ``limit`` of the points, evenly spaced, including the first and the last."""
    if len(points) <= limit:
        return list(points)
    return [points[index] for index in np.linspace(0, len(points) - 1, limit).round().astype(int)]


def _draw_panel(axes: Any, panel: Panel, series: Mapping[str, Series]) -> None:
    for (label, (steps, values)), colour, line in zip(series.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
        alone = len(values) == 1  # a line needs two points
        axes.plot(steps, values, color=colour, linestyle=line, label=label, marker="o" if alone else None)
    finite = [value for _, values in series.values() for value in values if math.isfinite(value)]
    log = panel.log and finite and min(finite) > 0 and max(finite) > 100 * min(finite)
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(f"{panel.label}, log" if log else panel.label)
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _finish_updates(axes: Any, boundary: int | None, *, label: bool = True) -> None:
    """Set up the horizontal axis of a chart over updates."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if boundary is not None:
        axes.axvline(boundary, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if label:
        axes.set_xlabel("updates")


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan
