"""Where a generated text ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_davinci.data.tokenizer import Tokenizer


def stopper(tokenizer: Tokenizer, until: Sequence[Sequence[str]]) -> Callable[[int, list[int]], bool]:
    """What `Engine.generate` asks after each token."""
    return lambda number, ids: ends(tokenizer, ids, until[number])


def ends(tokenizer: Tokenizer, ids: Sequence[int], until: Sequence[str]) -> bool:
    """Whether the last of these tokens ends the text: it ends the document, or completes one of these strings."""
    if ids[-1] == tokenizer.eod_id:
        return True
    longest = max((len(text.encode()) for text in until), default=0)
    if not longest:
        return False
    # A token is at least a byte; some more, for a character that is not whole at the beginning.
    tail = tokenizer.decode(ids[-(longest + 4) :], special=True)
    return any(text in tail for text in until)
