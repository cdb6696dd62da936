"""Weft and its peers compute the same, and do what they are measured for (oracles: transformers, PEFT)."""

from __future__ import annotations

import pytest
import torch

from weft_server.bench.coserve.checks import LOGPROB_TOLERANCE, logprob_error, step_errors
from weft_server.bench.coserve.peer_generator import PeerGenerator
from weft_server.bench.coserve.peer_trainer import PeerTrainer
from weft_server.bench.coserve.setup import make_adapters
from weft_server.bench.coserve.weft_contender import WeftContender
from weft_server.bench.coserve.workload import make_requests
from weft_server.bench.peers import adapter_name, add_adapters, build_peer


@pytest.fixture(scope="module")
def weft(setup):
    contender = WeftContender(setup)
    yield contender
    contender.close()


@pytest.fixture(scope="module")
def generator(setup):
    return PeerGenerator(setup, None)


@pytest.fixture(scope="module")
def trainer(setup):
    return PeerTrainer(setup, None)


def test_weft_and_its_peers_compute_the_same(weft, generator, trainer, workload):
    requests = list(make_requests(workload(8.0, 1.0)))
    shifted = [replace_adapter(request) for request in requests]
    own = weft.check(requests)
    assert logprob_error(own, generator.check(requests)) < 1e-3
    assert logprob_error(own, generator.check(shifted)) > 2 * LOGPROB_TOLERANCE
    loss, norm = step_errors(own, trainer.check(requests))
    assert loss < 1e-4
    assert norm < 1e-3


def replace_adapter(request):
    return type(request)(
        request.request_id,
        request.arrival_s,
        request.prompt,
        request.num_output_tokens,
        (request.adapter_idx + 1) % 3,
    )


def test_the_peers_batch_generates_what_transformers_generates_alone(setup, generator, workload):
    model = setup.random_model()
    adapters = make_adapters(setup, model)
    alone = add_adapters(build_peer(model, "none"), adapters, [model.dtype] * len(adapters))
    requests = list(make_requests(workload(12.0, 1.0)))
    tokens = {request.request_id: [] for request in requests}
    waiting = list(requests)
    while waiting or generator._waiting or generator._running:
        generator._waiting += [waiting.pop(0) for _ in range(min(2, len(waiting)))]
        observe(generator, tokens)
    for request in requests:
        alone.set_adapter(adapter_name(request.adapter_idx))
        ids = torch.tensor([request.prompt])
        made = alone.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.num_output_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens[request.request_id] == made[0, ids.shape[1] :].tolist()


def observe(generator, tokens):
    """One iteration, with the tokens that it made."""
    drop = generator._drop_finished

    def record():
        got.update(
            (row.request.request_id, int(token))
            for row, token in zip(generator._running, generator._tokens, strict=True)
        )
        drop()

    got = {}
    generator._drop_finished = record
    try:
        for request_id in generator._step():
            tokens[request_id].append(got[request_id])
    finally:
        del generator._drop_finished


def test_weft_serves_and_trains_in_a_window(weft, window, workload):
    alone = weft.run(window(workload=workload()))
    both = weft.run(window(workload=workload(), trains=True, tpot_s=0.5))
    dedicated = weft.run(window(trains=True, policy="dedicated"))
    assert alone.trained_tokens == 0.0
    assert 0.0 < alone.busy_s <= 0.6
    for outcome in (alone, both):
        assert outcome.answers
        assert all(answer.is_complete for answer in outcome.answers)
        assert all(answer.ttft_s > 0.0 for answer in outcome.answers)
    assert both.trained_tokens > 0.0
    assert dedicated.trained_tokens > 0.0
    assert not dedicated.answers


def test_the_peers_serve_and_train_in_a_window(generator, trainer, window, workload):
    outcome = generator.run(window(workload=workload()))
    assert all(answer.is_complete for answer in outcome.answers)
    assert outcome.busy_s > 0.0
    trained = trainer.run(window(drain_s=0.0))
    steps = trained.details["num_steps"]
    assert trained.trained_tokens == pytest.approx(steps * 4 * 48, rel=0.1, abs=1.5 * 4 * 48)
