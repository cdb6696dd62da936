"""Choosing plans by measurement, and the file that keeps them."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

from triton.runtime.errors import OutOfResources

from weft_kernels.product import LIBRARY, Plan, Tiles
from weft_kernels.product.tuning import PlanFile, Tuner

OWNER = {"device": "NVIDIA H200", "kernels": "1"}
SMALL, LARGE = Plan(Tiles(16, 64, 4, 2, 3)), Plan(Tiles(64, 128, 1, 8, 3))
PLANS = (SMALL, LARGE, LIBRARY)


class Bench:
    """Runs take the seconds given; the clock advances by them."""

    def __init__(self, seconds: dict[Plan, float]) -> None:
        self.seconds = seconds
        self.now = 100.0
        self.ran: list[Plan] = []
        self.num_measured = 0

    def run(self, plan: Plan) -> None:
        if plan not in self.seconds:
            raise OutOfResources(200, 100, "shared memory")
        self.ran.append(plan)

    def measure(self, run) -> float:
        run()
        self.num_measured += 1
        self.now += self.seconds[self.ran[-1]]
        return self.seconds[self.ran[-1]]

    def tuner(self, plans: PlanFile, max_seconds: float = 1e9) -> Tuner:
        return Tuner(plans, self.measure, max_seconds=max_seconds, clock=lambda: self.now)


def test_the_fastest_candidate_is_chosen_and_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plans.json"
    plans, bench = PlanFile(path, OWNER), Bench({SMALL: 3, LARGE: 1, LIBRARY: 2})
    assert bench.tuner(plans).choose("a", PLANS, bench.run) == LARGE
    assert bench.tuner(plans).choose("a", PLANS, bench.run) == LARGE
    assert bench.num_measured == 3
    plans.save()
    again = Bench({SMALL: 1, LARGE: 9, LIBRARY: 9})
    assert again.tuner(PlanFile(path, OWNER)).choose("a", PLANS, again.run) == LARGE
    assert (again.num_measured, again.ran) == (0, [LARGE])  # run once, so that it is compiled


def test_the_library_can_win_and_is_remembered(tmp_path: Path) -> None:
    plans, bench = PlanFile(tmp_path / "plans.json", OWNER), Bench({SMALL: 3, LIBRARY: 2})
    assert bench.tuner(plans).choose("a", (SMALL, LIBRARY), bench.run) == LIBRARY
    plans.save()
    assert PlanFile(tmp_path / "plans.json", OWNER).get("a") == LIBRARY


def test_a_candidate_that_does_not_fit_the_device_is_passed_over() -> None:
    bench = Bench({SMALL: 3, LIBRARY: 4})
    assert bench.tuner(PlanFile(None, OWNER)).choose("a", PLANS, bench.run) == SMALL


def test_after_the_time_limit_nothing_is_measured_and_nothing_remembered() -> None:
    plans, bench = PlanFile(None, OWNER), Bench({SMALL: 9, LARGE: 1, LIBRARY: 2})
    tuner = bench.tuner(plans, max_seconds=10)
    assert tuner.choose("a", PLANS, bench.run) == LARGE  # 9 s, then 1 s: the limit
    assert plans.get("a") is None
    assert tuner.choose("b", PLANS, bench.run) == SMALL
    assert bench.ran[-1] == SMALL
    assert bench.num_measured == 2
    assert tuner.choose("c", PLANS[1:], bench.run) == LARGE


def test_a_remembered_plan_that_is_no_candidate_any_more_is_measured_again() -> None:
    plans, bench = PlanFile(None, OWNER), Bench({SMALL: 3, LARGE: 1, LIBRARY: 2})
    plans.put("a", LARGE)
    assert bench.tuner(plans).choose("a", (SMALL, LIBRARY), bench.run) == LIBRARY


def test_a_remembered_plan_that_no_longer_fits_is_measured_again() -> None:
    plans, bench = PlanFile(None, OWNER), Bench({SMALL: 3, LIBRARY: 4})
    plans.put("a", LARGE)
    assert bench.tuner(plans).choose("a", PLANS, bench.run) == SMALL


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"owner": {}}',
        json.dumps({"owner": OWNER, "plans": [1]}),
        json.dumps({"owner": OWNER, "plans": {"a": {"rows": 16}}}),
        json.dumps({"owner": OWNER, "plans": {"a": 5}}),
        json.dumps(
            {
                "owner": OWNER,
                "plans": {
                    "a": {"rows": "16", "columns": 64, "num_splits": 1, "num_warps": 2, "num_stages": 3}
                },
            }
        ),
        json.dumps({"owner": OWNER | {"device": "NVIDIA A100"}, "plans": {"a": None}}),
        json.dumps({"owner": OWNER | {"kernels": "2"}, "plans": {"a": None}}),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plans.json"
    path.write_text(text)
    plans = PlanFile(path, OWNER)
    assert plans.get("a") is None
    plans.put("a", SMALL)
    plans.save()
    assert PlanFile(path, OWNER).get("a") == SMALL
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_other_bytes_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert PlanFile(path, OWNER).get("a") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plans = PlanFile(tmp_path / "file" / "plans.json", OWNER)
    plans.put("a", SMALL)
    plans.save()
    assert plans.get("a") == SMALL
