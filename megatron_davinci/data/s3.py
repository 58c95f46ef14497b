"""Objects in S3 as blobs: range reads through boto3, each of the very object that was opened."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_davinci.data.block_cache import BlockCache
from megatron_davinci.data.places import Place, S3Options, S3Path
from megatron_davinci.data.read_ahead import THREADS, Reader, Remote
from megatron_davinci.data.s3_errors import absent, changed, explained, is_absent
from megatron_davinci.errors import DataError, EnvironmentProblem

_CONNECTIONS = 4 * THREADS  # the background's and those of the threads that read


class S3Blob:
    """An object in S3, open: every read is of the version that its ETag named at opening.

    Pickles; an unpickled or forked copy reads on through its own process' connection.

    Args:
        place: The object.

    Raises:
        DataError: There is none.
        EnvironmentProblem: It cannot be reached, access is refused, or boto3 is not installed.
    """

    fd = -1

    def __init__(self, place: S3Path) -> None:
        self.place: Place = place
        connection = _connection(place.options)
        head = connection.head(place)
        if head is None:
            raise absent(place, "HTTP 404: no such bucket or no such key")
        self.size, etag = head
        # The server too: the same bucket and key elsewhere is another object.
        told = (connection.endpoint, place.bucket, place.key, etag, self.size, place.options.block_bytes)
        self._remote = Remote(
            place, etag, self.size, hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
        )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `Blob.read_into`."""
        view = memoryview(buffer)
        if view.nbytes == 0:
            return
        if not 0 <= offset <= self.size - view.nbytes:
            raise DataError(
                "An object in S3 ends before the bytes that were asked for.",
                where=_where(self._remote.place, offset, offset + view.nbytes),
                found=f"{self.size:,} bytes",
            )
        _connection(self._remote.place.options).reader.read_into(self._remote, offset, view.cast("B"))

    def will_need(self, offset: int, nbytes: int) -> None:
        """As `Blob.will_need`: what is missing is fetched in the background. A failure is the reader's to meet."""
        if nbytes > 0 and 0 <= offset < self.size:
            _connection(self._remote.place.options).reader.will_need(self._remote, offset, nbytes)

    def close(self) -> None:
        """As `Blob.close`: forget what was read ahead."""
        _connection(self._remote.place.options).reader.let_go(self._remote)


def object_size(place: S3Path) -> int | None:
    """The size of an object in bytes; None if there is none.

    Raises:
        EnvironmentProblem: It cannot be found out.
    """
    head = _connection(place.options).head(place)
    return None if head is None else head[0]


class _Connection:
    """A process' client for one set of options, and what it reads through. Threads share it."""

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._client = _client(options)
        self.endpoint: str = self._client.meta.endpoint_url
        self.reader = Reader(self._get, _cache(options), options.block_bytes)

    def head(self, place: S3Path) -> tuple[int, str] | None:
        """Size and ETag of an object; None if there is none."""
        try:
            answer = self._client.head_object(Bucket=place.bucket, Key=place.key)
        except Exception as error:
            if is_absent(error):
                return None
            raise explained(error, place, str(place)) from error
        if not answer.get("ETag"):
            raise EnvironmentProblem(
                "The server gives no ETag, so that an object that is replaced could not be told.",
                where=place,
                do="use a server that gives ETags, or copy the source to a local disk",
            )
        return int(answer["ContentLength"]), str(answer["ETag"])

    def _get(self, remote: Remote, start: int, stop: int) -> bytes:
        where = _where(remote.place, start, stop)
        attempts = self._options.attempts
        for attempt in range(1, attempts + 1):
            answer = self._ask(remote, start, stop, where)
            try:
                content: bytes = answer["Body"].read()
                if len(content) == stop - start:
                    return content
                raise OSError(f"a body of {len(content):,} bytes instead of {stop - start:,}")
            except _broken() as error:
                # boto3 retries until the headers are there; a body that breaks off is ours to ask for again.
                answer["Body"].close()
                if attempt == attempts:
                    raise explained(error, remote.place, where, remote.etag) from error
            _pause(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, remote: Remote, start: int, stop: int, where: str) -> dict[str, Any]:
        place, etag = remote.place, remote.etag
        try:
            answer: dict[str, Any] = self._client.get_object(
                Bucket=place.bucket, Key=place.key, Range=f"bytes={start}-{stop - 1}", IfMatch=etag
            )
        except Exception as error:
            raise explained(error, place, where, etag) from error
        # A server may not know If-Match or Range; then the headers show it, before a body is read.
        problem: Exception | None = None
        if answer.get("ETag") != etag:
            problem = changed(where, f"ETag {answer.get('ETag')}", etag)
        elif answer.get("ContentRange") != (expected := f"bytes {start}-{stop - 1}/{remote.size}"):
            problem = EnvironmentProblem(
                "The server did not answer with the range that was asked for.",
                where=where,
                found=answer.get("ContentRange") or "the whole object",
                expected=expected,
                do="use a server that answers range requests, or copy the source to a local disk",
            )
        if problem is not None:
            answer["Body"].close()
            raise problem
        return answer


_connections: dict[tuple[S3Options, str | None], _Connection] = {}
_connections_lock = Lock()


def _connection(options: S3Options) -> _Connection:
    # The environment names the server where the options do not.
    key = options, _endpoint(options)
    found = _connections.get(key)
    if found is None:
        with _connections_lock:
            found = _connections.get(key)
            if found is None:
                found = _connections[key] = _Connection(options)
    return found


def _endpoint(options: S3Options) -> str | None:
    return options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _begin_anew() -> None:
    global _connections_lock
    # A forked process has neither the threads that fetch nor sockets of its own, and perhaps a lock that none frees.
    _connections.clear()
    _connections_lock = Lock()


os.register_at_fork(after_in_child=_begin_anew)


def _client(options: S3Options) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise EnvironmentProblem(
            "Reading from S3 needs boto3, which is not installed.",
            found=error,
            do="pip install 'megatron-davinci[s3]'",
        ) from error
    given = _endpoint(options)
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=options.region,
            config=Config(
                connect_timeout=options.connect_timeout_seconds,
                read_timeout=options.read_timeout_seconds,
                retries={"mode": "standard", "total_max_attempts": options.attempts},
                max_pool_connections=_CONNECTIONS,
                tcp_keepalive=True,
                # Servers other than AWS seldom have a host name for each bucket, or newer checksums.
                s3={"addressing_style": "path"} if given else None,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except Exception as error:
        raise EnvironmentProblem(
            "The client for S3 cannot be set up.",
            where=given,
            found=error,
            do="check the endpoint, the region, AWS_PROFILE and the files in ~/.aws",
        ) from error


def _broken() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    return BotoCoreError, HTTPError, OSError


def _pause(attempt: int) -> None:
    # As botocore's standard mode, so that machines that failed together do not come back together.
    time.sleep(random.random() * min(20, 2 ** (attempt - 1)))


def _cache(options: S3Options) -> BlockCache | None:
    if options.cache_bytes <= 0:
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification says
        base = "~/.cache"
    given = options.cache or Path(base) / "megatron-davinci" / "s3"
    try:
        return BlockCache(given.expanduser(), options.cache_bytes)
    except RuntimeError as error:
        # A container may run as a user whom nobody knows.
        raise EnvironmentProblem(
            "It cannot be told where the cache of S3 lies.",
            where="data.s3.cache",
            found=f"{given}: {error}",
            do="give the folder from / on, set HOME or XDG_CACHE_HOME, or do without by data.s3.cache_bytes: 0",
        ) from error


def _where(place: S3Path, start: int, stop: int) -> str:
    return f"{place}, bytes {start:,} to {stop:,}"
