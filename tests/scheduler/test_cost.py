"""The cost model: finds the plateau and the slopes, follows a machine that changes, shrugs at outliers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from weft_scheduler.cost import KNOTS, CostModel
from weft_scheduler.features import LINEAR_NAMES, PlanFeatures


def truth(features: PlanFeatures) -> float:
    """A memory-bound plateau of 8 ms up to 200 tokens, then 50 µs a token, and linear terms."""
    plateau_s = 0.008 if features.forward_tokens else 0.0
    return (
        plateau_s
        + max(0, features.forward_tokens - 200) * 50e-6
        + features.kv_tokens_read * 30e-9
        + features.backward_token_layers * 4e-6
        + features.num_backward_slices * 100e-6
        + features.num_adapters * 40e-6
        + features.optimizer_steps * 3e-3
    )


def random_features(rng: random.Random) -> PlanFeatures:
    num_tokens = rng.choice((1, 4, 32, 100, 256, 600, 1500))
    num_slices = rng.choice((0, 0, 1, 4))
    return PlanFeatures(
        forward_tokens=num_tokens,
        kv_tokens_read=rng.randint(num_tokens, 40_000),
        num_sequences=min(num_tokens, 16),
        backward_token_layers=num_slices * 512,
        num_backward_slices=num_slices,
        num_adapters=rng.randint(0, 8),
        optimizer_steps=rng.choice((0, 0, 0, 1)),
    )


def calibrated(rng: random.Random) -> CostModel:
    model = CostModel()
    model.calibrate([(f, truth(f)) for f in (random_features(rng) for _ in range(80))])
    return model


def test_calibration_predicts_iterations_that_it_has_not_seen() -> None:
    rng = random.Random(1)
    model = calibrated(rng)
    errors = []
    for _ in range(200):
        features = random_features(rng)
        errors.append(abs(model.predict(features) / truth(features) - 1.0))
    errors.sort()
    assert errors[100] < 0.05
    assert errors[190] < 0.15


def test_extra_tokens_are_nearly_free_on_the_plateau_and_dear_beyond_it() -> None:
    model = calibrated(random.Random(2))
    on_plateau = model.predict(PlanFeatures(forward_tokens=128)) - model.predict(
        PlanFeatures(forward_tokens=1)
    )
    beyond = model.predict(PlanFeatures(forward_tokens=1500)) - model.predict(
        PlanFeatures(forward_tokens=1372)
    )
    assert on_plateau < 0.2 * beyond


def test_more_work_is_never_predicted_to_take_less_time() -> None:
    rng = random.Random(3)
    model = CostModel()
    for _ in range(300):
        model.observe(random_features(rng), rng.uniform(1e-4, 1.0))
    times = [model.predict(PlanFeatures(forward_tokens=count)) for count in range(0, 3 * KNOTS[-1], 37)]
    assert times == sorted(times)
    for name in ("forward_tokens", *LINEAR_NAMES):
        low, high = PlanFeatures(**{name: 10}), PlanFeatures(**{name: 20})
        assert 0.0 <= model.predict(low) <= model.predict(high)


def test_observations_follow_a_machine_that_becomes_three_times_slower() -> None:
    rng = random.Random(4)
    model = calibrated(rng)
    for _ in range(600):
        features = random_features(rng)
        model.observe(features, 3.0 * truth(features))
    assert model.error_p50 < 0.1
    features = PlanFeatures(forward_tokens=32, kv_tokens_read=5000, num_sequences=16)
    assert model.predict(features) == pytest.approx(3.0 * truth(features), rel=0.15)


def test_a_nominal_model_finds_a_machine_a_hundred_times_slower_without_calibration() -> None:
    rng = random.Random(5)
    model = CostModel()
    for _ in range(1500):
        features = random_features(rng)
        model.observe(features, 100.0 * truth(features))
    assert model.error_p50 < 0.25


def test_an_outlier_moves_the_prediction_little() -> None:
    rng = random.Random(6)
    model = calibrated(rng)
    steady = PlanFeatures(forward_tokens=16, kv_tokens_read=8000, num_sequences=16)
    for _ in range(320):
        model.observe(steady, truth(steady))
    before = model.predict(steady)
    model.observe(steady, 1000.0 * truth(steady))
    for _ in range(15):
        model.observe(steady, truth(steady))
    assert model.predict(steady) == pytest.approx(before, rel=0.05)


def test_the_error_is_that_of_predictions_made_before_the_result_was_seen() -> None:
    model = CostModel()
    assert model.error_p50 == model.error_p95 == 0.0
    features = PlanFeatures(forward_tokens=8)
    model.observe(features, 2.0 * model.predict(features))
    assert model.error_p50 == pytest.approx(0.5)
    assert model.error_p95 == pytest.approx(0.5)


def test_iterations_without_time_or_work_teach_nothing() -> None:
    model = CostModel()
    before = model.predict(PlanFeatures(forward_tokens=8))
    for _ in range(40):
        model.observe(PlanFeatures(), 1.0)
        model.observe(PlanFeatures(forward_tokens=8), 0.0)
    assert model.predict(PlanFeatures(forward_tokens=8)) == before
    assert model.predict(PlanFeatures()) == 0.0


def test_calibration_without_samples_or_with_impossible_times_is_refused() -> None:
    for samples in ([], [(PlanFeatures(forward_tokens=1), 0.0)], [(PlanFeatures(), 1.0)]):
        with pytest.raises(ValueError, match="calibration needs"):
            CostModel().calibrate(samples)


def test_a_rare_kind_of_iteration_that_is_predicted_wrongly_is_no_outlier() -> None:
    """One in twenty takes ten times what the calibration made of it."""
    rng = random.Random(8)
    model = calibrated(rng)
    common = PlanFeatures(forward_tokens=16, kv_tokens_read=8000, num_sequences=16)
    rare = PlanFeatures(16, 8000, num_sequences=16, backward_token_layers=2048, num_backward_slices=4)
    for idx in range(1, 801):
        features, factor = (rare, 10.0) if idx % 20 == 0 else (common, 1.0)
        model.observe(features, factor * truth(features))
    assert model.predict(rare) == pytest.approx(10.0 * truth(rare), rel=0.15)
    assert model.predict(common) == pytest.approx(truth(common), rel=0.1)


def test_a_calibration_that_a_busy_machine_spoiled_is_lived_down_within_a_few_iterations() -> None:
    rng = random.Random(15)
    samples = [random_features(rng) for _ in range(15)]
    model = CostModel()
    model.calibrate([(f, truth(f) * rng.choice((3.0, 30.0))) for f in samples])
    for _ in range(64):
        features = random_features(rng)
        model.observe(features, truth(features))
    errors = []
    for _ in range(100):
        features = random_features(rng)
        errors.append(abs(model.predict(features) / truth(features) - 1.0))
        model.observe(features, truth(features))
    errors.sort()
    assert errors[50] < 0.1


def test_every_feature_has_a_price_that_is_learnt() -> None:
    rng = random.Random(16)
    many = {"attention_products": 10_000_000, "adapter_elements": 10_000_000_000}
    for name in LINEAR_NAMES:
        model = calibrated(rng)
        without = PlanFeatures(forward_tokens=32, kv_tokens_read=1000, num_sequences=32)
        with_it = replace(without, **{name: getattr(without, name) + many.get(name, 10_000)})
        for _ in range(300):
            model.observe(without, 0.010)
            model.observe(with_it, 0.030)
        assert model.predict(without) == pytest.approx(0.010, rel=0.05), name
        assert model.predict(with_it) == pytest.approx(0.030, rel=0.05), name


def test_a_window_with_a_loss_and_a_new_layer_are_priced_with_their_fixed_parts() -> None:
    model = CostModel()
    heads = model.predict(PlanFeatures(num_loss_windows=1))
    layers = model.predict(PlanFeatures(num_backward_layers=1))
    assert min(heads, layers) > 0.0
    rows_s = model.predict(PlanFeatures(loss_tokens=8))
    assert model.chunk_s(8, 64, 8) - model.chunk_s(8, 64) == pytest.approx(heads + rows_s)
    assert model.backward_s(64, 1.0, 0.5, 0) - model.backward_s(64, 1.0, 0.0, 0) == pytest.approx(layers / 2)


def test_a_spell_in_which_all_takes_longer_is_followed_within_a_few_iterations() -> None:
    rng = random.Random(12)
    model = calibrated(rng)
    for _ in range(200):
        features = random_features(rng)
        model.observe(features, truth(features))
    for slowdown in (3.0, 1.0):
        for _ in range(4):
            features = random_features(rng)
            model.observe(features, slowdown * truth(features))
        for _ in range(20):
            features = random_features(rng)
            assert model.predict(features) == pytest.approx(slowdown * truth(features), rel=0.25)
            model.observe(features, slowdown * truth(features))


def test_a_slow_spell_scales_every_price_alike() -> None:
    rng = random.Random(13)
    model = calibrated(rng)

    def prices() -> list[float]:
        return [
            model.decode_s(500),
            model.chunk_s(64, 640, loss_tokens=64),
            model.backward_s(512, 1.0, 1.0, 256),
            model.adapter_s(1000),
            model.optimizer_step_s,
            model.predict(PlanFeatures(forward_tokens=700, kv_tokens_read=900, num_sequences=3)),
        ]

    before = prices()
    for _ in range(3):
        features = random_features(rng)
        model.observe(features, 3.0 * model.predict(features))
    ratios = [now / then for now, then in zip(prices(), before, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert ratios[0] > 2.0


def test_a_slow_spell_is_not_written_into_the_fitted_file() -> None:
    rng = random.Random(14)
    model = calibrated(rng)
    before = model.to_dict()
    for _ in range(3):
        features = random_features(rng)
        model.observe(features, 3.0 * truth(features))
    after = model.to_dict()
    assert (after["curve"], after["weights"]) == (before["curve"], before["weights"])
