"""Text while it is generated: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Iterable
from typing import SupportsIndex

from qjax.errors import QjaxError
from qjax.text.tokenizer import Tokenizer


class StreamDecoder:
    """Token ids in, text out; joined together, what `Tokenizer.decode` gives for all the ids.

    A character whose bytes come in several tokens is given with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, *, continuing: bool = False) -> None:
        """Args as in `Tokenizer.decode`: `continuing` where the ids go on a text, as those of a prompt."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._fresh = not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: SupportsIndex) -> str:
        """The text that is certain after one more token; may be empty.

        Raises:
            QjaxError: an id outside the vocabulary.
        """
        i = token.__index__()
        piece = self._tokenizer.piece(i, self._skip_special, fresh=self._fresh)
        self._fresh = self._tokenizer.is_special(i)
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that stayed half."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Text up to the first occurrence of any of some stop strings, however the text is cut.

    Text that may be the start of a stop string is held back until it is known. Of stop strings that overlap,
    the one that starts first counts.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises QjaxError for an empty stop string, which would stop everything."""
        self._stops = tuple(stops)
        if "" in self._stops:
            raise QjaxError("a stop string is empty: leave it out")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped: bool = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has come (then all later text is dropped)."""
        if self.stopped:
            return "", True
        text = self._held + text
        end = self._first(text)
        for start in range(max(0, len(text) - self._longest + 1), end):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                self._held = text[start:]
                return text[:start], False
        self._held, self.stopped = "", end < len(text)
        return text[:end], self.stopped

    def finish(self) -> str:
        """The text still held back, now that nothing follows."""
        text, self._held = self._held, ""
        end = self._first(text)
        self.stopped = self.stopped or end < len(text)
        return text[:end]

    def _first(self, text: str) -> int:
        return min((text.find(stop) for stop in self._stops if stop in text), default=len(text))
