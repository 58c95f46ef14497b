"""What a text states in forms that can be compared without a model: numbers with units, formulas, code, names.

Each form has a normal one, so that a repaired blank or another minus sign is no difference, and another value is.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from decimal import Decimal, InvalidOperation
from functools import cache

_NUMBER = re.compile(
    r"(?P<sign>(?:(?<=^)|(?<=[\s(=\[,:;|~<>^{]))[-+])?(?:(?<![\w.])|(?<=[^\W\d_]\.))"
    r"(?:(?P<chain>\d+(?:\.\d+){2,})"
    r"|(?:(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<fraction>\.\d+)?|(?P<bare>\.\d+))"
    r"(?:[eE](?P<power>[-+]?\d{1,4})(?![\w.]))?)",
    re.MULTILINE,
)
_MIXED = re.compile(r"(?<!\w)[^\W\d_][\w-]*?\d[\w-]*(?:\.\d[\w-]*)*")  # H2O, x2, GPT-4, Llama-3.1
# Digits that Unicode has as signs of their own: those below the line, and fractions.
_SIGNS = str.maketrans(
    {chr(0x2080 + digit): str(digit) for digit in range(10)}
    | dict(zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒", (
        " 1/2", " 1/3", " 2/3", " 1/4", " 3/4", " 1/5", " 2/5", " 3/5", " 4/5", " 1/6", " 5/6", " 1/7", " 1/8",
        " 3/8", " 5/8", " 7/8", " 1/9", " 1/10"), strict=True))
)  # fmt: skip
_RAISED = re.compile(r"(?<=[\d)])([⁺⁻]?)([⁰¹²³⁴-⁹]+)")  # 10⁵, and not m²
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_UNIT_AFTER = re.compile(
    r"[ \t\n\u00a0\u202f~]{0,2}(-?)(°?[^\W\d_]{1,14}|°[CF]?|%|‰|Ω)(?:[/·](\w+))?(?:\^\{?([-\d]+)\}?|([²³]))?"
)
_UNITS_OF_TEN = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_TENS = "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred"
_WORDS = dict(zip(f"{_UNITS_OF_TEN} {_TENS}".split(), [*range(2, 21), *range(30, 101, 10)], strict=True))
_SIZES = set(
    "thousand million billion trillion half halves twice thrice dozen double doubled triple tripled quarter".split()
)
_NUMBER_WORD = re.compile(r"\b(?:" + "|".join([*_WORDS, *_SIZES]) + r")\b", re.IGNORECASE)

_PREFIXES = {
    "n": "nano",
    "µ": "micro",
    "m": "milli",
    "c": "centi",
    "k": "kilo",
    "M": "mega",
    "G": "giga",
    "T": "tera",
}
_BASES = dict(
    entry.split(":")
    for entry in (
        "m:metre g:gram s:second Hz:hertz J:joule W:watt V:volt A:ampere N:newton Pa:pascal mol:mole L:litre "
        "eV:electronvolt B:byte Ω:ohm F:farad T:tesla M:molar Da:dalton cal:calorie bit:bit"
    ).split()
)
_OTHERS = [
    entry.split()
    for entry in (
        "% percent;‰ permille;° degree degrees deg;°C celsius;°F fahrenheit;K kelvin kelvins;min minute minutes;"
        "h hour hours hr hrs;d day days;week weeks;month months;yr year years;ft foot feet;inch inches;mile miles mi;"
        "lb pound pounds lbs;oz ounce ounces;bar bars;atm;dB decibel decibels;ppm;ppb;rad radian radians;"
        "Å angstrom angstroms;rpm;mph;ha hectare hectares;t tonne tonnes ton tons"
    ).split(";")
]

# Formulas that are marked, longest form first, and equations in plain text.
_FORMULAS = re.compile(
    r"\$\$(.{1,4000}?)\$\$|\\\[(.{1,4000}?)\\\]|\\\((.{1,2000}?)\\\)"
    r"|\\begin\{((?:equation|align|gather|multline|eqnarray|displaymath)\*?)\}(.{1,8000}?)\\end\{\4\}"
    r"|(?<![\\$\w])\$(?!\s)([^$\n]{1,600}?)(?<![\s\\])\$(?!\d)",
    re.DOTALL,
)
_OPERATORS = "=≈≤≥≠∝≡→⇒∈"
_EQUATION = re.compile(
    # From a word's beginning on: what is no equation from there is none from its middle.
    rf"(?<![^\s{_OPERATORS}])[^\s{_OPERATORS}]+[ ]?[{_OPERATORS}][ ]?[^\s{_OPERATORS}]+"
    rf"(?:[ ]?[-+*/^·×{_OPERATORS}][ ]?[^\s{_OPERATORS}]+)*"
)
_FENCED = re.compile(r"^(```+|~~~+)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:(?: {4}|\t)[^\n]*(?:\n|\Z)(?:[ \t]*\n(?=(?: {4}|\t)))*)+")
_CODE_LINE = re.compile(
    r"[;{}]\s*$|\w\(.*\)\s*:?\s*$|\w\s*[-+*/]?=\s*\S"
    r"|^\s*(?:>>>|\$ |#include|import |from \w+ import|return\b|def |class |for .*:$)"
)
_CAPITAL = re.compile(r"(?<![\w'’])[^\W\d_][\w'’]*")
_ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>\"'`)\]]+")
_TORN = re.compile(r"(?<=\w)[-\u00ad\u2010]\s*\n\s*(?=[a-zß-ÿ])")  # a hyphen at a line end
_LIGATURES = str.maketrans(
    {"ﬁ": "fi", "ﬂ": "fl", "ﬀ": "ff", "ﬃ": "ffi", "ﬄ": "ffl", "\u2212": "-", "’": "'", "μ": "µ"}
)


def plain(text: str) -> str:
    """A text in NFC with ligatures, minus signs and apostrophes of one kind, and without addresses of the web."""
    return _ADDRESS.sub(" ", unicodedata.normalize("NFC", text).translate(_LIGATURES))


def mended(text: str) -> str:
    """A text with words that were torn apart at line ends put together."""
    return _TORN.sub("", text)


@cache
def _units() -> dict[str, str]:
    found = {}
    for symbol, name in _BASES.items():
        spellings = [name, name + "s"] + (
            [name[:-2] + "er", name[:-2] + "ers"] if name.endswith("re") else []
        )
        for short, long in {"": "", **_PREFIXES}.items():
            found[short + symbol] = short + symbol
            found |= {long + spelling: short + symbol for spelling in spellings}
    found |= {"ml": "mL", "l": "L", "um": "µm", "us": "µs", "kb": "kB", "KB": "kB", "bits": "bit"}
    for symbol, *others in _OTHERS:
        found |= dict.fromkeys([symbol, *others], symbol)
    # Words and letters that mostly are none.
    for word in ("a", "A", "T", "M", "F", "mm.", "Mm"):
        found.pop(word, None)
    return found


def unit_of(word: str) -> str | None:
    """The unit that a word or symbol names, in one spelling; None for another word."""
    return _units().get(word) or _units().get(word.lower() if len(word) > 3 else word)


def numbers(text: str) -> Counter[tuple[str, str | None]]:
    """Numbers with the unit that follows each, if one does: in digits, in words, and inside names like H2O.

    What is dotted more than once (a version, a date, a section) is one number, as it is written.
    """
    found: Counter[tuple[str, str | None]] = Counter()
    text = _RAISED.sub(lambda match: "^" + match[0].translate(_LOWERED), text.translate(_SIGNS))
    for match in _NUMBER.finditer(text):
        value = _value(match)
        found[value, _unit_after(text, match.end())] += 1
    for match in _NUMBER_WORD.finditer(text):
        word = match[0].lower()
        found[str(_WORDS.get(word, word)), _unit_after(text, match.end())] += 1
    for match in _MIXED.finditer(text):
        found[match[0].casefold().strip("-"), None] += 1
    return found


def _value(match: re.Match[str]) -> str:
    if match["chain"]:
        return match["chain"]
    written = (match["digits"] or "").replace(",", "") + (match["fraction"] or match["bare"] or "")
    if match["power"]:
        written += f"e{match['power']}"
    if len(written) > 60:
        return written
    try:
        value = Decimal(("-" if match["sign"] == "-" else "") + written).normalize()
    except InvalidOperation:
        return written
    return f"{value:f}" if abs(value.adjusted()) < 30 else str(value)


def _unit_after(text: str, at: int) -> str | None:
    match = _UNIT_AFTER.match(text, at)
    unit = unit_of(match[2]) if match else None
    if match is None or unit is None:
        return None
    power = match[4] or {"²": "2", "³": "3"}.get(match[5] or "", "")
    return unit + (f"/{unit_of(match[3]) or match[3]}" if match[3] else "") + (f"^{power}" if power else "")


def formulas(text: str) -> Counter[str]:
    """Formulas without white space: marked ones, and equations in plain text. Code is taken out before."""
    found: Counter[str] = Counter()
    for match in _FORMULAS.finditer(text):
        body = next(
            group for group in (match[1], match[2], match[3], match[5], match[6]) if group is not None
        )
        found[_bare(body)] += 1
    for match in _EQUATION.finditer(_FORMULAS.sub(" ", text)):
        found[_bare(match[0]).strip(".,;:!?()[]\"'")] += 1
    return found


def _bare(formula: str) -> str:
    return re.sub(r"\\[,;:! ]|\\(?:left|right|displaystyle)\b|\s|~", "", formula).rstrip(".,;")


def code(text: str) -> tuple[Counter[str], str]:
    """Pieces of code (fenced, indented, inline), and the text without them."""
    found: Counter[str] = Counter()

    def take(match: re.Match[str]) -> str:
        if match.re is _INDENTED and not _looks_like_code(match[0]):
            return match[0]
        body = match[2] if match.re is _FENCED else match[1] if match.re is _INLINE else match[0]
        lines = [line.rstrip() for line in body.strip("\n").split("\n")]
        least = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
        found["\n".join(line[least:] for line in lines).strip("\n")] += 1
        return "\n"

    for pattern in (_FENCED, _INDENTED):
        text = pattern.sub(take, text)
    text = _INLINE.sub(lambda match: " " + take(match).strip("\n"), text)
    found.pop("", None)
    return found, text


def _looks_like_code(block: str) -> bool:
    """Whether half of an indented block's lines have marks that prose has not: much prose is indented."""
    lines = [line for line in block.splitlines() if line.strip()]
    return sum(bool(_CODE_LINE.search(line)) for line in lines) * 2 > len(lines)


def capitalised(text: str) -> list[tuple[str, bool]]:
    """Words with a capital in them, without a possessive, and whether each begins a sentence or a line."""
    found = []
    for match in _CAPITAL.finditer(text):
        word = re.sub(r"'s?$", "", match[0])
        if word != word.lower():
            before = text[: match.start()].rstrip(" \t\"'“‘([*_#-")
            found.append((word, not before or before[-1] in ".!?:\n>|"))
    return found


def words(text: str) -> list[str]:
    """Words of letters, case folded."""
    return [word.casefold() for word in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text)]


def sentences(text: str) -> list[str]:
    """Sentences, more or less: cut after end marks and at empty lines."""
    return [
        part
        for part in re.split(r"(?<=[.!?])[\"'”)]*\s+(?=[\"'“(]?[A-Z0-9\\$])|\n\s*\n", text)
        if part.strip()
    ]
