"""The errors a user can cause. Each names the thing, what was found, what was wanted, and the mend, in one line.

Whoever catches `MintError` catches everything that is wrong with the input; all else is a fault of ours or of the machine.
"""


class MintError(Exception):
    """What a user gave cannot be used; the command line prints it in one line and exits with 2."""

    def __str__(self) -> str:
        """The message with what a terminal would obey, and not show, written out: it may quote a file of anyone's."""
        text = super().__str__()
        return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


class RecordError(MintError):
    """A case, a pair, an image or a table that cannot be read; names the file and the line."""


class CheckpointError(MintError):
    """A checkpoint, tokenizer or adapter that is missing, broken or of another shape; names the file and the tensor."""


class ConfigError(MintError):
    """A setting that is out of range or fights another; names the setting."""


class WorkError(MintError):
    """The work itself failed: a NaN, a full disk, a lost rank; the command line exits with 1."""


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """The work was asked to stop, and has: all of it is saved in `folder`. The command line exits with 0.

    Without a folder the same command goes on, with no --resume.
    """

    def __init__(self, message: str, folder: str | None = None) -> None:
        super().__init__(message)
        self.folder = folder
