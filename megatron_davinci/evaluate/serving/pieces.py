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

    Only the last tokens are decoded with each new one: to decode all of them would take longer with every token.

    Args:
        tokenizer: The model's.
        until: Strings that end the text, of which none may begin in what is sent.
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]) -> None:
        self._tokenizer, self._until = tokenizer, until
        self._held = max((len(stop) for stop in until), default=1) - 1
        self._tokens: list[int] = []
        # The text of the first `_settled` tokens is known. Those from `_first` on stand before a new one when it is
        # decoded, since a decoder may treat the beginning of a text in its own way.
        self._first = self._settled = 0
        self._sent, self._unsent, self._ended = 0, "", False

    def add(self, token: int) -> str:
        """The next piece, with one more token; empty where that makes none."""
        self._tokens.append(token)
        if self._ended:
            return ""
        before = self._tokenizer.decode(self._tokens[self._first : self._settled], special=False)
        after = self._tokenizer.decode(self._tokens[self._first :], special=False)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""  # a special token, or a character that is not whole yet
        self._first, self._settled = self._settled, len(self._tokens)
        self._unsent += after[len(before) :]
        self._ended = any(stop in self._unsent for stop in self._until)
        ready = 0 if self._ended else max(0, len(self._unsent) - self._held)
        piece, self._unsent = self._unsent[:ready], self._unsent[ready:]
        self._sent += ready
        return piece

    def rest(self) -> tuple[str, str]:
        """The last piece, and why the text ends."""
        text, finish = text_of(self._tokenizer, self._tokens, self._until)
        return text[self._sent :], finish
