"""Personal data and secrets: what is found, what is left, and datatrove's formatter on the same text."""

from __future__ import annotations

import re

import pytest
from datatrove.pipeline.formatters.pii import PIIFormatter
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import cases
from tests.darwin.making import STDLIB, prose
from tests.darwin.test_rules import judged

# Put together here, so that no line of this file is one that a scanner for leaked keys takes for real.
KEYS = {
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "github": "gh" + "p_" + "a1B2" * 9,
    "google": "AI" + "za" + "Sy0123456789abcdefghijklmnopqrstuvw",
    "hugging face": "h" + "f_" + "abcdefgHIJKLMNopqrstuvwxyzABCDEFGH",
    "slack": "xo" + "xb-" + "123456789012-abcdefABCDEF",
    "token": "ey" + "JhbGciOiJIUzI1NiJ9." + "ey" + "JzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_X",
    "openai": "s" + "k-proj-" + "Ab3dE6gH9jK2mN5pQ8rS1tU4vW7xY0zA",
}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("write to bob.smith+x@mail.example.co.uk.", "write to <EMAIL>."),
        ("x='a@b.org', `a@b.org` |a@b.org| c@d.org--", "x='<EMAIL>', `<EMAIL>` |<EMAIL>| <EMAIL>--"),
        (f"//x.org/?u={'7' * 70}&mail=a@b.org", f"//x.org/?u={'7' * 70}&mail=<EMAIL>"),
        ("npm i react@18.2.0 @types/node, @media print", None),
        ("from 93.184.216.34, not 192.168.0.1", "from <IP>, not 192.168.0.1"),
        ("section 3.0.5.30 of version 1.22.3.4, and 200.1.2.3.4", None),
        ("at [2001:4860:4860::8888]:53", "at [<IP>]:53"),
        ("2a00:1450:4001:81b::200e: refused, 2001:470::/32", "<IP>: refused, <IP>/32"),
        ("std::dec, a::b, dead::beef, 12:34:56, ::1", None),
        ("call (202) 555-0143 or +44 20 7946 0958 today", "call <PHONE> or <PHONE> today"),
        ("212-736-5000 24 hours, 212-736-5000 212-736-5001", "<PHONE> 24 hours, <PHONE> <PHONE>"),
        ("(212) 736-5000 5 days, +1 212 736 5000 5 days", "<PHONE> 5 days, <PHONE> 5 days"),
        ("2019-05-12 212-736-5000, 310 212 736 5000 99", "2019-05-12 <PHONE>, 310 212 736 5000 99"),
        (
            "1-800-356-9377, 1-415-555-2671, 1 (415) 555-2671; 1.415.555.2671.",
            "<PHONE>, <PHONE>, <PHONE>; <PHONE>.",
        ),
        (
            "1-100-356-9377, 1.415.555.26710, 1-415-555-267, v1.415.555.2671, 1,415,555,2671",
            None,
        ),
        ("2024-01-15 10:30, 978-0-306-40615-7, 10 20 30 40, 2025550143", None),
        ("api_key: 'aB3xY9kLm2PqRs8T'", "api_key: '<KEY>'"),
        ('password = "correct-horse-battery"; token = "<your token here>"', None),
        ("class='sk-estimator-doc-link-of-some-length-and-more'", None),
        *((f"x = {key} ", "x = <KEY> ") for key in KEYS.values()),
    ],
)
def test_what_is_replaced(text, expected):
    assert judged("pii", text).text == expected


def test_a_private_key_goes_whole():
    lines = "\n".join("MIIEpAIBAAKCAQEA7bq" * 3 for _ in range(9))
    label = "RSA PRIVATE " + "KEY"
    found = judged("pii", f"before\n-----BEGIN {label}-----\n{lines}\n-----END {label}-----\nafter")
    assert found.text == "before\n<KEY>\nafter"
    assert found.counts == found.notes["replaced"] == {"key": 1}


def test_kinds_and_regions_are_chosen():
    text = "a@example.org, 020 7946 0958, 10.0.0.1"
    assert judged("pii", text, kinds=["phone"]).text is None
    assert judged("pii", text, kinds=["phone"], regions=["GB"]).text == "a@example.org, <PHONE>, 10.0.0.1"
    assert judged("pii", "1-415-555-2671", kinds=["phone"], regions=["GB"]).text is None
    assert judged("pii", text, kinds=["ip"], public_ips_only=False).text.endswith("<IP>")


def test_once_replaced_nothing_is_found_again_and_ordinary_text_is_left():
    text = "\n".join([*KEYS.values(), "a@b.example.org", "93.184.216.34", "+44 20 7946 0958"])
    once = judged("pii", text).text
    assert once.count("<") == len(KEYS) + 3
    assert judged("pii", once).text is None
    module = (STDLIB / "textwrap.py").read_text()
    [address] = re.findall(r"\S+@\S+", module)
    assert (
        judged("pii", module).counts == {"email": 1} and address.strip("<>") not in judged("pii", module).text
    )
    assert sum(judged("pii", each).text is not None for each in prose()[:60]) <= 3


@cases(60)
@given(
    st.lists(st.sampled_from(["ann@x.org", "b.c@d.example", "12", "word", "x@", "@y", ",", "<", "8.8.8.800"]))
)
def test_addresses_that_datatrove_finds_are_found(words):
    text = " ".join(words)
    theirs = PIIFormatter(remove_ips=False, email_replacement="<EMAIL>").format(text)
    ours = judged("pii", text, kinds=["email"]).text
    assert (text if ours is None else ours) == theirs


def test_long_runs_take_no_time():
    assert (
        judged("pii", "a." * 200_000 + "@" + "b" * 100_000 + "1-" * 100_000, kinds=["email", "phone"]).text
        is None
    )
