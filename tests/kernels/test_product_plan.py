"""Plans: which bucket a number of rows belongs to, and what is worth trying there."""

import pytest

from weft_kernels.product import LIBRARY, ROW_BUCKETS, PlanTable, candidates, default_plan, row_bucket

SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336), (33, 70), (1, 2)]


def test_rows_belong_to_the_smallest_bucket_that_holds_them() -> None:
    assert [row_bucket(n) for n in (1, 2, 4, 5, 17, 64, 65, 512)] == [1, 4, 4, 16, 32, 64, 128, 512]
    assert row_bucket(513) is None
    assert row_bucket(0) is None


@pytest.mark.parametrize("direction", ["forward", "input_grad"])
@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_differ_and_end_with_the_one_that_runs_anywhere(direction, shape) -> None:
    for bucket in ROW_BUCKETS:
        plans = candidates(direction, bucket, shape)
        assert plans[-1] == LIBRARY
        assert len(set(plans)) == len(plans)
        assert all(plan.tiles is not None for plan in plans[:-1])


@pytest.mark.parametrize("direction", ["forward", "input_grad"])
def test_splits_fill_a_large_device_but_stay_long(direction) -> None:
    for shape in SHAPES:
        width, depth = shape if direction == "forward" else shape[::-1]
        for bucket in ROW_BUCKETS:
            for plan in candidates(direction, bucket, shape)[:-1]:
                tiles = plan.tiles
                warps = (
                    -(-width // tiles.columns) * -(-bucket // tiles.rows) * tiles.num_splits * tiles.num_warps
                )
                assert tiles.num_splits == 1 or depth // tiles.num_splits >= 512
                assert warps >= 132 * 8 or depth // (tiles.num_splits + 1) < 512


def test_defaults_decode_in_the_tile_for_few_rows_only() -> None:
    shape = (4096, 4096)
    assert default_plan("forward", 3, shape) == candidates("forward", 4, shape)[0]
    assert default_plan("forward", 65, shape) == LIBRARY
    assert default_plan("forward", 0, shape) == LIBRARY
    assert default_plan("input_grad", 5000, shape) == LIBRARY


def test_a_table_gives_each_bucket_its_plan() -> None:
    shape = (4096, 4096)
    forward = tuple(candidates("forward", bucket, shape)[0] for bucket in ROW_BUCKETS)
    table = PlanTable(forward=forward, input_grad=(LIBRARY,) * len(ROW_BUCKETS))
    assert table.plan("forward", 20) == forward[ROW_BUCKETS.index(32)]
    assert table.plan("input_grad", 20) == LIBRARY
    assert table.plan("forward", 513) == LIBRARY
