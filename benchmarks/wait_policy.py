"""How OpenMP's threads should wait: small products of a decode iteration, alone and beside a busy process.

    python benchmarks/wait_policy.py [--seconds 5]

Every row is a process of its own with two threads, which multiplies 8 rows by 40 matrices of 2816 x 1024 in
bf16, again and again. Prints milliseconds for the 40.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "OpenMP's default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{
        f"PASSIVE, GOMP_SPINCOUNT={count}": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(count)}
        for count in (300, 1000, 3000, 10000)
    },
}


def measure(seconds: float) -> None:
    """In a child: print the 50th, 95th and 99th percentile."""
    import torch

    rows = torch.randn(8, 1024).bfloat16()
    weights = [torch.randn(2816, 1024).bfloat16() for _ in range(40)]
    times, started = [], time.perf_counter()
    while time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        for weight in weights:
            (rows @ weight.t()).relu_()
        times.append((time.perf_counter() - begun) * 1e3)
    times.sort()
    print(" | ".join(f"{times[int(share * len(times))]:.1f}" for share in (0.5, 0.95, 0.99)))


@contextlib.contextmanager
def neighbour(*, is_busy: bool) -> Iterator[None]:
    """A process that takes all of one core, if it is busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row (default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.seconds)
        return
    print("| threads wait by | beside | p50 ms | p95 ms | p99 ms |\n| --- | --- | ---: | ---: | ---: |")
    command = [sys.executable, __file__, "--child", "--seconds", str(arguments.seconds)]
    for is_busy in (False, True):
        for name, settings in SETTINGS.items():
            environment = {
                key: os.environ[key] for key in os.environ if not key.startswith(("OMP_", "GOMP_"))
            }
            with neighbour(is_busy=is_busy):
                result = subprocess.run(
                    command,
                    env={**environment, "OMP_NUM_THREADS": "2", **settings},
                    check=True,
                    capture_output=True,
                    text=True,
                )
            beside = "a busy process" if is_busy else "nothing"
            print(f"| {name} | {beside} | {result.stdout.strip()} |", flush=True)


if __name__ == "__main__":
    main()
