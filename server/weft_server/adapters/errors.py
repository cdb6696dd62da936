"""What is wrong with an adapter, said so that its owner can repair it."""

from __future__ import annotations

from weft_server.errors import Internal, InvalidRequest


class AdapterError(InvalidRequest):
    """400: the adapter cannot be used as it is; the message names the key or feature and the remedy."""

    default_code = "invalid_adapter"


class AdapterFetchFailed(Internal):
    """500: a stored adapter could not be read back, or its content is no longer what its digest says."""

    default_code = "adapter_fetch_failed"
