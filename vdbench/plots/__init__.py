"""Figures, from records and the files beside them: PNG and SVG, the same bytes for the same records."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from vdbench import outputs
from vdbench.config import Suite
from vdbench.plots import style
from vdbench.plots.curves import published_curves
from vdbench.plots.inference import time_per_image
from vdbench.plots.layers import roofline, speedup_by_sparsity
from vdbench.plots.structure import layers_left
from vdbench.plots.style import NoData, Timed, View
from vdbench.plots.tradeoff import error_vs_compression
from vdbench.plots.training import training_curves
from vdbench.plots.weights import first_layer, log_alpha
from vdbench.plots.widths import error_and_compression_by_width
from vdbench.records import Record

FIGURES = {
    "error_vs_compression": error_vs_compression,
    "error_and_compression_by_width": error_and_compression_by_width,
    "training_curves": training_curves,
    "published_curves": published_curves,
    "log_alpha": log_alpha,
    "first_layer": first_layer,
    "layers_left": layers_left,
}
TIMING_FIGURES = {
    "time_per_image": time_per_image,
    "speedup_by_sparsity": speedup_by_sparsity,
    "roofline": roofline,
}

log = logging.getLogger("vdbench")


def write_plots(
    suite: Suite,
    sources: Mapping[str, Sequence[Record]],
    folders: Mapping[str, Path],
    output: Path,
    *,
    partial: bool = False,
) -> list[Path]:
    """Write every figure of `outputs.figure_names(suite)`.

    `sources` are records by where they come from and `folders` the results folders they lie in. An experiment is drawn
    from the last source that has pruned nets, or timings, of it, and the figure says which. One without data says so,
    and why, or is left out if `partial`.
    """
    written = []
    with style.context():
        for stem, (kind, names) in outputs.figures(suite).items():
            try:
                if kind in TIMING_FIGURES:
                    figure = TIMING_FIGURES[kind](*[timed(suite, name, sources) for name in names])
                else:
                    figure = FIGURES[kind](*[view(suite, name, sources, folders) for name in names])
            except NoData as reason:
                if partial:
                    for extension in outputs.FIGURE_FORMATS:
                        (output / f"{stem}.{extension}").unlink(missing_ok=True)
                    continue
                log.warning("%s: no data: %s", stem, reason)
                figure = style.empty(stem, str(reason))
            written += style.save(figure, output, stem)
    return written


def view(suite: Suite, name: str, sources: Mapping[str, Sequence[Record]], folders: Mapping[str, Path]) -> View:
    """An experiment as the last source sees it that has pruned nets of it, else the last that has any record of it."""
    own = {source: [r for r in records if r.experiment == name] for source, records in sources.items()}
    best = max(own, key=lambda s: (any(r.stage == "prune" for r in own[s]), bool(own[s]), list(own).index(s)))
    title = outputs.figure_title(suite, name)
    return View(name, title, suite.experiments[name], best, own[best], folders.get(best))


def timed(suite: Suite, name: str, sources: Mapping[str, Sequence[Record]]) -> Timed:
    """A net or layer as the last source has timed it that has."""
    own = {s: [r for r in records if (r.experiment, r.stage) == (name, "time")] for s, records in sources.items()}
    best = max(own, key=lambda s: (any(r.timing for r in own[s]), list(own).index(s)))
    records = [record for record in own[best] if record.timing and record.status == "ok"]
    return Timed(name, outputs.timed_title(suite, name), best, records)
