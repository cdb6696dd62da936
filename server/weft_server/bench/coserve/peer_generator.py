"""transformers + PEFT as a server: a loop that generates for whoever has arrived, one token at a time.

What it does: continuous batching at the level of iterations. Waiting requests are prefilled together
(left-padded), their caches are joined with those that run, every running request gets one token per forward
pass, and who is done leaves the batch. Adapters are mixed in a batch by PEFT's `adapter_names`. What
transformers has no means for, it does not do: prompts are not cut into chunks, so all others wait for a
prefill, and rows are padded to the longest context.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from weft_server.bench.coserve.checks import Check
from weft_server.bench.coserve.replay import Replay
from weft_server.bench.coserve.setup import Setup, make_adapters
from weft_server.bench.coserve.turns import GeneratorSide
from weft_server.bench.coserve.window import Outcome, Window
from weft_server.bench.coserve.workload import BenchRequest, make_requests
from weft_server.bench.peers import PeerFormat, adapter_name, add_adapters, build_peer

Cache: TypeAlias = Any
"""transformers' `DynamicCache`; the library is imported when a cache is made."""

_MAX_PREFILL_TOKENS = 2048
"""Padded prompt tokens that one prefill takes."""
_IDLE_S = 2e-3
_SAFETY = 0.9
_LEAST_TURN_S = 0.005


@dataclass(slots=True)
class _Running:
    """A row of the batch: its request, its tokens so far and the padding on the left of its cache."""

    request: BenchRequest
    length: int
    padding: int


class PeerGenerator:
    """The model, and the batch that runs on it."""

    def __init__(self, setup: Setup, turns: GeneratorSide | None) -> None:
        """Loads the model with all adapters. With `turns` the trainer may run between two iterations."""
        self._setup = setup
        model = setup.random_model()
        peer = build_peer(model, cast(PeerFormat, setup.quantization))
        adapters = make_adapters(setup, model)
        self._model = add_adapters(peer, adapters, [model.dtype] * len(adapters))
        self._device = model.device
        self._turns = turns
        self._waiting: list[BenchRequest] = []
        self._running: list[_Running] = []
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._tokens = torch.empty(0, dtype=torch.int64)

    # ------------------------------------------------------------ the contender's commands

    def run(self, window: Window) -> Outcome:
        """Run one window; with turns, the trainer has the machine while nothing is to be generated."""
        requests = make_requests(window.workload) if window.workload else ()
        turns = self._turns if window.takes_turns else None
        replay, busy_s, late_s = Replay(requests, window), 0.0, 0.0
        while not replay.is_over:
            self._waiting += replay.take_due()
            if not (self._waiting or self._running):
                self._rest(replay.wait_s(0.05), turns)
                continue
            began_s = replay.now_s
            for request_id in self._step():
                replay.token(request_id)
            if 0.0 <= began_s <= window.seconds:
                busy_s += replay.now_s - began_s
            if turns is not None:
                # What the objective leaves of a token's time, less what the last turn took too long.
                left_s = _SAFETY * window.tpot_s - (replay.now_s - began_s) - late_s
                turn_s = max(_LEAST_TURN_S, left_s)
                late_s = turns.give_for(turn_s) - turn_s
        if turns is not None:
            turns.end()
        self._drop_all()
        return Outcome(replay.answers(), busy_s=busy_s)

    def answer_alone(self, requests: list[BenchRequest]) -> list[list[float]]:
        """Answer requests one after the other; seconds from sending to each token."""
        times = []
        for request in requests:
            self._waiting.append(request)
            started, own = time.monotonic(), list[float]()
            while self._waiting or self._running:
                own += [time.monotonic() - started for _ in self._step()]
            times.append(own)
        return times

    @torch.inference_mode()
    def check(self, requests: list[BenchRequest]) -> Check:
        """Log-probabilities of the requests' prompts."""
        rows = []
        for request in requests:
            ids = torch.tensor([request.prompt], device=self._device)
            names = [adapter_name(request.adapter_idx)]
            logits: Tensor = self._model(input_ids=ids, adapter_names=names).logits[0, :-1]
            found = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, 1:, None])
            rows.append([float(value) for value in found[:, 0]])
        return Check(rows)

    def close(self) -> None:
        """Nothing to end."""

    # ------------------------------------------------------------ one iteration

    @torch.inference_mode()
    def _step(self) -> list[str]:
        """Prefill who waits, as far as there is room, else decode; returns who got a token."""
        admitted = self._admit()
        if admitted:
            self._prefill(admitted)
            got = [request.request_id for request in admitted]
        else:
            self._decode()
            got = [row.request.request_id for row in self._running]
        self._drop_finished()
        return got

    def _admit(self) -> list[BenchRequest]:
        admitted: list[BenchRequest] = []
        longest = 0
        while self._waiting and len(self._running) + len(admitted) < self._setup.max_batch:
            longest = max(longest, len(self._waiting[0].prompt))
            if admitted and longest * (len(admitted) + 1) > _MAX_PREFILL_TOKENS:
                break
            admitted.append(self._waiting.pop(0))
        return admitted

    def _prefill(self, admitted: list[BenchRequest]) -> None:
        width = max(len(request.prompt) for request in admitted)
        padding = [width - len(request.prompt) for request in admitted]
        ids = torch.tensor(
            [[0] * pad + list(request.prompt) for pad, request in zip(padding, admitted, strict=True)]
        )
        rows = [_Running(request, width, pad) for pad, request in zip(padding, admitted, strict=True)]
        positions = (torch.arange(width)[None] - torch.tensor(padding)[:, None]).clamp(min=0)
        cache = _new_cache()
        tokens = self._forward(ids, positions, rows, width, cache)
        for row in rows:
            row.length = len(row.request.prompt)
        self._join(rows, _states(cache), tokens)

    def _decode(self) -> None:
        width = self._width
        positions = torch.tensor([[row.length] for row in self._running])
        cache = _new_cache(self._cache)
        self._tokens = self._forward(self._tokens[:, None], positions, self._running, width + 1, cache)
        self._cache = _states(cache)
        for row in self._running:
            row.length += 1

    def _forward(
        self, ids: Tensor, positions: Tensor, rows: list[_Running], width: int, cache: Cache
    ) -> Tensor:
        """The next token of every row, `[B]`."""
        padding = torch.tensor([row.padding for row in rows])
        mask = (torch.arange(width)[None] >= padding[:, None]).to(torch.int64)
        logits: Tensor = self._model(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=positions.to(self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            adapter_names=[adapter_name(row.request.adapter_idx) for row in rows],
        ).logits
        return logits[:, -1].argmax(dim=-1).cpu()

    # ------------------------------------------------------------ the batch

    @property
    def _width(self) -> int:
        return int(self._cache[0][0].shape[2]) if self._cache else 0

    def _join(self, rows: list[_Running], cache: list[tuple[Tensor, Tensor]], tokens: Tensor) -> None:
        """Put new rows beside the running ones, all padded on the left to the longest."""
        width = max(self._width, int(cache[0][0].shape[2]))
        for known, num in ((self._running, self._width), (rows, int(cache[0][0].shape[2]))):
            for row in known:
                row.padding += width - num
        if not self._running:
            self._cache = cache
        else:
            self._cache = [
                (_beside(keys, new_keys, width), _beside(values, new_values, width))
                for (keys, values), (new_keys, new_values) in zip(self._cache, cache, strict=True)
            ]
        self._tokens = torch.cat([self._tokens, tokens])
        self._running += rows

    def _drop_finished(self) -> None:
        kept = [
            idx
            for idx, row in enumerate(self._running)
            if row.length - len(row.request.prompt) + 1 < row.request.num_output_tokens
        ]
        if len(kept) == len(self._running):
            return
        if not kept:
            self._drop_all(keeps_waiting=True)
            return
        self._running = [self._running[idx] for idx in kept]
        spare = min(row.padding for row in self._running)
        for row in self._running:
            row.padding -= spare
        idx = torch.tensor(kept)
        self._tokens = self._tokens[idx]
        on_device = idx.to(self._device)
        self._cache = [(k[on_device, :, spare:], v[on_device, :, spare:]) for k, v in self._cache]

    def _drop_all(self, *, keeps_waiting: bool = False) -> None:
        self._running, self._cache = [], []
        self._tokens = torch.empty(0, dtype=torch.int64)
        if not keeps_waiting:
            self._waiting = []

    @staticmethod
    def _rest(seconds: float, turns: GeneratorSide | None) -> None:
        if turns is not None:
            turns.give_for(seconds)
        else:
            time.sleep(min(seconds, _IDLE_S))


def _new_cache(states: list[tuple[Tensor, Tensor]] | None = None) -> Cache:
    """A cache that holds the keys and values of every layer, or nothing."""
    from transformers import DynamicCache

    return DynamicCache(states)


def _beside(states: Tensor, others: Tensor, width: int) -> Tensor:
    """The rows of both, `width` long."""
    return torch.cat([_padded(states, width), _padded(others, width)])


def _states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _padded(states: Tensor, width: int) -> Tensor:
    """`[B, H, S, D]` with zeros on the left up to `width`."""
    missing = width - states.shape[2]
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing else states
