"""Sampling against transformers' logits processors, and its independence of whatever else is in the batch."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from weft_server.engine.history import TokenHistory, needs_history
from weft_server.engine.logprobs import top_logprobs
from weft_server.engine.sampler import SamplingRow, sample, uniform
from weft_server.protocol import SamplingParams

VOCAB = 23
NUM_DRAWS = 6000


def _row(position=0, prompt=(), output=(), choice_idx=0, device="cpu", **params):
    sampling = SamplingParams(max_tokens=1, **params)
    history = None
    if needs_history(sampling):
        history = TokenHistory(sampling, prompt, VOCAB, torch.device(device))
        history.add(output)
    return SamplingRow(sampling, choice_idx, position, len(output), history)


def _logits(num_rows, device, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, VOCAB, generator=generator) * scale).to(device)


def _frequencies(logits, **params):
    rows = [_row(position=i, seed=3, **params) for i in range(NUM_DRAWS)]
    drawn = sample(logits.expand(NUM_DRAWS, VOCAB), rows).token_ids
    return torch.bincount(drawn.cpu(), minlength=VOCAB)


def _assert_distributed(counts, probabilities):
    expected = probabilities.double() * NUM_DRAWS
    assert not counts[expected == 0].any(), "a forbidden token was drawn"
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5 + 5, (float(chi_square), degrees)


WARPERS = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 4},
    "one": {"top_k": 1, "temperature": 2.0},
    "top_p": {"top_p": 0.7},
    "narrow top_p": {"top_p": 0.05},
    "min_p": {"min_p": 0.2, "temperature": 1.3},
    "all": {"temperature": 0.9, "top_k": 9, "top_p": 0.85},
}


@pytest.mark.parametrize("name", WARPERS)
def test_draws_are_distributed_as_transformers_warps_them(name, device):
    process = pytest.importorskip("transformers.generation.logits_process")
    params = WARPERS[name]
    scores = _logits(1, "cpu", seed=5)
    warpers = [process.TemperatureLogitsWarper(float(params.get("temperature", 1.0)))]
    if "top_k" in params:
        warpers.append(process.TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        warpers.append(process.TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(process.MinPLogitsWarper(params["min_p"]))
    expected = scores
    for warper in warpers:
        expected = warper(None, expected)
    counts = _frequencies(scores.to(device), **params)
    _assert_distributed(counts, torch.softmax(expected[0], dim=-1))


def test_the_repetition_penalty_is_that_of_transformers(device):
    process = pytest.importorskip("transformers.generation.logits_process")
    penalize = process.RepetitionPenaltyLogitsProcessor(1.7)
    scores = _logits(200, "cpu", seed=1)
    prompt, output = [3, 7, 7, 1], [9, 3, 2]
    expected = penalize(torch.tensor([prompt + output]).expand(200, -1), scores.clone()).argmax(-1)
    rows = [_row(device=device, prompt=prompt, output=output, repetition_penalty=1.7, temperature=0.0)] * 200
    actual = sample(scores.to(device), rows).token_ids.cpu()
    assert actual.tolist() == expected.tolist()
    assert actual.tolist() != scores.argmax(-1).tolist()


def test_presence_and_frequency_penalties_are_those_of_openai(device):
    scores = _logits(200, "cpu", seed=2)
    prompt, output = [5, 6], [4, 4, 4, 8]
    expected = scores.clone()
    for token in range(VOCAB):
        times = output.count(token)
        expected[:, token] -= times * 0.6 + (times > 0) * 0.9
    rows = [
        _row(
            device=device,
            prompt=prompt,
            output=output,
            frequency_penalty=0.6,
            presence_penalty=0.9,
            temperature=0.0,
        )
    ] * 200
    actual = sample(scores.to(device), rows).token_ids.cpu()
    assert actual.tolist() == expected.argmax(-1).tolist()
    assert actual.tolist() != scores.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forces_or_bans_tokens(temperature, device):
    scores = _logits(50, device)
    rows = [_row(position=i, logit_bias={4: 100.0}, temperature=temperature) for i in range(50)]
    assert set(sample(scores, rows).token_ids.tolist()) == {4}
    best = int(scores[0].argmax())
    rows = [_row(position=i, logit_bias={best: -100.0}, temperature=temperature) for i in range(50)]
    assert best not in sample(scores[:1].expand(50, VOCAB), rows).token_ids.tolist()


def test_stop_tokens_are_banned_until_enough_tokens_are_there(device):
    scores = _logits(1, device)
    stop = int(scores[0].argmax())
    for num_output, is_banned in ((0, True), (2, True), (3, False), (4, False)):
        row = _row(output=[1] * num_output, min_tokens=3, stop_token_ids=(stop,), temperature=0.0)
        token = int(sample(scores, [row]).token_ids[0])
        assert (token != stop) == is_banned


def test_sampling_leaves_the_logits_as_they_were(device):
    scores = _logits(3, device)
    before = scores.clone()
    rows = [
        _row(
            device=device, output=[1, 2], temperature=0.7, top_p=0.5, top_k=3, min_p=0.1, presence_penalty=1.0
        ),
        _row(device=device, prompt=[1], repetition_penalty=2.0, logit_bias={0: 5.0}),
        _row(min_tokens=2, stop_token_ids=(1,)),
    ]
    sample(scores, rows)
    assert torch.equal(scores, before)


def test_a_draw_depends_on_its_own_row_alone(device):
    scores = _logits(1, device, seed=9, scale=4.0)
    kinds = ({}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.05, "temperature": 1.4}, {"temperature": 0.0})
    neighbours = [
        _row(top_p=0.5, seed=1),
        _row(top_k=2, min_p=0.3, seed=2),
        _row(device=device, output=[1], presence_penalty=2.0, logit_bias={2: 9.0}, seed=3),
        _row(temperature=0.0),
        _row(temperature=1e-3, seed=4),
    ]
    others = _logits(len(neighbours), device, seed=10)
    others[0] = torch.nan
    for params, position in product(kinds, range(60)):
        row = _row(position=position, seed=8, **params)
        alone = int(sample(scores, [row]).token_ids[0])
        for place in (0, 3):
            batch = torch.cat((others[:place], scores, others[place:]))
            rows = [*neighbours[:place], row, *neighbours[place:]]
            assert int(sample(batch, rows).token_ids[place]) == alone


def test_rounding_cuts_no_tail_off_a_row_without_limits(device):
    scores = torch.zeros(1, VOCAB, device=device)
    scores[0, 0] = 18.0  # the others come after a cumulated probability that rounds to 1
    neighbour = _row(top_p=0.5, seed=1)
    positions = sorted(range(200_000), key=lambda i: -uniform(8, 0, i))[:3]
    rows = [_row(position=i, seed=8) for i in positions]
    alone = [int(sample(scores, [row]).token_ids[0]) for row in rows]
    beside = [int(sample(scores.expand(2, VOCAB), [row, neighbour]).token_ids[0]) for row in rows]
    assert beside == alone


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-44, 1e-60])
def test_a_vanishing_temperature_is_greedy(temperature, device):
    scores = _logits(40, device, scale=30.0)
    rows = [_row(position=i, temperature=temperature) for i in range(40)]
    assert sample(scores, rows).token_ids.tolist() == scores.argmax(-1).tolist()


def test_rows_that_are_not_finite_are_told_apart(device):
    scores = _logits(5, device)
    scores[1, 3], scores[2, 0], scores[3, 5] = torch.nan, torch.inf, -torch.inf
    finite = sample(scores, [_row(temperature=0.0)] * 5).finite
    assert finite.tolist() == [True, False, False, True, True]


def test_random_numbers_cover_the_unit_interval_evenly():
    draws = torch.tensor([uniform(seed, 0, i) for seed in (0, 2**64 - 1) for i in range(20_000)]).double()
    assert float(draws.min()) >= 0.0
    assert float(draws.max()) < 1.0
    counts = torch.histc(draws, bins=50, min=0, max=1)
    assert float(((counts - 800) ** 2 / 800).sum()) < 49 + 5 * 98**0.5
    assert abs(float(torch.corrcoef(torch.stack((draws[1:], draws[:-1])))[0, 1])) < 0.02


def test_random_numbers_differ_by_seed_choice_and_position():
    triples = list(product((0, 1, 2**63), range(8), range(40)))
    assert len({uniform(*triple) for triple in triples}) == len(triples)


def test_log_probabilities_list_the_best_tokens_first(device):
    logits = _logits(3, device)
    issued = top_logprobs(logits, torch.tensor([2, 5, 7], device=device), [0, 2, VOCAB + 5])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    entries = issued.entries()
    expected = torch.log_softmax(logits.cpu(), dim=-1)
    assert [len(entry.top) for entry in entries] == [0, 2, VOCAB]
    for i, (entry, token) in enumerate(zip(entries, (2, 5, 7), strict=True)):
        assert (entry.token_id, entry.logprob) == (token, pytest.approx(float(expected[i, token]), abs=1e-5))
        values, ids = expected[i].topk(len(entry.top))
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


# ---------------------------------------------------------------- in the engine


def test_the_same_seed_gives_the_same_text_in_any_company(harness, make):
    sampling = {"temperature": 1.0, "seed": 99, "max_tokens": 20}
    alone = harness()
    alone.generate("a", make.prompt(7), **sampling)
    alone.run()
    crowded = harness(max_batch_tokens=24)
    for i in range(5):
        crowded.generate(f"r{i}", make.prompt(20, i), temperature=1.2, seed=i, top_p=0.7, max_tokens=15)
    crowded.generate("a", make.prompt(7), **sampling)
    crowded.generate("another seed", make.prompt(7), **(sampling | {"seed": 100}))
    crowded.run()
    assert crowded.tokens("a") == alone.tokens("a")
    assert crowded.tokens("another seed") != alone.tokens("a")


def test_choices_of_one_request_differ_and_are_reproducible(harness, make):
    texts = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        h = harness()
        for choice in order:
            h.generate(f"c{choice}", make.prompt(7), choice_idx=choice, temperature=1.0, seed=5)
        h.run()
        texts.append([h.tokens(f"c{choice}") for choice in range(4)])
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == 4
