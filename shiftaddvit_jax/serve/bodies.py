"""The bodies of requests, within limits of bytes and seconds, and the images in them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

FIELDS = ("image", "file")


class File(NamedTuple):
    """The bytes of an image file, and the name that a client gave it, if any."""

    name: str
    data: bytes


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
      HTTPException: 413, more than ``max_bytes``; 408, not all of it came in ``seconds``.
    """
    too_long = HTTPException(413, f"the body is longer than {max_bytes:,} bytes")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_long
    except TimeoutError:
        reason = f"the body did not come within {seconds:g} s"
        raise HTTPException(408, reason, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended before the body did") from None
    return bytes(body)


async def read_images(request: Request, body: bytes, max_files: int) -> list[File]:
    """The image files of a body: its parts if it is a form, else itself.

    Raises:
      HTTPException: 415, another type of content; 400, a damaged form, or fields other than `FIELDS`; 413,
        more than ``max_files``; 422, none.
    """
    kind = media_type(request)
    if kind == "multipart/form-data":
        return await _files_of_form(request, body, max_files)
    if kind and kind != "application/octet-stream" and not kind.startswith("image/"):
        expected = "multipart/form-data, image/..., application/octet-stream"
        raise HTTPException(415, f"the content type {kind} is none of {expected}")
    if not body:
        raise HTTPException(422, "the body is empty; expected an image")
    return [File("", body)]


def media_type(request: Request) -> str:
    """The type of a request's content, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _files_of_form(request, body, max_files):
    parser = MultiPartParser(request.headers, _once(body), max_files=max_files + 1, max_fields=max_files)
    parser.spool_max_size = len(body) + 1  # in memory, where the body is: none of it goes to the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        status = 413 if error.message.startswith("Too many") else 400
        raise HTTPException(status, f"the form can't be read: {error.message}") from None
    files = []
    for field, value in form.multi_items():
        if field not in FIELDS or not isinstance(value, UploadFile):
            raise HTTPException(
                400, f"the form's field {field!r} is no file in a field {' or '.join(FIELDS)}"
            )
        files.append(File(value.filename or "", await value.read()))
    if not files:
        raise HTTPException(422, f"the form has no image; expected a file in a field {' or '.join(FIELDS)}")
    return files


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
