"""KV block ids: which are free, which have users, which still wait for a plan that may read them.

Owns ids, user counts, fences and the order of reuse. What is stored in a block is `prefix`'s to know; here a
name only means that the contents are worth keeping until the block is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from weft_scheduler.prefix import PrefixIndex

_FREE, _HELD, _PENDING = 0, 1, 2


class BlockAllocator:
    """Hands out block ids `0 .. num_blocks - 1`.

    A block may have several users. When the last one has left, it carries a fence: the iteration of the last
    plan that could read it. It is handed out for new contents only after `advance` has reported that
    iteration as committed. A free block whose contents have a name keeps both until it is handed out, which
    happens to nameless blocks first and then to the least recently used.
    """

    def __init__(self, num_blocks: int, prefixes: PrefixIndex | None = None) -> None:
        """Start with every block free; names are looked up in `prefixes` and removed from it at reuse."""
        self.num_blocks = num_blocks
        self._prefixes = PrefixIndex() if prefixes is None else prefixes
        self._nameless = list(range(num_blocks - 1, -1, -1))
        self._named: OrderedDict[int, None] = OrderedDict()
        self._pending: dict[int, None] = {}
        self._committed = 0
        self._state = bytearray(num_blocks)
        self._num_users = [0] * num_blocks
        self._fences = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, whether their contents are kept or not."""
        return len(self._nameless) + len(self._named)

    @property
    def num_pending(self) -> int:
        """Freed blocks that a plan in flight may still read."""
        return len(self._pending)

    @property
    def num_held(self) -> int:
        """Blocks in somebody's table."""
        return self.num_blocks - self.num_free - self.num_pending

    def num_users(self, block_id: int) -> int:
        """Tables that the block is in."""
        return self._num_users[block_id]

    def try_allocate(self, num_blocks: int) -> list[int] | None:
        """Take `num_blocks` free blocks, or return None and take none."""
        if num_blocks > self.num_free:
            return None
        taken = [self._take() for _ in range(num_blocks)]
        for block_id in taken:
            self._state[block_id] = _HELD
            self._num_users[block_id] = 1
        return taken

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks.

        Raises:
            MemoryError: fewer are free; none are taken.
        """
        taken = self.try_allocate(num_blocks)
        if taken is None:
            raise MemoryError(f"{num_blocks} KV blocks wanted, {self.num_free} of {self.num_blocks} are free")
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """Become one more user of blocks with a name: held by others, waiting for a plan, or free.

        Raises:
            ValueError: a block's contents have no name, or a block is given twice; nothing has changed.
        """
        if len(set(block_ids)) < len(block_ids) or any(b not in self._prefixes for b in block_ids):
            raise ValueError(f"blocks {list(block_ids)} do not all have a name, each once")
        for block_id in block_ids:
            self._named.pop(block_id, None)
            self._pending.pop(block_id, None)
            self._state[block_id] = _HELD
            self._num_users[block_id] += 1

    def free(self, block_ids: Sequence[int], fence: int) -> None:
        """One user gives blocks back; without any, they become usable once all their users' fences are
        committed.

        Of a table, the last block is reused first: without the first ones it is worth nothing.

        Raises:
            ValueError: a block is not held (freed twice, or never allocated); nothing is freed.
        """
        if any(self._state[block_id] != _HELD for block_id in block_ids) or len(set(block_ids)) < len(
            block_ids
        ):
            raise ValueError(f"blocks {list(block_ids)} are not all held, each once")
        for block_id in reversed(block_ids):
            self._fences[block_id] = max(self._fences[block_id], fence)
            self._num_users[block_id] -= 1
            if self._num_users[block_id]:
                continue
            if self._fences[block_id] <= self._committed:
                self._return(block_id)
            else:
                self._state[block_id] = _PENDING
                self._pending[block_id] = None

    def advance(self, committed: int) -> None:
        """Every plan up to iteration `committed` is committed: release what waited for it."""
        self._committed = max(self._committed, committed)
        for block_id in [b for b in self._pending if self._fences[b] <= self._committed]:
            del self._pending[block_id]
            self._return(block_id)

    def reclaim(self, block_ids: Sequence[int]) -> None:
        """Take back blocks just freed, contents and all: the plan that they were freed in did not get so far.

        Raises:
            ValueError: a block does not wait for a plan any more; nothing has changed.
        """
        if any(block_id not in self._pending for block_id in block_ids):
            raise ValueError(f"blocks {list(block_ids)} are not all waiting for a plan in flight")
        for block_id in block_ids:
            del self._pending[block_id]
            self._state[block_id] = _HELD
            self._num_users[block_id] = 1

    def forget(self, block_ids: Iterable[int]) -> None:
        """The contents of these blocks are void, whatever their state: they lose their names."""
        for block_id in block_ids:
            self._prefixes.forget(block_id)
            if block_id in self._named:
                del self._named[block_id]
                self._nameless.append(block_id)

    def check_invariants(self) -> None:
        """Every block is in exactly one of the three states; the lists, users and names agree with it.

        Raises:
            AssertionError: they do not.
        """
        self._prefixes.check_invariants()
        free = [*self._nameless, *self._named]
        assert len(set(free)) == len(free) == self._state.count(_FREE)
        assert len(self._pending) == self._state.count(_PENDING)
        assert all(self._state[block_id] == _FREE for block_id in free)
        assert all(self._state[block_id] == _PENDING for block_id in self._pending)
        assert all(block_id not in self._prefixes for block_id in self._nameless)
        assert all(block_id in self._prefixes for block_id in self._named)
        assert all(self._fences[block_id] > self._committed for block_id in self._pending)
        assert all(self._fences[block_id] <= self._committed for block_id in free)
        for block_id, state in enumerate(self._state):
            assert (self._num_users[block_id] > 0) == (state == _HELD)

    def _take(self) -> int:
        if self._nameless:
            return self._nameless.pop()
        block_id, _ = self._named.popitem(last=False)
        self._prefixes.forget(block_id)
        return block_id

    def _return(self, block_id: int) -> None:
        self._state[block_id] = _FREE
        if block_id in self._prefixes:
            self._named[block_id] = None
        else:
            self._nameless.append(block_id)
