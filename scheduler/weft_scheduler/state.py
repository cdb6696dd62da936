"""Everything that the scheduler knows between plans, and the transitions that keep its parts in step.

A transition moves a sequence or pack together with its blocks, its adapter and its place in a queue. Which
transition happens when is decided by the policies (`adapter_policy`, `inference_policy`, `training_policy`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Collection
from heapq import nlargest
from itertools import pairwise

from weft_scheduler.blocks import BlockAllocator
from weft_scheduler.cost import CostModel
from weft_scheduler.deadlines import Deadlines
from weft_scheduler.demand import DecodeDemand
from weft_scheduler.draft import PlanDraft
from weft_scheduler.drain import ServiceMeter, TenantQueue
from weft_scheduler.fairness import FairQueue
from weft_scheduler.limits import Limits
from weft_scheduler.prefix import PrefixChain, PrefixIndex
from weft_scheduler.requests import Sequence, SequenceStatus, running_key
from weft_scheduler.residency import Residency
from weft_scheduler.training import Pack, PackStatus, TrainingQueue
from weft_scheduler.waiting import Backlog, WaitingQueue


class SchedulerState:
    """The mutable parts. `running` is ordered by (tier, arrival), `num_running` counts it by tenant; `active`
    counts what each tenant has under way, requests and jobs; `num_default` counts the
    unfinished requests of the default class. Every plan up to `committed` is committed.
    """

    def __init__(self, limits: Limits, cost: CostModel) -> None:
        """Start empty."""
        self.limits = limits
        self.cost = cost
        self.prefixes = PrefixIndex()
        self.blocks = BlockAllocator(limits.num_blocks, self.prefixes)
        self.residency = Residency(
            limits.num_adapter_slots,
            limits.arena_elements,
            limits.training_adapter_share,
            pinned_share=limits.pinned_adapter_share,
            is_synchronous=limits.max_inflight == 1,
        )
        self.training = TrainingQueue(limits.num_layers, limits.window_tokens)
        self.shares = FairQueue()
        self.active: Counter[str] = Counter()
        self.sequences: dict[str, Sequence] = {}
        self.num_default = 0
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_running: Counter[str] = Counter()
        self.max_concurrency: dict[str, int] = {}
        self.deadlines = Deadlines()
        self.meter = ServiceMeter()
        self.committed = 0
        self.num_idle_training_plans = 0
        self.demand = DecodeDemand()
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    def advance(self, committed: int) -> None:
        """Every plan up to iteration `committed` is committed: what they could read may be reused."""
        self.committed = committed
        self.blocks.advance(committed)
        self.training.release_retired(committed)

    def join(self, tenant: str) -> None:
        """One more request or job of a tenant; if it had none, its idle time is forgotten."""
        if not self.active[tenant]:
            self.shares.activate(tenant)
        self.active[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One request or job of a tenant less."""
        self.active[tenant] -= 1
        if not self.active[tenant]:
            del self.active[tenant]

    # ------------------------------------------------------------ sequences

    def enqueue(self, sequence: Sequence) -> None:
        """Let a sequence wait, for its adapter too.

        Raises:
            ValueError: its adapter can never be given room, or is known with another size; nothing has
        changed.
        """
        spec = sequence.spec
        if spec.adapter is not None:
            self.residency.want(spec.adapter, spec.adapter_elements)
        if spec.sequence_id not in self.sequences:
            self.sequences[spec.sequence_id] = sequence
            self.num_default += not sequence.is_flex
            self.join(spec.tenant)
        sequence.status = SequenceStatus.WAITING
        sequence.prompt_price_s = self.prompt_price_s(sequence.num_tokens)
        self.waiting.add(sequence)

    def admit(self, sequence: Sequence) -> None:
        """Start a waiting sequence: blocks for all its tokens (those that are cached are shared), its adapter
        pinned.
        """
        spec = sequence.spec
        self.waiting.took_turn(sequence)
        self.waiting.remove(sequence)
        sequence.awaited = None
        if spec.adapter is not None:
            sequence.adapter_slot = self.residency.acquire(spec.adapter)
        sequence.prefill_target = sequence.num_tokens
        self._take_blocks(sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=running_key)
        self.num_running[spec.tenant] += 1
        if not sequence.last_planned:
            sequence.num_cached_tokens = sequence.num_computed

    def preempt(self, sequence: Sequence, draft: PlanDraft) -> None:
        """Send a running sequence back to wait; it is computed again from its tokens."""
        self._stop_running(sequence)
        sequence.restart()
        sequence.waiting_since_s = draft.now_s
        self.enqueue(sequence)
        draft.preempted.append(sequence.spec.sequence_id)

    def retire(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
            if sequence.spec.adapter is not None:
                self.residency.unwant(sequence.spec.adapter)
        sequence.status = SequenceStatus.FINISHED
        del self.sequences[sequence.spec.sequence_id]
        self.num_default -= not sequence.is_flex
        self.leave(sequence.spec.tenant)

    def is_at_its_concurrency(self, tenant: str) -> bool:
        """Whether as many sequences of a tenant run as may."""
        most = self.max_concurrency.get(tenant)
        return most is not None and self.num_running[tenant] >= most

    def by_precedence(self) -> list[Sequence]:
        """What runs, the first to give way last: flex, then the youngest; a tenant's own in its own order.

        A tenant's priorities decide between its sequences alone: they share the places that these have by
        arrival.
        """
        if not any(sequence.spec.priority for sequence in self.running):
            return list(self.running)
        own = {tenant: iter(self._own_order(tenant)) for tenant in self.num_running}
        return [next(own[sequence.spec.tenant]) for sequence in self.running]

    def _own_order(self, tenant: str) -> list[Sequence]:
        sequences = [sequence for sequence in self.running if sequence.spec.tenant == tenant]
        return sorted(sequences, key=lambda seq: (seq.running_key[0], seq.spec.priority, seq.order))

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.running_key, key=running_key)]
        sequence.has_aged = False
        self.num_running[sequence.spec.tenant] -= 1
        if not self.num_running[sequence.spec.tenant]:
            del self.num_running[sequence.spec.tenant]
        self.blocks.free(sequence.block_ids, sequence.last_planned)
        self.prefixes.end(sequence.spec.sequence_id, self._unnamed(sequence))
        if sequence.spec.adapter is not None:
            self.residency.release(sequence.spec.adapter, sequence.last_planned)

    # ------------------------------------------------------------ prices

    def meter_arrival(self, tenant: str, now_s: float) -> None:
        """A request of a tenant is about to be queued."""
        if tenant not in self.waiting.backlogs and not self.num_running[tenant]:
            self.meter.begin(tenant, now_s)

    def meter_tokens(self, sampled: Collection[Sequence], now_s: float) -> None:
        """Count what the tenants are being given: prompts with their first token, decodes one by one."""
        served: defaultdict[str, float] = defaultdict(float)
        decode_s = self.cost.decode_s(1)
        self.demand.add(len(sampled), now_s)
        for sequence in sampled:
            spec = sequence.spec
            is_first = not sequence.num_generated
            served[spec.tenant] += self.prompt_price_s(spec.num_prompt_tokens) if is_first else decode_s
        for tenant, price_s in served.items():
            self.meter.serve(tenant, price_s, now_s)

    def queues(self, now_s: float, max_tenants: int) -> dict[str, TenantQueue]:
        """The longest queues by tenant; see `Scheduler.queues`."""
        backlogs = list(self.waiting.backlogs.items())
        longest = nlargest(max_tenants, backlogs, key=lambda item: item[1].num_waiting)
        return {
            tenant: TenantQueue(
                backlog.num_waiting, self.meter.drain_s(tenant, self._price_s(tenant, backlog), now_s)
            )
            for tenant, backlog in longest
        }

    def _price_s(self, tenant: str, backlog: Backlog) -> float:
        """What all of a tenant's waiting sequences are expected to take, alone, to their ends."""
        num_tokens = self.meter.expected_tokens(tenant, backlog.num_waiting, backlog.max_tokens)
        num_decodes = max(0.0, num_tokens - backlog.num_waiting)
        return backlog.prompt_price_s + num_decodes * self.cost.decode_s(1)

    def prompt_price_s(self, num_tokens: int, num_cached: int = 0) -> float:
        """The time that a prompt would take alone, whose first `num_cached` tokens are cached or computed."""
        most = self.limits.max_batch_tokens
        num_full, rest = divmod(num_tokens - num_cached, most)
        price_s = num_full * self.cost.chunk_s(most, num_tokens)
        if rest:
            price_s += self.cost.chunk_s(rest, num_tokens)
        return price_s

    # ------------------------------------------------------------ prefix cache

    def cached_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the first tokens of a waiting sequence already.

        Whole blocks, and never its last token: that one is computed, for its logits.
        """
        chain = _readable(sequence)
        return [] if chain is None else self.prefixes.match(chain, self._most_cached_blocks(sequence))

    def awaited_contents(self, sequence: Sequence) -> bytes | None:
        """The first contents that a waiting sequence misses, if a running one is just computing them.

        A running sequence waits for nobody until its prompt is computed: so this wait ends by then.
        """
        chain = _readable(sequence)
        num_cached = len(self.cached_blocks(sequence))
        if chain is None or num_cached >= self._most_cached_blocks(sequence):
            return None
        name = chain.hashes[num_cached]
        return name if name in self.prefixes.computing else None

    def num_blocks_to_find(self, sequence: Sequence) -> int:
        """Blocks that must be free to admit a waiting sequence: all but those it shares with running ones."""
        num_shared = sum(self.blocks.num_users(block_id) > 0 for block_id in self.cached_blocks(sequence))
        return self.limits.num_blocks_for(sequence.num_tokens) - num_shared

    def written(self, sequence: Sequence, num_tokens: int) -> None:
        """A committed plan has written the first `num_tokens` tokens of a running sequence: name its full
        blocks.
        """
        if sequence.chain is None:
            return
        names = sequence.chain.hashes[sequence.num_named : num_tokens // self.limits.block_size]
        for idx, name in enumerate(names, start=sequence.num_named):
            self.prefixes.add(sequence.block_ids[idx], name)
        self.prefixes.end(sequence.spec.sequence_id, names)
        sequence.num_named += len(names)

    def distrust(self, sequence: Sequence) -> None:
        """What the cache holds of a sequence's tokens may be wrong: nobody finds it any more."""
        names = [] if sequence.chain is None else sequence.chain.hashes
        found = (self.prefixes.block(name) for name in names)
        self.blocks.forget([block_id for block_id in found if block_id is not None])

    def _take_blocks(self, sequence: Sequence) -> None:
        cached = self.cached_blocks(sequence)
        self.blocks.share(cached)
        num_missing = self.limits.num_blocks_for(sequence.num_tokens) - len(cached)
        sequence.block_ids = cached + self.blocks.allocate(num_missing)
        sequence.num_named = len(cached)
        sequence.num_computed = len(cached) * self.limits.block_size
        self.prefixes.begin(sequence.spec.sequence_id, self._unnamed(sequence))
        if _readable(sequence) is not None:
            self.num_prefix_queries += sequence.num_tokens
            self.num_prefix_hits += sequence.num_computed

    def _most_cached_blocks(self, sequence: Sequence) -> int:
        return (sequence.num_tokens - 1) // self.limits.block_size

    def _unnamed(self, sequence: Sequence) -> list[bytes]:
        """What a running sequence has still to compute of the full blocks of its prompt."""
        if sequence.chain is None:
            return []
        return sequence.chain.hashes[sequence.num_named : sequence.prefill_target // self.limits.block_size]

    # ------------------------------------------------------------ packs

    def admit_pack(self, pack: Pack) -> None:
        """Give a queued pack its blocks, and room for its activations if there is any."""
        training, num_tokens = self.training, pack.spec.num_tokens
        keeps = training.kept_tokens + num_tokens <= self.limits.max_kept_tokens
        block_ids = self.blocks.allocate(self.limits.num_blocks_for(num_tokens))
        training.admit(pack, block_ids, keeps_activations=keeps)

    def drop_pack(self, pack: Pack, draft: PlanDraft) -> None:
        """Take the blocks of a pack that is at a boundary."""
        block_ids = self.training.drop(pack, draft.now_s)
        self.blocks.free(block_ids, pack.last_planned)
        draft.dropped.append(pack.spec.pack_id)

    def remaining_price_s(self, pack: Pack) -> float:
        """The time that the rest of an alive pack's way would take alone, to the nearest layer."""
        spec, cost = pack.spec, self.cost
        num_left = spec.num_tokens - pack.num_forwarded
        forward_s = -(-num_left // self.limits.window_tokens) * cost.chunk_s(
            min(spec.num_tokens, self.limits.window_tokens),
            spec.num_tokens // 2,
            spec.num_target_tokens // pack.num_windows,
        )
        wave = self.training.wave
        is_in_wave = wave is not None and pack.status is PackStatus.IN_WAVE
        num_layers = (wave.layer if is_in_wave and wave is not None else pack.cursor_layer) + 1
        num_slices = pack.num_windows * num_layers
        num_recomputed = (spec.num_tokens - pack.num_kept_tokens) * num_layers
        return forward_s + cost.backward_s(
            spec.num_tokens * num_layers, num_slices, num_layers, num_recomputed
        )

    # ------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        """Blocks, adapters and queues agree with the sequences and packs.

        Raises:
            AssertionError: they do not.
        """
        self.blocks.check_invariants()
        self.residency.check_invariants()
        self.training.check_invariants()
        self._check_tables()
        assert self.running == sorted(self.running, key=running_key)
        assert self.num_running == Counter(seq.spec.tenant for seq in self.running)
        assert sorted(self.by_precedence(), key=running_key) == self.running
        assert len(self.running) <= self.limits.max_num_seqs
        assert all(seq.status is SequenceStatus.RUNNING for seq in self.running)
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting)
        for tenant, backlog in self.waiting.backlogs.items():
            own = [seq for seq in waiting if seq.spec.tenant == tenant]
            assert backlog.num_waiting == len(own) > 0
            assert abs(backlog.prompt_price_s - sum(seq.prompt_price_s for seq in own)) < 1e-6
            assert backlog.max_tokens == sum(seq.remaining_tokens for seq in own)
            assert all(a.key < b.key for a, b in pairwise(self.waiting.heads(tenant)))
        assert all(seq.status is SequenceStatus.WAITING and not seq.block_ids for seq in waiting)
        assert {id(seq) for seq in [*self.running, *waiting]} == {id(s) for s in self.sequences.values()}
        tenants = Counter(seq.spec.tenant for seq in self.sequences.values())
        tenants.update(job.tenant for job in self.training.jobs.values() if job.tenant is not None)
        assert self.active == tenants
        assert self.num_default == sum(not seq.is_flex for seq in self.sequences.values())
        for seq in self.running:
            assert seq.num_computed <= len(seq.block_ids) * self.limits.block_size
            assert seq.awaited is None
        owed = {(name, seq.spec.sequence_id) for seq in self.running for name in self._unnamed(seq)}
        assert owed >= set(self.prefixes.computing.items())
        for key, entry in self.residency.entries.items():
            users = [seq for seq in self.running if seq.spec.adapter == key]
            assert entry.num_users == len(users)
            assert all(seq.adapter_slot == entry.slot for seq in users)
            if not entry.is_training:
                assert entry.num_waiting == sum(seq.spec.adapter == key for seq in waiting)

    def _check_tables(self) -> None:
        """A block is in as many tables as it has users; what no committed plan has filled is in one alone."""
        packs = [block_id for pack in self.training.alive for block_id in pack.block_ids]
        num_users = Counter(packs)
        size = self.limits.block_size
        for seq in self.running:
            assert len(set(seq.block_ids)) == len(seq.block_ids)
            num_users.update(seq.block_ids)
        assert len(num_users) == self.blocks.num_held
        assert all(self.blocks.num_users(block_id) == count for block_id, count in num_users.items())
        assert all(num_users[block_id] == 1 and block_id not in self.prefixes for block_id in packs)
        for seq in self.running:
            assert seq.num_named * size <= seq.num_computed
            for name, block_id in zip(seq.chain.hashes if seq.chain else (), seq.block_ids, strict=False):
                assert block_id not in self.prefixes or self.prefixes.block(name) == block_id
            own = seq.block_ids[seq.num_named :]
            assert all(num_users[block_id] == 1 and block_id not in self.prefixes for block_id in own)


def _readable(sequence: Sequence) -> PrefixChain | None:
    """The chain that a sequence may look up, if it may."""
    spec = sequence.spec.prefix
    return sequence.chain if spec is not None and spec.is_read else None
