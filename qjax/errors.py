"""The errors that qjax raises for what a user gave it.

Each message is one line: the file or the tensor, what was expected and found, and the way out. The command
line prints it and exits with code 2; any other exception is our own fault and exits with code 1.
"""


class QjaxError(Exception):
    """Bad input or bad usage: something that the user can mend."""


class FormatError(QjaxError):
    """A file is not what its name or header says: truncated, corrupt, or hostile."""


class UnsupportedError(QjaxError):
    """A sound file asks for something qjax does not know (an architecture, a type, a tokenizer)."""


class QjaxWarning(UserWarning):
    """Something slower or lossier than asked for happens; the message names the tensor."""
