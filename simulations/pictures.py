"""Pictures for reports, as SVG text that goes inline into a page."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#1f2a37", "#6b7280", "#e5e7eb"
COLOURS = ("#9ca3af", "#4b5563", "#0f766e", "#b45309", "#7c3aed")

_DASHES = ("-", "--", ":", "-.")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedward",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
}


def auc_by_hospital(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A dot a method, a row a hospital.

    Args:
        results: By method, metrics as in `metrics.json`.
    """
    sites = list(next(iter(results.values()))["sites"])
    figure, axes = _figure(6.6, (0.62 if len(results) > 1 else 0.34) * len(sites) + 1.1)
    rows = np.arange(len(sites))[::-1]
    for number, (method, result) in enumerate(results.items()):
        values = [result["sites"][site].get("auroc", np.nan) for site in sites]
        offset = 0.24 * (number - (len(results) - 1) / 2) / max(1, len(results) - 1)
        axes.scatter(
            values,
            rows - offset * 1.6,
            s=52,
            color=COLOURS[number % len(COLOURS)],
            label=method,
            zorder=3,
        )
    axes.set_yticks(rows, sites)
    axes.set_ylim(-0.6, len(sites) - 0.4)
    axes.set_xlabel("AUC on held-out patients")
    _frame(axes, "x")
    if len(results) > 1:
        figure.legend(
            loc="upper center", ncols=len(results), frameon=False, fontsize=9, handletextpad=0.1
        )
    return _svg(figure, "AUC by hospital and method")


def spread_of_hospitals(sites: Mapping[str, Mapping[str, float]]) -> str:
    """How many hospitals have which AUC and accuracy.

    Args:
        sites: By hospital, its metrics; a hospital with one class alone has no AUC.
    """
    figure, axes = _figure(6.6, 2.6)
    found = {
        label: [values[name] for values in sites.values() if name in values]
        for name, label in (("auroc", "AUC"), ("accuracy", "accuracy"))
    }
    known = [value for values in found.values() for value in values]
    edges = np.linspace(min(known, default=0.0), 1.0, 25)
    for number, (label, values) in enumerate(found.items()):
        if values:
            axes.hist(
                values,
                edges.tolist(),
                color=COLOURS[2 + number],
                alpha=0.6,
                label=f"{label}, {len(values)} hospitals",
            )
    axes.set_xlabel("on held-out patients")
    axes.set_ylabel("hospitals")
    _frame(axes, "y")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return _svg(figure, "AUC and accuracy of the hospitals")


def learning(curve: Sequence[Mapping[str, float]]) -> str:
    """AUC and accuracy of the global model by round."""
    figure, axes = _figure(6.6, 2.6)
    for number, (name, label) in enumerate((("auroc", "AUC"), ("accuracy", "accuracy"))):
        points = [(point["round"], point[name]) for point in curve if name in point]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[2 + number], label=label)
    axes.set_xlabel("rounds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("all held-out patients")
    _frame(axes, "y")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return _svg(figure, "AUC and accuracy by round")


def sweep(summary: Sequence[Mapping[str, Any]], *, axes: Sequence[str]) -> str:
    """AUC, or else accuracy, over the first axis, a line for each setting of the others."""
    figure, axis = _figure(6.6, 3.6)
    options = list(dict.fromkeys(row[axes[0]] for row in summary))
    measured = "AUC" if any("pooled.auroc" in row for row in summary) else "accuracy"
    name = "pooled.auroc" if measured == "AUC" else "pooled.accuracy"
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        lines.setdefault(", ".join(f"{row[axis]}" for axis in axes[1:]), []).append(row)
    for number, (label, rows) in enumerate(lines.items()):
        known = [row for row in rows if name in row]
        # Side by side, so that lines that agree are all seen.
        aside = 0.06 * (number - (len(lines) - 1) / 2)
        axis.errorbar(
            [options.index(row[axes[0]]) + aside for row in known],
            [row[name] for row in known],
            [row[f"{name} ±"] for row in known],
            color=COLOURS[(number + 2) % len(COLOURS)],
            linestyle=_DASHES[number // len(COLOURS) % len(_DASHES)],
            linewidth=1.3,
            marker="o",
            markersize=5,
            capsize=3,
            label=label or None,
        )
    seeds = max((row["seeds"] for row in summary), default=1)
    spread = f"mean and standard deviation of {seeds} seeds; " if seeds > 1 else ""
    axis.set_xticks(range(len(options)), [str(option) for option in options])
    axis.set_xlabel(f"{axes[0]}\n{spread}simulated, not private", linespacing=1.6)
    axis.set_ylabel(f"{measured}, all held-out patients")
    _frame(axis, "y")
    if len(lines) > 1:
        columns = min(4, len(lines))
        figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return _svg(figure, f"{measured} by {axes[0]}")


def calibration(histogram: Sequence[Sequence[float]], *, bins: int = 8) -> str:
    """Observed against predicted risk.

    Args:
        histogram: Counts by class (0, 1) and probability, on an even grid over [0, 1].
        bins: How many points to draw.
    """
    counts = np.asarray(histogram)
    centres = (np.arange(counts.shape[1]) + 0.5) / counts.shape[1]
    total = counts.sum(axis=0)
    edges = np.linspace(0, 1, bins + 1)
    figure, axes = _figure(3.5, 3.3)
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.5, zorder=1)
    for low, high in pairwise(edges):
        inside = (centres >= low) & (centres < high)
        number = total[inside].sum()
        if number <= 0:
            continue
        predicted = float((centres[inside] * total[inside]).sum() / number)
        observed = float(counts[1, inside].sum() / number)
        spread = 1.96 * np.sqrt(max(observed * (1 - observed), 0.02) / number)
        axes.errorbar(predicted, observed, spread, color=COLOURS[2], linewidth=1, zorder=2)
        axes.scatter(predicted, observed, s=20 + number * 0.6, color=COLOURS[2], zorder=3)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("predicted risk")
    axes.set_ylabel("observed share")
    _frame(axes, "both")
    return _svg(figure, "calibration")


def budget(rounds: Sequence[int], epsilon: Mapping[str, Sequence[float]], asked: float) -> str:
    """Epsilon spent after each round, by site, under the line of what was asked."""
    figure, axes = _figure(3.5, 3.3)
    axes.axhline(asked, color=COLOURS[3], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"asked {asked:g}", (rounds[0], asked), (2, -12), textcoords="offset points",
        color=COLOURS[3], fontsize=9,
    )  # fmt: skip
    for values in epsilon.values():
        axes.plot(rounds, values, color=COLOURS[2], linewidth=1.8, alpha=0.8)
    axes.set_ylim(0, asked * 1.12)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("epsilon spent")
    _frame(axes, "y")
    return _svg(figure, "epsilon by round")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _frame(axes: Axes, grid: str) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    if grid in {"x", "both"}:
        axes.xaxis.grid(visible=True, color=GRID)
    if grid in {"y", "both"}:
        axes.yaxis.grid(visible=True, color=GRID)


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', text, count=1)
