"""Ways to end a run early that keep what was trained: SIGTERM, Ctrl-C, a time limit.

    with signals.Stop(seconds=3600) as stop:
        for part in parts:
            train(part)
            save()
            if stop.requested:
                break
    write_results()
    if stop.requested:
        print(stop.sentence)
        sys.exit(stop.exit_code)

A request changes nothing by itself: the loop asks for it between compiled parts, so that a part is never cut. Where a
program ends early and has written what was trained, its exit code says why:

| exit code | why |
| --- | --- |
| 143 | SIGTERM (128 + 15, as a shell has it): the scheduler or the machine needs the place |
| 130 | Ctrl-C (128 + 2): a person stopped it |
| 75 | the time limit (EX_TEMPFAIL): start it again to go on |
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple


class _Reason(NamedTuple):
    exit_code: int
    sentence: str


_REASONS = {
    "SIGTERM": _Reason(143, "Stopped by SIGTERM before the end."),
    "Ctrl-C": _Reason(130, "Stopped by Ctrl-C before the end."),
    "time": _Reason(75, "Stopped at the time limit before the end."),
}


class Stop:
    """Whether a run should end after the present part.

    Attributes:
      reason: "SIGTERM", "Ctrl-C" or "time"; None if nothing asked the run to end.
    """

    def __init__(self, seconds: float | None = None, *, agree: Callable[[int], int] = lambda code: code):
        """Nothing is asked for yet.

        Args:
          seconds: the time limit, from now on.
          agree: the largest number of all processes, for a program of several: they end at the same place.
        """
        self.reason: str | None = None
        self._agree, self._agreed = agree, False
        self._end = None if seconds is None else time.monotonic() + seconds
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should end. It stays True. Of several processes, all must ask at the same place."""
        if self._agreed:
            return True
        if self.reason is None and self._end is not None and time.monotonic() >= self._end:
            self.reason = "time"
        code = self._agree(self.exit_code)
        if code:
            self.reason = next(reason for reason, known in _REASONS.items() if known.exit_code == code)
            self._agreed = True
        return self._agreed

    @property
    def exit_code(self) -> int:
        """That of the reason; 0 if there is none."""
        return 0 if self.reason is None else _REASONS[self.reason].exit_code

    @property
    def sentence(self) -> str:
        """The reason as a sentence; empty if there is none."""
        return "" if self.reason is None else _REASONS[self.reason].sentence

    def __enter__(self) -> "Stop":
        """Listen to signals. Only the main thread can; in another one, only the time limit holds."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGTERM, self._terminate), (signal.SIGINT, self._interrupt)):
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back to those who had them."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        # A second SIGTERM asks for nothing more: schedulers send one to the process and one to its group.
        self._ask("SIGTERM", "SIGTERM: the run ends after this part.")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            raise KeyboardInterrupt
        self._ask("Ctrl-C", "Ctrl-C: the run ends after this part and keeps what it has trained; again: at once.")

    def _ask(self, reason: str, message: str) -> None:
        if self.reason is None:
            self.reason = reason
            # `print` can be interrupted by this very handler, and then refuses to be entered again.
            os.write(2, f"\n{message}\n".encode())
