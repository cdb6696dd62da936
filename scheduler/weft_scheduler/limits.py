"""The sizes that the scheduler plans within. It does not know where they come from (free memory, flags,
tests).
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device offers; checked once, here.

    `num_blocks` KV blocks of `block_size` tokens are shared by inference and finetuning; packs are admitted
    only while `inference_reserve_blocks` stay free. A flat forward batch holds at most `max_batch_tokens`
    tokens of at most `max_num_seqs` sequences; a sequence is at most `max_model_len` tokens long. Adapters
    live in `num_adapter_slots` slots and `arena_elements` elements, of which training adapters hold at most
    `training_adapter_share` and pinned ones at most `pinned_adapter_share`.

    Packs alive at once (admitted, backward not finished) hold at most `max_train_tokens` tokens; they are
    forwarded in windows of `window_tokens`. Those of them that keep their activations, so that the backward
    need not recompute them, hold at most `max_kept_tokens`.

    `max_inflight` plans may be uncommitted at a time: 1 is synchronous, 2 makes the next plan while one runs.
    A request that has waited `max_wait_s` for room for its adapter, and a pack that has waited
    `max_training_wait_s` for KV blocks, hold back new admissions until theirs fits. A flex request that
    arrived `max_flex_wait_s` ago takes turns with its tenant's default ones.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    num_adapter_slots: int
    arena_elements: int
    window_tokens: int
    num_layers: int
    max_train_tokens: int
    max_kept_tokens: int = 0
    max_inflight: int = 1
    inference_reserve_blocks: int = 0
    training_adapter_share: float = 0.5
    pinned_adapter_share: float = 0.0
    max_wait_s: float = 2.0
    max_training_wait_s: float = 10.0
    max_flex_wait_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse sizes with which some work could never run.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        may_be_zero = {"num_adapter_slots", "arena_elements", "inference_reserve_blocks"}
        may_be_zero |= {"max_train_tokens", "max_kept_tokens"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_share"):
                continue
            lowest = 0 if field.name in may_be_zero or field.name.endswith("_s") else 1
            if value < lowest:
                raise ValueError(f"{field.name} is {value}; it must be at least {lowest}")
        shares = (self.training_adapter_share, self.pinned_adapter_share)
        if not 0.0 <= min(shares) <= sum(shares) <= 1.0:
            raise ValueError(
                f"training_adapter_share is {shares[0]} and pinned_adapter_share {shares[1]}; each must be "
                "within 0 and 1, and so must their sum"
            )
        if self.max_batch_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}; it must exceed max_num_seqs "
                f"({self.max_num_seqs}), so that prompts progress beside a full set of decodes"
            )
        if self.max_train_tokens and self.max_batch_tokens < self.max_num_seqs + self.window_tokens:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}; with finetuning it must be at least "
                f"max_num_seqs + window_tokens ({self.max_num_seqs} + {self.window_tokens}), "
                "so that a window always fits"
            )
        if self.inference_reserve_blocks >= self.num_blocks:
            raise ValueError(
                f"inference_reserve_blocks is {self.inference_reserve_blocks}; it must be below num_blocks "
                f"({self.num_blocks})"
            )

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all KV blocks together hold."""
        return self.num_blocks * self.block_size

    @property
    def max_pack_tokens(self) -> int:
        """The longest pack that can ever be admitted."""
        free_tokens = (self.num_blocks - self.inference_reserve_blocks) * self.block_size
        return min(self.max_train_tokens, free_tokens)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)
