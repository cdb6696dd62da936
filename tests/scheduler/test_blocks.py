"""The block allocator: no block in two hands, none reused before its fence."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from weft_scheduler.blocks import BlockAllocator


class BlockMachine(RuleBasedStateMachine):
    """A model that remembers, for every block, who has it or which iteration it waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockAllocator(12)
        self.held: list[list[int]] = []
        self.fences: dict[int, int] = {}
        self.committed = 0

    @rule(num_blocks=st.integers(0, 14))
    def allocate(self, num_blocks: int) -> None:
        num_free = self.blocks.num_free
        taken = self.blocks.try_allocate(num_blocks)
        assert (taken is None) == (num_blocks > num_free)
        if taken is None:
            return
        everyone = [block_id for table in self.held for block_id in table]
        assert len(taken) == num_blocks
        assert not set(taken) & set(everyone)
        assert all(self.fences.pop(block_id, 0) <= self.committed for block_id in taken)
        self.held.append(taken)

    @rule(data=st.data(), ahead=st.integers(0, 3))
    def free(self, data: st.DataObject, ahead: int) -> None:
        if not self.held:
            return
        table = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.blocks.free(table, self.committed + ahead)
        self.fences |= dict.fromkeys(table, self.committed + ahead)

    @rule(by=st.integers(0, 2))
    def commit(self, by: int) -> None:
        self.committed += by
        self.blocks.advance(self.committed)

    @invariant()
    def counts_agree(self) -> None:
        self.blocks.check_invariants()
        held = sum(len(table) for table in self.held)
        pending = sum(fence > self.committed for fence in self.fences.values())
        assert (self.blocks.num_held, self.blocks.num_pending) == (held, pending)
        assert self.blocks.num_free == 12 - held - pending


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_allocating_more_than_is_free_takes_nothing() -> None:
    blocks = BlockAllocator(3)
    with pytest.raises(MemoryError, match="4 KV blocks wanted, 3 of 3 are free"):
        blocks.allocate(4)
    assert blocks.num_free == 3


def test_a_freed_block_waits_for_the_last_plan_that_could_read_it() -> None:
    blocks = BlockAllocator(1)
    blocks.free(blocks.allocate(1), fence=5)
    blocks.advance(4)
    assert blocks.try_allocate(1) is None
    blocks.advance(5)
    assert blocks.allocate(1) == [0]


def test_freeing_twice_is_refused_and_frees_nothing() -> None:
    blocks = BlockAllocator(4)
    first, second = blocks.allocate(2)
    blocks.free([first], fence=0)
    with pytest.raises(ValueError, match="not all held"):
        blocks.free([second, first], fence=0)
    with pytest.raises(ValueError, match="not all held"):
        blocks.free([second, second], fence=0)
    assert blocks.num_held == 1
