"""Finetuning steps of transformers + PEFT as its users write them: loss, backward, clipping, AdamW."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from weft_server.adapters.packed import PackedAdapter
from weft_server.bench.peers import PEER, PeerFormat, PeerModel, adapter_name, peer_gradients


class PeerTrainer:
    """One configuration of the peer. Several may share a model: each makes it its own before it steps.

    Args:
        peer: PEFT's model.
        adapter_idx: which of its adapters is trained.
        quantization: the format of its base.
        adapter_dtype: of that adapter.
        examples: of one step, of one length.
        checkpointing: recompute each layer in the backward pass.
    """

    def __init__(
        self,
        peer: PeerModel,
        adapter_idx: int,
        quantization: PeerFormat,
        adapter_dtype: torch.dtype,
        examples: Sequence[Sequence[int]],
        *,
        checkpointing: bool,
    ) -> None:
        self.quantization = quantization
        self.checkpointing = checkpointing
        base = "nf4" if quantization == "nf4" else str(peer.dtype).removeprefix("torch.")
        adapters = str(adapter_dtype).removeprefix("torch.")
        self.name = f"{PEER}, {base} base, {adapters} adapters, " + (
            "checkpointing" if checkpointing else "no checkpointing"
        )
        self._peer = peer
        self._adapter = adapter_name(adapter_idx)
        self._ids = torch.tensor(examples, device=peer.device)
        self._parameters = [
            parameter for name, parameter in peer.named_parameters() if f".{self._adapter}." in name
        ]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def seconds_per_token(self) -> float:
        """One whole step."""
        self._take_over()
        started = time.perf_counter()
        self._backward(self._ids)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ids.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self._peer.eval()
        return seconds / self._ids.numel()

    def gradient(self, adapter: PackedAdapter, examples: Sequence[Sequence[int]]) -> Tensor:
        """The mean loss's gradient on other examples, without a step, flat, in `adapter`'s layout."""
        self._take_over()
        self._backward(torch.tensor(examples, device=self._ids.device))
        gradient = peer_gradients(self._peer, adapter, self._adapter)
        self._optimizer.zero_grad(set_to_none=True)
        self._peer.eval()
        return gradient

    def _take_over(self) -> None:
        """Make adapter and checkpointing this configuration's. Nothing drops out: training mode only lets
        checkpointing work."""
        self._peer.set_adapter(self._adapter)
        if self.checkpointing:
            self._peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self._peer.gradient_checkpointing_disable()
        self._peer.train()

    def _backward(self, ids: Tensor) -> None:
        self._peer(input_ids=ids, labels=ids, use_cache=False).loss.backward()
