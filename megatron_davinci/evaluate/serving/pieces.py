"""A text in pieces, as its tokens come: put together they are the text that would have been sent whole."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.evaluate.endings import ends


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], until: Sequence[str]) -> tuple[str, str]:
    """The text of an answer, and why it ends.

    Args:
        tokenizer: The model's.
        tokens: That the model wrote, its end included.
        until: Strings that end the text; they are not in it.

    Returns:
        The text, and `stop` or `length`.
    """
    text = tokenizer.decode(tokens, special=False)
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    # A special token's name may be such a string: it ends the text, and is nowhere in it.
    ended = bool(places) or ends(tokenizer, tokens, until)
    return text[: min(places)] if places else text, "stop" if ended else "length"


class Pieces:
    """What of a text can be sent already.

    Args:
        tokenizer: The model's.
        until: Strings that end the text, of which none may begin in what is sent.
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]) -> None:
        self._tokenizer, self._until = tokenizer, until
        self._held = max((len(stop) for stop in until), default=1) - 1
        self._tokens: list[int] = []
        self._sent = 0

    def add(self, token: int) -> str:
        """The next piece, with one more token; empty where that makes none."""
        self._tokens.append(token)
        text, _ = text_of(self._tokenizer, self._tokens, self._until)
        text = text.rstrip("\ufffd")  # a character that is not whole yet
        return self._cut(text[: max(0, len(text) - self._held)])

    def rest(self) -> tuple[str, str]:
        """The last piece, and why the text ends."""
        text, finish = text_of(self._tokenizer, self._tokens, self._until)
        return self._cut(text), finish

    def _cut(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece
