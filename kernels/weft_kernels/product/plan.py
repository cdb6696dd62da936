"""Plans: whether a product decodes its weight inside the tile, and with which tiles, or decodes it whole
first.

A value decided per direction, shape and number of rows; rows are rounded up to a bucket. `default_plan` is
what runs where nothing was measured, `candidates` what `tuning.py` measures.
"""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["forward", "input_grad"]
"""`x Wᵀ` or `dy W`."""

ROW_BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512)
"""A product of r rows runs the plan of the smallest bucket that is not below r."""

MAX_PLANNED_ROWS = ROW_BUCKETS[-1]
"""With more rows the weight is decoded once and the library multiplies: decoding is then a small part."""

_FILLING_WARPS = 132 * 8
"""Warps in flight that keep an H100's memory busy: eight on every multiprocessor."""

_SHORTEST_SPLIT = 512
"""A split sums over no fewer elements, or filling and draining its pipeline is all that it does."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Compile-time choices of a product that decodes inside the tile.

    rows: of x and y (or dy and dx) a program owns; columns: of the result it owns. num_splits: programs among
    which the sum over the other axis of W is divided. num_warps, num_stages: as Triton means them.
    """

    rows: int
    columns: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How to compute one product: with these tiles, or without (`LIBRARY`): decode W, call the library."""

    tiles: Tiles | None


LIBRARY = Plan(None)


@dataclass(frozen=True, slots=True)
class PlanTable:
    """The plans of one weight, one per bucket, in the order of `ROW_BUCKETS`."""

    forward: tuple[Plan, ...]
    input_grad: tuple[Plan, ...]

    def plan(self, direction: Direction, num_rows: int) -> Plan:
        """The plan for a product of `num_rows` rows."""
        bucket = row_bucket(num_rows)
        if bucket is None:
            return LIBRARY
        plans = self.forward if direction == "forward" else self.input_grad
        return plans[ROW_BUCKETS.index(bucket)]


def row_bucket(num_rows: int) -> int | None:
    """The bucket of a number of rows; None where every weight's plan is `LIBRARY`."""
    if num_rows == 0:
        return None
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), None)


def default_plan(direction: Direction, num_rows: int, shape: tuple[int, int]) -> Plan:
    """What runs unless something else was measured: tiles up to 64 rows, the library above.

    Args:
        shape: (N, K) of the weight.
    """
    bucket = row_bucket(num_rows)
    return LIBRARY if bucket is None or bucket > 64 else candidates(direction, bucket, shape)[0]


def candidates(direction: Direction, bucket: int, shape: tuple[int, int]) -> tuple[Plan, ...]:
    """The plans worth measuring for a bucket; the first is the best guess for up to 64 rows.

    Tiles of up to 16 rows belong to one or two warps with 32 columns each: enough that reading x again for
    every tile of columns costs no more than reading W, and several of them fit a multiprocessor, each with
    loads in flight. With fewer than four warps an H100 takes the operand that is decoded from registers, as
    older devices always do.
    """
    rows = 16 if bucket <= 16 else 32 if bucket <= 32 else 64
    sizes: tuple[tuple[int, int], ...]
    if direction == "input_grad":
        sizes = ((64, 4),)
    elif rows <= 32:
        sizes = ((128, 4), (64, 4)) if rows == 32 else ((64, 2), (32, 1))
    else:
        sizes = ((128, 8),)
    tiled = [_fill(direction, bucket, shape, rows, columns, warps) for columns, warps in sizes]
    return (*tiled, LIBRARY)


def _fill(
    direction: Direction, bucket: int, shape: tuple[int, int], rows: int, columns: int, num_warps: int
) -> Plan:
    """Tiles with as many splits as fill the device."""
    width, depth = shape if direction == "forward" else shape[::-1]
    num_programs = -(-width // columns) * -(-bucket // rows)
    wanted = -(-_FILLING_WARPS // (num_programs * num_warps))
    num_splits = max(1, min(wanted, depth // _SHORTEST_SPLIT))
    return Plan(Tiles(rows, columns, num_splits, num_warps, num_stages=3))
