"""The simulated device: takes plans, says how long each takes and which tokens it samples.

It counts the work of a plan by itself, from the plan and the packs it knows; it shares no number with what
the scheduler believes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from weft_scheduler.plan import BackwardSlice, SegmentKind, StepPlan
from weft_scheduler.simulator.device_model import DeviceModel, Work
from weft_scheduler.training import PackSpec

STOP_TOKEN = 1
OTHER_TOKEN = 0


class SimulatedDevice:
    """Runs plans in no time and says how long they would have taken."""

    def __init__(
        self,
        model: DeviceModel,
        *,
        window_tokens: int,
        elements_by_slot: dict[int, int],
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`noise` is the standard deviation of the logarithm of the times (0.1: about 10 %); its mean is
        kept. `elements_by_slot` is the arena's table, kept by the caller.
        """
        self._model = model
        self._window_tokens = window_tokens
        self._elements_by_slot = elements_by_slot
        self._noise = noise
        self._random = Random(f"noise/{seed}")
        self._packs: dict[str, tuple[PackSpec, int]] = {}
        self._keeping: set[str] = set()
        self._left: dict[str, int] = {}

    def add_sequence(self, sequence_id: str, num_output_tokens: int) -> None:
        """The sequence stops with its `num_output_tokens`-th token."""
        self._left[sequence_id] = num_output_tokens

    def remove_sequence(self, sequence_id: str) -> None:
        """Forget a sequence."""
        self._left.pop(sequence_id, None)

    def add_pack(self, spec: PackSpec, adapter_elements: int) -> None:
        """A pack that plans may name; its job's adapter has `adapter_elements` elements."""
        self._packs[spec.pack_id] = (spec, adapter_elements)

    def remove_pack(self, pack_id: str) -> None:
        """Forget a pack."""
        self._packs.pop(pack_id, None)
        self._keeping.discard(pack_id)

    def run(
        self, plan: StepPlan, stepped_elements: int, stop_s: float | None = None
    ) -> tuple[dict[str, int], float, Work]:
        """The sampled tokens, the seconds and the work of a plan, or of as much of it as runs.

        With `stop_s`, the slice that is under way so many seconds after the start is the last, and no
        optimizer step follows.
        """
        forward = Work(moved_elements=sum(move.num_elements for move in plan.memory.adapter_moves))
        sampled = self._forward(plan, forward)
        noise = 1.0
        if self._noise:
            noise = math.exp(self._random.gauss(-0.5 * self._noise**2, self._noise))

        def with_slices(num_slices: int) -> Work:
            work = replace(forward)
            self._backward(plan.backward[:num_slices], work)
            return work

        def seconds_of(work: Work) -> float:
            return noise * self._model.seconds(work)

        num_slices = len(plan.backward)
        work = with_slices(num_slices)
        work.stepped_elements, work.optimizer_steps = stepped_elements, len(plan.optimizer_steps)
        if stop_s is not None and num_slices > 1 and seconds_of(work) > stop_s:
            num_run = 1 + bisect_left(
                range(1, num_slices), stop_s, key=lambda num: seconds_of(with_slices(num))
            )
            work = with_slices(num_run) if num_run < num_slices else work
        return sampled, seconds_of(work), work

    def _forward(self, plan: StepPlan, work: Work) -> dict[str, int]:
        sampled: dict[str, int] = {}
        slots = set()
        left, decode = self._left, SegmentKind.DECODE
        num_decodes = kv_tokens = 0
        for segment in plan.forward:
            slots.add(segment.adapter_slot)
            name = segment.sequence_id
            if segment.kind is decode:
                num_decodes += 1
                kv_tokens += segment.start + 1
                # A plan made before the stop token was known decodes once more; that token is discarded.
                left[name] = remaining = left[name] - 1
                sampled[name] = STOP_TOKEN if remaining <= 0 else OTHER_TOKEN
                continue
            end = segment.start + segment.num_tokens
            work.forward_tokens += segment.num_tokens
            kv_tokens += end
            work.attention_products += segment.num_tokens * end
            work.num_chunks += 1
            if segment.kind is SegmentKind.TRAIN:
                (self._keeping.add if segment.keeps_activations else self._keeping.discard)(name)
                if segment.with_loss:
                    spec = self._packs[name][0]
                    work.num_loss_windows += 1
                    work.loss_tokens += -(-spec.num_target_tokens * segment.num_tokens // spec.num_tokens)
            elif segment.samples:
                left[name] = remaining = left[name] - 1
                sampled[name] = STOP_TOKEN if remaining <= 0 else OTHER_TOKEN
        work.forward_tokens += num_decodes
        work.kv_tokens_read = kv_tokens
        work.num_sequences = len(sampled)
        slots.discard(None)
        work.num_adapters = len(slots)
        work.adapter_elements = sum(self._elements_by_slot[slot] for slot in slots if slot is not None)
        return sampled

    def _backward(self, slices: Sequence[BackwardSlice], work: Work) -> None:
        adapters: dict[str, int] = {}
        for part in slices:
            start = part.window * self._window_tokens
            for pack_id in part.pack_ids:
                spec, elements = self._packs[pack_id]
                num_tokens = min(self._window_tokens, spec.num_tokens - start)
                products = num_tokens * (start + num_tokens)
                work.backward_token_layers += num_tokens
                work.backward_products += products
                if pack_id not in self._keeping:
                    work.recomputed_token_layers += num_tokens
                    work.recomputed_products += products
                adapters[spec.adapter] = elements
        work.num_backward_slices = len(slices)
        work.num_backward_layers = len({(part.wave_id, part.layer) for part in slices})
        work.num_adapters += len(adapters)
        work.adapter_elements += sum(adapters.values())
