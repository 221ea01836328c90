"""Style of the figures and their export, as SVG that follows the reader's light or dark scheme, or as PNG.

Figures are drawn in the colours of the light scheme; `svg` replaces each of them by a CSS variable that the page
defines. Text stays text. The order of the series' colours keeps neighbours distinguishable under common colour vision
deficiencies.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

WIDTH, NARROW = 7.4, 4.2
"""Width of every figure in inches, on a page of full width and on a phone."""

_width: ContextVar[float] = ContextVar("width", default=WIDTH)

LIGHT = {
    "ink": "#1c2430",
    "muted": "#5d6877",
    "grid": "#dde2e8",
    "surface": "#fcfcfb",
    "series-1": "#2a78d6",
    "series-2": "#eb6834",
    "series-3": "#1baf7a",
    "series-4": "#4a3aa7",
    "series-5": "#e87ba4",
    "series-6": "#b87700",
}
"""Colours of the light scheme, by name of the CSS variable."""

DARK = {
    "ink": "#e8ebf0",
    "muted": "#a0a9b6",
    "grid": "#333a44",
    "surface": "#171a1f",
    "series-1": "#4c95ee",
    "series-2": "#e5713f",
    "series-3": "#22a878",
    "series-4": "#9d92f2",
    "series-5": "#d5628c",
    "series-6": "#c98d10",
}
"""Colours of the dark scheme, by name of the CSS variable."""

_STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # class names come from users and may contain "$"
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["grid"],
    "axes.facecolor": "none",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["grid"],
    "ytick.color": LIGHT["grid"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "legend.frameon": False,
    "lines.linewidth": 2,
}
_LOCK = threading.RLock()  # matplotlib's settings are global to the process, and the tracker draws in a thread


@contextmanager
def figure_width(inches: float) -> Iterator[None]:
    """Draw figures of this width, `WIDTH` or `NARROW`, while the block lasts."""
    token = _width.set(inches)
    try:
        yield
    finally:
        _width.reset(token)


def is_narrow() -> bool:
    """Return whether figures are drawn for a phone."""
    return _width.get() < WIDTH


def new_figure(height: float) -> Figure:
    """Return an empty figure of the width that `figure_width` has set; ``height`` is in inches."""
    return Figure(figsize=(_width.get(), height), layout="constrained")


def add_legend(figure: Figure, handles: Sequence[Artist] | None = None, columns: int = 3) -> None:
    """Put a legend above the axes, in as many columns as fit the width.

    Args:
        figure: without a legend.
        handles: what is explained; None: whatever has a label.
        columns: at most.
    """
    handles = figure.axes[0].get_legend_handles_labels()[0] if handles is None else handles
    lengths = [len(str(handle.get_label())) for handle in handles]

    def width(columns: int) -> float:
        rows = -(-len(lengths) // columns)
        longest = [max(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
        return sum(_HANDLE + _LETTER * length for length in longest)

    fitting = [number for number in range(1, columns + 1) if width(number) <= _width.get()]
    figure.legend(handles=list(handles), loc="outside upper left", ncols=max(fitting, default=1), borderpad=0.3)


_HANDLE, _LETTER = 0.64, 0.078
"""Inches of a legend's line with its gaps, and of a letter."""


def accuracy_axis(axes: Axes) -> None:
    """Show accuracies on the vertical axis: in percent, with grid lines."""
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.set_ylabel("accuracy")


def add_hint(axes: Axes, x: float, y: float, text: str) -> None:
    """Show a text while the pointer is over a point, in figures for screens that have one."""
    if not is_narrow():
        axes.plot([x], [y], "o", ms=10, alpha=0, zorder=10, gid=f"{_HINT}{text}")


_HINT = "hint:"
"""Beginning of the identifiers of marks that `svg` turns into hints."""


@contextmanager
def style(**extra: Any) -> Iterator[None]:
    """Apply the style while the block lasts.

    Args:
        extra: further settings of matplotlib.
    """
    settings: Any = _STYLE | extra
    with _LOCK, warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.filterwarnings("ignore", "Glyph")  # a glyph may be missing here that the reader's font has
        yield


def svg(figure: Figure, name: str, description: str) -> str:
    """Export a figure as an ``<svg>`` element, for a page that defines the CSS variables ``--ink``, ``--series-1``, ...

    Args:
        figure: the figure.
        name: unique name within the page; makes the identifiers in the element unique and reproducible.
        description: alternative text, for screen readers.
    """
    buffer = io.StringIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with style(**{"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r'\s(width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", head)
    body = re.sub(f'<g id="{_HINT}(.*?)">', r"<g><title>\1</title>", body)
    for variable, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'{head} role="img" aria-label="{escape(description)}">{body.replace("xlink:href", "href")}'


def png(figure: Figure) -> bytes:
    """Export a figure as a PNG file with the light background."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=130, facecolor=LIGHT["surface"])
    return buffer.getvalue()
