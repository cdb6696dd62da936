"""The block allocator: no block in two states, none reused before its fence, none found as what it is not."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weft_scheduler.blocks import BlockAllocator
from weft_scheduler.prefix import PrefixIndex

NUM_BLOCKS = 12


class BlockMachine(RuleBasedStateMachine):
    """A model that remembers, for every block, its users, its contents, and the iterations that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = PrefixIndex()
        self.blocks = BlockAllocator(NUM_BLOCKS, self.prefixes)
        self.tables: list[list[int]] = []
        self.fences = [0] * NUM_BLOCKS
        self.contents: dict[int, bytes] = {}
        self.unused: list[int] = []
        self.committed = 0

    def is_held(self, block_id: int) -> bool:
        return any(block_id in table for table in self.tables)

    def free_blocks(self) -> list[int]:
        return [b for b in range(NUM_BLOCKS) if not self.is_held(b) and self.fences[b] <= self.committed]

    @rule(num_blocks=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, num_blocks: int) -> None:
        free = self.free_blocks()
        kept = [block_id for block_id in self.unused if block_id in free]
        taken = self.blocks.try_allocate(num_blocks)
        assert (taken is None) == (num_blocks > len(free))
        if taken is None:
            return
        assert len(set(taken)) == num_blocks
        assert set(taken) <= set(free)
        num_lost = max(0, num_blocks - (len(free) - len(kept)))
        assert [b for b in taken if b in kept] == kept[:num_lost], "the least recently used goes first"
        for block_id in taken:
            self.contents.pop(block_id, None)
        self.unused = [block_id for block_id in self.unused if block_id not in taken]
        self.tables.append(taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), name=st.binary(min_size=1, max_size=1))
    def fill(self, data: st.DataObject, name: bytes) -> None:
        block_id = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables)) or [0]))
        if self.is_held(block_id) and block_id not in self.contents:
            is_new = name not in self.contents.values()
            assert self.prefixes.add(block_id, name) == is_new
            if is_new:
                self.contents[block_id] = name

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        shared = data.draw(st.lists(st.sampled_from(sorted(self.contents)), unique=True, min_size=1))
        self.blocks.share(shared)
        self.unused = [block_id for block_id in self.unused if block_id not in shared]
        self.tables.append(shared)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), ahead=st.integers(0, 3))
    def free(self, data: st.DataObject, ahead: int) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.free(table, self.committed + ahead)
        for block_id in table:
            self.fences[block_id] = max(self.fences[block_id], self.committed + ahead)
        left = [block_id for block_id in reversed(table) if not self.is_held(block_id)]
        self.unused += [b for b in left if b in self.contents]

    @rule(block_ids=st.sets(st.integers(0, NUM_BLOCKS - 1), max_size=3))
    def forget(self, block_ids: set[int]) -> None:
        self.blocks.forget(block_ids)
        for block_id in block_ids:
            self.contents.pop(block_id, None)
        self.unused = [block_id for block_id in self.unused if block_id not in block_ids]

    @rule(by=st.integers(0, 2))
    def commit(self, by: int) -> None:
        late = [b for b in self.unused if self.fences[b] > self.committed]
        self.committed += by
        self.blocks.advance(self.committed)
        came = [b for b in late if self.fences[b] <= self.committed]
        self.unused = [b for b in self.unused if b not in came] + came

    @invariant()
    def counts_agree(self) -> None:
        self.blocks.check_invariants()
        held = {block_id for table in self.tables for block_id in table}
        assert self.blocks.num_held == len(held)
        assert self.blocks.num_free == len(self.free_blocks())
        assert self.blocks.num_pending == NUM_BLOCKS - len(held) - len(self.free_blocks())
        for block_id in range(NUM_BLOCKS):
            assert self.blocks.num_users(block_id) == sum(block_id in table for table in self.tables)

    @invariant()
    def contents_are_found_under_their_name_alone(self) -> None:
        assert len(self.prefixes) == len(self.contents)
        for block_id, name in self.contents.items():
            assert self.prefixes.block(name) == block_id


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


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


def test_a_shared_block_waits_for_the_last_plan_of_any_user() -> None:
    prefixes = PrefixIndex()
    blocks = BlockAllocator(1, prefixes)
    prefixes.add(*blocks.allocate(1), b"x")
    blocks.share([0])
    blocks.free([0], fence=5)
    blocks.free([0], fence=3)
    blocks.advance(4)
    assert (blocks.num_pending, blocks.try_allocate(1)) == (1, None)
    blocks.share([0])
    blocks.free([0], fence=2)
    assert blocks.num_pending == 1
    blocks.advance(5)
    assert blocks.allocate(1) == [0]
    assert prefixes.block(b"x") is None


def test_of_a_table_the_last_block_is_reused_first_and_nameless_blocks_before_it() -> None:
    prefixes = PrefixIndex()
    blocks = BlockAllocator(5, prefixes)
    table = blocks.allocate(3)
    for block_id in table:
        prefixes.add(block_id, bytes([block_id]))
    blocks.free(table, fence=0)
    assert blocks.num_free == 5
    blocks.share(table[:1])
    blocks.free(table[:1], fence=0)
    assert blocks.allocate(5)[2:] == table[::-1]


def test_only_named_blocks_can_be_shared() -> None:
    prefixes = PrefixIndex()
    blocks = BlockAllocator(3, prefixes)
    named, nameless = blocks.allocate(2)
    prefixes.add(named, b"x")
    for wrong in ([named, nameless], [named, named], [2]):
        with pytest.raises(ValueError, match="do not all have a name, each once"):
            blocks.share(wrong)
    assert blocks.num_users(named) == 1


def test_freeing_twice_is_refused_and_frees_nothing() -> None:
    blocks = BlockAllocator(4)
    first, second = blocks.allocate(2)
    blocks.free([first], fence=0)
    with pytest.raises(ValueError, match="not all held"):
        blocks.free([second, first], fence=0)
    with pytest.raises(ValueError, match="not all held"):
        blocks.free([second, second], fence=0)
    assert blocks.num_held == 1
