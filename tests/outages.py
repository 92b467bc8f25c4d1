"""Outages of simulated providers, that a test begins and ends while workers run."""

from __future__ import annotations

from pathlib import Path

from tests.faults_support import Pond


class Outage:
    """The outage file of a deployment."""

    def __init__(self, pond: Pond) -> None:
        self._file: Path = pond.journal.parent / "outage"
        pond.options["simulated_outage"] = self._file

    def begin(self, lines: str = "") -> None:
        """From now on all providers are down, or those that `lines` name (see `simulated_outage`)."""
        self._file.write_text(lines)

    def end(self) -> None:
        """From now on all answer."""
        self._file.unlink()
