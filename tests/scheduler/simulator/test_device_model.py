"""The roofline by hand for Llama-3.1-8B on an H200, limits, and fitted devices."""

from __future__ import annotations

import json

import pytest

from weft_scheduler import CostModel, LatencyTargets, PlanFeatures, Scheduler
from weft_scheduler.simulator.device_model import FittedDevice, Roofline, Work, calibration_samples
from weft_scheduler.simulator.fitted import describe, read_fitted
from weft_scheduler.simulator.gpus import GPUS, DoesNotFit, choose_limits
from weft_scheduler.simulator.shapes import SHAPES

LLAMA, H200 = SHAPES["llama-3.1-8b"], GPUS["h200"]
GIVEN_BANDWIDTH = 0.80 * 4.8e12
GIVEN_FLOPS = 0.55 * 989e12


def test_the_shape_has_the_published_number_of_weights() -> None:
    assert LLAMA.decoder_weights == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert LLAMA.kv_bytes_per_token == 128 * 1024
    assert LLAMA.adapter_elements(16) * 2 == pytest.approx(80 * 2**20, rel=0.01)


def test_one_decode_streams_the_packed_weights_and_the_head() -> None:
    work = Work(forward_tokens=1, kv_tokens_read=1000, num_sequences=1)
    weights = 6_979_321_856 * 0.516 + 128256 * 4096 * 2 + 1000 * 131072
    assert Roofline(LLAMA, H200, "nf4").forward_s(work) == pytest.approx(weights / GIVEN_BANDWIDTH, rel=1e-6)


def test_a_large_batch_is_bound_by_its_products() -> None:
    work = Work(forward_tokens=2048)
    expected = 2048 * 2 * 6_979_321_856 / GIVEN_FLOPS
    assert Roofline(LLAMA, H200, "nf4").forward_s(work) == pytest.approx(expected, rel=1e-6)


def test_a_middling_batch_reads_the_dense_copy_or_dequantizes_first() -> None:
    work = Work(forward_tokens=128)
    dense = 6_979_321_856 * 2 / GIVEN_BANDWIDTH
    assert Roofline(LLAMA, H200, "nf4").forward_s(work) == pytest.approx(dense, rel=1e-6)
    l4 = GPUS["l4"]
    dequantized = 6_979_321_856 * 4.516 / (0.80 * 300e9)
    assert Roofline(LLAMA, l4, "nf4").forward_s(work) == pytest.approx(dequantized, rel=1e-6)


def test_a_slice_computes_the_layer_again_but_for_down_and_then_its_gradient() -> None:
    work = Work(backward_token_layers=512, num_backward_slices=1, recomputed_token_layers=512)
    layer, down = LLAMA.layer_weights, 4096 * 14336
    expected = 512 * 2 * (2 * layer - down) / GIVEN_FLOPS
    assert Roofline(LLAMA, H200, "nf4").backward_s(work) == pytest.approx(expected, rel=1e-6)
    tiny = Work(backward_token_layers=1, num_backward_slices=1, recomputed_token_layers=1)
    weights = 2 * 2 * layer / GIVEN_BANDWIDTH
    assert Roofline(LLAMA, H200, "nf4").backward_s(tiny) == pytest.approx(weights, rel=1e-6)


def test_a_slice_that_kept_its_activations_reads_them_instead() -> None:
    layer = LLAMA.layer_weights
    written_and_read = 2 * ((2 * 4096 + 2 * 1024 + 4096 + 2 * 14336) * 2 + 4 * 32) / GIVEN_BANDWIDTH
    work = Work(backward_token_layers=512, num_backward_slices=1)
    expected = 512 * (2 * layer / GIVEN_FLOPS + written_and_read)
    assert Roofline(LLAMA, H200, "nf4").backward_s(work) == pytest.approx(expected, rel=1e-6)
    tiny = Work(backward_token_layers=1, num_backward_slices=1)
    weights = 2 * layer / GIVEN_BANDWIDTH
    assert Roofline(LLAMA, H200, "nf4").backward_s(tiny) == pytest.approx(
        weights + written_and_read, rel=1e-6
    )


def test_kernels_that_cannot_be_started_faster_set_the_pace() -> None:
    device = Roofline(LLAMA, H200, "nf4")
    work = Work(forward_tokens=1)
    assert device.seconds(work) == pytest.approx(32 * 14 * 4e-6 + H200.overhead_s)


def test_an_optimizer_step_moves_thirty_bytes_an_element() -> None:
    device = Roofline(LLAMA, H200, "nf4")
    seconds = device.seconds(Work(optimizer_steps=1, stepped_elements=42_000_000))
    assert seconds == pytest.approx(42e6 * 30 / GIVEN_BANDWIDTH + H200.overhead_s)


def test_the_cost_model_learns_the_roofline_within_a_few_percent() -> None:
    limits = choose_limits(LLAMA, H200, "nf4")
    device = Roofline(LLAMA, H200, "nf4")
    cost = CostModel()
    samples = calibration_samples(device, limits)
    cost.calibrate(samples)
    errors = sorted(abs(cost.predict(features) - seconds) / seconds for features, seconds in samples)
    assert errors[len(errors) // 2] < 0.05
    assert errors[-1] < 0.25


def test_limits_leave_room_for_the_weights() -> None:
    limits = choose_limits(LLAMA, H200, "nf4", max_model_len=8192)
    usable = 141e9 * 0.9 - LLAMA.weight_bytes("nf4") - LLAMA.decoder_weights * 2
    assert limits.capacity_tokens == pytest.approx(usable * 0.55 / 131072, rel=1e-3)
    assert (limits.max_model_len, limits.num_layers, limits.max_inflight) == (8192, 32, 2)
    with pytest.raises(DoesNotFit, match=r"takes 14\d\.\d GB; l4 offers 21\.6 GB"):
        choose_limits(SHAPES["llama-3.1-70b"], GPUS["l4"], "none")


def fitted_text() -> str:
    limits = choose_limits(LLAMA, H200, "nf4")
    cost = CostModel()
    cost.calibrate(calibration_samples(Roofline(LLAMA, H200, "nf4"), limits))
    scheduler = Scheduler(limits, cost, LatencyTargets(0.04, 1.5))
    return json.dumps(describe(scheduler, model="llama", device="cuda", max_pack_tokens=4096))


def test_a_fitted_device_predicts_as_the_server_did() -> None:
    text = fitted_text()
    fitted = read_fitted(text)
    assert (fitted.slo.tpot_s, fitted.slo.ttft_s, fitted.max_pack_tokens) == (0.04, 1.5, 4096)
    cost = CostModel()
    cost.calibrate(calibration_samples(Roofline(LLAMA, H200, "nf4"), fitted.limits))
    counts = (300, 9000, 70_000, 20, 100, 4096, 8, 5, 1, 10_000, 3, 2, 4)
    features, work = PlanFeatures(*counts), Work(*counts)
    assert FittedDevice(fitted.cost).seconds(work) == pytest.approx(cost.predict(features), rel=1e-9)


def test_a_model_read_back_goes_on_learning() -> None:
    cost = read_fitted(fitted_text()).cost
    features = PlanFeatures(forward_tokens=32, num_sequences=32)
    slow = 3.0 * cost.predict(features)
    for _ in range(640):
        cost.observe(features, slow)
    assert cost.predict(features) == pytest.approx(slow, rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("format"), "has no"),
        (lambda v: v.update(format="weft-cost-model-1"), "'weft-cost-model-1'; this version reads"),
        (lambda v: v.pop("limits"), "missing or unknown"),
        (lambda v: v["cost_model"]["weights"].pop("loss_tokens"), "`weights` must have exactly"),
        (lambda v: v["cost_model"]["curve"].update({"16": 0.0}), "must not fall"),
        (lambda v: v["cost_model"]["curve"].pop("16"), "`curve` must map"),
    ],
)
def test_a_file_that_is_not_a_fitted_device_is_refused(change: object, message: str) -> None:
    values = json.loads(fitted_text())
    change(values)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        read_fitted(json.dumps(values))
