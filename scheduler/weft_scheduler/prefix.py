"""The prefix cache's names: which KV block holds the keys and values of which tokens, and what is being
computed.

The contents of a full block are a function of its tokens, of all tokens before them, of the adapter, and are
visible to one tenant alone. So a block is named by a chain: the root stands for (tenant, adapter digest), and
every full block's hash covers its parent's hash and its own tokens. Two blocks of one name may differ in
rounding, never in meaning; blocks of different tenants, adapters or adapter versions never share a name.

Owns hashes and the map between them and block ids. It does not know who uses a block or when it may be
reused: that is `blocks`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

_DIGEST_BYTES = 32


def prefix_root(tenant: str, adapter: str | None) -> bytes:
    """The root of all chains of one tenant and one adapter version (its digest; None is the base model)."""
    owner = tenant.encode()
    model = b"base" if adapter is None else b"adapter" + adapter.encode()
    return _hash(len(owner).to_bytes(8, "little") + owner + model)


@dataclass(frozen=True, slots=True)
class PrefixSpec:
    """How a request uses the cache: the root of its chain, and the ids of its prompt tokens.

    With `is_read` False it computes its whole prompt and only leaves its blocks to others.
    """

    root: bytes
    token_ids: Sequence[int]
    is_read: bool = True


class PrefixChain:
    """The hashes of one sequence's full blocks, growing with its tokens; `hashes[i]` covers blocks 0 to i."""

    def __init__(self, root: bytes, block_size: int, token_ids: Iterable[int] = ()) -> None:
        """Start with the tokens known so far; blocks have `block_size` tokens."""
        self.hashes: list[bytes] = []
        self._newest = root
        self._block_size = block_size
        tokens = array("q", token_ids)
        num_full = len(tokens) // block_size
        for idx in range(num_full):
            self._add_block(tokens[idx * block_size : (idx + 1) * block_size])
        self._tail = tokens[num_full * block_size :]

    def append(self, token_id: int) -> None:
        """Add the sequence's next token."""
        self._tail.append(token_id)
        if len(self._tail) == self._block_size:
            self._add_block(self._tail)
            self._tail = array("q")

    def _add_block(self, tokens: array[int]) -> None:
        self._newest = _hash(self._newest + tokens.tobytes())
        self.hashes.append(self._newest)


class PrefixIndex:
    """Which block holds what. A hash names at most one block, a block has at most one hash.

    `computing` names the sequence that is about to fill a block with the contents of a hash.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.computing: dict[bytes, str] = {}
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    def __contains__(self, block_id: int) -> bool:
        """Whether the block's contents have a name."""
        return block_id in self._hashes

    def __len__(self) -> int:
        """Blocks whose contents have a name."""
        return len(self._hashes)

    def block(self, name: bytes) -> int | None:
        """The block that holds the contents of this hash."""
        return self._blocks.get(name)

    def match(self, chain: PrefixChain, most: int) -> list[int]:
        """The blocks that hold the longest known prefix of a chain, at most its first `most` blocks."""
        found: list[int] = []
        for name in islice(chain.hashes, most):
            block_id = self._blocks.get(name)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def add(self, block_id: int, name: bytes) -> bool:
        """The block now holds the contents of this hash; False, and no change, if another block does already.

        Raises:
            ValueError: the block has a hash; its contents must not be replaced while it has.
        """
        if block_id in self._hashes:
            raise ValueError(f"block {block_id} is named already; forget it first")
        if name in self._blocks:
            return False
        self._blocks[name] = block_id
        self._hashes[block_id] = name
        return True

    def forget(self, block_id: int) -> None:
        """The block's contents are void, or about to be replaced. A block without a name stays so."""
        name = self._hashes.pop(block_id, None)
        if name is not None:
            del self._blocks[name]

    def begin(self, owner: str, names: Iterable[bytes]) -> None:
        """A sequence begins to compute these contents; where another does already, that one stays."""
        for name in names:
            self.computing.setdefault(name, owner)

    def end(self, owner: str, names: Iterable[bytes]) -> None:
        """The sequence has computed these contents, or gives up."""
        for name in names:
            if self.computing.get(name) == owner:
                del self.computing[name]

    def check_invariants(self) -> None:
        """The two directions agree.

        Raises:
            AssertionError: they do not.
        """
        assert {block_id: name for name, block_id in self._blocks.items()} == self._hashes
        assert len(self._blocks) == len(self._hashes)


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()
