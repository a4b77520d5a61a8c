"""What the figures share: the results they are drawn from, colours, and saving with the same bytes every time."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from vdbench import outputs
from vdbench.config import Experiment
from vdbench.records import Record, atomic_write, run_folder

DPI = 100
PALETTE = [to_hex(colour) for colour in seaborn.color_palette("colorblind")]
COLOURS = dict(zip(outputs.METHODS, [PALETTE[i] for i in (7, 0, 3, 2, 1)], strict=True))
MARKERS = dict(zip(outputs.METHODS, "osD^v", strict=True))
REMOVED = "#d9d9d9"


class NoData(Exception):
    """There is nothing to draw; the message says why."""


@dataclass(frozen=True)
class View:
    """One experiment as one source has it. `folder` is the results folder with the files beside the records."""

    name: str
    title: str
    experiment: Experiment
    source: str
    records: Sequence[Record]
    folder: Path | None

    @property
    def error_label(self) -> str:
        unit = " (%)" if outputs.error_unit(self.experiment) else ""
        return f"{outputs.error_name(self.experiment).capitalize()}{unit}"

    def of(self, stage: str, methods: Sequence[str] | None = None) -> list[Record]:
        """Records of one stage of finished runs, in the order of the methods."""
        order = [m for m in self.experiment.present_methods() if methods is None or m in methods]
        ok = [r for r in self.records if r.stage == stage and r.status == "ok" and r.method in order]
        return sorted(ok, key=lambda r: (order.index(r.method), r.seed))  # type: ignore[arg-type]

    def file(self, record: Record, name: str) -> Path | None:
        """A file beside a record, None where it is not there."""
        path = run_folder(self.folder, *record.run) / name if self.folder else None
        return path if path and path.is_file() else None


@dataclass(frozen=True)
class Timed:
    """A net or layer, trained or not, as one source has timed it: one record for each of its pruned states."""

    name: str
    title: str
    source: str
    records: Sequence[Record]


@contextmanager
def context() -> Iterator[None]:
    """Settings under which figures are drawn and saved."""
    settings: Mapping[str, object] = {
        **seaborn.axes_style("whitegrid"),
        **seaborn.plotting_context("notebook", font_scale=0.85),
        "grid.color": "#e8e8e8",
        "axes.edgecolor": "#808080",
        "legend.frameon": False,
        "figure.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.08,
        "figure.constrained_layout.w_pad": 0.08,
        "svg.hashsalt": "vdbench",
        "svg.fonttype": "none",  # text that can be searched, in a fifth of the bytes
    }
    with matplotlib.rc_context(dict(settings)):  # type: ignore[arg-type]
        yield


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """PNG and SVG; the same figure gives the same bytes."""
    paths = []
    for extension in outputs.FIGURE_FORMATS:
        path = folder / f"{stem}.{extension}"
        drawn = io.BytesIO()
        figure.savefig(drawn, format=extension, dpi=DPI, metadata={"Date": None} if extension == "svg" else {})
        with atomic_write(path) as temporary:
            temporary.write_bytes(_with_a_palette(drawn) if extension == "png" else drawn.getvalue())
        figure.set_layout_engine("none")  # what the first format arranged holds for the next
        paths.append(path)
    return paths


def _with_a_palette(png: io.BytesIO) -> bytes:
    """A picture of 64 colours at most, in less than a third of the bytes: it is kept in the history of the project. By
    median cut, which is Pillow's own choice, the few pixels of a marker would take the colour of others."""
    smaller = io.BytesIO()
    picture = Image.open(png, formats=["PNG"]).convert("RGB")
    picture = picture.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def empty(stem: str, why: str) -> Figure:
    figure = Figure(figsize=(7, 2))
    figure.text(0.5, 0.6, stem, ha="center", va="center", fontsize=12)
    figure.text(0.5, 0.35, f"no data: {why}", ha="center", va="center", wrap=True)
    return figure


def method_handles(methods: Sequence[str], **style: object) -> list[Line2D]:
    return [Line2D([], [], color=COLOURS[m], label=outputs.METHODS[m], **style) for m in methods]  # type: ignore[arg-type]


def marker_handles(methods: Sequence[str], **style: object) -> list[Line2D]:
    """Where every method has a marker of its own, and no line."""
    return [
        handle for m in methods for handle in method_handles([m], **{"marker": MARKERS[m], "linestyle": ""} | style)
    ]


class _PlainLogLocator(LogLocator):
    """Ticks at 1, 2, 5, 10, 20; evenly spaced ones where under a decade and fewer than four of these are in view."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        ticks = np.asarray(super().tick_values(vmin, vmax))
        if vmax >= 10 * vmin or np.count_nonzero((ticks >= vmin) & (ticks <= vmax)) >= 4:
            return ticks
        even = np.asarray(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(vmin, vmax))
        return even[even > 0]


def plain_log_axis(axis: Axes, which: str, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """A logarithmic axis whose ticks read 1, 2, 5, 10 instead of powers; `subs` are those of a decade."""
    getattr(axis, f"set_{which}scale")("log")
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_locator(_PlainLogLocator(subs=subs, numticks=12))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ticks.set_minor_locator(NullLocator())
