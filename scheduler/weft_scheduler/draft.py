"""A plan being made: segments and slices added one by one, with the predicted time kept up to date.

Knows how much each addition costs; it does not choose what to add.
"""

from __future__ import annotations

from collections.abc import Sequence as Sizes
from dataclasses import dataclass, field
from math import ceil, inf
from typing import NamedTuple

from weft_scheduler.charging import Pieces, split_time
from weft_scheduler.cost import CostModel
from weft_scheduler.features import PlanFeatures
from weft_scheduler.in_flight import InFlight
from weft_scheduler.limits import Limits
from weft_scheduler.plan import BackwardSlice, MemoryPlan, Segment, SegmentKind, StepPlan
from weft_scheduler.requests import Sequence
from weft_scheduler.training import Job, Pack, PackStatus, TrainingQueue, Wave

MIN_WINDOW_TOKENS = 16
"""The least that is forwarded of a pack at a time, but for its end."""


class PlannedSlice(NamedTuple):
    """A backward slice in a draft: its wave, the slots of its packs, and what it adds to the plan's time (see
    `_count_slice`); `prices` are the stand-alone prices of its packs, in seconds, by tenant.
    """

    wave: Wave
    adapter_slots: tuple[int, ...]
    num_tokens: int
    num_layers: int
    is_recomputed: bool
    prices: list[tuple[str, float]]


@dataclass(slots=True, eq=False)
class PlanDraft:
    """The plan of iteration `iteration`, unfinished.

    `slot_elements` are the elements of the adapter in each slot. `is_flex`: no request of the default class
    is there to be protected. `num_claimed_blocks` are freed blocks that stalled decodes await. `freed` are
    the blocks that packs give back which the plan completes.
    """

    iteration: int
    now_s: float
    limits: Limits
    cost: CostModel
    slot_elements: Sizes[int] = ()
    is_flex: bool = False
    forward: list[Segment] = field(default_factory=list)
    backward: list[BackwardSlice] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    written: list[tuple[Sequence, int]] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    slices: list[PlannedSlice] = field(default_factory=list)
    done: list[Pack] = field(default_factory=list)
    freed: dict[Pack, tuple[int, ...]] = field(default_factory=dict)
    stepped: list[Job] = field(default_factory=list)
    step_slots: list[int] = field(default_factory=list)
    tally: PlanFeatures = field(default_factory=PlanFeatures)
    training_tally: PlanFeatures = field(default_factory=PlanFeatures)
    inference: Pieces = field(default_factory=Pieces)
    training: Pieces = field(default_factory=Pieces)
    adapters: Pieces = field(default_factory=Pieces)
    num_decodes: int = 0
    num_prefill_tokens: int = 0
    num_training_units: int = 0
    num_claimed_blocks: int = 0
    is_short_of_blocks: bool = False
    must_finish_layer: bool = False
    stops_between_layers: bool = False
    _adapter_slots: set[int] = field(default_factory=set)
    _charged: set[tuple[str, int]] = field(default_factory=set)

    @property
    def tokens_left(self) -> int:
        """Rows of the flat batch that are still free."""
        return self.limits.max_batch_tokens - self.tally.forward_tokens

    @property
    def predicted_s(self) -> float:
        """The predicted time of what has been added."""
        return self.cost.predict(self.tally)

    # ------------------------------------------------------------ inference

    def add_decode(self, sequence: Sequence) -> None:
        """One token of a running sequence; advances it."""
        # Many times the most frequent addition: what `_add_segment` does, written out.
        tally, slot, start = self.tally, sequence.adapter_slot, sequence.num_computed
        if len(sequence.block_table) != len(sequence.block_ids):
            sequence.block_table = tuple(sequence.block_ids)
        self.forward.append(
            Segment(sequence.spec.sequence_id, SegmentKind.DECODE, start, 1, slot, sequence.block_table, True)
        )
        if slot is not None and slot not in self._adapter_slots:
            self._count_adapters((slot,))
        sequence.num_computed = start + 1
        sequence.last_planned = self.iteration
        sequence.num_planned += 1
        self.written.append((sequence, start + 1))
        self.sampled.append(sequence)
        tally.num_sequences += 1
        tally.forward_tokens += 1
        tally.kv_tokens_read += start + 1
        self.inference.by_tenant[sequence.spec.tenant] += self.cost.decode_s(start + 1)
        if slot is not None:
            self._charge_adapter(sequence.spec.tenant, slot)
        self.num_decodes += 1

    def add_prefill(self, sequence: Sequence, num_tokens: int) -> None:
        """A chunk of a prompt; advances the sequence."""
        start = sequence.num_computed
        samples = start + num_tokens == sequence.prefill_target
        self._count_chunk(start, num_tokens)
        self._add_segment(sequence, SegmentKind.PREFILL, start, num_tokens, samples=samples)
        self.inference.add(sequence.spec.tenant, self.cost.chunk_s(num_tokens, start + num_tokens))
        if sequence.adapter_slot is not None:
            self._charge_adapter(sequence.spec.tenant, sequence.adapter_slot)
        self.num_prefill_tokens += num_tokens

    def prefill_tokens_within(self, sequence: Sequence, most: int, budget_s: float) -> int:
        """The longest chunk of at most `most` tokens that keeps the predicted time within `budget_s`; may be
        0.
        """
        start = sequence.num_computed
        slots = () if sequence.adapter_slot is None else (sequence.adapter_slot,)
        new = self._count_adapters(slots)
        self.tally.num_sequences += 1
        fits = self._search_chunk(start, most, budget_s)
        self.tally.num_sequences -= 1
        self._uncount_adapters(new)
        return fits

    # ------------------------------------------------------------ finetuning

    def try_add_step(self, job: Job, adapter_slot: int, budget_s: float) -> bool:
        """An optimizer step, if it fits."""
        new = self._count_adapters((adapter_slot,))
        self.tally.optimizer_steps += 1
        if self.predicted_s > budget_s:
            self.tally.optimizer_steps -= 1
            self._uncount_adapters(new)
            return False
        job.step_is_planned = True
        job.last_planned = self.iteration
        self.stepped.append(job)
        self.step_slots.append(adapter_slot)
        self.training_tally.optimizer_steps += 1
        self.training.add(job.tenant or "", self.cost.optimizer_step_s)
        self._charge_adapter(job.tenant or "", adapter_slot)
        self.num_training_units += 1
        return True

    def try_add_window(
        self,
        training: TrainingQueue,
        pack: Pack,
        adapter_slot: int,
        budget_s: float,
        whole: int,
        dearest: float = inf,
    ) -> bool:
        """The next `whole` tokens of a pack's forward, or as many of them as fit, from `MIN_WINDOW_TOKENS`
        on; advances the pack. Not if a token would take more than `dearest` times what one of `whole` tokens
        takes in a plan of their own.
        """
        start, before_s = pack.num_forwarded, self.predicted_s
        loss_share = 0.0 if pack.has_loss else pack.spec.num_target_tokens / pack.spec.num_tokens
        new = self._count_adapters((adapter_slot,))
        num_tokens = self._search_chunk(start, min(whole, self.tokens_left), budget_s, loss_share)
        can_be_added = num_tokens >= min(whole, MIN_WINDOW_TOKENS)
        if can_be_added and dearest < inf:
            added_s = self._predict_chunk(start, num_tokens, loss_share) - before_s
            alone_s = self.cost.chunk_s(whole, start + whole, ceil(loss_share * whole))
            alone_s += self.cost.adapter_s(self._elements_of([adapter_slot]))
            can_be_added = added_s / num_tokens <= dearest * alone_s / whole
        if not can_be_added:
            self._uncount_adapters(new)
            return False
        self._count_chunk(start, num_tokens)
        loss_tokens = _count_loss(self.tally, loss_share, num_tokens)
        blocks = pack.block_ids[: self.limits.num_blocks_for(start + num_tokens)]
        self.forward.append(
            Segment(
                pack.spec.pack_id,
                SegmentKind.TRAIN,
                start,
                num_tokens,
                adapter_slot,
                blocks,
                with_loss=not pack.has_loss,
                keeps_activations=pack.keeps_activations,
            )
        )
        pack.last_planned = self.iteration
        training.forwarded(pack, num_tokens)
        self.num_training_units += 1
        end, alone = start + num_tokens, self.training_tally
        alone.forward_tokens += num_tokens
        alone.kv_tokens_read += end
        alone.attention_products += num_tokens * end
        alone.num_chunks += 1
        _count_loss(alone, loss_share, num_tokens)
        self.training.add(pack.spec.tenant, self.cost.chunk_s(num_tokens, end, loss_tokens))
        self._charge_adapter(pack.spec.tenant, adapter_slot)
        return True

    def try_add_slice(
        self, training: TrainingQueue, wave: Wave, adapter_slots: tuple[int, ...], budget_s: float
    ) -> bool:
        """The next slice of the wave, if it fits; advances the wave."""
        tokens = training.slice_tokens(wave)
        last = self.backward[-1] if self.backward else None
        num_layers = int(last is None or (last.wave_id, last.layer) != (wave.wave_id, wave.layer))
        again = not wave.keeps_activations
        new = self._count_adapters(adapter_slots)
        _count_slice(self.tally, tokens, num_layers, again)
        if self.predicted_s > budget_s:
            _count_slice(self.tally, tokens, num_layers, again, sign=-1)
            self._uncount_adapters(new)
            return False
        members = wave.members()
        if len(members) == 1:
            price_s = self.cost.backward_s(tokens, 1.0, num_layers, tokens * again)
            prices = [(members[0].spec.tenant, price_s)]
        else:
            share = 1 / len(members)
            own = [(pack.spec.tenant, training.window_range(pack, wave.window)[1]) for pack in members]
            prices = [
                (name, self.cost.backward_s(n, share, num_layers * share, n * again)) for name, n in own
            ]
        for tenant, price_s in prices:
            self.training.add(tenant, price_s)
        for pack, slot in zip(members, adapter_slots, strict=True):
            self._charge_adapter(pack.spec.tenant, slot)
        _count_slice(self.training_tally, tokens, num_layers, again)
        part, done = training.sliced(wave, self.iteration)
        self.backward.append(part)
        self.slices.append(PlannedSlice(wave, adapter_slots, tokens, num_layers, again, prices))
        self.done.extend(done)
        self.num_training_units += 1
        return True

    def withdraw(self, num_slices: int, num_steps: int) -> None:
        """Take out all backward slices and optimizer steps but the first so many, and what only they cost.

        The states of their packs and jobs are not touched, except that `done` keeps those that are.
        """
        slices, steps = self.slices[num_slices:], self.stepped[num_steps:]
        del self.backward[num_slices:], self.slices[num_slices:]
        del self.stepped[num_steps:], self.step_slots[num_steps:]
        self.done = [pack for pack in self.done if pack.status is PackStatus.DONE]
        self.num_training_units -= len(slices) + len(steps)
        for tally in (self.tally, self.training_tally):
            for each in slices:
                _count_slice(tally, each.num_tokens, each.num_layers, each.is_recomputed, sign=-1)
            tally.optimizer_steps -= len(steps)
        for each in slices:
            for tenant, price_s in each.prices:
                self.training.add(tenant, -price_s)
        for job in steps:
            self.training.add(job.tenant or "", -self.cost.optimizer_step_s)
        self._uncharge_unused_adapters()

    # ------------------------------------------------------------ finish

    @property
    def is_empty(self) -> bool:
        """Whether nothing to compute has been added."""
        return not (self.forward or self.backward or self.stepped)

    def finish(self, memory: MemoryPlan, budget_s: float, expired: tuple[str, ...] = ()) -> InFlight:
        """The frozen plan and what belongs to it."""
        plan = StepPlan(
            iteration=self.iteration,
            forward=tuple(self.forward),
            backward=tuple(self.backward),
            optimizer_steps=tuple(job.job_id for job in self.stepped),
            memory=memory,
            predicted_s=self.predicted_s,
            budget_s=budget_s,
            expired=expired,
        )
        return InFlight(
            plan=plan,
            draft=self,
            features=self.tally,
            charges=self._charges(plan.predicted_s),
            is_flex=self.is_flex,
            num_decodes=self.num_decodes,
            has_prefill=self.num_prefill_tokens > 0,
            has_training=self.num_training_units > 0,
            written=tuple(self.written),
            sampled=tuple(self.sampled),
            done=tuple(self.done),
            stepped=tuple(self.stepped),
        )

    # ------------------------------------------------------------ inside

    def _charges(self, predicted_s: float) -> dict[str, float]:
        adapters_s = self.cost.adapters_s(self.tally)
        training_s = self.cost.predict(self.training_tally) if self.num_training_units else 0.0
        inference_s = self.cost.predict(self.tally.without(self.training_tally)) - adapters_s
        return split_time(
            predicted_s,
            (self.inference, inference_s),
            (self.training, training_s),
            (self.adapters, adapters_s),
        )

    def _add_segment(
        self, sequence: Sequence, kind: SegmentKind, start: int, num_tokens: int, *, samples: bool
    ) -> None:
        if len(sequence.block_table) != len(sequence.block_ids):
            sequence.block_table = tuple(sequence.block_ids)
        self.forward.append(
            Segment(
                sequence.spec.sequence_id,
                kind,
                start,
                num_tokens,
                sequence.adapter_slot,
                sequence.block_table,
                samples,
            )
        )
        if sequence.adapter_slot is not None:
            self._count_adapters((sequence.adapter_slot,))
        sequence.num_computed += num_tokens
        self.written.append((sequence, sequence.num_computed))
        sequence.last_planned = self.iteration
        if samples:
            sequence.num_planned += 1
            self.sampled.append(sequence)
            self.tally.num_sequences += 1

    def _count_chunk(self, start: int, num_tokens: int, sign: int = 1) -> None:
        end = start + num_tokens
        self.tally.forward_tokens += sign * num_tokens
        self.tally.kv_tokens_read += sign * end
        self.tally.attention_products += sign * num_tokens * end
        self.tally.num_chunks += sign

    def _search_chunk(self, start: int, most: int, budget_s: float, loss_share: float = 0.0) -> int:
        if self._predict_chunk(start, most, loss_share) <= budget_s:
            return most
        fits, too_long = 0, most
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self._predict_chunk(start, middle, loss_share) <= budget_s:
                fits = middle
            else:
                too_long = middle
        return fits

    def _predict_chunk(self, start: int, num_tokens: int, loss_share: float) -> float:
        self._count_chunk(start, num_tokens)
        _count_loss(self.tally, loss_share, num_tokens)
        predicted_s = self.predicted_s
        self._count_chunk(start, num_tokens, sign=-1)
        _count_loss(self.tally, loss_share, num_tokens, sign=-1)
        return predicted_s

    def _count_adapters(self, slots: tuple[int, ...]) -> list[int]:
        if self._adapter_slots.issuperset(slots):
            return []
        new = [slot for slot in dict.fromkeys(slots) if slot not in self._adapter_slots]
        self._adapter_slots.update(new)
        self.tally.num_adapters += len(new)
        self.tally.adapter_elements += self._elements_of(new)
        return new

    def _charge_adapter(self, tenant: str, slot: int) -> None:
        """A tenant pays for an adapter once a plan, also for one that others use as well."""
        if (tenant, slot) not in self._charged:
            self._charged.add((tenant, slot))
            self.adapters.add(tenant, self.cost.adapter_s(self._elements_of([slot])))

    def _uncharge_unused_adapters(self) -> None:
        used = {segment.adapter_slot for segment in self.forward} | set(self.step_slots)
        used.update(slot for each in self.slices for slot in each.adapter_slots)
        unused = self._adapter_slots - used
        for tenant, slot in [pair for pair in self._charged if pair[1] in unused]:
            self._charged.remove((tenant, slot))
            self.adapters.add(tenant, -self.cost.adapter_s(self._elements_of([slot])))
        self._uncount_adapters(list(unused))

    def _elements_of(self, slots: list[int]) -> int:
        sizes = self.slot_elements
        return sum(sizes[slot] for slot in slots)

    def _uncount_adapters(self, slots: list[int]) -> None:
        self._adapter_slots.difference_update(slots)
        self.tally.num_adapters -= len(slots)
        self.tally.adapter_elements -= self._elements_of(slots)


def _count_loss(tally: PlanFeatures, loss_share: float, num_tokens: int, sign: int = 1) -> int:
    """Add the loss of a window in which `loss_share` of the tokens are trained; returns its rows."""
    loss_tokens = ceil(loss_share * num_tokens)
    tally.loss_tokens += sign * loss_tokens
    tally.num_loss_windows += sign * (loss_tokens > 0)
    return loss_tokens


def _count_slice(
    tally: PlanFeatures, num_tokens: int, num_layers: int, is_recomputed: bool, sign: int = 1
) -> None:
    """Add a backward slice; `num_layers` is 1 if it is the plan's first of its wave in its layer, or 0."""
    tally.backward_token_layers += sign * num_tokens
    tally.recomputed_token_layers += sign * num_tokens * is_recomputed
    tally.num_backward_slices += sign
    tally.num_backward_layers += sign * num_layers
