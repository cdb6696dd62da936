"""Multipart bodies while they arrive: where they lie, and what becomes of what a crash left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fastapi import Request

from weft_server.api.uploads import read_form
from weft_server.errors import Unavailable

MEBIBYTE = 1 << 20


def upload(num_bytes: int) -> Request:
    """A request that uploads a file of so many bytes."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    body = head + bytes(num_bytes) + b"\r\n--x--\r\n"

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


async def path_of_upload(folder: Path, num_bytes: int) -> Path:
    async with read_form(
        upload(num_bytes), texts=(), files=("file",), folder=folder, max_bytes=8 * MEBIBYTE, is_openai=True
    ) as form:
        file = form.files["file"].file
        assert len(file.read()) == num_bytes
        return Path(f"/proc/self/fd/{file.fileno()}").readlink()


def test_a_large_upload_lies_in_the_folder_given_while_it_arrives_and_nothing_stays(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "uploads"
    path = asyncio.run(path_of_upload(folder, 3 * MEBIBYTE))
    assert path.is_relative_to(folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("a file")
    with pytest.raises(Unavailable, match="--data-dir"):
        asyncio.run(path_of_upload(tmp_path / "uploads", 3 * MEBIBYTE))
