"""`python -m weft_server.bench PART`: `weft bench` without the web stack, for a bare GPU machine."""

from __future__ import annotations

import argparse
import sys

from weft_server.bench.arguments import add_bench_arguments
from weft_server.errors import ConfigError, WeftError


def main() -> int:
    """Run one part; returns the exit code (0 done, 1 failed, 2 usage, 130 interrupted)."""
    parser = argparse.ArgumentParser(
        prog="python -m weft_server.bench",
        description="Measures Weft: correctness first, then times against ceilings, peers and targets.",
        allow_abbrev=False,
    )
    add_bench_arguments(parser)
    arguments = parser.parse_args()
    try:
        code: int = arguments.run(arguments)
    except WeftError as error:
        print(f"weft bench: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
