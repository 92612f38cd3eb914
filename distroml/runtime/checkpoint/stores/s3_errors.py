"""What went wrong at an S3 endpoint, and what to do: try again, or tell people how to help it. Pure.

Errors of the libraries are not passed on: their texts are the server's. What is told is the code, and advice of ours.
"""

from __future__ import annotations

import time
from enum import Enum

from msgspec import Struct

from distroml.runtime.checkpoint.stores.redaction import redacted
from distroml.runtime.checkpoint.stores.retrying import asked_wait_s


class Kind(Enum):
    """What a failed request means."""

    MISSING = "there is no such object"
    TAKEN = "the name is taken"
    UNSATISFIABLE = "the range begins behind the end"
    NO_UPLOAD = "the upload is unknown"
    AGAIN = "another attempt may succeed"
    CREDENTIALS = "the credentials were refused"
    REFUSED = "no attempt would succeed"


class Failure(Struct, frozen=True):
    """One failed request."""

    kind: Kind
    detail: str
    """A clause for people: what went wrong and what to do."""
    asked_wait_s: float = 0.0


class Incomplete(Exception):
    """Fewer bytes arrived than were announced, or others than were stored."""


_NEEDS = (
    "they need s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket, s3:AbortMultipartUpload and "
    "s3:ListBucketMultipartUploads for it"
)
_REGION = "the bucket is in another region: say which in the URL (?region=…) or with --s3-region"
_RENEW = "the credentials have expired: renew those that this node has"

_BY_CODE: dict[str, tuple[Kind, str]] = {
    "NoSuchKey": (Kind.MISSING, "there is no such object"),
    "404": (Kind.MISSING, "there is no such object"),
    "NoSuchUpload": (Kind.NO_UPLOAD, "its upload was aborted meanwhile"),
    "InvalidRange": (Kind.UNSATISFIABLE, "the range begins behind the end"),
    "416": (Kind.UNSATISFIABLE, "the range begins behind the end"),
    "PreconditionFailed": (Kind.TAKEN, "the name is taken"),
    "412": (Kind.TAKEN, "the name is taken"),
    "ConditionalRequestConflict": (Kind.AGAIN, "another writer is at the same name"),
    "409": (Kind.AGAIN, "another writer is at the same name"),
    "OperationAborted": (Kind.AGAIN, "another writer is at the same name"),
    "BadDigest": (Kind.AGAIN, "the bytes were altered on their way"),
    "XAmzContentChecksumMismatch": (Kind.AGAIN, "the bytes were altered on their way"),
    "IncompleteBody": (Kind.AGAIN, "the bytes were cut short on their way"),
    "RequestTimeout": (Kind.AGAIN, "the bytes came too slowly"),
    "SlowDown": (Kind.AGAIN, "it asks for fewer requests"),
    "Throttling": (Kind.AGAIN, "it asks for fewer requests"),
    "InternalError": (Kind.AGAIN, "it failed"),
    "NoSuchBucket": (
        Kind.REFUSED,
        "the bucket does not exist there: create it, or correct the URL of the store",
    ),
    "InvalidBucketName": (Kind.REFUSED, "the bucket's name is not allowed: correct the URL"),
    "InvalidAccessKeyId": (
        Kind.CREDENTIALS,
        "the access key is not known there: give this node the credentials of this endpoint",
    ),
    "SignatureDoesNotMatch": (
        Kind.CREDENTIALS,
        "the secret key does not belong to the access key: correct this node's credentials",
    ),
    "ExpiredToken": (Kind.CREDENTIALS, _RENEW),
    "TokenRefreshRequired": (Kind.CREDENTIALS, _RENEW),
    "InvalidToken": (Kind.CREDENTIALS, "the session token is not valid there: renew this node's"),
    "AccessDenied": (Kind.CREDENTIALS, f"this node's credentials do not allow it: {_NEEDS}"),
    "403": (
        Kind.CREDENTIALS,
        f"this node's credentials are not accepted or do not allow it: {_NEEDS}",
    ),
    "AllAccessDisabled": (Kind.REFUSED, "the bucket is disabled"),
    "RequestTimeTooSkewed": (Kind.REFUSED, "the clock of this node is wrong: set it"),
    "PermanentRedirect": (Kind.REFUSED, _REGION),
    "AuthorizationHeaderMalformed": (Kind.REFUSED, _REGION),
    "IllegalLocationConstraintException": (Kind.REFUSED, _REGION),
    "301": (Kind.REFUSED, _REGION),
    "307": (Kind.AGAIN, "the bucket is being moved"),
    "NotImplemented": (
        Kind.REFUSED,
        "it does not know this request; writes with If-None-Match and checksums are needed "
        "(AWS, or a current MinIO, Ceph or Garage)",
    ),
    "501": (Kind.REFUSED, "it does not know this request; writes with If-None-Match are needed"),
    "QuotaExceeded": (Kind.AGAIN, "there is no room: make some"),
    "XMinioStorageFull": (Kind.AGAIN, "there is no room: make some"),
}
_NO_CREDENTIALS = (
    "this node has no usable credentials: give it some with --s3-credentials-file, --s3-profile, or "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in its environment"
)
_BY_CLASS: dict[str, tuple[Kind, str]] = {
    "NoCredentialsError": (Kind.CREDENTIALS, _NO_CREDENTIALS),
    "PartialCredentialsError": (Kind.CREDENTIALS, _NO_CREDENTIALS),
    "CredentialRetrievalError": (Kind.CREDENTIALS, _NO_CREDENTIALS),
    "TokenRetrievalError": (Kind.CREDENTIALS, _NO_CREDENTIALS),
    "SSOTokenLoadError": (Kind.CREDENTIALS, _NO_CREDENTIALS),
    "UnauthorizedSSOTokenError": (Kind.CREDENTIALS, _RENEW),
    "ProfileNotFound": (
        Kind.CREDENTIALS,
        "the profile of --s3-profile or AWS_PROFILE is not there",
    ),
    "ConfigParseError": (Kind.REFUSED, "the file with AWS settings cannot be read"),
    "ConfigNotFound": (Kind.REFUSED, "the file with AWS settings is not there"),
    "ParamValidationError": (Kind.REFUSED, "the bucket's name is not allowed: correct the URL"),
    "SSLError": (
        Kind.REFUSED,
        "its certificate is not trusted: AWS_CA_BUNDLE may name the authority",
    ),
    "EndpointConnectionError": (Kind.AGAIN, "nobody answers there"),
    "ConnectTimeoutError": (Kind.AGAIN, "nobody answers there"),
    "ReadTimeoutError": (Kind.AGAIN, "it does not answer in time"),
    "AioReadTimeoutError": (Kind.AGAIN, "it does not answer in time"),
    "TimeoutError": (Kind.AGAIN, "it is too slow"),
    "ConnectionClosedError": (Kind.AGAIN, "it closed the connection"),
    "ResponseStreamingError": (Kind.AGAIN, "it closed the connection"),
    "IncompleteReadError": (Kind.AGAIN, "its answer was cut short"),
    "ClientPayloadError": (Kind.AGAIN, "its answer was cut short"),
    "HTTPClientError": (Kind.AGAIN, "the connection failed"),
    "ResponseParserError": (Kind.AGAIN, "its answer is not S3's"),
}


def understand(error: Exception) -> Failure:
    """What a request's exception means."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and isinstance(response.get("Error"), dict):
        return _answered(response)
    if isinstance(error, Incomplete):
        return Failure(Kind.AGAIN, str(error))
    for known in type(error).__mro__:
        if known.__name__ in _BY_CLASS:
            return Failure(*_BY_CLASS[known.__name__])
    if isinstance(error, OSError) or type(error).__module__.startswith("aiohttp"):
        return Failure(Kind.AGAIN, "the connection failed")
    return Failure(Kind.REFUSED, f"{type(error).__name__}: {redacted(str(error))}")


def _answered(response: dict[str, object]) -> Failure:
    """An error that the server itself told."""
    told, meta = response["Error"], response.get("ResponseMetadata")
    assert isinstance(told, dict)
    meta = meta if isinstance(meta, dict) else {}
    code, status = str(told.get("Code", "")), meta.get("HTTPStatusCode")
    headers = meta.get("HTTPHeaders")
    asked = headers.get("retry-after", "") if isinstance(headers, dict) else ""
    wait_s = asked_wait_s(str(asked), time.time()) if asked else 0.0
    for key in (code, str(status)):
        if key in _BY_CODE:
            kind, detail = _BY_CODE[key]
            return Failure(kind, f"{detail} ({_named(code, status)})", wait_s)
    if status == 429 or (isinstance(status, int) and status >= 500):
        return Failure(Kind.AGAIN, f"it failed ({_named(code, status)})", wait_s)
    message = redacted(str(told.get("Message", "")))
    return Failure(Kind.REFUSED, f"it refused ({_named(code, status)}): {message}", wait_s)


def _named(code: str, status: object) -> str:
    code = redacted(code)[:64]
    return f"HTTP {status}" if code in ("", str(status)) else f"{code}, HTTP {status}"
