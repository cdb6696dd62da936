"""Reads what the compiler made of a kernel: registers, spills, and how wide each line's global loads are.

Loads are matched by source line: Triton's IR says how much a line loads per program, PTX in how wide pieces.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeAlias

import triton

Place: TypeAlias = tuple[str, int]
"""A source file and a line of it."""

_ITEM_BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i1": 8}
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)
_TTIR_LOAD = re.compile(r"tt\.load .*?: (?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>.* loc\((#loc\d*)\)")
_PTX_FILE = re.compile(r'^\s*\.file\s+(\d+) "(.*)"', re.MULTILINE)
_PTX_LINE = re.compile(
    r"\.loc\s+(?P<file>\d+) (?P<line>\d+)"
    r"|ld\.global[.\w:]*?(?:\.v(?P<count>[248]))?\.[bsuf](?P<bits>\d+)\s"
    r"|cp\.async\.c[ag]\.shared\.global\s.*?\],\s*(?P<bytes>0x\w+|\d+)"
    r"|(?P<begin>// begin inline asm)|(?P<end>// end inline asm)"
)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread, and the instructions that move registers to local memory."""
    dumper = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(dumper, "-res-usage", file.name)
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert match is not None, usage
        local = len(re.findall(r"\b(?:LDL|STL)\b", _run(dumper, "-sass", file.name)))
    return {"num_registers": int(match[1]), "stack_bytes": int(match[2]), "num_local_accesses": local}


def _run(program: Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def loads(ttir: str, ptx: str) -> list[dict[str, Any]]:
    """Every source line that loads from global memory.

    Returns:
        Per `file` and `line`: `tile_bytes`, what one program loads there at a time (None where the line has
        no load of Triton's, so that it must be hand-written assembly), and `widths`, the bytes per thread
        and instruction.
    """
    tiles, widths = _tile_bytes(ttir), _widths(ptx)
    return [
        {"file": file, "line": line, "tile_bytes": tiles.get((file, line)), "widths": sorted(found)}
        for (file, line), found in sorted(widths.items())
    ]


def _widths(ptx: str) -> dict[Place, set[int]]:
    """Bytes that a thread's load instructions move, by source line."""
    files = {int(number): path for number, path in _PTX_FILE.findall(ptx)}
    widths: dict[Place, set[int]] = defaultdict(set)
    place, inside, moves = ("", 0), False, True
    for match in _PTX_LINE.finditer(ptx):
        if match["begin"] or match["end"]:
            # Inside inline assembly LLVM counts its lines on from the one of the source.
            moves, inside = True, bool(match["begin"])
        elif match["line"]:
            if moves and int(match["line"]):
                place = (files[int(match["file"])], int(match["line"]))
            moves = not inside
        elif match["bits"]:
            widths[place].add(int(match["count"] or 1) * int(match["bits"]) // 8)
        else:
            widths[place].add(int(match["bytes"], 0))
    return widths


def _tile_bytes(ttir: str) -> dict[Place, int]:
    """The largest load of each source line; a scalar counts as its own size."""
    locations = dict(_LOCATION.findall(ttir))

    def place(name: str) -> Place:
        text = locations[name]
        while (match := re.search(r'"(.*)":(\d+):\d+', text)) is None:
            inner = re.search(r"#loc\d*", text)
            assert inner is not None, text
            text = locations[inner[0]]
        return match[1], int(match[2])

    sizes: dict[Place, int] = {}
    for shape, item, location in _TTIR_LOAD.findall(ttir):
        size = _ITEM_BITS[item] // 8
        for extent in shape.split("x") if shape else ():
            size *= int(extent)
        sizes[place(location)] = max(size, sizes.get(place(location), 0))
    return sizes
