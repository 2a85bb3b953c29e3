"""A line every few seconds: what is done, how fast, how long still."""

import sys
import time
from typing import TextIO


class Progress:
    """Counts units and cells of one stage.

    Parameters
    ----------
    stage
        Name of the stage.
    num_units, num_cells
        All there is to do; `num_cells` in whatever `what` names.
    every_s
        Seconds between lines.
    """

    def __init__(
        self,
        stage: str,
        num_units: int,
        num_cells: int,
        every_s: float = 5.0,
        stream: TextIO | None = None,
        what: str = "cells",
    ) -> None:
        self._stage, self._num_units, self._num_cells = stage, num_units, num_cells
        self._what = what
        self._every_s, self._stream = every_s, stream or sys.stderr
        self._units = self._cells = 0
        self._start = self._last = time.monotonic()

    def add(self, num_cells: int) -> None:
        """One more unit is done."""
        self._units += 1
        self._cells += num_cells
        now = time.monotonic()
        if now - self._last >= self._every_s and self._units < self._num_units:
            self._last = now
            self._print(now)

    def done(self) -> None:
        """Print the last line."""
        self._print(time.monotonic())

    def _print(self, now: float) -> None:
        seconds = max(now - self._start, 1e-9)
        left = seconds * (self._num_cells - self._cells) / self._cells if self._cells else float("nan")
        units = "" if self._num_units == self._num_cells else f"{self._units:,}/{self._num_units:,} units, "
        text = f"{self._stage:<9} {units}{self._cells:,}/{self._num_cells:,} {self._what}, "
        rate = self._cells / seconds
        text += f"{rate:,.0f} {self._what}/s" if rate >= 10 else f"{rate:.1f} {self._what}/s"
        text += f", {left:,.0f} s left" if self._units < self._num_units else f", {seconds:.1f} s"
        print(text, file=self._stream, flush=True)
