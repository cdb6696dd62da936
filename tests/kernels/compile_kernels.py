"""Compiles every Triton kernel for real GPUs on a machine without one and reports what came of it.

Drives the host wrappers on meta tensors at the shapes of Llama-3.1-8B with the kernels replaced by recorders,
so that what is compiled is exactly what would be launched. Prints one JSON list. Run as a program, without
TRITON_INTERPRET; `--all` adds every tile size, dropout and both kinds of NF4 scales.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weft_kernels.lora import LoraBatch, LoraDropout, LoraEntry, LoraTable
from weft_kernels.lora import fused as lora_fused
from weft_kernels.nf4 import Nf4Weight
from weft_kernels.nf4 import fused as nf4_fused

TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
HIDDEN, INTERMEDIATE, KV = 4096, 14336, 1024
GROUPS = {
    "qkv": ((0, 1, 2), HIDDEN, (HIDDEN, KV, KV)),
    "o": ((3,), HIDDEN, (HIDDEN,)),
    "gate_up": ((4, 5), HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    "down": ((6,), INTERMEDIATE, (HIDDEN,)),
}


class Recorder:
    """Stands in for a kernel: collects the signature of every launch, keyed so that equal ones count once."""

    def __init__(self, kernel: Any, launches: dict[str, tuple[Any, ...]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Any:
        return self.record

    def record(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for idx, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or (_is_one(value) and not parameter.do_not_specialize):
                signature[parameter.name] = "constexpr"
                constants[(idx,)] = value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
                # Allocations are aligned, views of them where they begin (a tensor on `meta` has no address).
                aligned = value.storage_offset() * value.itemsize % 16 == 0
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
            if aligned:
                attributes[(idx,)] = [["tt.divisibility", 16]]
        key = repr((self.kernel.__name__, signature, constants, attributes, options))
        self.launches.setdefault(key, (self.kernel, signature, constants, attributes, options))


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def record(module: ModuleType, launches: dict[str, tuple[Any, ...]]) -> None:
    for name in dir(module):
        if name.endswith("_kernel"):
            setattr(module, name, Recorder(getattr(module, name), launches))


def lora_launches(rank: int, num_rows: int, dropped: bool) -> None:
    entries, offset = [], 0
    for modules, width, outs in GROUPS.values():
        for module, out in zip(modules, outs, strict=True):
            entries.append(LoraEntry(0, module, rank, width, out, offset, offset + rank * width, 2.0))
            offset += rank * (width + out)
    table = LoraTable(torch.empty(offset, dtype=torch.bfloat16, device="meta"), 2, 2, 7)
    table.set_slot(0, 0, entries)
    batch = LoraBatch.build([(0, 0, num_rows)], "meta")
    assert batch is not None
    dropout = None
    if dropped:
        dropout = LoraDropout(
            torch.empty(num_rows, device="meta"), torch.empty(num_rows, dtype=torch.int64, device="meta")
        )
    for modules, width, outs in GROUPS.values():
        x = torch.empty(num_rows, width, dtype=torch.bfloat16, device="meta")
        y = torch.empty(num_rows, sum(outs), dtype=torch.bfloat16, device="meta")
        lora_fused.lora_forward(x, y, table, 0, modules, outs, batch, dropout)
        grads = {0: torch.empty(offset, device="meta")}
        lora_fused.lora_backward(x, y, x, grads, table, 0, modules, outs, batch, dropout)


def nf4_launches(nested: bool, num_rows: int) -> None:
    n, k = HIDDEN + 2 * KV, HIDDEN
    num_blocks = n * k // 64

    def meta(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    if nested:
        scales = {
            "absmax_codes": meta(num_blocks, torch.uint8),
            "nested_absmax": meta(num_blocks // 256),
            "nested_offset": meta(num_blocks // 256),
            "nested_map": meta(256),
        }
    else:
        scales = {"absmax": meta(num_blocks)}
    weight = Nf4Weight(meta(n * k // 2, torch.uint8), (n, k), torch.bfloat16, 64, meta(16), **scales)
    nf4_fused.dequantize(weight, torch.bfloat16)
    nf4_fused.nf4_linear(torch.empty(num_rows, k, dtype=torch.bfloat16, device="meta"), weight)
    nf4_fused.nf4_input_grad(torch.empty(num_rows, n, dtype=torch.bfloat16, device="meta"), weight)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread in the machine code; registers that spill show as stack."""
    dumper = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(dumper), "-res-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert usage is not None, listing
    return {"num_registers": int(usage[1]), "stack_bytes": int(usage[2])}


def compile_launch(launch: tuple[Any, ...], capability: int) -> dict[str, Any]:
    kernel, signature, constants, attributes, options = launch
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    loads = re.findall(r"ld\.global[.\w:]*?((?:\.v[248])?\.[bsuf]\d+)", ptx)
    copies = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?(0x\w+)", ptx)]
    named = {kernel.arg_names[idx]: str(value) for (idx,), value in constants.items()}
    return {
        "kernel": kernel.__name__,
        "constants": named,
        "capability": capability,
        "shared_bytes": compiled.metadata.shared,
        "loads": {kind: loads.count(kind) for kind in sorted(set(loads))},
        "async_copies": {size: copies.count(size) for size in sorted(set(copies))},
        **resources(compiled.asm["cubin"]),
    }


def main() -> None:
    launches: dict[str, tuple[Any, ...]] = {}
    record(lora_fused, launches)
    record(nf4_fused, launches)
    every = "--all" in sys.argv
    lora_launches(rank=16, num_rows=8, dropped=False)
    nf4_launches(nested=True, num_rows=16)
    if every:
        for rank, num_rows, dropped in itertools.product((16, 32, 64, 256), (16, 32, 500), (False, True)):
            lora_launches(rank, num_rows, dropped)
        for nested, num_rows in itertools.product((False, True), (1, 32, 64)):
            nf4_launches(nested, num_rows)
    reports = [compile_launch(launch, c) for launch in launches.values() for c in (80, 90)]
    json.dump(reports, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
