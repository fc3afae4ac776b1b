"""Errors people read: what happened, where in the model, what to do."""

from __future__ import annotations


class BlockwrightError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        what: What happened, in one sentence that names values.
        where: Module path, node, file or source line; None when there is no place to name.
        remedy: What to do about it; None when nothing useful can be said.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message over up to three lines."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  try:   {self.remedy}")
        return "\n".join(lines)

    def one_line(self) -> str:
        """Return the message on one line, for a terminal or a log."""
        where = f" [{self.where}]" if self.where else ""
        remedy = f" Try: {self.remedy}" if self.remedy else ""
        return " ".join(f"{type(self).__name__}: {self.what}{where}{remedy}".split())


class CaptureError(BlockwrightError):
    """The model or its example inputs cannot be captured as a graph."""


class OptionError(BlockwrightError):
    """An option, name or argument given by the user is not valid."""


class NoMatchError(BlockwrightError):
    """A pass changed nothing, which is never reported as success."""


class VerifyError(BlockwrightError):
    """A program breaks an invariant, or a pass broke its promise."""


class RecoveryError(BlockwrightError):
    """A training cannot begin, or its loss is not finite."""


class LoweringError(BlockwrightError):
    """A backend is missing or cannot lower a program."""


class ArtefactError(BlockwrightError):
    """A saved artefact is damaged, foreign, unsafe, or cannot be written."""
