"""What ends a run early and in good order: Ctrl-C, SIGTERM, or the time that engine.max_seconds leaves it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether this process was told to stop, and by what; a second signal raises KeyboardInterrupt wherever the program stands.

    `signal` is the name of the first. `max_seconds` count from `since`, a time of time.monotonic().
    """

    def __init__(self, max_seconds: float | None = None, *, since: float = 0.0) -> None:
        self.signal: str | None = None
        self._at_once = False
        self._max_seconds, self._since = max_seconds, since

    @property
    def received(self) -> str | None:
        """The signal's name, or the key whose time is over."""
        if self.signal is None and self._max_seconds is not None and time.monotonic() - self._since > self._max_seconds:
            return f"engine.max_seconds={self._max_seconds:g}"
        return self.signal

    def comes(self, within_s: float) -> bool:
        """Whether a signal has come, or comes within so many seconds: who tells several processes tells one after the other."""
        until = time.monotonic() + within_s
        while self.signal is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.signal is not None

    @contextmanager
    def caught(self) -> Iterator["Stop"]:
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside there is nothing to save, and the first signal raises KeyboardInterrupt too, even one that came before."""
        self._at_once = True
        try:
            if self.signal is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, self.signal or signal.Signals(number).name
        if again or self._at_once:
            raise KeyboardInterrupt
