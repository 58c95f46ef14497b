"""Level 2: personal data and secrets, replaced by marks: mail addresses, IP addresses, telephone numbers, keys.

The kinds are those of datatrove's formatter (mail, public IP addresses) and of StarCoder's redaction (2305.06161,
section 4: keys too). What differs from datatrove's: `react@18.2.0` is no address, nor are numbers of versions and
sections (all parts small, or five of them); the mark is always the same, where its replacements take turns by the
order of documents, which differs with the number of tasks; IPv6 counts too.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Literal

from datatrove.data import Document
from datatrove.pipeline.formatters.pii import public_ip_validator
from pydantic import Field

from megatron_davinci.darwin.secrets import replace, replace_keys
from megatron_davinci.darwin.step import KEEP, Outcome, Step, StepParameters

Kind = Literal["email", "ip", "phone", "key"]
Replaced = tuple[str, int]

# RFC 5321: at most 64 characters before the sign, labels of at most 63. The bounds also keep the search linear.
# Of the marks that RFC 5322 lets stand before it, those are left out that stand around addresses: quotes, `=`, `/`.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9_])[A-Za-z0-9_](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?!-?[A-Za-z0-9])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])")
_VERSION = 31  # four parts up to this are a version or a section: of addresses one in 4,096 is such
# A colon behind it is a sentence's, but for two of them.
_IPV6 = re.compile(
    r"(?<![\w:.])[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]{1,33}(?:[0-9A-Fa-f]|(?<=::))(?!\w|:[0-9A-Fa-f:])"
)
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")  # what is given out; `a::b` of a program is outside
_PART = re.compile(r"(?:\S*\) )?\S+")  # of what blanks part
_DATE = re.compile(r"(?:19|20)[0-9]{2}[-./ ][01]?[0-9][-./ ][0-3]?[0-9]")
# With a country's code, in any grouping; without, in groups, since plain digits are most often something else.
_PHONE = re.compile(
    r"(?<![\w.,+$€£-])(?:\+[0-9](?:[ ().\-/]{0,2}[0-9]){6,14}"
    r"|\(?[0-9]{2,5}[)]?[ .\-/]{1,2}[0-9]{2,5}(?:[ .\-/][0-9]{2,5}){1,4})(?![\w]|[.,:-][0-9])"
)
# Of North America, with the 1 that is dialled before the area code: a group of one digit is one there only.
_LONG_DISTANCE = re.compile(
    r"(?<![\w.,+$€£-])1[ .\-]\(?[2-9][0-9]{2}\)?[ .\-]{1,2}[2-9][0-9]{2}[ .\-][0-9]{4}(?![\w]|[.,:-][0-9])"
)


class Pii(Step):
    """Mail addresses, IP addresses, telephone numbers and keys become marks, which are counted."""

    name = "pii"
    level = 2
    version = 3
    edits = True
    about = "mail and public IP addresses, telephone numbers, keys and passwords, replaced by marks such as <EMAIL>"

    class Parameters(StepParameters):
        """Parameters of `pii`.

        Attributes:
            kinds: What is looked for.
            regions: Countries (ISO 3166) in whose form a telephone number without a country's code counts as one.
            public_ips_only: Leave addresses that name no machine of the open network, such as 192.168.0.1.
        """

        kinds: list[Kind] = Field(default=["email", "ip", "phone", "key"], min_length=1)
        regions: list[str] = Field(default=["US"])
        public_ips_only: bool = True

    parameters: Parameters

    def find_model(self) -> str | None:
        """The library that knows the world's telephone numbers, with its version."""
        return f"phonenumbers {version('phonenumbers')}" if "phone" in self.parameters.kinds else None

    def apply(self, document: Document) -> Outcome:
        """Replace, kind by kind. Keys go first: what looks like an address inside one is none."""
        text, counts = document.text, Counter[str]()
        replace: dict[Kind, Callable[[str], Replaced]] = {
            "key": replace_keys,
            "email": _replace_emails,
            "ip": lambda text: _replace_ips(text, self.parameters.public_ips_only),
            "phone": lambda text: _replace_phones(text, self.parameters.regions),
        }
        for kind, action in replace.items():
            if kind in self.parameters.kinds:
                text, counts[kind] = action(text)
        found = {kind: count for kind, count in counts.items() if count}
        if not found:
            return KEEP
        return Outcome(text=text, notes={"replaced": found}, counts=found)


def _replace_emails(text: str) -> Replaced:
    return _EMAIL.subn("<EMAIL>", text) if "@" in text else (text, 0)


def _replace_ips(text: str, public_only: bool) -> Replaced:
    def four(found: re.Match[str]) -> bool:
        small = max(map(int, found[0].split("."))) <= _VERSION
        return public_ip_validator(found[0], public_only) and not (small and public_ip_validator(found[0]))

    def six(found: re.Match[str]) -> bool:
        try:
            address = ipaddress.IPv6Address(found[0])
        except ValueError:
            return False
        return not public_only or address in _GLOBAL_IPV6

    text, count = replace(_IPV4, "<IP>", text, four)
    if "::" not in text and text.count(":") < 7:
        return text, count
    text, more = replace(_IPV6, "<IP>", text, six)
    return text, count + more


def _replace_phones(text: str, regions: list[str]) -> Replaced:
    import phonenumbers

    count = 0

    def valid(number: str, regions: Sequence[str | None]) -> bool:
        for region in regions:
            try:
                if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
                    return True
            except phonenumbers.NumberParseException:
                pass
        return False

    def judge(number: str) -> bool:
        return not _DATE.match(number) and valid(number, [None] if number.startswith("+") else regions)

    def longest(found: re.Match[str]) -> str:
        """A number may have another behind it: what is none with it may be one without."""
        nonlocal count
        number = found[0]
        if not number.startswith("+") and not judge(number):
            # Without blanks in it: rows of numbers are no telephone numbers.
            return _PART.sub(lambda part: single(part[0]), number)
        while not judge(number):
            if " " not in number:
                return found[0]
            number = number[: number.rindex(" ")]
        count += 1
        return "<PHONE>" + found[0][len(number) :]

    def single(part: str) -> str:
        nonlocal count
        if not (_PHONE.fullmatch(part) and judge(part)):
            return part
        count += 1
        return "<PHONE>"

    dialled = [region for region in regions if phonenumbers.country_code_for_region(region) == 1]
    if dialled:
        text, count = replace(_LONG_DISTANCE, "<PHONE>", text, lambda found: valid(found[0], dialled))
    return _PHONE.sub(longest, text), count
