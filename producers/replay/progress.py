"""The live bar of a run, on stderr: done, rate, hit rate per tier, coalesced, errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from time import monotonic

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from producers.replay.record import Recorder, in_order
from producers.replay.style import COLOURS, colour
from producers.replay.words import per_second

REFRESH = 0.1


class _Bar(Progress):
    """A bar with a second line that says which way the answers came."""

    def __init__(self, recorder: Recorder, *columns: ProgressColumn, console: Console) -> None:
        self.recorder = recorder
        super().__init__(*columns, console=console, auto_refresh=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar and the line under it."""
        yield Group(self.make_tasks_table(self.tasks), ways_line(self.recorder))


def ways_line(recorder: Recorder) -> Text:
    """Return one line with the share of each way to an answer so far, and the errors."""
    line, total = Text("  "), max(len(recorder), 1)
    for way in in_order(list(recorder.counts)):
        line.append(f"{way} ", style="bold")
        line.append(f"{recorder.counts[way] / total:4.0%}   ", style=colour(way))
    errors = sum(recorder.errors.values())
    line.append("errors ", style="bold")
    line.append(f"{errors:,}", style=COLOURS["error"] if errors else "dim")
    return line


@contextlib.asynccontextmanager
async def shown(recorder: Recorder, total: int, *, console: Console | None = None) -> AsyncIterator[None]:
    """Show the bar while the block runs; reading the recorder ten times a second costs the run nothing."""
    bar = _Bar(
        recorder,
        TextColumn("  replay"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
    task = bar.add_task("replay", total=total, rate="0")
    with bar:
        refresher = asyncio.create_task(_keep_fresh(bar, task))
        try:
            yield
        finally:
            refresher.cancel()
            await asyncio.gather(refresher, return_exceptions=True)
            bar.update(task, completed=len(recorder), refresh=True)


async def _keep_fresh(bar: _Bar, task: TaskID) -> None:
    recent: list[tuple[float, int]] = [(monotonic(), 0)]
    while True:
        await asyncio.sleep(REFRESH)
        recent.append((monotonic(), len(bar.recorder)))
        del recent[:-20]
        (began, before), (now, done) = recent[0], recent[-1]
        rate = (done - before) / max(now - began, 1e-9)
        bar.update(task, completed=done, rate=per_second(rate), refresh=bar.console.is_terminal)
