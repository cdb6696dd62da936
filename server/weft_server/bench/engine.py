"""`weft bench engine`: the engine-level parts, one after the other."""

from __future__ import annotations

import argparse

from weft_server.bench import decode, prefill, train


def run(arguments: argparse.Namespace) -> int:
    """Every part with the same flags; the first failure ends it."""
    for part in (decode.run, prefill.run, train.run):
        code = part(arguments)
        if code:
            return code
    return 0
