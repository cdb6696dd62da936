"""How long the simulated device takes for what a plan computes: a roofline, or a model fitted on a real one.

    forward  = max(weights / bandwidth + keys and values / bandwidth, products / rate) + attention + head
    slice    = max(a layer's weights / bandwidth, products / rate) + attention: once, and once more what it
               recomputes; what it does not is written and read
    no faster than its kernels can be started, plus a constant for every iteration

This is the *true* time of the simulation. What the scheduler believes is fitted from it, as on a real device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

from weft_scheduler.cost import CostModel
from weft_scheduler.features import PlanFeatures
from weft_scheduler.limits import Limits
from weft_scheduler.simulator.gpus import Gpu, keeps_expansion
from weft_scheduler.simulator.shapes import DENSE_BYTES, WEIGHT_BYTES, ModelShape

LAUNCHES_PER_LAYER = 14
LAUNCHES_PER_SLICE = 40
OPTIMIZER_BYTES_PER_ELEMENT = 30
"""AdamW in fp32 reads four vectors, writes three, and writes the bf16 copy."""

RECOMPUTED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
"""What a backward slice computes again; the down projection is not needed."""


@dataclass(slots=True)
class Work(PlanFeatures):
    """What one plan computes, and what the device alone needs to know of it.

    `backward_products` sums tokens · context over backward slices (per layer), `recomputed_products` over
    those that recompute; `stepped_elements` the elements of adapters whose optimizer step runs,
    `moved_elements` those of adapters that change their place in the arena.
    """

    backward_products: int = 0
    recomputed_products: int = 0
    stepped_elements: int = 0
    moved_elements: int = 0


class DeviceModel(Protocol):
    """The time of an iteration on some device."""

    def seconds(self, work: Work) -> float:
        """Seconds from the start of the iteration to its end."""
        ...


class Roofline:
    """A device from its published figures and a model's shape."""

    def __init__(self, shape: ModelShape, gpu: Gpu, quantization: str) -> None:
        """Raises KeyError for an unknown quantization."""
        self.shape, self.gpu, self.quantization = shape, gpu, quantization
        self.bytes_per_s = gpu.bandwidth * gpu.memory_efficiency
        self.flops_per_s = gpu.flops * gpu.compute_efficiency
        self._fused_s = shape.decoder_weights * WEIGHT_BYTES[quantization] / self.bytes_per_s
        self._dense_s = shape.decoder_weights * self._dense_weight_bytes() / self.bytes_per_s
        self._flops_per_row = 2.0 * shape.decoder_weights
        self._kv_s = shape.kv_bytes_per_token / self.bytes_per_s
        self._product_s = shape.attention_flops(1.0) / self.flops_per_s
        self._head_s = shape.head_weights * DENSE_BYTES / self.bytes_per_s
        self._head_row_s = 2.0 * shape.head_weights / self.flops_per_s
        recomputed = sum(a * b for name, (a, b) in shape.modules.items() if name in RECOMPUTED_MODULES)
        self._slice_row_s = 2.0 * shape.layer_weights / self.flops_per_s
        self._recomputed_row_s = 2.0 * recomputed / self.flops_per_s
        self._slice_weights_s = self._dense_s / shape.num_layers
        self._kept_row_s = 2.0 * shape.activation_bytes_per_token / shape.num_layers / self.bytes_per_s

    def _dense_weight_bytes(self) -> float:
        """Bytes moved per weight in a batch of many rows: read dense, or dequantized into scratch before."""
        if self.quantization == "none" or keeps_expansion(self.shape, self.gpu, self.quantization):
            return DENSE_BYTES
        return WEIGHT_BYTES[self.quantization] + 2.0 * DENSE_BYTES

    def seconds(self, work: Work) -> float:
        """Seconds of one iteration; see the module's formula."""
        gpu, shape = self.gpu, self.shape
        busy_s, num_launches = 0.0, 0
        if work.forward_tokens:
            busy_s += self.forward_s(work)
            num_launches += LAUNCHES_PER_LAYER * shape.num_layers
        if work.num_backward_slices:
            busy_s += self.backward_s(work)
            num_launches += LAUNCHES_PER_SLICE * work.num_backward_slices
        busy_s += work.adapter_elements * DENSE_BYTES / self.bytes_per_s
        busy_s += 2 * work.moved_elements * DENSE_BYTES / self.bytes_per_s
        busy_s += work.stepped_elements * OPTIMIZER_BYTES_PER_ELEMENT / self.bytes_per_s
        return max(busy_s, num_launches * gpu.launch_s) + gpu.overhead_s

    def forward_s(self, work: Work) -> float:
        """The forward batch: linears against their weights, attention, head and loss."""
        rows = work.forward_tokens
        weights_s = self._fused_s if rows <= self.gpu.fused_rows else self._dense_s
        linears_s = max(weights_s, rows * self._flops_per_row / self.flops_per_s)
        attention_s = max(work.kv_tokens_read * self._kv_s, work.attention_products * self._product_s)
        head_s = 0.0
        if work.num_sequences or work.loss_tokens:
            # The loss multiplies by the head twice: logits, then the gradient of the hidden state.
            rows = work.num_sequences + 2 * work.loss_tokens
            head_s = max(self._head_s, rows * self._head_row_s)
        return linears_s + attention_s + head_s

    def backward_s(self, work: Work) -> float:
        """All backward slices: what they recompute, the gradients of inputs, attention's backward."""
        num_recomputed = work.recomputed_token_layers
        share = num_recomputed / work.backward_token_layers
        weights_s = (1.0 + share) * work.num_backward_slices * self._slice_weights_s
        products_s = work.backward_token_layers * self._slice_row_s + num_recomputed * self._recomputed_row_s
        kept_s = (work.backward_token_layers - num_recomputed) * self._kept_row_s
        # Five products where the forward has two.
        products = 2.5 * work.backward_products + work.recomputed_products
        return max(weights_s, products_s) + kept_s + products * self._product_s / self.shape.num_layers


class FittedDevice:
    """A device as a cost model learnt it in a real run (`CostModel.to_dict`)."""

    def __init__(self, cost: CostModel) -> None:
        """Answer with the predictions of `cost`, which is not changed."""
        self._cost = cost

    def seconds(self, work: Work) -> float:
        """The prediction, at least a microsecond."""
        return max(self._cost.predict(work), 1e-6)


def calibration_samples(
    device: DeviceModel, limits: Limits, adapter_elements: int = 0
) -> list[tuple[PlanFeatures, float]]:
    """The measurements that an engine makes at its start, on this device: decodes, prompts, decodes with
    adapters of `adapter_elements` elements (unless 0), one pack.
    """
    features = [_decodes(num) for num in (1, 4, 16, 32) if num <= limits.max_num_seqs]
    most = min(limits.max_batch_tokens, limits.max_model_len - 1, limits.capacity_tokens)
    features += [_prompt(num) for num in (16, 64, 128, 256, 512, 1024) if num <= most]
    features += [_decodes(num, adapter_elements) for num in (1, 4, 8) if adapter_elements]
    window = min(limits.window_tokens, limits.max_pack_tokens, limits.max_batch_tokens)
    if window >= 2:
        features.append(
            PlanFeatures(
                window, window, window * window, loss_tokens=window, num_loss_windows=1, num_chunks=1
            )
        )
        features += [_backward(window, limits.num_layers, 1)]
        features += [_backward(window, limits.num_layers, 0)] if limits.max_kept_tokens >= window else []
    return [(item, device.seconds(_work(item, limits))) for item in features]


def _decodes(num: int, adapter_elements: int = 0) -> PlanFeatures:
    return PlanFeatures(
        forward_tokens=num,
        kv_tokens_read=33 * num,
        num_sequences=num,
        num_adapters=num if adapter_elements else 0,
        adapter_elements=num * adapter_elements,
    )


def _backward(window: int, num_layers: int, recomputed: int) -> PlanFeatures:
    return PlanFeatures(
        backward_token_layers=window * num_layers,
        num_backward_slices=num_layers,
        num_backward_layers=num_layers,
        recomputed_token_layers=window * num_layers * recomputed,
    )


def _prompt(num: int) -> PlanFeatures:
    return PlanFeatures(num, num, num * num, num_sequences=1, num_chunks=1)


def _work(features: PlanFeatures, limits: Limits) -> Work:
    window = min(limits.window_tokens, limits.max_pack_tokens)
    products = features.num_backward_slices * window * window // 2
    recomputed = products if features.recomputed_token_layers else 0
    return Work(**asdict(features), backward_products=products, recomputed_products=recomputed)
