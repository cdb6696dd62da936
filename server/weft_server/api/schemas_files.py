"""Wire form of files, as OpenAI writes them."""

from __future__ import annotations

from typing import Any

from weft_server.service.files import StoredFile


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's `file`."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
