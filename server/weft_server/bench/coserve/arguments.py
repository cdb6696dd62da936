"""The flags of `weft bench coserve`. Imports nothing that computes."""

from __future__ import annotations

import argparse

from weft_server.number_flags import positive, whole_from


def add_coserve_arguments(parser: argparse.ArgumentParser) -> None:
    """Those beside the model's and the output's."""
    parser.add_argument(
        "--trace",
        metavar="TRACE",
        help="arrivals and lengths from a file as `weft simulate` takes it (default: Poisson arrivals and "
        "lengths as Azure's conversations)",
    )
    parser.add_argument(
        "--length-scale",
        type=positive,
        metavar="F",
        help="prompts and answers so many times as long (default: 0.125 on a CPU, 1 on a GPU)",
    )
    parser.add_argument(
        "--loads",
        metavar="R,…",
        help="requests a second (default: on a CPU, from light load to three quarters of the time busy with "
        "inference; on a GPU 1,5,15)",
    )
    parser.add_argument(
        "--slo",
        metavar="T,…",
        help="per-token targets, milliseconds or times what a token takes unloaded (default: 1.5x,4x on a "
        "CPU, 15,50 on a GPU)",
    )
    parser.add_argument(
        "--ttft-slo-ms",
        type=positive,
        default=5000.0,
        metavar="MS",
        help="target to the first token (default: %(default)g)",
    )
    parser.add_argument(
        "--adapters", type=whole_from(1), default=4, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--seconds", type=positive, metavar="S", help="of a window (default: 18 on a CPU)")
    parser.add_argument("--quick", action="store_true", help="one load and short windows: about four minutes")
    parser.add_argument("--no-peers", action="store_true", help="without transformers + PEFT")
