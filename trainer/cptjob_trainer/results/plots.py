"""The plots of a run as inline SVG: text stays text, colours are the page's, the bytes are stable."""

import io
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cptjob_trainer.results.record import ROLES, Column, Record, SourceRecord, Steps
from cptjob_trainer.words import counted

#: Points of a line at most; longer ones keep the lowest and the highest of each stretch.
MOST_POINTS = 1500
#: The smoothing's window, as a share of the run; shorter runs are drawn point by point.
_SMOOTHED_SHARE = 1 / 50
_SMOOTHED_FROM = 20
_STRETCHES = 30
#: Sources with a colour of their own; the rest is one.
MOST_SOURCES = 7
#: A highest value so many times the median is read on a logarithmic axis.
_LOGARITHMIC_FROM = 20.0

# Inches, and points of text: a figure is 425 units wide, near its size on a phone.
_SIZE = (5.9, 3.1)
_TEXT = 11
# Ticks at multiples that a person counts in.
_TICKS = [1, 2, 2.5, 5, 10]

# Stand-ins which are replaced by variables of the page's style sheet, so that one drawing serves
# the light and the dark scheme.
_COLOURS = {"ink": "#010001", "grid": "#010002"} | {f"c{n}": f"#0200{n:02x}" for n in range(1, 9)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": _TEXT,
    "text.color": _COLOURS["ink"],
    "text.parse_math": False,
    "axes.edgecolor": _COLOURS["grid"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": _COLOURS["grid"],
    "ytick.color": _COLOURS["grid"],
    "xtick.labelcolor": _COLOURS["ink"],
    "ytick.labelcolor": _COLOURS["ink"],
    "ytick.left": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Key:
    """A line of a legend. `mark` is line, thin, dashed, area or cross."""

    label: str
    colour: str
    mark: str


@dataclass(frozen=True)
class Plot:
    """A drawing and what is written around it. `svg` is markup; everything else is plain text."""

    name: str
    title: str
    note: str
    keys: tuple[Key, ...]
    svg: str


def plots(record: Record) -> list[Plot]:
    """What there is to draw, in the order of the page."""
    if not len(record.steps):
        return []
    with matplotlib.rc_context():
        # A person's own matplotlibrc must not change the page.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        drawn = [
            _loss(record.steps),
            _held_out(record),
            _learning_rate(record.steps),
            _gradient_norm(record.steps),
            _speed(record.steps),
            _shares(record),
            _mix(record),
        ]
    return [plot for plot in drawn if plot is not None]


# --- one function a plot --------------------------------------------------------------------------


def _loss(steps: Steps) -> Plot:
    figure, axes = _axes(steps)
    keys = _line(axes, steps.step, steps.loss, "c1", "of each step")
    return _plot(
        "loss",
        "Loss",
        "Training loss, nats per token.",
        keys,
        figure,
        _story("loss", steps.step, steps.loss),
    )


def _held_out(record: Record) -> Plot | None:
    lines = {role: record.differences(role) for role in ROLES}
    lines = {role: line for role, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    figure, axes = _axes(record.steps, first=0)
    axes.axhline(0, color=_COLOURS["ink"], linewidth=0.9)
    keys, stories = [], []
    for colour, mark, role in (("c1", "line", "Domain"), ("c2", "dashed", "General")):
        if role not in lines:
            continue
        x, y = (np.array(values, dtype=np.float64) for values in zip(*lines[role], strict=True))
        few = len(x) <= 40
        x, y = thin(x, y)
        axes.plot(
            x,
            y,
            color=_COLOURS[colour],
            linestyle="--" if mark == "dashed" else "-",
            marker="o" if few else "",
            markersize=3.5,
        )
        keys.append(Key(f"{role} text", colour, mark))
        stories.append(f"{role} text: {y[-1]:+.4f} at step {x[-1]:.0f}, best {y.min():+.4f}")
    return _plot(
        "heldout",
        "Held-out loss against the base model",
        "Difference, nats per token. Below zero is better than the base model; general text above "
        "zero is forgetting.",
        keys,
        figure,
        "; ".join(stories) + ".",
    )


def _learning_rate(steps: Steps) -> Plot:
    figure, axes = _axes(steps)
    x, y = thin(steps.step, steps.learning_rate)
    axes.plot(x, y, color=_COLOURS["c1"])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    return _plot(
        "rate",
        "Learning rate",
        "As the schedule set it.",
        [],
        figure,
        _story("learning rate", steps.step, steps.learning_rate, scientific),
    )


def _gradient_norm(steps: Steps) -> Plot:
    figure, axes = _axes(steps)
    norm = np.where(steps.grad_norm > 0, steps.grad_norm, np.nan)
    keys = _line(axes, steps.step, norm, "c1", "of each step")
    known = norm[~np.isnan(norm)]
    if len(known) and known.max() > _LOGARITHMIC_FROM * np.median(known):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    else:
        axes.set_ylim(bottom=0)
    skipped = steps.step[steps.skipped]
    if len(skipped):
        shown = skipped[:: math.ceil(len(skipped) / MOST_POINTS)]
        axes.plot(
            shown,
            np.full(len(shown), 0.97),
            transform=axes.get_xaxis_transform(),
            color=_COLOURS["c4"],
            linestyle="",
            marker="x",
            markersize=6,
            markeredgewidth=1.6,
        )
        keys.append(Key("update skipped, not finite", "c4", "cross"))
    story = _story("gradient norm", steps.step, norm)
    return _plot(
        "norm",
        "Gradient norm",
        "Before clipping.",
        keys,
        figure,
        f"{story} {counted(len(skipped), 'step was', 'steps were')} skipped.",
    )


def _speed(steps: Steps) -> Plot:
    figure, axes = _axes(steps)
    keys = _line(axes, steps.step, steps.tokens_per_second, "c1", "of each step")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return _plot(
        "speed",
        "Tokens per second",
        "All processes together, waiting for data included.",
        keys,
        figure,
        _story("tokens per second", steps.step, steps.tokens_per_second, short),
    )


def _shares(record: Record) -> Plot:
    steps = record.steps
    figure, axes = _axes(steps)
    waiting, padding, note = data_wait_share(steps), steps.padding, ""
    if steps.step[-1] == record.total_steps and padding[-1] > 0.01 + np.nanmax(
        padding[:-1], initial=0.0
    ):
        # Drawn, it would leave a flat line of everything before it.
        note = f" Without the last step, whose batch is filled up: {_percent(padding[-1])} padding."
        padding = np.append(padding[:-1], np.nan)
    parts = (("c1", "", "waiting for data", waiting), ("c2", "--", "padding", padding))
    keys, stories = [], []
    for colour, style, label, share in parts:
        mean = smooth(share)
        x, y = thin(steps.step, 100 * mean)
        axes.plot(x, y, color=_COLOURS[colour], linestyle=style or "-")
        keys.append(Key(label, colour, "dashed" if style else "line"))
        stories.append(f"{label}: {_percent(_mean(share))} on average")
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] < 1:
        axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    return _plot(
        "waste",
        "Waiting and padding",
        "Share of the time that waits for data, and of the row slots that hold padding; smoothed."
        + note,
        keys,
        figure,
        "; ".join(stories) + ".",
    )


def _mix(record: Record) -> Plot | None:
    """Stacked shares of the sources; nothing is to be seen with one."""
    steps = record.steps
    sources = sorted(record.sources, key=lambda source: -source.trained_tokens)
    sources = [source for source in sources if source.name in steps.by_source]
    if len(sources) < 2:
        return None
    starts = np.unique(np.linspace(0, len(steps), min(_STRETCHES, len(steps)) + 1).astype(int))[:-1]
    rows, keys, asked = _stack(steps, sources, starts)
    total = rows.sum(axis=0)
    tops = np.cumsum(100 * rows / np.where(total > 0, total, np.nan), axis=0)
    figure, axes = _axes(steps)
    edges = np.append(steps.step[starts] - 1, steps.step[-1])
    x = np.repeat(edges, 2)[1:-1]
    below = np.zeros(len(x))
    for key, top in zip(keys, tops, strict=True):
        above = np.repeat(top, 2)
        axes.fill_between(x, below, above, color=_COLOURS[key.colour], linewidth=0)
        below = above
    if asked is not None:
        for top in np.cumsum(100 * asked)[:-1]:
            axes.axhline(float(top), color=_COLOURS["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
        keys.append(Key("asked for", "ink", "dashed"))
    axes.set_ylim(0, 100)
    axes.grid(visible=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    return _plot(
        "mix",
        "Tokens by source",
        "Share of the tokens trained, and the mix that was asked for.",
        keys,
        figure,
        f"Shares of {len(sources)} sources over the steps; the table of sources has the numbers.",
    )


def _stack(
    steps: Steps,
    sources: Sequence[SourceRecord],
    starts: "np.ndarray[tuple[int], np.dtype[np.int_]]",
) -> tuple["np.ndarray[tuple[int, int], np.dtype[np.float64]]", list[Key], Column | None]:
    """(tokens [layers, stretches], legend, asked share of each layer or None), small ones in one."""
    own = list(sources) if len(sources) <= MOST_SOURCES + 1 else list(sources[:MOST_SOURCES])
    rest = sources[len(own) :]
    layers = [[source] for source in own] + ([list(rest)] if rest else [])
    rows = np.array(
        [
            sum(np.add.reduceat(steps.by_source[source.name], starts) for source in layer)
            for layer in layers
        ]
    )
    labels = [source.name for source in own] + ([f"{len(rest)} others"] if rest else [])
    keys = [Key(label, f"c{at + 1}", "area") for at, label in enumerate(labels)]
    shares = [source.asked_share for source in sources]
    if any(share is None for share in shares):
        return rows, keys, None
    asked = np.array([sum(source.asked_share or 0.0 for source in layer) for layer in layers])
    return rows, keys, asked


# --- numbers --------------------------------------------------------------------------------------


def thin(x: Column, y: Column, most: int = MOST_POINTS) -> tuple[Column, Column]:
    """At most `most` points: the lowest and the highest of each stretch, and both ends."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    edges = np.linspace(0, len(x), (most - 2) // 2 + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        part = y[start:end]
        if np.isnan(part).all():
            kept.add(int(start))  # a gap stays a gap
        else:
            kept |= {int(start + np.nanargmin(part)), int(start + np.nanargmax(part))}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def smooth(values: Column) -> Column:
    """Mean over a window around each element, smaller at the ends; NaNs are left out of it."""
    if len(values) < _SMOOTHED_FROM:
        return values
    half = max(2, int(len(values) * _SMOOTHED_SHARE / 2))
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    count = counts[high] - counts[low]
    mean = (sums[high] - sums[low]) / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)


def data_wait_share(steps: Steps) -> Column:
    """Share of each step's time that waits for data."""
    whole = steps.seconds + steps.data_wait
    return steps.data_wait / np.where(whole > 0, whole, np.nan)


def short(value: float) -> str:
    """A number for an axis or a tile: 9500, 12k, 3.4M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if unit == "k" else size
            return f"{value / scale:.3g}{unit}" if abs(value) < 1e3 * scale else f"{value:.3g}"
    return f"{value:.4g}"


def scientific(value: float) -> str:
    """2e-5 rather than 2e-05."""
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", f"{value:.3g}").replace("e+", "e")


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{100 * share:.2g} %"


def _mean(values: Column) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _story(
    what: str, x: Column, y: Column, written: Callable[[float], str] = lambda value: f"{value:.4g}"
) -> str:
    """A line in words, for those who do not see it."""
    known = ~np.isnan(y)
    if not known.any():
        return f"No {what} is known."
    x, y = x[known], y[known]
    low, high = int(np.argmin(y)), int(np.argmax(y))
    return (
        f"The {what} is {written(y[0])} at step {x[0]:.0f} and {written(y[-1])} at step {x[-1]:.0f}; "
        f"lowest {written(y[low])} at step {x[low]:.0f}, highest {written(y[high])} at step "
        f"{x[high]:.0f}."
    )


# --- drawing --------------------------------------------------------------------------------------


def _axes(steps: Steps, first: float | None = None) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_xlabel("step")
    start, end = steps.step[0] if first is None else first, steps.step[-1]
    edge = 0.01 * max(end - start, 1.0)
    axes.set_xlim(start - edge, end + edge)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_TICKS))
    axes.grid(visible=False, axis="x")
    return figure, axes


def _line(axes: Axes, x: Column, y: Column, colour: str, label: str) -> list[Key]:
    """A thin line of the values and a thick one of their mean; only a thick one of a few values."""
    if len(x) < _SMOOTHED_FROM:
        axes.plot(x, y, color=_COLOURS[colour], marker="o", markersize=3.5)
        return []
    # So many points that they fill an area would hide the mean in it.
    alpha = 0.5 if len(x) <= MOST_POINTS / 2 else 0.3
    axes.plot(*thin(x, y), color=_COLOURS[colour], linewidth=0.8, alpha=alpha)
    axes.plot(*thin(x, smooth(y)), color=_COLOURS[colour])
    return [Key(label, colour, "thin"), Key("smoothed", colour, "line")]


def _plot(
    name: str, title: str, note: str, keys: Sequence[Key], figure: Figure, story: str
) -> Plot:
    file = io.StringIO()
    # The salt keeps the ids of two drawings on one page apart, and the same from run to run.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name, title, note, tuple(keys), _inline(file.getvalue(), name, title, story))


def _inline(text: str, name: str, title: str, story: str) -> str:
    """An SVG document as an element of the page: named, described, coloured by the page."""
    root = ElementTree.fromstring(text)
    _clean(root, name, set(re.findall(r'["(]#([\w-]+)', text)))
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-story",
    }
    for at, (tag, content) in enumerate((("title", title), ("desc", story))):
        element = ElementTree.Element(tag, id=f"{name}-{'story' if at else 'title'}")
        element.text = content
        root.insert(at, element)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, name: str, referred: set[str]) -> None:
    """Drop what a page has no use for, and make the rest belong to the page."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if attributes.get("id") not in referred:
        attributes.pop("id", None)
    element.attrib = {key: _recolour(value) for key, value in attributes.items()}
    element.text = element.text and element.text.strip()
    element.tail = None
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            element.remove(child)
        else:
            _clean(child, name, referred)


def _recolour(value: str) -> str:
    for colour, stand_in in _COLOURS.items():
        value = value.replace(stand_in, f"var(--{colour})")
    return value
