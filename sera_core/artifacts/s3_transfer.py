"""Upload and download files, large ones in parallel parts; they are hashed during the transfer."""

import asyncio
import hashlib
import shutil
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from sera_core.artifacts.checks import Blob, Progress, check_hash
from sera_core.artifacts.s3_requests import Patience, Requests
from sera_core.errors import StoreError

Start = Callable[[], Coroutine[Any, Any, Any]]

PART_BYTES = 16 * 2**20
"""S3 allows parts of 5 MiB to 5 GiB."""
MAX_PARTS = 10_000
PARALLEL = 4
"""Parts in flight at once, while one more is read and hashed; all are in memory."""

CLEANING = Patience(answer=5.0, total=15.0, tries=3)
"""Time limits for cleaning up after a failed upload."""


def part_size(size: int) -> int:
    """Bytes per part: `PART_BYTES`, or more if the file would exceed S3's number of parts."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


async def upload(requests: Requests, key: str, file: Path, progress: Progress) -> Blob:
    """Write a file to an object; returns the hash of the bytes that were sent."""
    size, hasher = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= part_size(size):
            data = await asyncio.to_thread(_read_hashed, stream, size, hasher)
            _same_size(file, len(data), size)
            await requests.put(key, data)
        else:
            await _upload_parts(requests, key, file, stream, size, hasher, progress)
    progress(size, size, "bytes")
    return Blob(hasher.hexdigest(), size)


async def _upload_parts(
    requests: Requests, key: str, file: Path, stream: BinaryIO, size: int, hasher: Any, progress: Progress
) -> None:
    sent, done, step = 0, [], part_size(size)
    try:
        upload_id = await requests.begin_parts(key)

        async def parts() -> AsyncIterator[Start]:
            nonlocal sent
            number = 0
            while data := await asyncio.to_thread(_read_hashed, stream, step, hasher):
                number, sent = number + 1, sent + len(data)
                yield partial(requests.put_part, key, upload_id, number, data)

        async with aclosing(_in_order(parts())) as ended:
            async for part in ended:
                done.append(part)
                progress(min(size, len(done) * step), size, "bytes")
        _same_size(file, sent, size)
        await requests.end_parts(key, upload_id, done, size)
    finally:
        with suppress(StoreError):  # `sera gc` removes what is left
            await Requests(requests.fs, requests.bucket, CLEANING).abort_parts(key)


async def download(requests: Requests, key: str, file: Path, blob: Blob, progress: Progress) -> None:
    """Download an object to a new file and check its size and hash.

    Raises:
        FileNotFoundError: there is no such object.
        StoreError: wrong size (checked before anything is written), wrong hash, or not enough disk space.
    """
    _check_room(file, blob.bytes, key)
    step, hasher = part_size(blob.bytes), hashlib.sha256()
    starts = range(0, blob.bytes, step) or range(1)

    async def parts() -> AsyncIterator[Start]:
        for start in starts:
            yield partial(requests.read_range, key, start, min(start + step, blob.bytes), blob.bytes)

    written = 0
    with file.open("xb") as stream:
        async with aclosing(_in_order(parts())) as arrived:
            async for data in arrived:
                await asyncio.to_thread(_write_hashed, stream, data, hasher)
                written += len(data)
                progress(written, blob.bytes, "bytes")
    check_hash(f"s3://{requests.bucket}/{key}", hasher.hexdigest(), blob.sha256)


async def _in_order(starts: AsyncIterator[Start]) -> AsyncGenerator[Any, None]:
    """Results in order, with a few tasks running at once; if one fails, the others are cancelled."""
    running: deque[asyncio.Task[Any]] = deque()
    try:
        async for start in starts:
            running.append(asyncio.create_task(start()))
            if len(running) > PARALLEL:  # the caller processes one result while PARALLEL others run
                yield await running.popleft()
        while running:
            yield await running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _read_hashed(stream: BinaryIO, size: int, hasher: Any) -> bytes:
    data = stream.read(size)
    hasher.update(data)
    return data


def _write_hashed(stream: BinaryIO, data: bytes, hasher: Any) -> None:
    stream.write(data)
    hasher.update(data)


def _same_size(file: Path, sent: int, size: int) -> None:
    if sent != size:
        raise StoreError(f"{file}: changed while it was uploaded ({sent:,} bytes of {size:,}); run again")


def _check_room(file: Path, size: int, key: str) -> None:
    free = shutil.disk_usage(file.parent).free
    if size > free:
        raise StoreError(
            f"{key}: its record says {size:,} bytes, but {file.parent} has {free:,} bytes free; free some "
            "space, or set SERA_CACHE to a folder on a larger disk"
        )
