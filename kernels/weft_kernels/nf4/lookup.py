"""Looking up NF4 values in registers: 16 lanes of a warp hold one value each, and shuffles fetch them.

A gather from memory would cost an address and a load for each of billions of elements; a shuffle costs one
instruction with a shifted code as it is, since lanes 16 to 31 hold the same values as lanes 0 to 15 and only
the five lowest bits select. The values are constants, so that the lookup has no operand but the codes: only
then does Triton move the conversion of the codes to the layout of the tensor cores' operands before the
lookup, and decoded values never pass through shared memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import struct

import triton
import triton.language as tl

from weft_kernels.nf4.weight import NF4_VALUES


def assembly() -> str:
    """PTX: `$8` holds four bytes; `$0..$3` become the values of their high nibbles, `$4..$7` of the low ones.

    Lane l selects value l mod 16 out of the constants in four rounds, one for each bit of l; the assembler
    keeps the outcome from one use to the next.
    """
    lines = [".reg .pred bit<4>;", ".reg .b32 lane, chosen<15>, code<8>;", "mov.u32 lane, %laneid;"]
    names = [f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}" for value in NF4_VALUES]
    num_chosen = 0
    for bit in range(4):
        lines += [f"and.b32 code0, lane, {1 << bit};", f"setp.ne.u32 bit{bit}, code0, 0;"]
        for idx in range(len(names) // 2):
            lines.append(f"selp.b32 chosen{num_chosen}, {names[2 * idx + 1]}, {names[2 * idx]}, bit{bit};")
            num_chosen += 1
        names = [f"chosen{idx}" for idx in range(num_chosen - len(names) // 2, num_chosen)]
    for nibble in range(8):
        output = nibble // 2 + (0 if nibble % 2 else 4)
        lines.append(f"shr.u32 code{nibble}, $8, {4 * nibble};")
        lines.append(f"shfl.sync.idx.b32 ${output}, {names[0]}, code{nibble}, 31, -1;")
    return "\n".join(["{", *lines, "}"])


_ASSEMBLY = tl.constexpr(assembly())


@triton.jit
def look_up(packed, quant_map, SHUFFLED: tl.constexpr):
    """The float32 values of the high and of the low nibbles of bytes.

    SHUFFLED: `quant_map` holds `NF4_VALUES`, and whole warps run this; otherwise it is read.
    """
    if SHUFFLED:
        high, low = tl.inline_asm_elementwise(
            _ASSEMBLY,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        high = tl.load(quant_map + (packed >> 4).to(tl.int32))
        low = tl.load(quant_map + (packed & 15).to(tl.int32))
    return high, low
