"""Level 0 over HTTP: the pages of a list of addresses into WARC files, which a recipe then reads as a source.

What servers answered is stored as they sent it, so a corpus can be made again, and each document traced, without
asking anybody twice. Each address ends as a record of a WARC file or with a reason in `fetched.jsonl`; stopped, the
same command goes on with those that have neither.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx

from megatron_davinci.darwin.manners import Host, Manners, Refused, check_redirect, root_of, seconds_to_wait
from megatron_davinci.darwin.warc import MEDIA
from megatron_davinci.errors import DataError, DavinciError, EnvironmentProblem
from megatron_davinci.files import disk_errors, fsync_folder
from megatron_davinci.platform.background_process import try_lock

JOURNAL = "fetched.jsonl"
_FILE_BYTES = 1_000_000_000  # as Common Crawl's
_REDIRECTS = 5
_LATER = (429, 503)
_KEPT_HEADERS = ("content-type", "content-encoding", "content-language", "last-modified", "date", "etag")


class Store:
    """WARC files and the journal of a crawl; what was stored and not noted, at a kill, is taken back.

    Args:
        folder: Where they lie.
        agent: For the files' first record.

    Attributes:
        done: By address, what has become of it.
    """

    def __init__(self, folder: Path, agent: str) -> None:
        self.folder, self.agent = folder, agent
        with disk_errors(folder, "making a folder of pages"):
            folder.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        journal = folder / JOURNAL
        with disk_errors(journal, "opening the journal"):
            held = try_lock(journal)
        if held is None:
            raise EnvironmentProblem(
                "Another crawl is at work in this folder.",
                where=folder,
                do="wait for it, or give another --out",
            )
        self._held = held
        whole = _whole_lines(journal)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.done[entry["url"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                os.close(held)
                raise DataError(
                    "The journal of a crawl is damaged.",
                    where=f"{journal}, line {number:,}",
                    found=error,
                    do="take the line out; its address is fetched again",
                ) from error
        ends: Counter[str] = Counter()
        for entry in self.done.values():
            if "file" in entry:
                ends[entry["file"]] = max(ends[entry["file"]], entry["first"] + entry["bytes"])
        for path in folder.glob("crawl-*.warc.gz"):
            if path.name not in ends:
                path.unlink()
            elif path.stat().st_size > ends[path.name]:
                os.truncate(path, ends[path.name])
        self._number = max((int(name[6:11]) for name in ends), default=-1)
        self._warc: Any = None
        with disk_errors(journal, "writing the journal"):
            if journal.exists() and journal.stat().st_size != len(whole):
                os.truncate(journal, len(whole))
            self._journal = open(journal, "ab")  # noqa: SIM115

    def put(self, url: str, final: str, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Store an answer, and note that it is there."""
        head = "".join(
            f"{name}: {value}\r\n" for name, value in [*headers, ("Content-Length", str(len(body)))]
        )
        block = f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1", "replace") + body
        with disk_errors(self.folder, "writing a page"):
            if self._warc is None or self._warc.tell() > _FILE_BYTES:
                self._open()
            first = self._warc.tell()
            self._warc.write(
                gzip.compress(_record("response", block, "application/http; msgtype=response", final))
            )
            self._warc.flush()
            os.fsync(self._warc.fileno())
        place = {"file": Path(self._warc.name).name, "first": first, "bytes": self._warc.tell() - first}
        self._note({"url": url, **({"final": final} if final != url else {}), **place})

    def leave(self, url: str, reason: str, said: str) -> None:
        """Note why an address has no page."""
        self._note({"url": url, "reason": reason, "said": said})

    def _note(self, entry: dict[str, Any]) -> None:
        with disk_errors(self.folder / JOURNAL, "writing the journal"):
            self._journal.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._journal.flush()
        self.done[entry["url"]] = entry

    def _open(self) -> None:
        if self._warc is not None:
            self._warc.close()
        self._number += 1
        self._warc = open(self.folder / f"crawl-{self._number:05d}.warc.gz", "xb")  # noqa: SIM115
        about = f"software: megatron-davinci\r\nhttp-header-user-agent: {self.agent}\r\nrobots: obeyed\r\n".encode()
        self._warc.write(gzip.compress(_record("warcinfo", about, "application/warc-fields", None)))
        fsync_folder(self.folder)

    def close(self) -> None:
        """Let the files go. What is noted has been flushed; what a full disk cut off is taken back at a start."""
        for file in filter(None, (self._warc, self._journal)):
            with suppress(OSError):
                file.close()
        os.close(self._held)


def _whole_lines(journal: Path) -> bytes:
    content = journal.read_bytes() if journal.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _record(kind: str, block: bytes, media: str, url: str | None) -> bytes:
    target = f"WARC-Target-URI: {url}\r\n" if url else ""
    head = (
        f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{uuid.uuid4()}>\r\n{target}"
        f"WARC-Date: {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\r\n"
        f"Content-Type: {media}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def read_lists(paths: Iterable[Path]) -> tuple[list[str], int]:
    """The different addresses of files that hold one a line, and how many stood there again.

    Raises:
        DataError: A file cannot be read, or holds none.
    """
    found: dict[str, None] = {}
    lines = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("A list of addresses cannot be read.", where=path, found=error) from error
        own = [
            line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
        ]
        if not own:
            raise DataError("A list of addresses is empty.", where=path, expected="an address a line")
        lines += len(own)
        found.update(dict.fromkeys(own))
    return list(found), lines - len(found)


def fetch(
    urls: list[str], folder: Path, manners: Manners, tell: Callable[[int], None] = lambda done: None
) -> Counter[str]:
    """Fetch pages, or go on with it.

    Args:
        urls: Different addresses.
        folder: For WARC files and the journal.
        manners: Towards servers.
        tell: Is told now and then how many addresses are done.

    Returns:
        Addresses by what became of them: `stored`, or the reason.

    Raises:
        DataError: An address has neither a page nor a reason, which no crawl may end with.
        EnvironmentProblem: The disk refused, or another crawl is at work in the folder.
    """
    store = Store(folder, manners.agent)
    try:
        asyncio.run(_Crawl(store, manners, tell).all([url for url in urls if url not in store.done]))
    except ExceptionGroup as group:
        # Of one that a person can mend, that is what is to be said; tasks beside it have been stopped.
        raise next((one for one in group.exceptions if isinstance(one, DavinciError)), group) from None
    finally:
        store.close()
    counts = Counter(store.done[url].get("reason", "stored") for url in urls if url in store.done)
    if sum(counts.values()) != len(urls):
        raise DataError(
            "Addresses have been lost.",
            where=folder,
            found=f"{sum(counts.values()):,}",
            expected=f"{len(urls):,}",
        )
    return counts


class _Crawl:
    def __init__(self, store: Store, manners: Manners, tell: Callable[[int], None]) -> None:
        self.store, self.manners, self.tell = store, manners, tell
        self.hosts: dict[str, Host] = {}
        self.places = asyncio.Semaphore(manners.hosts)

    async def all(self, urls: list[str]) -> None:
        by_root: dict[str, list[str]] = {}
        for url in urls:
            try:
                by_root.setdefault(root_of(url), []).append(url)
            except Refused as why:
                self.store.leave(url, why.reason, why.said)
        limits = httpx.Limits(max_connections=2 * self.manners.hosts)
        headers = {"User-Agent": self.manners.agent, "Accept-Encoding": "gzip, deflate"}
        async with (
            httpx.AsyncClient(headers=headers, limits=limits, timeout=self.manners.seconds) as self.client,
            asyncio.TaskGroup() as group,
        ):
            for own in by_root.values():
                group.create_task(self._some(own))

    async def _some(self, urls: list[str]) -> None:
        async with self.places:
            for url in urls:
                try:
                    await self._page(url)
                except Refused as why:
                    self.store.leave(url, why.reason, why.said)
                self.tell(len(self.store.done))

    def _host(self, url: str) -> Host:
        root = root_of(url)
        if root not in self.hosts:
            self.hosts[root] = Host(root, self.manners, self._robots)
        return self.hosts[root]

    async def _robots(self, url: str) -> tuple[int, bytes]:
        for _ in range(_REDIRECTS):
            response, body = await self._answer(url, any_media=True)
            if not response.has_redirect_location:
                return response.status_code, body
            target = urljoin(url, response.headers["location"])
            check_redirect(url, target)
            url = target
        return 404, b""  # RFC 9309, 2.3.1.2: as if there were none

    async def _page(self, url: str) -> None:
        at = url
        for _ in range(_REDIRECTS + 1):
            response, body = await self._politely(at)
            if response.has_redirect_location:
                target = urljoin(at, response.headers["location"])
                check_redirect(url, target)
                at = target
                continue
            if response.status_code != 200:
                raise Refused(f"http_{response.status_code}", at)
            headers = [(name, value) for name, value in response.headers.items() if name in _KEPT_HEADERS]
            self.store.put(url, at, f"200 {response.reason_phrase or 'OK'}", headers, body)
            return
        raise Refused("redirect", f"more than {_REDIRECTS}")

    async def _politely(self, url: str) -> tuple[httpx.Response, bytes]:
        """An answer of a host that lets us ask, at its pace; asked again where it says later."""
        host = self._host(url)
        for attempt in range(self.manners.retries + 1):
            last = attempt == self.manners.retries
            async with host.lock:
                await host.permit(url)
                await host.turn()
                wait = self.manners.delay * 2 ** (attempt + 1)
                try:
                    response, body = await self._answer(url)
                except Refused as why:
                    host.asked(wait)
                    if last or why.reason not in ("no_connection", "timeout"):
                        raise
                    continue
                if response.status_code not in _LATER:
                    host.asked()
                    return response, body
                wait = max(wait, seconds_to_wait(response.headers.get("retry-after")))
                host.asked(min(wait, self.manners.patience))
                if last or wait > self.manners.patience:
                    return response, body
        raise AssertionError

    async def _answer(self, url: str, any_media: bool = False) -> tuple[httpx.Response, bytes]:
        """One request. The body is as it was sent, and is left unread where there is nothing to store."""
        try:
            async with asyncio.timeout(self.manners.seconds), self.client.stream("GET", url) as response:
                media = response.headers.get("content-type", "").split(";")[0].strip().lower()
                if response.status_code != 200 and not any_media:
                    return response, b""
                if not any_media and media and media not in MEDIA:
                    raise Refused("other_media", media)
                parts, have = [], 0
                async for part in response.aiter_bytes() if any_media else response.aiter_raw():
                    parts.append(part)
                    have += len(part)
                    if have > self.manners.max_bytes:
                        raise Refused("too_large", f"more than {self.manners.max_bytes:,} bytes")
                length = response.headers.get("content-length", "")
                if not any_media and length.isdigit() and int(length) != have:
                    raise Refused("no_connection", f"{have:,} of {length} bytes came")
                return response, b"".join(parts)
        except TimeoutError as error:
            raise Refused("timeout", f"no whole answer in {self.manners.seconds:g} seconds") from error
        except httpx.TimeoutException as error:
            raise Refused("timeout", type(error).__name__) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Refused("no_connection", f"{type(error).__name__}: {error}") from error
