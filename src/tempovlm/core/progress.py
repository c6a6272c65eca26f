"""Show a progress bar on stderr if it is a terminal and rich is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int, int], None]
"""Callback with the number of finished steps and of all steps."""


def silent(done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def progress_bar(title: str, *, show: bool = True) -> Iterator[Advance]:
    """Show a bar until the block ends, or only the title if stderr is no terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        show = False
    if not show:
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(title, highlight=False)
        yield silent
        return
    # Two redraws a second: drawing takes time from what is being measured.
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
