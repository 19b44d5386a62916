"""A request to stop a run after the present block."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mi_experiments.errors import MiError, ResumableError


class StopRequest:
    """A wish to stop, from a scheduler or a person, granted when a block is finished."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.listening = False
        self.tell: Callable[[str], None] | None = None

    @contextmanager
    def listen(self, *more: signal.Signals) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1, which schedulers send, as that; a second one ends all.

        Args:
            more: other signals to take so. Inside of another call nothing changes.
        """
        if self.listening:
            yield
            return
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.received = signal.Signals(number).name
            # First, so that a second signal ends a process that never comes back from this one.
            signal.signal(number, previous[number])
            if self.tell is not None:
                with suppress(OSError, MiError):
                    self.tell(self.line)

        signals = (signal.SIGTERM, signal.SIGUSR1, *more)
        previous: dict[int, Any] = {number: signal.signal(number, note) for number in signals}
        self.listening = True
        try:
            # What has come since the command was started, which held it back, comes now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            yield
        finally:
            self.listening = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Stop here if that was asked for.

        Raises:
            ResumableError: it was.
        """
        if self.received is not None:
            raise ResumableError(self.line)

    @property
    def line(self) -> str:
        """The one line of a run that stops."""
        return f"stopped by {self.received}: give the same command again to continue"

    @contextmanager
    def telling(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Say at once that a wish has come, since a second signal may leave no time to.

        Args:
            tell: called with the line, in the middle of whatever is done.
        """
        self.tell = tell
        try:
            yield
        finally:
            self.tell = None
