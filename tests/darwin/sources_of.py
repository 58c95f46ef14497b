"""Raw files of the formats that are no text, good and broken, made byte by byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from xml.sax.saxutils import quoteattr


def record(kind: str, block: bytes, number: int, media: str = "application/http; msgtype=response") -> bytes:
    """A WARC record."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
        f"WARC-Date: 2024-05-06T07:08:09Z\r\nWARC-Target-URI: http://site.example/{number}\r\n"
        f"Content-Type: {media}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def answer(
    body: bytes, number: int, media: str = "text/html", status: str = "200 OK", more: str = ""
) -> bytes:
    """A server's answer as a record."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return record("response", head.encode() + body, number)


def pdf(lines: list[str]) -> bytes:
    """A PDF of one page with these lines as its text layer; none for a scan."""
    text = " ".join(f"({line}) Tj 0 -16 Td" for line in lines)
    content = f"BT /F1 12 Tf 60 700 Td {text} ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def page(words: str) -> bytes:
    """A web page."""
    return f"<html><body><main><h1>Title</h1><p>{words}</p></main></body></html>".encode()


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"9\r\n<p>chunke\r\n5\r\nd</p>\r\n0\r\n\r\n"
)


def write_crawl(path: Path) -> None:
    """A compressed crawl with good records, records of all sorts, a damaged member, and one that is cut off."""
    zipped = gzip.compress(page("packed words"))
    damaged = bytearray(gzip.compress(answer(page("never seen " * 50), 90)))
    damaged[len(damaged) // 2] ^= 0xFF
    damaged[-6] ^= 0xFF
    members = [
        record("warcinfo", b"software: a crawler", 0, "application/warc-fields"),
        record("request", b"GET / HTTP/1.1\r\n\r\n", 1, "application/http; msgtype=request"),
        answer(page("plain words"), 2),
        answer(zipped, 3, more="Content-Encoding: gzip\r\n"),
        record("response", CHUNKED, 4),
        answer("<p>été à Besançon</p>".encode("latin-1"), 5, "text/html; charset=iso-8859-1"),
        answer(page("gone"), 6, status="404 Not Found"),
        answer(b"\x89PNG....", 7, "image/png"),
        answer(pdf(["out of a crawl"]), 8, "application/pdf"),
        answer(b"z" * 60_000, 9, "text/plain"),
        record("response", b"192.0.2.1", 10, "text/dns"),
        bytes(damaged),
        record("conversion", b"text of a WET file", 12, "text/plain"),
        answer(b"\x00\x01\x02", 13, "text/plain"),
        b"no record at all",
        answer(page("after the second damage"), 15),
    ]  # fmt: skip
    whole = b"".join(m if m is members[11] or m is members[14] else gzip.compress(m) for m in members)
    path.write_bytes(whole + gzip.compress(answer(page("cut off " * 400), 16))[:-40])


def notebook(old: bool = False) -> str:
    """A notebook of format 4, or 3."""
    output = {"output_type": "stream", "text": ["4\n"]}
    if old:
        cells = [
            {"cell_type": "heading", "level": 2, "source": ["Old"]},
            {"cell_type": "code", "input": ["1 + 1"], "language": "python", "outputs": []},
        ]
        return json.dumps({"nbformat": 3, "metadata": {}, "worksheets": [{"cells": cells}]})
    cells = [
        {"cell_type": "markdown", "source": ["# Sums\n", "We add $a + b$."]},
        {"cell_type": "code", "source": ["x = 2\n", "print(x + x)"], "outputs": [output]},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    about = {"language_info": {"name": "python"}}
    return json.dumps({"nbformat": 4, "metadata": about, "cells": cells})


LATEX = r"""\documentclass{article}
\title{On \emph{Sums}}
\newcommand{\half}{\frac12}
\begin{document}
\maketitle
\section{First} % a remark to myself
Let $x_i \in \mathbb{R}$; then
\[ \sum_i x_i = \half . \]
See \cite{gauss} and 50\% more.
\begin{equation}\label{e} a^2 + b^2 = c^2 \end{equation}
\end{document}
"""


def post(**attributes) -> str:
    """A row of Posts.xml."""
    return "  <row " + " ".join(f"{key}={quoteattr(str(value))}" for key, value in attributes.items()) + " />"


def write_posts(path: Path) -> None:
    """A dump: threads whose answers stand anywhere, an answer to nothing, lines that are no posts."""
    rows = [
        post(Id=7, PostTypeId=1, AcceptedAnswerId=9, Title="Why < and &?", Body="<p>I <b>wonder</b>.</p>"),
        post(Id=8, PostTypeId=2, ParentId=7, Score=12,
             Body="<p>Because of votes.</p><pre><code>if a < b:\n  x\n</code></pre>"),
        post(Id=20, PostTypeId=2, ParentId=404, Score=1, Body="<p>to nobody</p>"),
        post(Id=3, PostTypeId=1, Title="Alone", Body="<p>No answer yet.</p>"),
        "  <row Id='no' />",
        "garbage",
        '  <row Id="30" PostTypeId="1" Title="cut />',
        post(Id=9, PostTypeId=2, ParentId=7, Score=2, Body="<p>The accepted one.</p>"),
    ]  # fmt: skip
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n<posts>\n' + "\n".join(rows) + "\n</posts>\n")
