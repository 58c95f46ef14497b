"""Licences of files, by header or by the licence file above them, and expressions of several."""

from __future__ import annotations

import os
from importlib.metadata import distribution
from pathlib import Path

import pytest

from megatron_davinci.darwin.catalogue import STEPS
from megatron_davinci.darwin.licences import allowed, licence_of_text
from megatron_davinci.darwin.provenance import begin
from tests.darwin.test_rules import document


def fate(licence, **parameters):
    step = STEPS["licence"](STEPS["licence"].Parameters(**parameters))
    return step.apply(document("x", licence)).drop


def test_licence():
    assert fate("GPL-3.0", drop=["gpl*"]) == "licence"
    assert fate("MIT", drop=["gpl*"]) is None
    assert fate("CC-BY-NC-4.0", keep=["cc-by-4*", "mit"]) == "licence"
    assert fate(None) is None and fate(None, unknown="drop") == "no_licence"
    assert fate("MIT OR GPL-3.0", keep=["mit"]) is None
    assert fate("MIT AND CC-BY-NC-4.0", drop=["*-nc-*"]) == "licence"


def test_operators_are_written_in_any_case():
    assert fate("MIT and CC-BY-NC-4.0", keep=["mit*"]) == "licence"
    assert fate("MIT or GPL-3.0", drop=["*gpl*"]) is None
    assert fate("GPL-2.0 or later", drop=["gpl-2.0*"]) == "licence"
    assert fate("MIT and GPL-2.0 or newer", drop=["gpl-2.0*"]) == "licence"
    assert fate("GPL-2.0 or any later version", drop=["gpl-2.0*"]) == "licence"


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("A", True), ("B", False), ("A OR B", True), ("A AND B", False), ("B OR A AND A", True),
        ("(A OR B) AND B", False), ("B AND B OR A", True), ("B AND (B OR A)", False), ("(A)", True),
        ("A WITH X", False), ("A and B", False), ("B or A", True), ("A OR (B", False), ("Some licence here", False),
    ],
)  # fmt: skip
def test_an_expression_is_judged_by_its_parts(expression, expected):
    assert allowed(expression, lambda licence: licence == "A") is expected


def test_what_is_no_expression_is_one_name():
    assert allowed("(" * 3000 + "A AND B" + ")" * 3000, lambda licence: licence != "A") is True


FORMS = "Redistribution and use in source and binary forms are permitted: "


@pytest.mark.parametrize(
    "text, name",
    [
        (
            "Eclipse Public License - v 2.0. Or the GNU General Public License, version 2.0, or later",
            "EPL-2.0",
        ),
        (FORMS + "retain the notice", "BSD-2-Clause"),
        (FORMS + "the name of the author may not be used to endorse or promote products", "BSD-3-Clause"),
        (FORMS + "All advertising materials mentioning features. Neither the name of", "BSD-4-Clause"),
        (FORMS + '"Apache Software Foundation" must not be used to endorse or promote', "Apache-1.1"),
        (FORMS + "our name must not be used to endorse or promote", None),
        ("SPDX-License-Identifier: MIT. See LICENSE (in this folder)", "MIT"),
        ("SPDX-License-Identifier: MIT License", "MIT"),
        (
            "<!-- SPDX-License-Identifier: (MIT OR GPL-2.0 WITH x-note) AND ISC -->",
            "(MIT OR GPL-2.0 WITH x-note) AND ISC",
        ),
        ("SPDX-License-Identifier:\n\nThis is a text", None),
    ],
)
def test_words_that_several_licences_have_are_no_sign_of_one(text, name):
    assert licence_of_text(text) == name


@pytest.mark.parametrize(
    "package, name", [("jinja2", "BSD-3-Clause"), ("rich", "MIT"), ("tokenizers", None), ("hypothesis", "MPL-2.0"),
                      ("transformers", "Apache-2.0"), ("pyyaml", "MIT")]
)  # fmt: skip
def test_licence_files_of_installed_packages_are_known(package, name):
    files = [
        file
        for file in distribution(package).files or []
        if file.name.upper().startswith(("LICENSE", "COPYING"))
    ]
    found = {licence_of_text(Path(file.locate()).read_text()) for file in files[:1]}
    assert found <= {name} and (found or name is None)


def test_the_header_counts_before_the_folder_and_the_nearest_folder_first(tmp_path):
    inner = tmp_path / "repository" / "vendored" / "deep"
    inner.mkdir(parents=True)
    (tmp_path / "LICENSE").write_text("SPDX-License-Identifier: GPL-2.0-only\n")
    (tmp_path / "repository" / ".git").mkdir()
    (tmp_path / "repository" / "COPYING.md").write_text(
        "# MIT\n\n> Permission is hereby granted, free of charge,\n> to any person obtaining a copy of"
    )
    (tmp_path / "repository" / "license.py").write_text("print('Apache License, Version 2.0')")
    (tmp_path / "repository" / "vendored" / "LICENSE").write_text("Our own words, which nobody knows.")

    def found(text, path, licence=None, **parameters):
        each = begin(text, "s/1", "s", licence, {"path": str(path), "format": "code"})
        outcome = STEPS["find_licence"](STEPS["find_licence"].Parameters(**parameters)).apply(each)
        return each.metadata["licence"], outcome.notes and outcome.notes["by"]

    plain = "int main(void) { return 0; }"
    header = '/*\n * Licensed under the Apache\n * License, Version 2.0 (the "License")\n */\n' + plain
    assert found(header, inner / "a.c") == ("Apache-2.0", "header")
    assert found("# SPDX-License-Identifier: MIT OR BSD-2-Clause\n", inner / "a.py") == (
        "MIT OR BSD-2-Clause",
        "header",
    )
    assert found(plain, inner / "a.c") == ("MIT", os.fspath(tmp_path / "repository" / "COPYING.md"))
    assert found(plain, inner / "a.c", folders_up=1) == (None, None)
    (tmp_path / "repository" / "COPYING.md").unlink()
    assert found(plain, inner / "b.c", folders_up=0) == (None, None)
    assert found(header, inner / "a.c", "Zlib") == ("Zlib", None)
    assert found(header, inner / "a.c", "Zlib", override=True) == ("Apache-2.0", "header")
    # The folder above the one with .git is another project's.
    outside = tmp_path / "other"
    (outside / ".git").mkdir(parents=True)
    assert found(plain, outside / "x.c") == (None, None)
