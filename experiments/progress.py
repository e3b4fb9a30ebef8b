"""A progress bar with rate and time left; plain lines, now and then, where the output is a file."""

import sys
import time
from typing import Any

from tqdm import tqdm

BETWEEN = 30.0  # seconds between two lines in a file


class Progress:
    """Shows how far a long work is, on standard error.

        with Progress(total=100, unit="step") as bar:
            bar.describe("epoch 1/10")
            bar.advance(5, "loss 0.3")
    """  # fmt: skip

    def __init__(self, total: int, unit: str, *, begin: int = 0, show: bool = True):
        """`begin`: units that are done already; `show`: or nothing."""
        self.total, self.unit = total, unit
        self.done, self.begin, self.label, self.note, self.show = begin, begin, "", "", show
        self.bar: Any = tqdm(total=total, unit=unit, initial=begin) if show and sys.stderr.isatty() else None
        self.start = self.last = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.close()
        elif self.done > self.begin:
            self._line()

    def describe(self, label: str) -> None:
        """The text before the bar."""
        self.label = label
        if self.bar:
            self.bar.set_description(label)

    def restart(self, total: int, begin: int = 0, *, unit: str | None = None) -> None:
        """Another total, of which `begin` units are done already, and perhaps another unit."""
        self.total, self.done, self.begin, self.start = total, begin, begin, time.monotonic()
        self.unit = unit or self.unit
        if self.bar:
            self.bar.initial, self.bar.unit = begin, self.unit
            self.bar.reset(total)
            self.bar.update(begin)

    def advance(self, units: int, note: str | None = None) -> None:
        """`units` more are done; `note` is the text after the bar."""
        self.done += units
        self.note = self.note if note is None else note
        if self.bar:
            if note is not None:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(units)
        elif time.monotonic() - self.last > BETWEEN:
            self._line()

    def _line(self) -> None:
        if not self.show:
            return
        self.last = time.monotonic()
        meter = tqdm.format_meter(
            self.done, self.total, self.last - self.start, initial=self.begin, ncols=0, unit=self.unit,
            prefix=self.label, postfix=self.note or None,
        )  # fmt: skip
        print(meter, file=sys.stderr, flush=True)
