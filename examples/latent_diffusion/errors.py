"""What can go wrong by no fault of the program, and what was passed over."""

import pathlib


class UserError(Exception):
  """Something the user has to change; the message says what."""


class Interrupted(Exception):
  """Training was stopped on purpose, after it was saved."""


class Skipped:
  """Files that could not be used, by name and reason."""

  def __init__(self) -> None:
    self.reasons: dict[str, str] = {}

  def add(self, path: pathlib.Path, reason: object) -> None:
    """Notes a file that is passed over."""
    self.reasons[path.name] = " ".join(str(reason).split())

  def lines(self) -> list[str]:
    """One line for all and one for each of the first ten."""
    if not self.reasons:
      return []
    shown = [f"  {name}: {reason}" for name, reason in list(self.reasons.items())[:10]]
    more = len(self.reasons) - len(shown)
    files = "file" if len(self.reasons) == 1 else "files"
    head = f"Skipped {len(self.reasons)} {files}:"
    return [head, *shown, *([f"  and {more} more"] if more else [])]
