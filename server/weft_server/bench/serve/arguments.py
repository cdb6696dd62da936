"""The flags of `weft bench serve`. Imports nothing that computes."""

from __future__ import annotations

import argparse

from weft_server.number_flags import count, from_zero, positive, whole_from


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags but those of the output."""
    parser.add_argument(
        "--trace",
        metavar="TRACE",
        help="arrivals and lengths: a file, or azure:FILE, mooncake:FILE, servegen:FILE (default: Poisson "
        "arrivals, lengths as Azure's conversations)",
    )
    parser.add_argument("--name", metavar="NAME", help="of the result's files (default: serve-MODEL)")
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="a running server (default: start one)")
    server.add_argument(
        "--key",
        action="append",
        metavar="KEY",
        help="an API key of the server at --url; several, one for each tenant",
    )
    server.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help="what the started server serves: as `weft serve`, or tiny, bench-200m, bench-1b or llama-3.1-8b "
        "with random weights (default: %(default)s)",
    )
    server.add_argument(
        "server_flags", nargs="*", metavar="FLAG", help="after `--`: flags of the started `weft serve`"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--rate", type=positive, metavar="R", help="requests a second (default: the trace's, else 1)"
    )
    load.add_argument(
        "--duration",
        type=positive,
        default=60.0,
        metavar="S",
        help="or to the end of the trace (default: %(default)g)",
    )
    load.add_argument(
        "--start", type=from_zero, default=0.0, metavar="S", help="begin at this second of the trace"
    )
    load.add_argument("--length-scale", type=positive, default=1.0, metavar="F", help="times as long")
    load.add_argument(
        "--tenants",
        type=whole_from(1),
        default=1,
        metavar="N",
        help="of the started server (default: %(default)s)",
    )
    load.add_argument(
        "--adapters",
        type=count,
        default=0,
        metavar="N",
        help="adapters asked for by a power law: random ones are uploaded to the started server, those of "
        "--url are its own (default: 0, the base model)",
    )
    load.add_argument(
        "--adapter-rank", type=whole_from(1), default=16, metavar="R", help="(default: %(default)s)"
    )
    load.add_argument(
        "--jobs",
        type=count,
        default=0,
        metavar="N",
        help="finetune jobs; then requests alone, jobs alone and both are measured",
    )
    load.add_argument("--seed", type=count, default=0, metavar="N", help="of all draws (default: 0)")
    load.add_argument("--warm-up", type=from_zero, default=5.0, metavar="S", help="(default: %(default)g)")
    load.add_argument("--timeout", type=positive, default=300.0, metavar="S", help="of a request")
    slo = parser.add_argument_group("objective")
    slo.add_argument(
        "--tpot-slo-ms", type=positive, default=50.0, metavar="MS", help="(default: %(default)g)"
    )
    slo.add_argument(
        "--ttft-slo-ms", type=positive, default=2000.0, metavar="MS", help="(default: %(default)g)"
    )
