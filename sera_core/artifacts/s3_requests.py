"""Requests to one bucket through s3fs, with retries and time limits.

This is the only retry loop. Those of s3fs and botocore are off, because nested retries multiply: together
they sent 25 requests in 40 seconds to a busy server before they reported an error.
"""

import asyncio
import errno
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import aiohttp
from botocore import exceptions as botocore_errors
from botocore.parsers import ResponseParserError

from sera_core.artifacts.checks import MAX_RECORD_BYTES, mismatch_error
from sera_core.errors import StoreError

T = TypeVar("T")

S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "total_max_attempts": 1},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "s3": {"addressing_style": "path"},
    "max_pool_connections": 16,
}
_RETRY_STATUS = {408, 409, 429, 500, 502, 503, 504}
_RETRY_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch"}
_REDIRECTS = {301, 302, 307, 308}
_RETRY_ERRORS = (
    TimeoutError,
    ConnectionError,
    aiohttp.ClientError,
    botocore_errors.HTTPClientError,
    botocore_errors.ConnectionError,
    botocore_errors.IncompleteReadError,
    botocore_errors.ResponseStreamingError,
    botocore_errors.ReadTimeoutError,
    ResponseParserError,
)
_ACCESS_ERRORS = (
    PermissionError,
    botocore_errors.NoCredentialsError,
    botocore_errors.PartialCredentialsError,
    botocore_errors.CredentialRetrievalError,
)
_PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 5.0)
"""Seconds before the second try, the third, …; the last value repeats."""
_LONGEST = 100.0
"""Maximum seconds for a part of any size: with clean-up, less than two minutes."""


@dataclass(frozen=True)
class Patience:
    """Time limits and number of tries of requests; reaching a limit is an error."""

    answer: float = 20.0
    """Seconds without a response after which a request is sent again."""
    total: float = 55.0
    """Seconds after which a request fails. No operation needs more than two requests in sequence."""
    tries: int = 8
    """Maximum number of tries."""
    slowest: int = 384 * 1024
    """Bytes per second below which a transfer counts as stalled."""

    def one_request(self, size: int) -> float:
        """Maximum seconds for one try of a request that transfers `size` bytes."""
        return self.answer + size / self.slowest

    def all_tries(self, size: int) -> float:
        """Maximum seconds for all its tries together."""
        return min(_LONGEST, self.total + size / self.slowest)


@dataclass(frozen=True)
class Listed:
    """An object in a listing."""

    key: str
    bytes: int
    modified: datetime


class Requests:
    """Requests to one bucket. Every method is a coroutine of fsspec's loop."""

    def __init__(self, fs: Any, bucket: str, patience: Patience) -> None:
        self.fs, self.bucket, self.patience = fs, bucket, patience

    async def put(self, key: str, data: bytes) -> None:
        """Write an object, replacing any existing one."""
        await self._with_retries(
            "write",
            key,
            len(data),
            lambda: self._call("put_object", Key=key, Body=data, ContentLength=len(data)),
        )

    async def create(self, key: str, data: bytes) -> bytes:
        """Write an object unless it exists; returns the bytes that are stored now.

        A refused write may be our own: if the response to the first try was lost, the second is refused. So
        the stored bytes decide.
        """
        try:
            await self._with_retries(
                "create",
                key,
                len(data),
                lambda: self._call("put_object", Key=key, Body=data, IfNoneMatch="*"),
            )
            return data
        except _Refused as refused:
            winner = await self.read(key)
            if winner is None:
                raise StoreError(
                    f"{refused}, but the record does not exist; run again, and check the store with "
                    "`sera doctor`"
                ) from refused
            return winner

    async def read(self, key: str) -> bytes | None:
        """A whole small object, or None."""

        async def once() -> bytes:
            answer = await self._call("get_object", Key=key)
            size = answer["ContentLength"]
            with closing(answer["Body"]) as body:
                if size > MAX_RECORD_BYTES:
                    raise StoreError(
                        f"{self._where(key)}: {size:,} bytes are too many for a record; it was modified"
                    )
                return await _whole(body, size)

        try:
            return await self._with_retries("read", key, 0, once)
        except FileNotFoundError:
            return None

    async def read_range(self, key: str, start: int, stop: int, size: int | None = None) -> bytes:
        """Bytes start to stop of an object; with `size`, the object must have exactly that many bytes.

        Raises:
            FileNotFoundError: there is no such object.
        """

        async def once() -> bytes:
            whole = start == 0 and stop == size
            answer = await self._call("get_object", Key=key, **({} if whole else _range(start, stop)))
            with closing(answer["Body"]) as body:
                if not whole and "ContentRange" not in answer:
                    raise StoreError(
                        f"{self._where(key)}: the server ignores range requests and sends whole objects; "
                        "use another server (`sera doctor` tests it)"
                    )
                there = answer["ContentLength"] if whole else int(answer["ContentRange"].rpartition("/")[2])
                if size is not None and there != size:
                    raise mismatch_error(self._where(key), f"{there:,} bytes, but its record says {size:,}")
                return await _whole(body, stop - start)

        try:
            return await self._with_retries("read", key, stop - start, once)
        except _Refused as refused:
            what = f"it ends before byte {stop:,}, but its record says it is longer"
            raise mismatch_error(self._where(key), what) from refused

    async def size(self, key: str) -> int | None:
        """Bytes of an object, or None."""
        try:
            answer = await self._with_retries("find", key, 0, lambda: self._call("head_object", Key=key))
        except FileNotFoundError:
            return None
        return answer["ContentLength"]

    async def delete(self, key: str) -> None:
        """Remove an object if it exists."""
        await self._with_retries("remove", key, 0, lambda: self._call("delete_object", Key=key))

    async def listing(self, prefix: str, delimiter: str = "") -> AsyncIterator[Listed | str]:
        """Objects below a prefix and, with a delimiter, the folders; for display only."""
        more: dict[str, str] = {}
        while True:
            arguments = {"Prefix": prefix, "Delimiter": delimiter, **more}
            try:
                answer = await self._with_retries(
                    "list", prefix, 0, lambda given=arguments: self._call("list_objects_v2", **given)
                )
            except FileNotFoundError as error:
                raise self.listing_error(error, prefix) from error
            for found in answer.get("Contents", []):
                yield Listed(found["Key"], found["Size"], found["LastModified"])
            for found in answer.get("CommonPrefixes", []):
                yield found["Prefix"]
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    # ----------------------------------------------------------------------------------- files in parts

    async def begin_parts(self, key: str) -> str:
        """Start an upload in parts; returns its id."""
        answer = await self._with_retries(
            "write", key, 0, lambda: self._call("create_multipart_upload", Key=key)
        )
        return answer["UploadId"]

    async def put_part(self, key: str, upload: str, number: int, data: bytes) -> dict[str, Any]:
        """Upload one part, numbered from 1; returns its entry for `end_parts`."""
        part = {"UploadId": upload, "PartNumber": number, "Body": data}
        answer = await self._with_retries(
            "write", key, len(data), lambda: self._call("upload_part", Key=key, **part)
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    async def end_parts(self, key: str, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        """Complete the upload. If it is unknown, an earlier try completed it and its response was lost."""
        named = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        try:
            await self._with_retries(
                "write", key, 2**23, lambda: self._call("complete_multipart_upload", Key=key, **named)
            )
        except FileNotFoundError:
            if await self.size(key) != size:
                raise StoreError(
                    f"{self._where(key)}: the server lost the upload before it was complete; run again"
                ) from None

    async def abort_parts(self, key: str) -> None:
        """Abort every unfinished upload of an object, including those whose id we never received."""
        answer = await self._with_retries(
            "clean up", key, 0, lambda: self._call("list_multipart_uploads", Prefix=key)
        )
        for upload in answer.get("Uploads") or []:
            if upload["Key"] != key:
                continue
            arguments = {"Key": key, "UploadId": upload["UploadId"]}
            try:
                await self._with_retries(
                    "clean up",
                    key,
                    0,
                    lambda given=arguments: self._call("abort_multipart_upload", **given),
                )
            except FileNotFoundError:
                continue

    # ------------------------------------------------------------------------------------- one request

    async def _call(self, method: str, **arguments: Any) -> Any:
        return await self.fs._call_s3(method, Bucket=self.bucket, **arguments)

    def _where(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    async def _with_retries(self, verb: str, key: str, size: int, once: Callable[[], Awaitable[T]]) -> T:
        """Send a request, with retries while the error may be temporary.

        Raises:
            FileNotFoundError: the object (not the bucket) does not exist.
            StoreError: any other failure; _Refused if a condition of the request may not hold.
        """
        patience, began = self.patience, time.monotonic()
        total = patience.all_tries(size)
        for tried in range(1, patience.tries + 1):
            left = began + total - time.monotonic()
            try:
                async with asyncio.timeout(min(left, patience.one_request(size))):
                    return await once()
            except Exception as error:
                if not _is_temporary(error):
                    raise self._translated(error, key) from error
                last = error
            pause = _PAUSES[min(tried, len(_PAUSES)) - 1] * random.uniform(0.75, 1.25)
            spent = time.monotonic() - began
            if tried == patience.tries or spent + pause >= total:
                raise StoreError(
                    f"{self._where(key)}: the object store did not {verb} it in {tried} tries, {spent:.0f} s "
                    f"(last error: {_describe(last)}). Committed files are safe; run again when it responds"
                ) from last
            await asyncio.sleep(pause)
        raise AssertionError("the loop returns or raises")

    def _translated(self, error: Exception, key: str) -> Exception:
        """The exception to raise for an error that a retry cannot fix."""
        if isinstance(error, StoreError):
            return error
        if isinstance(error, RecursionError) or _status(error) in _REDIRECTS:  # s3fs follows some in circles
            return StoreError(
                f"s3://{self.bucket}: the server redirects requests: region or endpoint is wrong; set "
                "AWS_DEFAULT_REGION to the bucket's region, or correct AWS_ENDPOINT_URL"
            )
        if _is_page(error):
            return self._no_s3(key)
        if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.EINVAL:
            # AWS and moto raise FileExistsError for a refused create, Ceph and Swift EINVAL.
            return _Refused(f"{self._where(key)}: the object store refused: {_describe(error)}")
        if _code(error) == "NoSuchBucket":
            return StoreError(
                f"s3://{self.bucket}: this bucket does not exist; create it, or check AWS_ENDPOINT_URL"
            )
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(self._where(key))
        if isinstance(error, _ACCESS_ERRORS):
            return StoreError(
                f"{self._where(key)}: access denied ({_describe(error)}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, and that get, put, delete and list are allowed"
            )
        return StoreError(f"{self._where(key)}: the object store refused: {_describe(error)}")

    def listing_error(self, error: Exception, key: str) -> Exception:
        """As `_translated`, for a listing: an existing bucket can always be listed, even if it is empty."""
        found = self._translated(error, key)
        return self._no_s3(key) if isinstance(found, FileNotFoundError) else found

    def _no_s3(self, key: str) -> StoreError:
        return StoreError(
            f"{self._where(key)}: the server is not S3, or the bucket does not exist; check AWS_ENDPOINT_URL "
            "and the bucket's name"
        )


class _Refused(StoreError):
    """The server refused the request: the object exists, or the server does not support the request."""


async def _whole(body: Any, size: int) -> bytes:
    data = await body.read()
    if len(data) != size:
        raise ConnectionError(f"received {len(data)} of {size} bytes")
    return data


def _range(start: int, stop: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{stop - 1}"}


def _response(error: Exception) -> dict[str, Any]:
    """The server's response: s3fs raises Python's exceptions with botocore's as their cause."""
    return getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}


def _code(error: Exception) -> str:
    return _response(error).get("Error", {}).get("Code", "")


def _status(error: Exception) -> int:
    return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _is_page(error: Exception) -> bool:
    """Whether the error response is a web page instead of an S3 error."""
    return 400 <= _status(error) < 500 and _code(error) == "" and "Error" in _response(error)


def _is_temporary(error: Exception) -> bool:
    """Whether the error is temporary, so that a retry may succeed."""
    response = _response(error)
    if response:
        return _status(error) in _RETRY_STATUS or _code(error) in _RETRY_CODES
    return isinstance(error, _RETRY_ERRORS) and not isinstance(error, StoreError)


def _describe(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    parts = [_code(error) or type(error).__name__, *(str(part) for part in error.args[-1:] if part)]
    return ": ".join(parts)
