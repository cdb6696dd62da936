"""The assembly of the NF4 lookup, run lane by lane: without a GPU nothing else executes it."""

import re
import struct

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from weft_kernels.nf4.lookup import assembly as lookup_assembly
from weft_kernels.nf4.weight import NF4_VALUES

NUM_LANES = 32


def run(assembly: str, words: list[int]) -> list[dict[str, int]]:
    """Executes the PTX instructions in use for a warp; returns each lane's registers. `$8` is its word."""
    lanes: list[dict[str, int]] = [{"$8": word, "%laneid": lane} for lane, word in enumerate(words)]

    def value(lane: dict[str, int], operand: str) -> int:
        return lane[operand] if operand in lane else int(operand, 0) & 0xFFFFFFFF

    for line in assembly.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        match = re.fullmatch(r"(\S+) (\S+), (.*);", line)
        assert match is not None, line
        name, target, operands = match[1], match[2], match[3].split(", ")
        before = [dict(lane) for lane in lanes]
        for lane, old in zip(lanes, before, strict=True):
            args = [value(old, operand) for operand in operands[:3] if name != "shfl.sync.idx.b32"]
            if name == "mov.u32":
                lane[target] = args[0]
            elif name == "and.b32":
                lane[target] = args[0] & args[1]
            elif name == "shr.u32":
                lane[target] = args[0] >> args[1]
            elif name == "setp.ne.u32":
                lane[target] = int(args[0] != args[1])
            elif name == "selp.b32":
                lane[target] = args[0] if args[2] else args[1]
            elif name == "shfl.sync.idx.b32":
                assert operands[2:] == ["31", "-1"]
                lane[target] = before[value(old, operands[1]) & 31][operands[0]]
            else:
                raise AssertionError(line)
    return lanes


def test_every_lane_gets_the_values_of_its_own_nibbles() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 1 << 32, (NUM_LANES,), generator=generator).tolist()
    words[:2] = [0x01234567, 0x89ABCDEF]
    for lane, word in zip(run(lookup_assembly(), words), words, strict=True):
        for idx, byte in enumerate(word.to_bytes(4, "little")):
            for output, code in ((f"${idx}", byte >> 4), (f"${idx + 4}", byte & 15)):
                assert struct.unpack("<f", struct.pack("<I", lane[output]))[0] == NF4_VALUES[code]
