"""A page as a browser shows it: no network, no screen."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 1366, 768  # of a common laptop

# Added behind the page: what only a browser knows of it.
_LOOK = """<script>addEventListener("load", () => {
  const box = one => one.getBoundingClientRect();
  document.body.dataset.seen = JSON.stringify({
    images: [...document.images].map(one => one.complete && one.naturalWidth > 0),
    drawings: [...document.querySelectorAll("svg")].filter(one => one.closest("details:not([open])") === null)
      .map(one => box(one).width > 0 && box(one).height > 0 && one.children.length > 0),
    width: document.documentElement.scrollWidth,
    size: Math.min(...[...document.querySelectorAll("p, td, th, li, svg text")]
      .filter(one => box(one).width > 0)
      .map(one => parseFloat(getComputedStyle(one).fontSize) * (one.ownerSVGElement
        ? box(one.ownerSVGElement).width /
          (one.ownerSVGElement.viewBox.baseVal.width || box(one.ownerSVGElement).width) : 1))),
  });
});</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser says of a page.

    Attributes:
        images: Of each, whether it is there.
        drawings: Of each, whether it takes room.
        width: Pixels that the page wants.
        size: Pixels of the smallest letters.
        console: What the page had the console say.
    """

    images: list[bool]
    drawings: list[bool]
    width: int
    size: float
    console: list[str]


def look(page: Path, scratch: Path) -> Seen:
    """Open a page in a browser of a laptop's size, with no network.

    Args:
        page: The file.
        scratch: A folder for the browser.
    """
    from tests.need_chromium import BROWSER

    copy = page.with_name(f"seen-{page.name}")  # beside it, where what it links to is
    text = page.read_text(encoding="utf-8")
    # The page allows no script: ours alone is let in, and whatever else it would load is still refused and told.
    text = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy.write_text(text + _LOOK, encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
    command += [f"--user-data-dir={scratch / 'profile'}", f"--window-size={WIDTH},{HEIGHT}"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    copy.unlink()
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"the page was not loaded: {done.stderr[-1000:]}"
    seen = json.loads(found[1].replace("&quot;", '"'))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**seen, console=console)
