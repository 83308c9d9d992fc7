"""Errors that the user has to solve, and a record of skipped files."""

import pathlib


class UserError(Exception):
  """An error that the user has to solve; the message says how."""


class Interrupted(Exception):
  """The user stopped the training, and its state was saved."""


class Skipped:
  """Files that could not be used, by name and reason."""

  def __init__(self) -> None:
    self.reasons: dict[str, str] = {}

  def add(self, path: pathlib.Path, reason: object) -> None:
    """Records a file that is skipped."""
    self.reasons[path.name] = " ".join(str(reason).split())

  def lines(self) -> list[str]:
    """Formats a line with the count, and a line for each of the first ten files."""
    if not self.reasons:
      return []
    shown = [f"  {name}: {reason}" for name, reason in list(self.reasons.items())[:10]]
    more = len(self.reasons) - len(shown)
    files = "file" if len(self.reasons) == 1 else "files"
    head = f"Skipped {len(self.reasons)} {files}:"
    return [head, *shown, *([f"  and {more} more"] if more else [])]
