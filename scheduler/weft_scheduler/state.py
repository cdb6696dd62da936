"""Everything that the scheduler knows between plans, and the transitions that keep its parts in step.

A transition moves a sequence or pack together with its blocks, its adapter and its place in a queue. Which
transition happens when is decided by the policies (`adapter_policy`, `inference_policy`, `training_policy`).
"""

from __future__ import annotations

from bisect import bisect_left, insort

from weft_scheduler.blocks import BlockAllocator
from weft_scheduler.cost import CostModel, PlanFeatures
from weft_scheduler.draft import PlanDraft
from weft_scheduler.fairness import FairQueue
from weft_scheduler.limits import Limits
from weft_scheduler.requests import Sequence, SequenceStatus, WaitingQueue, sequence_key
from weft_scheduler.residency import Residency
from weft_scheduler.training import Pack, TrainingQueue


class SchedulerState:
    """The mutable parts. `running` is ordered by (priority, arrival); every plan up to `committed` is
    committed.
    """

    def __init__(self, limits: Limits, cost: CostModel) -> None:
        """Start empty."""
        self.limits = limits
        self.cost = cost
        self.blocks = BlockAllocator(limits.num_blocks)
        self.residency = Residency(
            limits.num_adapter_slots,
            limits.arena_elements,
            limits.training_adapter_share,
            pinned_share=limits.pinned_adapter_share,
            is_synchronous=limits.max_inflight == 1,
        )
        self.training = TrainingQueue(limits.num_layers, limits.window_tokens)
        self.inference_shares = FairQueue()
        self.training_shares = FairQueue()
        self.sequences: dict[str, Sequence] = {}
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.committed = 0
        self.num_idle_training_plans = 0

    def advance(self, committed: int) -> None:
        """Every plan up to iteration `committed` is committed: what they could read may be reused."""
        self.committed = committed
        self.blocks.advance(committed)
        self.training.release_retired(committed)

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
        self.sequences[spec.sequence_id] = sequence
        sequence.status = SequenceStatus.WAITING
        if self.waiting.add(sequence):
            self.inference_shares.activate(spec.tenant)

    def admit(self, sequence: Sequence) -> None:
        """Start a waiting sequence: blocks for all its tokens, its adapter pinned, its prompt charged."""
        spec = sequence.spec
        self.waiting.remove(sequence)
        if spec.adapter is not None:
            sequence.adapter_slot = self.residency.acquire(spec.adapter)
        sequence.prefill_target = sequence.num_tokens
        sequence.block_ids = self.blocks.allocate(self.limits.num_blocks_for(sequence.num_tokens))
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=sequence_key)
        if not sequence.is_charged:
            sequence.is_charged = True
            self.inference_shares.charge(spec.tenant, self._prompt_price_s(spec.num_prompt_tokens))

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

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.key, key=sequence_key)]
        self.blocks.free(sequence.block_ids, sequence.last_planned)
        if sequence.spec.adapter is not None:
            self.residency.release(sequence.spec.adapter, sequence.last_planned)

    def _prompt_price_s(self, num_tokens: int) -> float:
        """The time that a prompt would take alone."""
        most = self.limits.max_batch_tokens
        num_full, rest = divmod(num_tokens, most)
        price_s = num_full * self.cost.predict(
            PlanFeatures(forward_tokens=most, kv_tokens_read=num_tokens, attention_products=most * num_tokens)
        )
        if rest:
            price_s += self.cost.predict(
                PlanFeatures(
                    forward_tokens=rest, kv_tokens_read=num_tokens, attention_products=rest * num_tokens
                )
            )
        return price_s

    # ------------------------------------------------------------ packs

    def admit_pack(self, pack: Pack) -> None:
        """Give a queued pack its blocks and charge its whole way, once."""
        self.training.admit(pack, self.blocks.allocate(self.limits.num_blocks_for(pack.spec.num_tokens)))
        if not pack.is_charged:
            pack.is_charged = True
            self.training_shares.charge(pack.spec.tenant, self._pack_price_s(pack))

    def drop_pack(self, pack: Pack, draft: PlanDraft) -> None:
        """Take the blocks of a pack that is at a boundary."""
        block_ids = self.training.drop(pack, draft.now_s)
        self.blocks.free(block_ids, pack.last_planned)
        draft.dropped.append(pack.spec.pack_id)

    def _pack_price_s(self, pack: Pack) -> float:
        """The time that forward and backward of a pack would take alone."""
        num_tokens, num_layers = pack.spec.num_tokens, self.limits.num_layers
        window = min(num_tokens, self.limits.window_tokens)
        forward_s = self.cost.predict(
            PlanFeatures(
                forward_tokens=window,
                kv_tokens_read=num_tokens // 2,
                attention_products=window * num_tokens // 2,
                loss_tokens=pack.spec.num_target_tokens // pack.num_windows,
                num_adapters=1,
            )
        )
        backward_s = self.cost.predict(
            PlanFeatures(
                backward_token_layers=num_tokens * num_layers,
                num_backward_slices=pack.num_windows * num_layers,
            )
        )
        return pack.num_windows * forward_s + backward_s

    # ------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        """Blocks, adapters and queues agree with the sequences and packs.

        Raises:
            AssertionError: they do not.
        """
        self.blocks.check_invariants()
        self.residency.check_invariants()
        self.training.check_invariants()
        tables = [block_id for seq in self.running for block_id in seq.block_ids]
        tables += [block_id for pack in self.training.alive for block_id in pack.block_ids]
        assert len(set(tables)) == len(tables) == self.blocks.num_held
        assert self.running == sorted(self.running, key=sequence_key)
        assert len(self.running) <= self.limits.max_num_seqs
        assert all(seq.status is SequenceStatus.RUNNING for seq in self.running)
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting)
        assert all(seq.status is SequenceStatus.WAITING and not seq.block_ids for seq in waiting)
        assert {id(seq) for seq in [*self.running, *waiting]} == {id(s) for s in self.sequences.values()}
        for seq in self.running:
            assert seq.num_computed <= len(seq.block_ids) * self.limits.block_size
        for key, entry in self.residency.entries.items():
            users = [seq for seq in self.running if seq.spec.adapter == key]
            assert entry.num_users == len(users)
            assert all(seq.adapter_slot == entry.slot for seq in users)
            if not entry.is_training:
                assert entry.num_waiting == sum(seq.spec.adapter == key for seq in waiting)
