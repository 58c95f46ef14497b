"""Whether a model's final answer is the reference's: numbers, formulas, sets, letters and words, by rules.

What the reports that sample answers and keep the right ones call a verifier (Llama-Nemotron, MegaScience) they do
not describe. Here an answer that cannot be read is not right: a right answer that is lost costs less than a wrong one
that is kept.
"""

from __future__ import annotations

import re

from megatron_davinci.darwin import formulas
from megatron_davinci.darwin.formulas import NoFormula

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_AFTER = re.compile(
    r"(?:^|\n)\s*####\s*(.+)|\b(?:final answer|answer)(?P<sign>(?: is)?\s*[:=]?\s*(?:is\s+)?)(?P<said>.+)",
    re.IGNORECASE,
)
_DECIMAL = re.compile(r"-?\d*\.(\d+)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?![\d,])")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?<=[\d})])\s+(?:[A-Za-zµΩ°]+(?:\^?-?\d)?(?:\s*[/·*]\s*[A-Za-z]+(?:\^?\d)?)*|square \w+)\.?$"
)
_NAMED = re.compile(r"^\s*[A-Za-z](?:_\{?\w+\}?)?(?:\([a-z]\))?\s*=(?!=)\s*")


def final_answer(text: str) -> str | None:
    """What a model ends with: its last `\\boxed{}`, or what follows `####` or is called the answer, if later."""
    boxes = list(_BOX.finditer(text))
    end = _end_of_group(text, boxes[-1].end()) if boxes else -1
    said = [match for match in _AFTER.finditer(text) if not boxes or match.start() > boxes[-1].start()]
    # What is in the box may have the word too, and behind it "I hope that this answer helps" says nothing.
    if said and said[-1].start() > end and (end < 0 or said[-1][1] or said[-1]["sign"].strip()):
        return (said[-1][1] or said[-1]["said"]).strip(" .*$") or None
    return text[boxes[-1].end() : end].strip() or None if end >= 0 else None


def _end_of_group(text: str, begin: int) -> int:
    """Where the brace closes that is open at `begin`; -1 where it does not."""
    depth = 1
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
        if depth == 0:
            return at
    return -1


def equal(answer: str, reference: str) -> bool:
    """Whether an answer is the reference's, in any of its forms.

    Numbers are the same exactly; a decimal fraction of three digits or more also where the other rounds to it.
    A percent sign and a unit may be missing on one side, and must be the same where both have one. Formulas are the
    same where they have the same values (`formulas.same`). What stands in brackets has an order, braces and bare
    lists have none. Anything else is the same by its letters.
    """
    answer, reference = _plain(answer), _plain(reference)
    if not answer or not reference:
        return False
    if _letters(answer) == _letters(reference):
        return True
    if re.fullmatch(r"[A-Z]", reference):  # an option's letter, with or without what it says
        return re.fullmatch(rf"{reference}\s*[.:)].*", answer) is not None
    lists = _items(answer), _items(reference)
    if len(lists[0][1]) > 1 or len(lists[1][1]) > 1:
        return _same_items(*lists)
    answer, reference = _NAMED.sub("", answer), _NAMED.sub("", reference)
    return _same_value(answer, reference)


def _same_value(answer: str, reference: str) -> bool:
    units = [_unit(text) for text in (answer, reference)]
    if any(units) and not all(units):
        answer, reference = (
            text[: len(text) - len(unit)].strip()
            for text, unit in zip((answer, reference), units, strict=True)
        )
    elif all(units):
        if _letters(units[0]) != _letters(units[1]):
            return False
        answer, reference = answer[: -len(units[0])].strip(), reference[: -len(units[1])].strip()
    try:
        one, other = formulas.number(_number(answer)), formulas.number(_number(reference))
    except NoFormula:
        try:
            return formulas.same(answer, reference)
        except NoFormula:
            return False
    if formulas.close(one, other) or _rounded(answer, one, other) or _rounded(reference, other, one):
        return True
    shares = [text.rstrip().endswith("%") for text in (answer, reference)]
    if shares == [True, False]:
        return formulas.close(one / 100, other)
    return shares == [False, True] and formulas.close(one, other / 100)


def _rounded(text: str, value: formulas.Value, other: formulas.Value) -> bool:
    """Whether a decimal fraction is what the other number rounds to."""
    decimal = _DECIMAL.fullmatch(text.strip(" %"))
    digits = len(text.strip(" %-").replace(".", "").lstrip("0")) if decimal else 0
    if decimal is None or digits < 3:
        return False
    try:
        one, exact = complex(value), complex(other)
    except OverflowError:  # what is beyond all floats rounds to no decimal fraction that is written out
        return False
    return not exact.imag and abs(one.real - exact.real) <= 0.5001 * 10.0 ** -len(decimal[1])


def _plain(text: str) -> str:
    text = _TEXT.sub(lambda match: f" {match[1].strip()} ", text)
    text = re.sub(r"\\[$%]", lambda match: match[0][1], text)
    text = (
        re.sub(r"\\(?:left|right|displaystyle|!|,(?!\d{3})|;|:)", "", text)
        .replace("\\(", "")
        .replace("\\)", "")
    )
    text = text.strip().strip("$*").strip().removesuffix(".").strip()
    text = text.removeprefix("$").strip()
    if text[:1] not in ("(", "[", "{", "\\"):  # "[1,234]" may be two numbers
        text = _THOUSANDS.sub(lambda match: re.sub(r"\{,\}|\\,|,", "", match[0]), text)
    single = re.fullmatch(r"\(([A-Z])\)\.?", text)
    return single[1] if single else text


def _number(text: str) -> str:
    return text.strip().removesuffix("%").strip()


def _unit(text: str) -> str:
    """What stands behind a number and is a unit: words, or one of the few letters that are used as one."""
    match = _UNIT.search(text)
    if match is None or (len(match[0].strip(" .")) == 1 and match[0].strip(" .") not in "mgsAVNJWKLhCF"):
        return ""
    try:
        formulas.number(_number(text[: match.start()]))
    except NoFormula:
        return ""
    return match[0]


def _letters(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def _items(text: str) -> tuple[str, list[str]]:
    """The kind of a list, by its brackets, and its items; a single one for what is no list."""
    kind, inner = "", text
    braces = re.fullmatch(r"\\?\{(.*)\\?\}", text, re.DOTALL)
    if braces and "," in text:
        inner = braces[1].rstrip("\\")
    elif len(text) > 1 and text[0] in "([" and text[-1] in ")]" and _whole(text):
        kind, inner = text[0] + text[-1], text[1:-1]
    if "\\pm" in inner or "±" in inner:
        signs = [re.sub(r"\\pm|±", sign, inner, count=1) for sign in "+-"]
        return "", signs
    parts, depth, last = [], 0, 0
    for at, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter in ",;" and depth == 0:
            parts.append(inner[last:at])
            last = at + 1
    parts.append(inner[last:])
    if len(parts) == 1 and not kind:
        parts = re.split(r"\s+(?:and|or)\s+", inner)
    elif not kind:
        parts[-1] = re.sub(r"^\s*(?:and|or)\s+", "", parts[-1])
    return (kind if len(parts) > 1 else ""), [part.strip() for part in parts]


def _whole(text: str) -> bool:
    """Whether the first bracket closes with the last."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0:
            return at == len(text) - 1
    return False


def _same_items(answer: tuple[str, list[str]], reference: tuple[str, list[str]]) -> bool:
    if answer[0] != reference[0] or len(answer[1]) != len(reference[1]):
        return False
    if answer[0]:
        return all(map(equal, answer[1], reference[1]))
    left = list(reference[1])
    for item in answer[1]:
        match = next((place for place, other in enumerate(left) if equal(item, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def program_of(text: str) -> str | None:
    """The last fenced program of an answer."""
    blocks = re.findall(r"^```(?:python|py)?[ \t]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else None
