"""Progress bars on standard error; silent where nobody looks (no terminal)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)


class Progress:
    """Draws one bar for each long task."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, line: str) -> None:
        """Print a line where the bars are, and keep it in the log."""
        log.info("%s", line)
        if self.console.is_terminal:
            self.console.print(line, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Draw a bar; yields `advance(description="", count=1)`."""
        columns = (
            TextColumn("{task.fields[title]:<20}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        disabled = not self.console.is_terminal
        with RichProgress(*columns, console=self.console, disable=disabled) as bars:
            task = bars.add_task("", total=total, title=title)

            def advance(description: str = "", count: int = 1) -> None:
                bars.update(task, advance=count, description=description)

            yield advance
