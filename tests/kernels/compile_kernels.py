"""Compiles every Triton kernel for real GPUs on a machine without one and reports what came of it.

Every module of `launches/` drives the host wrappers of one op on meta tensors at the shapes of real models:

    MODULES: tuple[ModuleType, ...]       host modules whose `*_kernel` globals are recorded
    def launch(every: bool) -> None       calls them; `every` adds the tile sizes and options that are rarer
    NARROW_LOADS: dict[str, dict[str, str]]
        optional: by kernel, pieces of source lines whose loads may be narrower than a vector, and why
    STACK_BYTES: dict[str, tuple[int, str]]
        optional: by kernel, how many bytes a thread may spill, and why

What is compiled is so exactly what would be launched. Prints one JSON object. Run as a program, without
TRITON_INTERPRET; `--all` asks for everything, names of ops for those alone.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from launch_recorder import Launch, record
from machine_code import loads, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)
_launches: list[Launch] = []


def collect(folder: Path, ops: list[str], every: bool) -> dict[str, Any]:
    """Appends the launches of the given ops (all, if none) to `_launches`; returns what the ops declare."""
    sys.path.insert(0, str(folder))
    launches: dict[str, Launch] = {}
    declared: dict[str, Any] = {"narrow_loads": {}, "stack_bytes": {}}
    for op in ops or sorted(path.stem for path in folder.glob("*.py")):
        driver = importlib.import_module(op)
        for module in driver.MODULES:
            record(op, module, launches)
        driver.launch(every)
        for name, exceptions in declared.items():
            exceptions |= getattr(driver, name.upper(), {})
    _launches.extend(launches.values())
    return declared


def compile_launch(task: tuple[int, int]) -> dict[str, Any]:
    """Compiles launch number `task[0]` for capability `task[1]`."""
    launch, capability = _launches[task[0]], task[1]
    kernel = launch.kernel
    source = ASTSource(
        fn=kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return {
        "op": launch.op,
        "kernel": kernel.__name__,
        "constants": {kernel.arg_names[idx]: str(v) for (idx,), v in launch.constants.items()},
        "capability": capability,
        "num_threads": 32 * compiled.metadata.num_warps,
        "shared_bytes": compiled.metadata.shared,
        "loads": loads(compiled.asm["ttir"], compiled.asm["ptx"]),
        **resources(compiled.asm["cubin"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("ops", nargs="*", help="modules to take; all by default")
    parser.add_argument("--all", action="store_true", help="rarer tile sizes and options too")
    parser.add_argument("--launches", type=Path, default=Path(__file__).with_name("launches"))
    arguments = parser.parse_args()
    declared = collect(arguments.launches, arguments.ops, arguments.all)
    tasks = [(i, capability) for i in range(len(_launches)) for capability in CAPABILITIES]
    # Forked, so that the launches need not be pickled.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        reports = list(pool.map(compile_launch, tasks))
    json.dump({"launches": reports, **declared}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
