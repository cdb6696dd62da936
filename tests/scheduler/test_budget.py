"""The budget: starts under the target, is cut when iterations come in late, grows back, opens when nobody
decodes.
"""

from __future__ import annotations

import pytest

from weft_scheduler import CostModel, Limits, Scheduler
from weft_scheduler.budget import BudgetController, LatencyTargets


def feed(budget: BudgetController, elapsed_s: float, rounds: int = 1) -> None:
    for _ in range(64 * rounds):
        budget.observe(elapsed_s, num_decodes=1)


def test_the_budget_starts_below_the_target() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    assert budget.decode_budget_s == pytest.approx(0.045)


def test_late_iterations_cut_the_budget_and_punctual_ones_restore_it() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    feed(budget, 0.06)
    assert budget.decode_budget_s == pytest.approx(0.045 * 0.05 / 0.06)
    assert budget.measured_s == 0.06
    low = budget.decode_budget_s
    feed(budget, 0.03, rounds=3)
    assert low < budget.decode_budget_s <= low * 1.05**3 * 1.0001


def test_a_machine_that_is_slower_than_predicted_ends_on_target() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    for _ in range(40):
        feed(budget, 1.4 * budget.decode_budget_s)
    assert 1.4 * budget.decode_budget_s == pytest.approx(0.05, rel=0.01)


def test_lateness_without_finetuning_does_not_cut_finetuning() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    for idx in range(64 * 3):
        budget.observe(0.08, num_decodes=1, has_training=idx % 2 == 0)
    assert budget.decode_budget_s == pytest.approx(0.045)
    for idx in range(64):
        has_training = idx % 2 == 0
        budget.observe(0.16 if has_training else 0.08, num_decodes=1, has_training=has_training)
    assert budget.decode_budget_s == pytest.approx(0.045 * 0.7)


def test_the_budget_does_not_grow_while_nothing_fills_it() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    for _ in range(1000):
        budget.observe(0.007, num_decodes=2, has_training=False, is_filled=False)
    assert budget.decode_budget_s == pytest.approx(0.045)
    for _ in range(64):
        budget.observe(0.1, num_decodes=2, is_filled=False)
    assert budget.decode_budget_s == pytest.approx(0.045 * 0.7), "lateness counts whatever was planned"


def test_prompts_that_fill_the_budget_do_not_excuse_its_lateness() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    for _ in range(3):
        for idx in range(64):
            budget.observe(0.06, num_decodes=1, has_prefill=idx % 2 == 0, has_training=idx % 2 == 1)
    assert budget.decode_budget_s < 0.045


def feed_alone_and_trained(budget: BudgetController, alone_s: float, trained_s: float) -> None:
    for idx in range(64):
        is_alone = idx % 4 == 0
        budget.observe(alone_s if is_alone else trained_s, num_decodes=1, has_training=not is_alone)


def test_a_relative_target_follows_what_decoding_takes_while_serving() -> None:
    budget = BudgetController(LatencyTargets(0.008, 2.0, unloaded_factor=2.0))
    feed_alone_and_trained(budget, alone_s=0.007, trained_s=0.014)
    assert budget.tpot_s == pytest.approx(0.014)
    assert budget.decode_budget_s == pytest.approx(0.014 * 0.9)
    feed_alone_and_trained(budget, alone_s=0.001, trained_s=0.002)
    assert budget.tpot_s == pytest.approx(0.008), "never below the measured unloaded decode"


def test_a_target_that_was_asked_for_stays() -> None:
    budget = BudgetController(LatencyTargets(0.008, 2.0))
    feed_alone_and_trained(budget, alone_s=0.007, trained_s=0.014)
    assert budget.tpot_s == 0.008


def test_only_the_asked_percentile_counts() -> None:
    tail, median = (BudgetController(LatencyTargets(0.05, 2.0, percentile)) for percentile in (95, 50))
    for idx in range(64):
        for budget in (tail, median):
            budget.observe(0.08 if idx % 10 == 0 else 0.02, num_decodes=3)
    assert tail.decode_budget_s < 0.045 < median.decode_budget_s


def test_iterations_without_decodes_are_nobodys_latency() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    for _ in range(200):
        budget.observe(10.0, num_decodes=0)
    assert budget.decode_budget_s == pytest.approx(0.045)
    assert budget.measured_s is None


def test_the_budget_stays_within_a_tenth_and_one_and_a_half_of_the_target() -> None:
    budget = BudgetController(LatencyTargets(0.05, 2.0))
    feed(budget, 9.0, rounds=50)
    assert budget.decode_budget_s == pytest.approx(0.005)
    feed(budget, 0.0001, rounds=100)
    assert budget.decode_budget_s == pytest.approx(0.075)


def test_without_decodes_the_budget_is_what_an_arrival_may_wait() -> None:
    assert BudgetController(LatencyTargets(0.05, 1.0)).open_budget_s == 0.25
    assert BudgetController(LatencyTargets(0.05, 60.0)).open_budget_s == 0.5
    assert BudgetController(LatencyTargets(0.05, 1.0), max_inflight=2).open_budget_s == 0.125


@pytest.mark.parametrize("targets", [(0.0, 1.0, 95.0), (1.0, -1.0, 95.0), (1.0, 1.0, 0.0), (1.0, 1.0, 101.0)])
def test_impossible_targets_are_refused(targets: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LatencyTargets(*targets)
    with pytest.raises(ValueError, match="must be"):
        LatencyTargets(1.0, 1.0, unloaded_factor=0.5)


def test_a_relative_target_comes_down_again_when_the_machine_is_quiet() -> None:
    budget = BudgetController(LatencyTargets(0.008, 2.0, unloaded_factor=2.0))
    feed_alone_and_trained(budget, alone_s=0.1, trained_s=0.2)
    assert budget.tpot_s == pytest.approx(0.2)
    num_probes = 0
    for _ in range(64 * 40):
        is_probe = budget.wants_probe(num_decodes=1, num_prefill_tokens=0)
        num_probes += is_probe
        budget.observe(0.005 if is_probe else 0.19, num_decodes=1, has_training=not is_probe)
    assert budget.tpot_s == pytest.approx(0.01)
    assert num_probes <= 40, "one plan in 64 at most"


def test_a_fixed_target_needs_no_probes_and_prompts_spoil_one() -> None:
    fixed = BudgetController(LatencyTargets(0.05, 2.0))
    relative = BudgetController(LatencyTargets(0.05, 2.0, unloaded_factor=2.0))
    for _ in range(200):
        fixed.observe(0.04, num_decodes=1)
        relative.observe(0.04, num_decodes=1)
    assert not fixed.wants_probe(1, 0)
    assert relative.wants_probe(1, 0)
    assert not relative.wants_probe(1, 16)
    assert not relative.wants_probe(0, 0)


def test_late_first_tokens_shorten_the_iterations_that_an_arrival_may_meet() -> None:
    budget = BudgetController(LatencyTargets(0.02, 1.0))
    for _ in range(32 * 3):
        budget.observe_first_token(1.5)
    assert budget.measured_ttft_s == 1.5
    assert budget.open_budget_s < 0.25 * 0.7
    for _ in range(32 * 40):
        budget.observe_first_token(5.0)
    assert budget.open_budget_s == pytest.approx(0.1 * 0.02), "a tenth of the per-token target is left"
    for _ in range(32 * 100):
        budget.observe_first_token(0.1)
    assert budget.open_budget_s == 0.25


def test_new_targets_forget_what_was_learnt_under_others() -> None:
    limits = Limits(
        num_blocks=64,
        block_size=16,
        max_num_seqs=8,
        max_batch_tokens=64,
        max_model_len=128,
        num_adapter_slots=4,
        arena_elements=1 << 16,
        window_tokens=16,
        num_layers=2,
        max_train_tokens=256,
    )
    scheduler = Scheduler(limits, CostModel(), LatencyTargets(0.05, 2.0))
    feed(scheduler.budget, 0.5)
    scheduler.set_targets(LatencyTargets(0.02, 1.0))
    assert scheduler.budget.decode_budget_s == pytest.approx(0.018)
    assert scheduler.flex_budget.tpot_s == pytest.approx(0.08)


def test_iterations_are_short_enough_for_the_first_token_of_an_arrival() -> None:
    budget = BudgetController(LatencyTargets(tpot_s=0.05, ttft_s=0.12), max_inflight=2)
    assert budget.decode_budget_s == pytest.approx(0.03), "two in flight, the prompt's own, and one to spare"
    for _ in range(64 * 20):
        budget.observe(0.02, num_decodes=1)
    assert budget.decode_budget_s == pytest.approx(0.03)


def test_a_relative_target_follows_iterations_that_do_not_fill_the_budget() -> None:
    budget = BudgetController(LatencyTargets(0.008, 2.0, unloaded_factor=2.0))
    for _ in range(64):
        budget.observe(0.007, num_decodes=1, has_training=False, is_filled=False)
    assert budget.tpot_s == pytest.approx(0.014)
    assert budget.measured_s is None
