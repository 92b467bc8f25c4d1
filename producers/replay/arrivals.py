"""When requests arrive: as a trace recorded, as chance has it, or as fast as possible. All times in seconds."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from pathlib import Path

from producers.replay.workload import Request, reading
from shared.errors import InvalidRequest

COLUMN = "ts_s"


def read_trace(path: Path, limit: int | None = None) -> list[float]:
    """Return the arrival times of a trace in order, the first at 0: the column `ts_s` of a CSV (may be gzipped).

    Raises:
        InvalidRequest: the column is missing, a value is not a number, or there is no arrival.
        OSError: the file cannot be read.
    """
    times: list[float] = []
    with reading(path) as file:
        rows = csv.DictReader(file)
        if COLUMN not in (rows.fieldnames or ()):
            raise InvalidRequest(
                f"{path.name}:1: an arrival trace needs a column `{COLUMN}` with seconds, "
                f"has {', '.join(rows.fieldnames or ['none'])}",
                field=path.name,
            )
        for row in rows:
            times.append(_seconds(row[COLUMN], f"{path.name}:{rows.line_num}"))
            if limit is not None and len(times) >= limit:
                break
    if not times:
        raise InvalidRequest(f"{path.name}: no arrival in it; expected one row per arrival", field=path.name)
    times.sort()
    first = times[0]
    return [at - first for at in times]


def _seconds(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"{where}: `{COLUMN}` is {text!r}, expected a number of seconds", field=where)
    return value


def repeat_trace(times: Sequence[float], count: int) -> list[float]:
    """Return `count` arrival times: the trace, played again from its start as often as needed."""
    mean_gap = times[-1] / (len(times) - 1) if len(times) > 1 else 1.0
    period = times[-1] + mean_gap
    return [times[i % len(times)] + (i // len(times)) * period for i in range(count)]


def poisson(rate: float, count: int, rng: random.Random) -> list[float]:
    """Return `count` arrivals of a Poisson process of `rate` per second."""
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += rng.expovariate(rate)
    return times


def own_times(requests: Sequence[Request]) -> list[float] | None:
    """Return the arrival times the requests carry themselves, the first at 0, or None if any lacks one."""
    times = [request.at for request in requests if request.at is not None]
    if not times or len(times) < len(requests):
        return None
    first = min(times)
    return [at - first for at in times]


def schedule(
    requests: Sequence[Request],
    *,
    trace: Path | None,
    rate: float | None,
    flat_out: bool,
    speedup: float,
    rng: random.Random,
) -> list[float] | None:
    """Return when each request is due, in seconds from the start; None is as fast as possible.

    A trace wins over the times in the file; `speedup` divides all of them.
    """
    count = len(requests)
    if trace is not None:
        times: list[float] | None = repeat_trace(read_trace(trace, count), count)
    elif rate is not None:
        times = poisson(rate, count, rng)
    else:
        times = None if flat_out else own_times(requests)
    return None if times is None else [at / speedup for at in times]
