"""Multipart uploads: parsed as they arrive, spooled to a folder of the caller's, and bounded.

Knows forms and limits; knows nothing of what is uploaded.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from weft_server.errors import InvalidRequest, TooLarge, Unavailable, Unprocessable, WeftError

_MAX_TEXT_BYTES = 64 * 1024
_FRAMING_BYTES = 1 << 20
_MAX_DRAINED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of one upload by name; files are open while `read_form`'s context is."""

    texts: dict[str, str]
    files: dict[str, UploadFile]


class _Parser(MultiPartParser):
    """Starlette's, which knows no folder but the system's temporary one."""

    def __init__(
        self, headers: Headers, stream: AsyncGenerator[bytes, None], folder: Path, **limits: int
    ) -> None:
        super().__init__(headers, stream, **limits)
        self._folder = folder

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            # Nothing has been written to the one it replaces, so that one is not on any disk.
            upload.file.close()
            spooled: Any = SpooledTemporaryFile(max_size=self.spool_max_size, dir=str(self._folder))  # noqa: SIM115
            self._files_to_close_on_error[-1] = upload.file = spooled


@asynccontextmanager
async def read_form(
    request: Request,
    *,
    texts: Sequence[str],
    files: Sequence[str],
    folder: Path,
    max_bytes: int,
    is_openai: bool,
    unsupported: Sequence[str] = (),
) -> AsyncIterator[Form]:
    """Read a multipart body that consists of exactly these fields, each once.

    Args:
        request: its body must not have been read.
        texts: names of the text fields.
        files: names of the file fields.
        folder: where files larger than a megabyte lie meanwhile, without names; created if absent.
        max_bytes: limit for all files together.
        is_openai: whose object it is: errors in OpenAI's are 400, in Weft's own 422.
        unsupported: names of known fields that are not implemented; so are their parts, `name[part]`.

    Raises:
        InvalidRequest: not multipart, malformed, or (OpenAI's) a field is missing, repeated or unknown.
        Unprocessable: (Weft's) a field is missing, repeated or unknown.
        TooLarge: the body exceeds the limit.
        Unavailable: the folder cannot be written, or its disk is full.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest("The body must be multipart/form-data.", code="invalid_content_type")
    parser = _Parser(
        request.headers,
        _limited(request, max_bytes),
        folder,
        max_files=len(files) + 1,
        max_fields=len(texts) + 16,
        max_part_size=_MAX_TEXT_BYTES,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InvalidRequest(
            f"The multipart body cannot be read: {_reason(error)}.", code="invalid_multipart"
        ) from None
    except OSError as error:
        raise Unavailable(
            f"The upload cannot be kept while it arrives: {error.strerror or error}. Try again when the "
            "disk of the server's --data-dir has room.",
            retry_after_s=5.0,
        ) from error
    try:
        _refuse_unsupported(data.multi_items(), unsupported)
        form = _sorted(data.multi_items(), texts, files, is_openai=is_openai)
        if sum(file.size or 0 for file in form.files.values()) > max_bytes:
            raise _too_large(max_bytes)
        yield form
    finally:
        await data.close()


def _reason(error: MultiPartException | KeyError) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    # What the parser found wrong is the cause of the exception that reports it.
    reason = str(error.__cause__ or error.message).rstrip(".")
    if reason == "Maximum header size exceeded":
        return "a part's header, which holds the names of field and file, is too long; shorten the filename"
    return reason


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body while it is within the limit.

    Beyond it some more is read and dropped before the refusal: a client still sending would not see it.
    """
    limit = max_bytes + _FRAMING_BYTES
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes <= limit:
            yield chunk
        elif num_bytes > limit + _MAX_DRAINED_BYTES:
            break
    if num_bytes > limit:
        raise _too_large(max_bytes)


def _refuse_unsupported(items: Sequence[tuple[str, Any]], unsupported: Sequence[str]) -> None:
    for name, _ in items:
        if name.partition("[")[0] in unsupported:
            raise InvalidRequest(
                f"Unsupported parameter: '{name}' is not implemented by Weft. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )


def _sorted(
    items: Sequence[tuple[str, Any]], texts: Sequence[str], files: Sequence[str], *, is_openai: bool
) -> Form:
    form = Form({}, {})
    for name, value in items:
        is_file = isinstance(value, UploadFile)
        if name not in texts and name not in files:
            raise _refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter", is_openai)
        if name in form.texts or name in form.files:
            raise _refused(f"'{name}' is given twice.", name, "invalid_value", is_openai)
        if is_file != (name in files):
            kind = "a file (with a filename)" if name in files else "text (without a filename)"
            raise _refused(f"'{name}' must be {kind}.", name, "invalid_type", is_openai)
        if isinstance(value, UploadFile):
            form.files[name] = value
        else:
            form.texts[name] = value
    for name in (*texts, *files):
        if name not in form.texts and name not in form.files:
            text = f"Missing required parameter: '{name}'."
            raise _refused(text, name, "missing_required_parameter", is_openai)
    return form


def _refused(message: str, param: str, code: str, is_openai: bool) -> WeftError:
    if is_openai:
        return InvalidRequest(message, param=param, code=code)
    return Unprocessable(message, param=param)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The upload is larger than {max_bytes // (1 << 20)} MiB; the operator sets the limit with "
        "--max-upload-mb."
    )
