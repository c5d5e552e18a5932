"""Plots as SVG that stands in the page's text: the page's colours and fonts, the same bytes for the same results."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lmrepair.bench.report.figures import Group, groups
from lmrepair.bench.report.results import Result, by_group
from lmrepair.bench.report.tables import MATCH, PERCENT, SECONDS, drift_kinds, place
from lmrepair.errors import UsageError
from lmrepair.measure import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour until the SVG is made
COLOURS = ("#2f7ebc", "#d9772b", "#3d9970", "#b5539c", "#8a7433", "#c8504b", "#5d6fc4", "#6b9a2f", "#7d7d7d", "#1f9aa8",
           "#7a4a2a", "#2b2f77", "#d16aa0")  # fmt: skip
MARKERS = "osD^vP*XhH<>p"
WIDTH = 9.0  # inches


@dataclass(frozen=True)
class Plot:
    """An SVG and what it shows, in words."""

    svg: str
    caption: str


@contextmanager
def _style(name: str) -> Iterator[Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "the report needs matplotlib, which is not installed; pip install 'lmrepair[bench]'"
        ) from error
    settings: Any = {
        "svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5,
        "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.6, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
        "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.6, "lines.linewidth": 1.6,
        "axes.formatter.use_mathtext": False, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield Figure


def _svg(figure: Figure, name: str) -> str:
    """The figure's SVG: transparent, without date, its ids its own, its ink the text colour of the page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([^;\"]*?)'[^\"]*?(?=[;\"])", r"font: \1system-ui, sans-serif", text)
    size = re.search(r'<svg [^>]*?width="([\d.]+)pt"', text)
    wide = f'style="width:{float(size.group(1)) * 4 / 3:.0f}px"' if size else ""
    return re.sub(
        r'(<svg [^>]*?)height="[\d.]+pt"([^>]*?)width="[\d.]+pt"|<svg ', lambda m: _sized(m, wide), text, count=1
    )


def _sized(match: re.Match[str], wide: str) -> str:
    return f"{match.group(1) or '<svg '}{match.group(2) or ''}{wide} "


def _each(
    results: Sequence[Result], study: str, name: str, draw: Callable[[Axes, list[Group]], None], height: float = 3.0
) -> str | None:
    """One panel a task, side by side, with one legend below."""
    found = [(key, groups(members)) for key, members in by_group(results, study)]
    if not found:
        return None
    with _style(name) as make:
        columns = min(3, len(found))
        lines = -(-len(found) // columns)
        figure = make(figsize=(WIDTH * min(1.0, 0.2 + columns * 0.27), height * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(found) :]:
            axis.remove()
        for axis, (key, members) in zip(axes.flat, found, strict=False):
            axis.set_title(place(key))
            axis.grid(visible=True)
            draw(axis, members)
        handles: dict[str, Any] = {}
        for axis in axes.flat[: len(found)]:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
        return _svg(figure, name)


def _error(found: Interval, scale: float = 1.0) -> list[list[float]]:
    return [[max(0.0, found.mean - found.low) * scale], [max(0.0, found.high - found.mean) * scale]]


def pareto(results: Sequence[Result], effect_key: str, label: str, words: str, name: str) -> Plot | None:
    """Effect against side effect, the KL on the kind of text that changes most."""
    kinds = drift_kinds([result for result in results if result.study == "alone"])
    if not kinds or not any(effect_key in row.values for result in results for row in result.rows):
        return None
    key = f"drift.{kinds[0]}.kl"
    colours = _colours(results, "alone")

    def draw(axis: Axes, members: list[Group]) -> None:
        for group in members:
            effect, side = group.mean(effect_key), group.mean(key)
            if effect is None or side is None:
                continue
            axis.errorbar(
                [max(side.mean, 1e-7)], [effect.mean * PERCENT], xerr=_error(side), yerr=_error(effect, PERCENT),
                fmt=colours[group.name][1], color=colours[group.name][0], label=group.name, capsize=2, elinewidth=1,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda *_: "")
        axis.set_xlabel(f"KL on {kinds[0]} text, nats/token")
        axis.set_ylabel(label)

    svg = _each(results, "alone", name, draw)
    caption = (
        f"Effect against side effect, each failure repaired alone: {words} (higher is better) against the drift on "
        f"{kinds[0]} text (further left is better), with bootstrap intervals. A method that changes no weights has no "
        "drift and is not shown."
    )
    return Plot(svg, caption) if svg else None


def costs(results: Sequence[Result]) -> Plot | None:
    """Seconds a repair, as bars."""
    colours = _colours(results, "alone")

    def draw(axis: Axes, members: list[Group]) -> None:
        timed = [(group, mean) for group in members if (mean := group.mean(SECONDS.key)) is not None]
        for place_, (group, found) in enumerate(timed):
            axis.barh(place_, found.mean, xerr=_error(found), color=colours[group.name][0], height=0.7,
                      error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 2})  # fmt: skip
        axis.set_yticks(range(len(timed)), [group.name for group, _ in timed])
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(lambda *_: "")
        axis.set_xlabel("seconds a failure (log)")

    most = max((len(groups(members)) for _, members in by_group(results, "alone")), default=1)
    svg = _each(results, "alone", "costs", draw, height=0.9 + 0.28 * most)
    return Plot(svg, "Time of one repair, mean over failures with its bootstrap interval.") if svg else None


def curves(results: Sequence[Result], key: str, label: str, name: str, scale: float = 1.0) -> Plot | None:
    """A measure after k repairs one after another."""
    if not any(key in point for result in results for point in result.curve):
        return None
    colours = _colours(results, "cumulative")

    def draw(axis: Axes, members: list[Group]) -> None:
        for group in members:
            points = [point for point in group.first.curve if key in point]
            axis.plot([p["k"] for p in points], [p[key] * scale for p in points], color=colours[group.name][0],
                      marker=colours[group.name][1], markersize=4, label=group.name)  # fmt: skip
            if "joint." + key in group.first.whole:
                whole = group.first.whole
                axis.plot([whole["joint.k"]], [whole["joint." + key] * scale], color=colours[group.name][0], ls="none",
                          marker=colours[group.name][1], markersize=9, fillstyle="none")  # fmt: skip
        axis.set_xlabel("repairs so far")
        if key == "holding":
            axis.set_ylim(0, 105)
        axis.set_ylabel(label)

    svg = _each(results, "cumulative", name, draw, height=2.7)
    return (
        Plot(
            svg,
            f"{label[0].upper()}{label[1:]}, after so many repairs one after another. "
            "Large open marks: one solve of them all.",
        )
        if svg
        else None
    )


def heat_maps(results: Sequence[Result]) -> list[Plot]:
    """Sparsity: effect and side effect over shares of layers and of neurons, one figure a method and task."""
    kinds = drift_kinds([result for result in results if result.study == "sparsity"])
    measures = [(MATCH.key, "ExactMatch after, %", PERCENT, "viridis")]
    measures += [(f"drift.{kind}.kl", f"KL on {kind} text × 1000", 1000.0, "viridis_r") for kind in kinds[:1]]
    plots = []
    for number, (title, members) in enumerate(_maps(results).items()):
        layers = _rows(members)
        shares = sorted({result.settings.get("share", "1") for result in members}, key=_size)
        if len(layers) * len(shares) < 2:
            continue
        name = f"sparsity{number}"
        with _style(name) as make:
            figure = make(figsize=(1.6 + 3.4 * len(measures), 1.1 + 0.42 * len(layers)), layout="constrained")
            axes = figure.subplots(1, len(measures), squeeze=False)
            for axis, (key, label, scale, colours) in zip(axes.flat, measures, strict=True):
                _heat(axis, members, (layers, shares), key, scale, colours)
                axis.set_title(label)
            where = "shares of layers (down; even pattern unless another is named) and of neurons (across)"
            plots.append(Plot(_svg(figure, name), f"Sparsity, {title}: {where}."))
    return plots


def _maps(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for key, members in by_group(results, "sparsity"):
        for result in members:
            found.setdefault(f"{result.method} on {place(key)}", []).append(result)
    return found


def _rows(members: Sequence[Result]) -> list[str]:
    """Layers, with the pattern where it is not the even one; the smallest share first, a single layer before all."""
    values = {(_size(result.settings.get("layers", "1")), _pattern(result), _row_name(result)) for result in members}
    return [name for _, _, name in sorted(values, key=lambda value: (value[1] != "even", value[1], value[0], value[2]))]


def _row_name(result: Result) -> str:
    layers, pattern = result.settings.get("layers", "1"), _pattern(result)
    return layers if pattern == "even" else f"{layers}, {pattern}"


def _pattern(result: Result) -> str:
    return result.settings.get("pattern", "even")


def _size(share: str) -> Fraction:
    if share in ("one", "last"):
        return Fraction(0)
    return Fraction(1) if share == "auto" else Fraction(share.removeprefix("upper "))


def _heat(
    axis: Axes, members: list[Result], ends: tuple[list[str], list[str]], key: str, scale: float, name: str
) -> None:
    layers, shares = ends
    grid = [[float("nan")] * len(shares) for _ in layers]
    for group in groups(members):
        found = group.mean(key)
        if found is not None:
            settings = group.first.settings
            grid[layers.index(_row_name(group.first))][shares.index(settings.get("share", "1"))] = found.mean * scale
    values = [value for line in grid for value in line if value == value]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    axis.pcolormesh(grid, cmap=name, vmin=low, vmax=high, edgecolors="face", linewidth=0.2, alpha=0.9)
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            if value == value:
                share = (value - low) / (high - low)
                dark = share < 0.55 if name == "viridis" else share > 0.45
                text = f"{value:.1f}" if abs(value) >= 0.1 else f"{value:.2g}"
                axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8.5,
                          color="#ffffff" if dark else "#101010")  # fmt: skip
    axis.set_xticks([at + 0.5 for at in range(len(shares))], shares)
    axis.set_yticks([at + 0.5 for at in range(len(layers))], layers)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _colours(results: Sequence[Result], study: str) -> dict[str, tuple[str, str]]:
    """Colour and marker by the name of a group, the same in every panel."""
    names: dict[str, None] = {}
    for _, members in by_group(results, study):
        names.update(dict.fromkeys(group.name for group in groups(members)))
    return {name: (COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]) for at, name in enumerate(names)}
