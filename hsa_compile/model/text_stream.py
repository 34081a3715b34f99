"""Text as its tokens come: only whole characters, and nothing of what might become a stop string."""

import codecs
from collections.abc import Callable, Sequence

from hsa_compile.errors import InvalidArgument
from hsa_compile.model.data.tokenizer import BYTES, Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 8  # tokens that one character may be made of


class TextStream:
    """Turns tokens into text that can be shown at once.

    Args:
        tokenizer: of the tokens.
        stop: strings that end the text; none of one is shown.

    Raises:
        InvalidArgument: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise InvalidArgument(f"stop = {list(stop)} holds an empty string")
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""  # the beginning of a stop string, perhaps
        self._decode: _Bytes | _Tokens = _Bytes() if tokenizer.name == BYTES else _Tokens(tokenizer.decode)

    def feed(self, token: int) -> str:
        """The text that is certain after one more token."""
        return self._pass(self._decode.feed(token))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        shown = self._pass(self._decode.finish())
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _pass(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Bytes:
    """UTF-8, byte by byte; what is none becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Tokens:
    """Tokens whose text may depend on those before and end inside a character: a few are decoded again each time."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._shown: list[int] = []  # the newest whose text is out, for the spaces between words
        self._new: list[int] = []

    def feed(self, token: int) -> str:
        self._new.append(token)
        text = self._text()
        if text.endswith(_UNKNOWN) and len(self._new) < _LONGEST_CHARACTER:
            return ""
        self._shown, self._new = self._new, []
        return text

    def finish(self) -> str:
        text, self._new = self._text(), []
        return text

    def _text(self) -> str:
        return self._decode(self._shown + self._new)[len(self._decode(self._shown)) :]
