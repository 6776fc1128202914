"""A progress bar with a rate, on a terminal only; silent in logs and pipes."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text


class _Rate(TextColumn):
    """Units per second, and how many are done."""

    def render(self, task: RichTask) -> Text:
        speed = f"{task.speed:,.0f}" if task.speed else "?"
        unit = task.fields["unit"]
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}, {speed} {unit}/s")


class ProgressBar:
    """A context manager that shows stages of work on standard error.

    Args:
        enabled: False shows nothing; True shows the bar where standard error is a terminal.
    """

    def __init__(self, enabled: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), _Rate(""), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not (enabled and console.is_terminal), transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def stage(self, description: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a stage; the one before it disappears."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, completed=done, unit=unit)

    def describe(self, description: str) -> None:
        """Say something else beside the bar of the stage."""
        if self._task is not None:
            self._progress.update(self._task, description=description)

    def advance(self, amount: float) -> None:
        """Some more of the stage is done."""
        if self._task is not None:
            self._progress.advance(self._task, amount)

    def set(self, done: float, total: float) -> None:
        """So much of the stage is done."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)
