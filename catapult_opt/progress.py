"""Progress bars, and where there is no terminal to draw them in, a line every half minute."""

from __future__ import annotations

import threading
from typing import Any

from rich.progress import Progress, Task
from rich.text import Text

__all__ = ["BarsOrLines"]


class BarsOrLines(Progress):
    """`rich.progress.Progress`, which in a pipe, a file or a CI job prints a line every ``seconds`` while it runs.

    Example:
        >>> import io
        >>> from rich.console import Console
        >>> with BarsOrLines(seconds=60, console=Console(file=io.StringIO())) as progress:
        ...     task = progress.add_task("training", total=3)
        ...     for _ in range(3):
        ...         progress.advance(task)
        >>> progress.finished
        True
    """

    def __init__(self, *columns: Any, seconds: float = 30.0, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._seconds = seconds
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to show the tasks."""
        super().start()
        if not self.console.is_terminal:
            threading.Thread(target=self._tell, daemon=True).start()

    def stop(self) -> None:
        """Show the tasks for a last time."""
        self._ended.set()
        super().stop()

    def _tell(self) -> None:
        while not self._ended.wait(self._seconds):
            running = [task for task in self.tasks if task.started and not task.finished]
            done = sum(task.finished for task in self.tasks)
            line = "; ".join(f"{task.description} {_state(task)}" for task in running[:4])
            more = f"; {len(running) - 4} more running" if len(running) > 4 else ""
            self.console.print(Text(f"{done} of {len(self.tasks)} done; {line}{more}"), soft_wrap=True)


def _state(task: Task) -> str:
    elapsed = int(task.elapsed or 0)
    of = f"{task.percentage:.0f} %" if task.total else f"{task.completed:g}"
    return f"{of} after {elapsed // 60}:{elapsed % 60:02d}"
