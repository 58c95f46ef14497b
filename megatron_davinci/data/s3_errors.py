"""What S3 answers or fails to answer, as errors that say which object, which bytes and what to do."""

from __future__ import annotations

from typing import Any

from megatron_davinci.data.places import NotThere, S3Path
from megatron_davinci.errors import DataError, DavinciError, EnvironmentProblem

_RENEW = "renew the credentials (for AWS: `aws sso login`, or new keys), then resume"
_ALLOW = (
    "check which credentials are used (AWS_PROFILE, AWS_ACCESS_KEY_ID) and that they allow s3:GetObject on it; "
    "who may not list a bucket gets 403 for objects that are not there, too"
)
_CODES = {
    "ExpiredToken": ("The credentials for S3 have expired.", _RENEW),
    "ExpiredTokenException": ("The credentials for S3 have expired.", _RENEW),
    "TokenRefreshRequired": ("The credentials for S3 have expired.", _RENEW),
    "RequestTimeTooSkewed": ("S3 refused a request for this machine's clock.", "set the clock, then resume"),
    "InvalidAccessKeyId": ("S3 does not know the credentials.", _ALLOW),
    "SignatureDoesNotMatch": (
        "S3 refused the credentials' signature.",
        "check the secret key, the region and the endpoint; a proxy may have changed the request",
    ),
}


def absent(place: S3Path, said: object) -> NotThere:
    """There is no such object, or no such bucket."""
    return NotThere(
        "A data file is not there.",
        where=place,
        found=said,
        do="check the bucket, the key and, for a server other than AWS, the endpoint",
    )


def changed(where: str, found: object, etag: str) -> DataError:
    """The object is not the one that was opened."""
    return DataError(
        "An object in S3 was changed while it was being read.",
        where=where,
        found=found,
        expected=f"ETag {etag}, as when it was opened",
        do="restore the object; a source's objects must stay as they are for as long as runs read them",
    )


def is_absent(error: Exception) -> bool:
    """Whether a server said that there is no such object or bucket."""
    response = getattr(error, "response", None)
    return isinstance(response, dict) and _status(response) == 404


def explained(error: Exception, place: S3Path, where: str, etag: str | None = None) -> DavinciError:
    """The error that a reader of the run's output needs, from one that boto3 raised.

    Args:
        error: What boto3 raised, after its own retries.
        place: The object.
        where: The object and the bytes that were asked for.
        etag: What the object had to be.
    """
    import botocore.exceptions as of

    if isinstance(error, of.ClientError):
        return _answered(error, place, where, etag)
    options = place.options
    server = options.endpoint_url or "the S3 endpoint"
    if isinstance(error, of.ParamValidationError):
        return DataError("This is no address of an object.", where=place, found=error)
    if isinstance(
        error,
        of.NoCredentialsError | of.PartialCredentialsError | of.CredentialRetrievalError | of.ProfileNotFound,
    ):
        return EnvironmentProblem(
            "There are no credentials for S3.",
            where=where,
            found=error,
            do="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the machine a role, "
            "on every node",
        )
    if isinstance(error, of.TokenRetrievalError | of.SSOError):
        return EnvironmentProblem("The credentials for S3 have expired.", where=where, found=error, do=_RENEW)
    if isinstance(error, of.ConnectTimeoutError | of.ReadTimeoutError):
        return EnvironmentProblem(
            "S3 did not answer in time.",
            where=where,
            found=error,
            expected=f"a connection within {options.connect_timeout_seconds:g} s and bytes within "
            f"{options.read_timeout_seconds:g} s, {options.attempts} attempts",
            do=f"check the network to {server}, then resume; raise the timeouts or attempts if it is only slow",
        )
    return EnvironmentProblem(
        "S3 cannot be reached, or the connection broke.",
        where=where,
        found=f"{error} ({options.attempts} attempts)",
        do=f"check {server} and the network, then resume",
    )


def _answered(error: Any, place: S3Path, where: str, etag: str | None) -> DavinciError:
    response = error.response
    status, code = _status(response), str(response.get("Error", {}).get("Code", ""))
    message = response.get("Error", {}).get("Message") or "no message"
    tries = response.get("ResponseMetadata", {}).get("RetryAttempts", 0) + 1
    said = f"HTTP {status}" + (f" {code}" if code != str(status) else "") + f": {message}"
    said += f" ({tries} attempts)" if tries > 1 else ""
    if status == 404:
        return absent(place, said)
    if status in (412, 416) and etag is not None:
        return changed(where, said, etag)
    if code in _CODES:
        what, do = _CODES[code]
        return EnvironmentProblem(what, where=where, found=said, do=do)
    if status in (401, 403):
        return EnvironmentProblem("S3 refused access.", where=where, found=said, do=_ALLOW)
    if status in (429, 500, 502, 503, 504):
        return EnvironmentProblem(
            "S3 is overloaded or failing.",
            where=where,
            found=said,
            do="resume when it answers again; fewer read threads ask for less, more attempts wait for longer",
        )
    return EnvironmentProblem(
        "S3 refused a request.",
        where=where,
        found=said,
        do="check the region, the endpoint and the credentials: a request for an object's head gets no reason",
    )


def _status(response: dict[str, Any]) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
