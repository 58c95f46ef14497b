"""How to behave towards servers: robots.txt (RFC 9309), one request at a time to a host, and pauses between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from socket import inet_aton
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROBOTS_BYTES = 512_000  # RFC 9309 asks for at least 500 KiB


class Manners(NamedTuple):
    """What a crawl may do.

    Attributes:
        agent: The name that servers are told, with a way to reach whoever crawls: `example-crawl (mail@example.org)`.
        delay: Seconds between the end of one request to a host and the next; its robots.txt may ask for more.
        patience: Seconds beyond which a host's wish to wait means that its pages are left out.
        seconds: That one request may take, all of it.
        retries: After answers that say later (429, 503) and connections that fail.
        hosts: That are asked at once.
        max_bytes: Of one page, as it is sent.
    """

    agent: str
    delay: float = 1.0
    patience: float = 60.0
    seconds: float = 60.0
    retries: int = 2
    hosts: int = 16
    max_bytes: int = 32_000_000


class Refused(Exception):
    """Why a page is left out: one of few fixed words, and what there is to say of it."""

    def __init__(self, reason: str, said: object = "") -> None:
        super().__init__(reason, str(said))
        self.reason, self.said = reason, str(said)


class Host:
    """One server: what its robots.txt says, and when it may be asked again.

    Args:
        root: Scheme and authority, `https://example.org:8080`.
        manners: Of the crawl.
        ask: Fetches a robots.txt: its status and bytes; raises what a request raises.
    """

    def __init__(
        self, root: str, manners: Manners, ask: Callable[[str], Awaitable[tuple[int, bytes]]]
    ) -> None:
        self.root, self.manners, self._ask = root, manners, ask
        self.lock = asyncio.Lock()
        self._next = 0.0
        self._robots: Any = None
        self._known, self._closed = False, ""

    async def turn(self) -> None:
        """Wait until the host may be asked."""
        await asyncio.sleep(max(0.0, self._next - time.monotonic()))

    def asked(self, wait: float = 0.0) -> None:
        """A request has ended; the host may have wished to wait so many seconds."""
        self._next = time.monotonic() + max(wait, self._pause())

    def _pause(self) -> float:
        wished = self._robots.crawl_delay(self.manners.agent) if self._robots is not None else None
        return max(self.manners.delay, float(wished or 0))

    async def permit(self, url: str) -> None:
        """Ask robots.txt, which is fetched once.

        Raises:
            Refused: It forbids the page, or cannot be had; or asks for more patience than there is.
        """
        if not self._known:
            await self._learn()
        if self._closed:
            raise Refused("robots_unreachable", self._closed)
        if self._robots is None:
            return
        if not self._robots.can_fetch(url, self.manners.agent):
            raise Refused("robots", f"{self.root}/robots.txt forbids it")
        if self._pause() > self.manners.patience:
            raise Refused(
                "crawl_delay", f"{self.root}/robots.txt asks for {self._pause():g} seconds between pages"
            )

    async def _learn(self) -> None:
        from protego import Protego

        await self.turn()
        try:
            status, content = await self._ask(f"{self.root}/robots.txt")
        except Refused as error:
            self._closed = f"{error.reason}: {error.said}"
        else:
            if status >= 500 or status == 429:  # RFC 9309, 2.3.1.4: then all is forbidden
                self._closed = f"status {status}"
            elif status < 300:
                self._robots = Protego.parse(content[:ROBOTS_BYTES].decode("utf-8", "replace"))
        self._known = True
        self.asked()


def root_of(url: str) -> str:
    """Scheme and authority of an address.

    Raises:
        Refused: It is no address of the web.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise Refused("not_a_url", "http:// or https:// with a host, without a name and a password")
        _ = parts.port
    except ValueError as error:
        raise Refused("not_a_url", error) from error
    return f"{parts.scheme}://{parts.netloc.lower()}"


def check_redirect(begin: str, target: str) -> None:
    """A page of the open network may not send a crawl into the network that it runs in.

    Raises:
        Refused: The target is an address of a private network, and the first one was of another host.
    """
    root_of(target)
    host = (urlsplit(target).hostname or "").rstrip(".")
    if host == urlsplit(begin).hostname:
        return
    try:
        try:
            private = not ip_address(host).is_global
        except ValueError:  # 127.1, 2130706433 and 0x7f.1 are addresses to those who connect
            private = not ip_address(inet_aton(host)).is_global
    except OSError:
        private = host == "localhost" or host.endswith((".localhost", ".internal", ".local"))
    if private:
        raise Refused("redirect", f"into a private network: {target}")


def seconds_to_wait(header: str | None) -> float:
    """What a `Retry-After` asks for: seconds, or a date; 0 for none."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
