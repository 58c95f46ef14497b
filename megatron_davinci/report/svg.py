"""From matplotlib's SVG to one that belongs on our page: its colours follow the theme, its ids are its own.

Matplotlib writes a document: a style rule for every element on the page, ids that repeat from plot to plot,
fixed colours, six decimals. Inlined as it is, two plots would share clip paths and both would be black on black
in the dark theme.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape

from megatron_davinci.report.colors import ALL

_VARIABLE = {colour.light: f"var(--{name}, {colour.light})" for name, colour in ALL.items()}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def themed_svg(document: str, *, label: str, id_prefix: str) -> str:
    """One `<svg role="img">` element that can stand in a page, or as a file of its own.

    Args:
        document: What matplotlib wrote, drawn in the light colours of `colors.ALL`.
        label: What the picture shows, for who does not see it (`aria-label`).
        id_prefix: Put before every id, so that no two plots of a page share one.
    """
    view_box = re.search(r'viewBox="([^"]+)"', document)
    start, end = document.index("<svg"), document.rindex("</svg>")
    body = document[document.index(">", start) + 1 : end]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = body.replace("xlink:href=", "href=")
    body = _outside_text(body, _restyle)
    body = _own_ids(body, id_prefix)
    body = re.sub(r">\s*\n\s*<", ">\n<", body).strip()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view_box[1] if view_box else "0 0 0 0"}" '
        f'role="img" aria-label="{escape(label)}" stroke-linejoin="round" stroke-linecap="butt">\n{body}\n</svg>'
    )


def _outside_text(body: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the tags only: a run may be named "#ffffff"."""
    return re.sub(r"<[^>]*>", lambda tag: change(tag[0]), body)


def _restyle(tag: str) -> str:
    tag = re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: _VARIABLE.get(found[0].lower(), found[0]), tag)
    # Matplotlib writes `font-family: ...` or, in older versions, the family at the end of `font: ...`.
    tag = re.sub(r"(font-family: |font: [^;\"]*?[\d.]+px )[^;\"]*", lambda found: found[1] + _FONT, tag)
    if ' d="' in tag:
        tag = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), tag)
    return tag


def _own_ids(body: str, prefix: str) -> str:
    used = set(re.findall(r'href="#([^"]+)"', body)) | set(re.findall(r"url\(#([^)]+)\)", body))

    def renamed(tag: str) -> str:
        tag = re.sub(
            r' id="([^"]*)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", tag
        )
        tag = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', tag)
        return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", tag)

    return _outside_text(body, renamed)
