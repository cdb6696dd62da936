"""Token-level finetuning is exact: windows, packs and drops change memory and latency, never the gradient."""

from __future__ import annotations

import pytest
import torch

LENGTHS = (97, 23, 40, 5)
TOLERANCE = 1e-9


def _assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max()
    assert scale > 1e-3, "the oracle's gradient is dead"
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("window_tokens", [1, 7, 64, 1000])
def test_windowed_gradient_equals_whole_sequence_autograd(window_tokens, bench, make):
    config = make.config()
    b = bench(config, torch.float64, window_tokens)
    job = b.add_job(make.dataset(LENGTHS, config.vocab_size), make.adapter(config, 5), make.spec())
    expected, loss = b.whole_sequence_gradient("job")
    b.accumulate_gradients("job")
    _assert_same(job.optimizer.grad, expected)
    summed = sum(float(pack.loss_by_example().sum()) for pack in job._packs)
    assert summed == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family_has_exact_gradients(family, bench, make):
    changes = {"sliding_window": 9} if family == "mistral" else {}
    config = make.config(family, **changes)
    b = bench(config, torch.float64, 16)
    job = b.add_job(make.dataset(LENGTHS, config.vocab_size), make.adapter(config, 5), make.spec())
    expected, _ = b.whole_sequence_gradient("job")
    b.accumulate_gradients("job")
    _assert_same(job.optimizer.grad, expected)


@pytest.mark.parametrize("max_pack_tokens", [40, 63, 120, 1000])
def test_packing_unequal_examples_does_not_change_the_gradient(max_pack_tokens, bench, make):
    config = make.config()
    b = bench(config, torch.float64, 32)
    dataset = make.dataset(LENGTHS, config.vocab_size)
    job = b.add_job(dataset, make.adapter(config, 5), make.spec(), max_pack_tokens=max_pack_tokens)
    expected, _ = b.whole_sequence_gradient("job")
    b.accumulate_gradients("job")
    _assert_same(job.optimizer.grad, expected)


def test_jobs_that_share_a_wave_get_their_own_exact_gradients(bench, make):
    config = make.config()
    b = bench(config, torch.float64, 32)
    specs = {"a": (4, 5), "b": (7, 9), "c": (2, 13)}
    for job_id, (rank, seed) in specs.items():
        modules = ("q_proj", "down_proj") if job_id == "c" else ("q_proj", "v_proj", "o_proj", "up_proj")
        adapter = make.adapter(config, seed, rank=rank, modules=modules)
        b.add_job(
            make.dataset(LENGTHS, config.vocab_size, seed=seed), adapter, make.spec(seed=seed), job_id=job_id
        )
    expected = {job_id: b.whole_sequence_gradient(job_id)[0] for job_id in specs}
    b.accumulate_gradients(*specs)
    for job_id in specs:
        _assert_same(b.jobs[job_id].optimizer.grad, expected[job_id])


@pytest.mark.parametrize("boundaries", [{0}, {1}, {2}, {0, 1, 2}])
def test_packs_dropped_at_layer_boundaries_resume_exactly(boundaries, bench, make):
    config = make.config()
    b = bench(config, torch.float64, 16)
    job = b.add_job(
        make.dataset(LENGTHS, config.vocab_size), make.adapter(config, 5), make.spec(), max_pack_tokens=100
    )
    expected, _ = b.whole_sequence_gradient("job")
    b.accumulate_gradients("job", drop_before=lambda layer: layer in boundaries)
    _assert_same(job.optimizer.grad, expected)


def test_dropout_is_redrawn_identically_by_windows_drops_and_packs(bench, make):
    config = make.config()
    gradients = []
    for window_tokens, max_pack_tokens, boundaries in ((1000, 1000, set()), (7, 40, set()), (16, 1000, {1})):
        b = bench(config, torch.float64, window_tokens)
        spec = make.spec()
        spec = make.spec(lora=type(spec.lora)(4, 8.0, 0.3, spec.lora.target_modules))
        job = b.add_job(
            make.dataset(LENGTHS, config.vocab_size),
            make.adapter(config, 5),
            spec,
            max_pack_tokens=max_pack_tokens,
        )
        b.accumulate_gradients("job", drop_before=lambda layer, where=boundaries: layer in where)
        gradients.append(job.optimizer.grad.clone())
    without, _ = b.whole_sequence_gradient("job")
    assert (gradients[0] - without).abs().max() > 1e-2 * without.abs().max(), "dropout did nothing"
    _assert_same(gradients[1], gradients[0])
    _assert_same(gradients[2], gradients[0])


def test_a_second_step_starts_from_a_cleared_gradient(bench, make):
    config = make.config()
    b = bench(config, torch.float64, 32)
    job = b.add_job(make.dataset(LENGTHS * 2, config.vocab_size), make.adapter(config, 5), make.spec())
    b.accumulate_gradients("job")
    b.finish_step("job")
    expected, _ = b.whole_sequence_gradient("job")
    b.accumulate_gradients("job")
    _assert_same(job.optimizer.grad, expected)
