"""Encoding of `protocol.py` messages on the wire between the API process and the engine process.

Tagged MessagePack by msgspec; every frame carries the epoch of the engine that it belongs to, so that
messages of a dead engine are never taken for those of its successor.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from weft_server.protocol import FromEngine, ToEngine

_TYPES = {kind.__name__: kind for kind in (*get_args(ToEngine), *get_args(FromEngine))}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    name: msgspec.msgpack.Decoder(kind) for name, kind in _TYPES.items()
}


def encode(message: ToEngine | FromEngine, epoch: int) -> list[bytes]:
    """Frames of one message: epoch, type name, body."""
    return [str(epoch).encode(), type(message).__name__.encode(), _ENCODER.encode(message)]


def decode(frames: list[bytes]) -> tuple[int, ToEngine | FromEngine]:
    """Inverse of `encode`.

    Raises:
        ValueError: not a message of this protocol version.
    """
    if len(frames) != 3 or (name := frames[1].decode(errors="replace")) not in _DECODERS:
        raise ValueError(f"not a message of this protocol: {frames[:2]!r}")
    try:
        return int(frames[0]), _DECODERS[name].decode(frames[2])
    except msgspec.DecodeError as error:
        raise ValueError(f"a {name} message cannot be decoded: {error}") from error
