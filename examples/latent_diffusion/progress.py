"""Progress bars on the terminal and a log that TensorBoard reads."""

import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

SHOWN = {
  "loss": "loss {:.4f}", "held_out": "held-out {:.4f}", "rate": "rate {:.1e}",
  "steps_per_second": "{:.1f} steps/s", "state_mb": "{:.2f} MB",
}


class Display:
  """The bar and the log of one run. Without a terminal a single line is printed at the end."""

  def __init__(self, name: str, console: Console, log: pathlib.Path):
    self.name, self.console = name, console
    self._log, self._writer, self._bar = log, None, None
    self._last: dict[str, Any] = {}

  def start(self, steps: int, done: int) -> None:
    """Shows the bar, which starts at the step from which the run resumes."""
    self._writer = SummaryWriter(str(self._log))
    self._bar = Progress(
      TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
      TextColumn("{task.fields[figures]}"),
      console=self.console)
    self._task = self._bar.add_task(self.name, total=steps, completed=done, figures="compiling")
    if self.console.is_terminal:
      self._bar.start()

  def show(self, row: dict[str, Any]) -> None:
    """Moves the bar to the step of a record, and logs the record."""
    self._last |= {name: row[name] for name in SHOWN if name in row}
    self._bar.update(self._task, completed=row["step"], figures=self._figures())
    for name, value in row.items():
      if name != "step" and isinstance(value, float):
        self._writer.add_scalar(name, value, row["step"])

  def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
    """Logs a picture (height, width, 3)."""
    if self._writer is not None:
      self._writer.add_image(name, pixels, step, dataformats="HWC")

  def stop(self) -> None:
    """Stops the bar, leaving its last line on the terminal, and closes the log."""
    if self._bar is not None and self.console.is_terminal:
      self._bar.stop()
    elif self._bar is not None:
      self.console.print(f"{self.name}: {self._figures()}", highlight=False, soft_wrap=True)
    if self._writer is not None:
      self._writer.close()
    self._writer = self._bar = None

  def _figures(self) -> str:
    return "  ".join(SHOWN[name].format(value) for name, value in self._last.items())
