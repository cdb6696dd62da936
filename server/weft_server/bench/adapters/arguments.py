"""The flags of `weft bench adapters`. Imports nothing that computes."""

from __future__ import annotations

import argparse
from pathlib import Path

from weft_server.number_flags import whole_from


def add_adapters_arguments(parser: argparse.ArgumentParser) -> None:
    """Those beside the model's and the output's."""
    parser.add_argument(
        "--adapter-rank", type=whole_from(1), default=16, metavar="R", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--store-dir",
        type=Path,
        metavar="DIR",
        help="a folder on the disk that is measured; nothing is left in it (default: /var/tmp, else the "
        "system's temporary folder)",
    )
