"""What the time of an iteration depends on, counted from its plan.

Sums of integers; what they cost is the cost model's affair.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class PlanFeatures:
    """Sums over one iteration; a draft adds to them piece by piece.

    `kv_tokens_read` sums the context of every segment, `attention_products` tokens · context of the segments
    longer than one token; `num_sequences` counts segments that sample, `loss_tokens` rows of the loss head,
    `backward_token_layers` tokens times layers of all backward slices, `recomputed_token_layers` those of
    them whose activations were not kept, `num_adapters` distinct adapters and `adapter_elements` their
    elements (so ranks count). `num_loss_windows` counts segments with a loss, each a pass over the head's
    weights, and `num_backward_layers` the layers that each wave goes through: slices of neighbouring windows
    run as one, so that its weights are read about once. `num_chunks` counts segments longer than one token:
    on a CPU each has attention and adapter products of its own.
    """

    forward_tokens: int = 0
    kv_tokens_read: int = 0
    attention_products: int = 0
    num_sequences: int = 0
    loss_tokens: int = 0
    backward_token_layers: int = 0
    num_backward_slices: int = 0
    num_adapters: int = 0
    optimizer_steps: int = 0
    adapter_elements: int = 0
    num_loss_windows: int = 0
    num_backward_layers: int = 0
    recomputed_token_layers: int = 0
    num_chunks: int = 0

    @property
    def linear(self) -> tuple[int, ...]:
        """All but the forward tokens, in the order of `LINEAR_NAMES`."""
        return (
            self.kv_tokens_read,
            self.attention_products,
            self.num_sequences,
            self.loss_tokens,
            self.backward_token_layers,
            self.num_backward_slices,
            self.num_adapters,
            self.optimizer_steps,
            self.adapter_elements,
            self.num_loss_windows,
            self.num_backward_layers,
            self.recomputed_token_layers,
            self.num_chunks,
        )

    @property
    def kind(self) -> tuple[bool, ...]:
        """Which sorts of work there are: decodes or ends of prompts, chunks, loss, backward, optimizer."""
        return (
            self.num_sequences > 0,
            self.attention_products > 0,
            self.loss_tokens > 0,
            self.num_backward_slices > 0,
            self.optimizer_steps > 0,
        )

    def without(self, part: PlanFeatures) -> PlanFeatures:
        """The sums less those of a part."""
        linear = [own - other for own, other in zip(self.linear, part.linear, strict=True)]
        return PlanFeatures(self.forward_tokens - part.forward_tokens, *linear)


LINEAR_NAMES = (
    "kv_tokens_read",
    "attention_products",
    "num_sequences",
    "loss_tokens",
    "backward_token_layers",
    "num_backward_slices",
    "num_adapters",
    "optimizer_steps",
    "adapter_elements",
    "num_loss_windows",
    "num_backward_layers",
    "recomputed_token_layers",
    "num_chunks",
)
"""The features that a time depends on linearly."""
