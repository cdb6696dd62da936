"""KV block ids: which are free, which are held, which still wait for a plan that may read them.

Owns ids and fences alone; it does not know what is stored in a block, or whose it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_FREE, _HELD, _PENDING = 0, 1, 2


class BlockAllocator:
    """Hands out block ids `0 .. num_blocks - 1`.

    A freed block carries a fence: the iteration of the last plan that could read it. It is handed out again
    only after `advance` has reported that iteration as committed.
    """

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._pending: deque[tuple[int, list[int]]] = deque()
        self._num_pending = 0
        self._committed = 0
        self._state = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_pending(self) -> int:
        """Freed blocks that a plan in flight may still read."""
        return self._num_pending

    @property
    def num_held(self) -> int:
        """Blocks in somebody's table."""
        return self.num_blocks - len(self._free) - self._num_pending

    def try_allocate(self, num_blocks: int) -> list[int] | None:
        """Take `num_blocks` free blocks, or return None and take none."""
        if num_blocks > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block_id in taken:
            self._state[block_id] = _HELD
        return taken

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks.

        Raises:
            MemoryError: fewer are free; none are taken.
        """
        taken = self.try_allocate(num_blocks)
        if taken is None:
            raise MemoryError(
                f"{num_blocks} KV blocks wanted, {len(self._free)} of {self.num_blocks} are free"
            )
        return taken

    def free(self, block_ids: Sequence[int], fence: int) -> None:
        """Give blocks back; they become usable once iteration `fence` is committed.

        Raises:
            ValueError: a block is not held (freed twice, or never allocated); nothing is freed.
        """
        if any(self._state[block_id] != _HELD for block_id in block_ids) or len(set(block_ids)) < len(
            block_ids
        ):
            raise ValueError(f"blocks {list(block_ids)} are not all held, each once")
        if fence <= self._committed:
            self._return(block_ids)
            return
        for block_id in block_ids:
            self._state[block_id] = _PENDING
        self._num_pending += len(block_ids)
        self._pending.append((fence, list(block_ids)))

    def advance(self, committed: int) -> None:
        """Every plan up to iteration `committed` is committed: release what waited for it."""
        self._committed = max(self._committed, committed)
        for _ in range(len(self._pending)):
            fence, block_ids = self._pending.popleft()
            if fence <= self._committed:
                self._num_pending -= len(block_ids)
                self._return(block_ids)
            else:
                self._pending.append((fence, block_ids))

    def check_invariants(self) -> None:
        """Every block is in exactly one of the three states, and the lists agree with the states.

        Raises:
            AssertionError: they do not.
        """
        pending = [block_id for _, block_ids in self._pending for block_id in block_ids]
        assert len(pending) == self._num_pending
        assert len(set(self._free)) == len(self._free) == self._state.count(_FREE)
        assert len(set(pending)) == len(pending) == self._state.count(_PENDING)
        assert all(self._state[block_id] == _FREE for block_id in self._free)
        assert all(self._state[block_id] == _PENDING for block_id in pending)
        assert all(fence > self._committed for fence, _ in self._pending)

    def _return(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self._state[block_id] = _FREE
        self._free.extend(block_ids)
