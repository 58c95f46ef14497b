"""Keys, tokens and passwords in text, by the forms that their makers have published, and by how they are assigned."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

_PRIVATE = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----.{16,20000}?-----END (?P=kind)-----",
    re.DOTALL,
)
# Beginnings that belong to one maker each; what follows has the length and the alphabet of its documentation.
_ISSUED = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA)[A-Z2-7]{16}"  # Amazon Web Services
    r"|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,90}"  # GitHub
    r"|glpat-[A-Za-z0-9_-]{20,50}"  # GitLab
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|xox[abeoprs]-[A-Za-z0-9-]{20,250}"  # Slack
    r"|(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{24,99}"  # Stripe
    r"|sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,200}"  # OpenAI, Anthropic
    r"|hf_[A-Za-z]{34}"  # Hugging Face
    r"|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{80,250}"
    r"|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"  # SendGrid
    r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{16,1000}"  # JSON Web Token
    r")(?![A-Za-z0-9_-])"
)
_BEGINNINGS = (
    *("AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "AIza", "xox"),
    *("sk_", "rk_", "sk-", "hf_", "npm_", "pypi-", "SG.", "eyJ"),
)
# A quoted word that is assigned, and before it a name that says secret.
_ASSIGNED = re.compile(r"(?:[:=]|=>)\s{0,4}([\"'])(?P<value>[A-Za-z0-9+/_.=~!@#$%^&*-]{16,200})\1")
_NAME = re.compile(
    r"(?i)(?:secret|token|passw(?:or)?d|(?:api|access|auth|private)[_-]?key)[\w-]{0,20}[\"']?\s{0,4}:?\Z"
)
_LEAST_BITS = 3.2  # of a character: words and placeholders lie below, random keys of 16 characters above


def replace_keys(text: str) -> tuple[str, int]:
    """The text with `<KEY>` in the place of each key, and how many there were."""
    count = 0
    if "PRIVATE KEY" in text:
        text, count = _PRIVATE.subn("<KEY>", text)
    if any(beginning in text for beginning in _BEGINNINGS):
        text, issued = replace(_ISSUED, "<KEY>", text, _issued)
        count += issued

    def secret(found: re.Match[str]) -> bool:
        begin = found.start()
        return _random(found["value"]) and bool(_NAME.search(found.string[max(0, begin - 60) : begin]))

    def masked(found: re.Match[str]) -> str:
        return found[0].replace(found["value"], "<KEY>")

    text, assigned = replace(_ASSIGNED, masked, text, secret)
    return text, count + assigned


def replace(
    pattern: re.Pattern[str],
    mark: str | Callable[[re.Match[str]], str],
    text: str,
    judge: Callable[[re.Match[str]], bool],
) -> tuple[str, int]:
    """Put a mark in the place of what a pattern finds and `judge` confirms, and count it."""
    count = 0

    def decide(found: re.Match[str]) -> str:
        nonlocal count
        if not judge(found):
            return found[0]
        count += 1
        return mark if isinstance(mark, str) else mark(found)

    return pattern.sub(decide, text), count


def _issued(found: re.Match[str]) -> bool:
    """Keys that begin with `sk-` are told from style sheets' names by being drawn."""
    return not found[0].startswith("sk-") or _random(found[0][3:])


def _random(value: str) -> bool:
    """Whether a word looks drawn: letters and digits mixed, and many different ones."""
    if not (any(map(str.isdigit, value)) and any(map(str.isalpha, value))):
        return False
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return bits >= _LEAST_BITS
