"""A request to stop a run after the present block."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mi_experiments.errors import ResumableError


class StopRequest:
    """A wish to stop, from a scheduler or a person, granted when a block is finished."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.listening = False

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
            signal.signal(number, previous[number])

        signals = (signal.SIGTERM, signal.SIGUSR1, *more)
        previous: dict[int, Any] = {number: signal.signal(number, note) for number in signals}
        self.listening = True
        try:
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
            raise ResumableError(
                f"stopped by {self.received}: give the same command again to continue"
            )
