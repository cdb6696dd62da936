"""What windows amount to: attainment, percentiles, progress and gains, on numbers worked out by hand."""

from __future__ import annotations

import pytest

from weft_server.bench.coserve.measures import Point, Slo
from weft_server.bench.coserve.replay import Replay
from weft_server.bench.coserve.results import Results
from weft_server.bench.coserve.window import Answer, Outcome, TrainMeter, Window
from weft_server.bench.coserve.workload import BenchRequest

SLO = Slo("tight", 0.1, 1.0)
LOOSE = Slo("loose", 10.0, 10.0)


def answer(ttft_s=0.5, tpot_s=0.05, num_tokens=5, arrival_s=1.0, num_expected=None):
    times = tuple(arrival_s + ttft_s + i * tpot_s for i in range(num_tokens))
    return Answer(arrival_s, 10, num_expected or num_tokens, times)


def point(contender="Weft", answers=(), trained=100.0, load=1.0, slo=SLO, busy_s=0.0):
    return Point(contender, load, slo, 10.0, Outcome(tuple(answers), trained, busy_s))


def test_a_request_attains_if_it_keeps_both_targets_and_is_answered():
    kept, slow, late = answer(), answer(tpot_s=0.2), answer(ttft_s=2.0)
    unanswered = answer(num_tokens=3, num_expected=5)
    assert SLO.attained([kept, slow, late, unanswered]) == 0.25
    assert SLO.attained([answer(num_tokens=1)]) == 1.0
    assert SLO.attained([]) is None


def test_what_was_not_answered_is_the_upper_end_of_the_percentiles():
    answers = [answer(tpot_s=0.01 * (i + 1)) for i in range(9)] + [answer(num_tokens=2, num_expected=5)]
    assert point(answers=answers).tpot_ms(50.0) == pytest.approx(55.0)
    assert point(answers=answers).tpot_ms(99.0) is None


def test_progress_counts_forward_a_third_and_backward_the_rest():
    meter = TrainMeter(num_layers=4)
    meter.add(1.0, forward=400.0)
    meter.add(2.0, backward=400.0)
    assert meter.between(0.0, 2.0) == pytest.approx(100.0)
    assert meter.between(1.0, 2.0) == pytest.approx(200 / 3)
    assert meter.between(1.0, 1.5) == pytest.approx(100 / 3)


def test_a_gain_needs_the_attainment_that_the_rival_has():
    results = Results("tiny", loads=(1.0,), slos=(SLO,))
    good, bad = [answer()], [answer(tpot_s=5.0)]
    results.points = [point(answers=bad), point("alternating", good, trained=50.0)]
    assert results.gain("alternating", 1.0, SLO) == 0.0
    assert not results.is_outdone("alternating", 1.0, SLO)
    assert results.gain("two processes", 1.0, SLO) is None


@pytest.mark.parametrize(("num_bad", "is_outdone"), [(0, False), (2, False), (4, True), (20, True)])
def test_a_rival_that_attains_much_less_is_not_compared(num_bad: int, is_outdone: bool):
    results = Results("tiny", loads=(1.0,), slos=(SLO,))
    other = [answer()] * (20 - num_bad) + [answer(tpot_s=5.0)] * num_bad
    results.points = [point(answers=[answer()] * 20), point("alternating", other, trained=50.0)]
    assert results.is_outdone("alternating", 1.0, SLO) == is_outdone
    gain = results.gain("alternating", 1.0, SLO)
    assert gain is None if is_outdone else gain == pytest.approx(2.0)


def test_kept_is_relative_to_the_own_peak_and_the_own_light_load():
    results = Results("tiny", loads=(1.0, 2.0), slos=(SLO, LOOSE))
    results.points = [
        point("finetuning alone", trained=200.0, load=0.0, slo=None),
        point("PEFT training alone", trained=80.0, load=0.0, slo=None),
        point(trained=160.0, load=1.0),
        point(trained=100.0, load=2.0),
        point("two processes", trained=40.0, load=2.0, slo=None),
    ]
    heavy, pair = results.find("Weft", 2.0, SLO), results.find("two processes", 2.0, LOOSE)
    assert (results.kept(heavy), results.kept_of_light(heavy)) == (0.5, 0.625)
    assert results.kept(pair) == 0.5
    assert results.find("Weft", 2.0, LOOSE) is None


def test_the_half_busy_load_is_the_nearest_one():
    results = Results("tiny")
    results.points = [
        point("inference alone", load=load, slo=None, busy_s=busy)
        for load, busy in ((1.0, 1.0), (2.0, 4.5), (3.0, 9.0))
    ]
    assert results.half_busy_load == 2.0
    assert results.busy_share(2.0) == pytest.approx(0.45)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_replay_follows_the_clock_and_ends_when_all_are_answered():
    clock = Clock()
    requests = [BenchRequest(f"r{i}", float(i), (1, 2), 2, 0) for i in range(3)]
    replay = Replay(requests, Window(101.0, 3.0, 5.0), clock)
    assert replay.take_due() == []
    assert replay.wait_s(10.0) == pytest.approx(1.0)
    clock.now = 102.5
    assert [request.request_id for request in replay.take_due()] == ["r0", "r1"]
    assert [replay.token("r0"), replay.token("r0")] == [False, True]
    assert replay.open_ids == ["r1"]
    clock.now = 104.5
    assert [request.request_id for request in replay.take_due()] == ["r2"]
    assert not replay.is_over
    for name in ("r1", "r1", "r2", "r2"):
        replay.token(name)
    assert replay.is_over
    first, _, last = replay.answers()
    assert (first.ttft_s, last.ttft_s) == (pytest.approx(1.5), pytest.approx(1.5))


def test_a_replay_gives_up_at_the_end_of_its_drain():
    clock = Clock()
    replay = Replay([BenchRequest("r", 0.0, (1,), 2, 0)], Window(100.0, 1.0, 2.0), clock)
    replay.take_due()
    clock.now = 102.5
    assert not replay.is_over
    clock.now = 103.0
    assert replay.is_over
    assert not replay.answers()[0].is_complete
