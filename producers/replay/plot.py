"""A run over time as a picture: hit rate by tier above, latency below."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from producers.replay.record import Recorder, in_order
from producers.replay.report import Report
from producers.replay.style import COLOURS, colour
from producers.replay.words import counted
from shared.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
#: The one directory that is made for a plot; a missing other one is more likely a slip.
OUT = Path("out")
DOTS = 6000
WINDOWS = (10, 80)
PER_WINDOW = 40
COMPUTED = ("coalesced", "llm")


def check(path: Path) -> None:
    """Refuse a plot file that cannot be written, and leave nothing behind.

    Raises:
        InvalidRequest: it is a directory, does not end in .png, .svg or .pdf, or cannot be written.
    """
    try:
        if path.is_dir():
            raise InvalidRequest(f"--plot {path} is a directory; name a file in it, such as replay.png", field="plot")
        if path.suffix.lower() not in FORMATS:
            raise InvalidRequest(f"--plot is {str(path)!r}; name it .png, .svg or .pdf", field="plot")
        _try_writing(Path(os.path.realpath(path)), made=path.parent == OUT)
    except OSError as problem:
        raise InvalidRequest(unwritable(path, problem), field="plot") from None


def unwritable(path: Path, problem: OSError) -> str:
    """Return the message that `path` could not be written, and what to do."""
    if isinstance(problem, FileNotFoundError):
        return f"--plot {path}: there is no directory {path.parent}; make it, or name a file elsewhere"
    return f"--plot {path}: {problem.strerror or problem}; name a file that can be written"


def _try_writing(path: Path, *, made: bool) -> None:
    """Raise the OSError that writing `path` would; its directory may be missing if it is to be `made`."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        parent = path.parent.parent if made and not path.parent.exists() else path.parent
        with tempfile.TemporaryFile(dir=parent):
            return
    if stat.S_ISREG(mode):  # to open a pipe would wait for its reader
        with path.open("ab"):
            return


def draw(recorder: Recorder, report: Report, path: Path) -> None:
    """Draw the run into `path`, by its suffix; the directory `OUT` is made, no other. Does nothing about an empty run.

    Raises:
        OSError: the file cannot be written.
    """
    if not len(recorder):
        return
    import matplotlib as mpl  # half a second that only a plot should cost

    mpl.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "mp"}):
        figure, (above, below) = plt.subplots(
            2, 1, sharex=True, figsize=(9, 6.2), height_ratios=(1, 1.15), layout="constrained"
        )
        windows = int(np.clip(len(recorder) // PER_WINDOW, *WINDOWS))
        edges = np.linspace(0.0, max(max(recorder.due), 1e-3), windows + 1)
        _shares(above, recorder, edges)
        _latency(below, recorder, edges)
        below.set_xlim(edges[0], edges[-1])
        figure.suptitle(_title(report), fontsize=11, x=0.01, ha="left")
        try:
            if path.parent == OUT:
                OUT.mkdir(exist_ok=True)
            figure.savefig(path, dpi=160)
        finally:
            plt.close(figure)


def _title(report: Report) -> str:
    simulated = "simulated provider" if report.provider.simulated else report.provider.name
    requests, calls = counted(report.requests, "request"), counted(report.spent.calls, "call")
    return (
        f"{requests} from {report.run.source}: {report.without_call_share:.0%} answered without a "
        f"call of their own\n{calls} ({simulated}), {report.saved_share:.0%} of the cost saved"
    )


def _shares(axes: Axes, recorder: Recorder, edges: Floats) -> None:
    """Stack the share of each way per window of arrival time."""
    import numpy as np

    due, ways = np.frombuffer(recorder.due), np.frombuffer(recorder.ways, dtype=np.uint16)
    total = np.maximum(np.histogram(due, edges)[0], 1)
    shown = in_order(recorder.names)
    parts = [np.histogram(due[ways == recorder.names.index(way)], edges)[0] / total for way in shown]
    if recorder.errors:
        shown.append("error")
        parts.append(np.clip((np.histogram(due, edges)[0] / total) - sum(parts), 0, 1))
    stairs = [np.append(part, part[-1]) for part in parts]
    axes.stackplot(edges, stairs, labels=shown, colors=[colour(way) for way in shown], step="post", linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    axes.set_ylabel("share of requests")
    axes.set_title("Answered by", loc="left", fontsize=10, fontweight="bold")
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, reverse=True)


def _latency(axes: Axes, recorder: Recorder, edges: Floats) -> None:
    """Dots for single requests, lines for the median and the 95th percentile of hits and of computed answers."""
    import numpy as np

    due, took = np.frombuffer(recorder.due), np.maximum(np.frombuffer(recorder.latency) * 1000, 1e-3)
    ways = np.frombuffer(recorder.ways, dtype=np.uint16)
    dots = np.random.default_rng(0).permutation(len(due))[:DOTS]
    colours = np.array([colour(way) for way in recorder.names])
    axes.scatter(due[dots], took[dots], s=6, c=colours[ways[dots]], alpha=0.4, linewidths=0, rasterized=True)
    computed = [i for i, way in enumerate(recorder.names) if way in COMPUTED]
    failed = [i for i, way in enumerate(recorder.names) if way.startswith("error")]
    groups = {
        "llm and coalesced": (np.isin(ways, computed), COLOURS["llm"]),
        "hits": (~np.isin(ways, computed + failed), COLOURS["l1"]),
    }
    middle = (edges[:-1] + edges[1:]) / 2
    for name, (mask, line) in groups.items():
        if mask.any():
            p50, p95 = _percentiles(due[mask], took[mask], edges)
            axes.plot(middle, p95, color=line, linewidth=1.2, linestyle=(0, (4, 1.5)), label=f"{name}, p95")
            axes.plot(middle, p50, color=line, linewidth=1.8, label=f"{name}, p50")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} ms" if value < 1000 else f"{value / 1000:g} s")
    axes.set_ylabel("latency (log scale)")
    axes.set_xlabel("arrival, seconds from the start")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("Latency", loc="left", fontsize=10, fontweight="bold")
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False)


def _percentiles(due: Floats, took: Floats, edges: Floats) -> tuple[Floats, Floats]:
    """Return p50 and p95 per window; NaN, a gap in the line, where a window has nothing."""
    import numpy as np

    order = np.argsort(due, kind="stable")
    cuts = np.searchsorted(due[order], edges[1:-1])
    parts = np.split(took[order], cuts)
    both = [np.percentile(part, (50, 95)) if len(part) else (np.nan, np.nan) for part in parts]
    p50, p95 = np.array(both).T
    return p50, p95


if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
