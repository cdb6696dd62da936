"""A tiny decoder in any dtype, a finetune job on it, and a driver that runs packs in windows through the real
runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from weft_scheduler.plan import BackwardSlice, MemoryPlan, Segment, SegmentKind, StepPlan
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import PackedAdapter, new_adapter, repack
from weft_server.cache.kv import KvCache
from weft_server.engine.runner import Runner, RunResult
from weft_server.model.config import ModelConfig
from weft_server.model.decoder import Decoder
from weft_server.model.random import random_weights
from weft_server.model.weights import DecoderWeights
from weft_server.protocol import JobSpec, LoraSpec
from weft_server.training.data import Dataset
from weft_server.training.job import FinetuneJob

CPU = torch.device("cpu")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK_SIZE = 4


def tiny_config(family: str = "llama", **changes: object) -> ModelConfig:
    architectures = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
    raw: dict[str, object] = {
        "architectures": [architectures[family]],
        "model_type": family,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    return ModelConfig.from_dict(raw | changes)


def job_spec(**changes: object) -> JobSpec:
    lora = LoraSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=ALL_LINEAR)
    spec = JobSpec(
        seed=7,
        num_epochs=1,
        batch_size=4,
        total_steps=8,
        learning_rate=1e-3,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        checkpoint_every=0,
        lora=lora,
    )
    return replace(spec, **changes)


def dataset_of(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Dataset:
    """A dataset of (tokens, targets) pairs."""
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in examples)])
    return Dataset(
        safetensors.numpy.save(
            {
                "tokens": np.concatenate([np.asarray(t, dtype=np.int32) for t, _ in examples]),
                "targets": np.concatenate([np.asarray(t, dtype=np.uint8) for _, t in examples]),
                "offsets": offsets.astype(np.int32),
                "lines": np.arange(1, len(examples) + 1, dtype=np.int32),
            }
        )
    )


def random_dataset(lengths: Iterable[int], vocab_size: int, seed: int = 3) -> Dataset:
    rng = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        targets = rng.integers(0, 2, length)
        targets[0], targets[-1] = 0, 1
        examples.append((rng.integers(0, vocab_size, length), targets))
    return dataset_of(examples)


def random_adapter(
    config: ModelConfig, seed: int, rank: int = 4, modules: tuple[str, ...] = ALL_LINEAR
) -> PackedAdapter:
    """An adapter whose B is not zero, so that every gradient is alive."""
    fresh = new_adapter(
        rank=rank,
        alpha=2.0 * rank,
        dropout=0.0,
        target_modules=modules,
        use_rslora=False,
        num_layers=config.num_layers,
        shapes=config.module_shapes,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    return repack(fresh, torch.randn(fresh.num_elements, generator=generator) * 0.2)


@dataclass
class Bench:
    """A decoder, its cache and arena, and some jobs; runs whole steps in windows of any size."""

    config: ModelConfig
    dtype: torch.dtype
    window_tokens: int
    num_blocks: int = 256
    keeps_activations: bool = False
    weights: DecoderWeights | None = None
    decoder: Decoder = field(init=False)
    runner: Runner = field(init=False)
    jobs: dict[str, FinetuneJob] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    _next_wave: int = 0

    def __post_init__(self) -> None:
        weights = self.weights
        if weights is None:
            weights = random_weights(self.config, seed=11, dtype=self.dtype, device=CPU, quantization="none")
        self.decoder = Decoder(weights, max_positions=256)
        self.cache = KvCache(
            num_layers=self.config.num_layers,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=CPU,
        )
        self.arena = AdapterArena(1 << 20, 8, self.config.num_layers, dtype=self.dtype, device=CPU)
        self.runner = Runner(
            self.decoder, self.cache, self.arena.table, max_num_seqs=8, window_tokens=self.window_tokens
        )

    def add_job(
        self,
        dataset: Dataset,
        adapter: PackedAdapter,
        spec: JobSpec,
        *,
        job_id: str = "job",
        max_pack_tokens: int = 1000,
    ) -> FinetuneJob:
        job = FinetuneJob(
            job_id,
            "tenant",
            spec,
            dataset,
            adapter,
            lease_epoch=1,
            device=CPU,
            max_pack_tokens=max_pack_tokens,
            dtype=torch.float64 if self.dtype == torch.float64 else torch.float32,
        )
        job.take_place()
        slot = len(self.slots)
        offset = sum(other.adapter.num_elements for other in self.jobs.values())
        self.arena.load(slot, offset, HostImage.build(job.adapter, self.dtype))
        self.jobs[job_id], self.slots[job_id] = job, slot
        return job

    def accumulate_gradients(
        self, *job_ids: str, drop_before: Callable[[int], bool] = lambda _layer: False
    ) -> None:
        """Run the forward and backward of one step of each job, all packs in one wave.

        `drop_before(layer)` says at which layer boundaries all packs are dropped and forwarded again.
        """
        packs = [pack for job_id in job_ids for pack in self.jobs[job_id].start_step()]
        tables = self._block_tables([pack.num_tokens for pack in packs])
        for pack in packs:
            self.runner.add_pack(pack)
        self._forward(packs, tables, with_loss=True)
        for layer in reversed(range(self.config.num_layers)):
            if drop_before(layer):
                names = tuple(pack.pack_id for pack in packs)
                self._run(StepPlan(0, (), memory=MemoryPlan(dropped_packs=names)))
                for index in range(self.config.num_layers):
                    self.cache.keys[index].fill_(torch.nan)
                    self.cache.values[index].fill_(torch.nan)
                tables = [tuple(reversed(table)) for table in tables]
                self._forward(packs, tables, with_loss=False)
                self._next_wave += 1
            num_windows = max(-(-pack.num_tokens // self.window_tokens) for pack in packs)
            for window in reversed(range(num_windows)):
                names = tuple(p.pack_id for p in packs if p.num_tokens > window * self.window_tokens)
                self._run(StepPlan(0, (), backward=(BackwardSlice(self._next_wave, names, layer, window),)))
        self._next_wave += 1

    def finish_step(self, *job_ids: str) -> RunResult:
        result = self._run(StepPlan(0, (), optimizer_steps=job_ids))
        for job_id in job_ids:
            self.arena.write(self.slots[job_id], self.jobs[job_id].optimizer.master.data.to(self.dtype))
        return result

    def _forward(
        self, packs: Sequence[object], tables: Sequence[tuple[int, ...]], *, with_loss: bool
    ) -> None:
        longest = max(pack.num_tokens for pack in packs)
        for start in range(0, longest, self.window_tokens):
            segments = []
            for pack, table in zip(packs, tables, strict=True):
                count = min(self.window_tokens, pack.num_tokens - start)
                if count > 0:
                    slot = self.slots[pack.job_id]
                    segments.append(
                        Segment(
                            pack.pack_id,
                            SegmentKind.TRAIN,
                            start,
                            count,
                            slot,
                            table,
                            with_loss=with_loss,
                            keeps_activations=self.keeps_activations,
                        )
                    )
            self._run(StepPlan(0, tuple(segments)))

    def _run(self, plan: StepPlan) -> RunResult:
        return self.runner.submit(plan, self.jobs).result()

    def _block_tables(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        tables, first = [], 0
        for length in lengths:
            count = -(-length // BLOCK_SIZE)
            tables.append(tuple(range(first + count - 1, first - 1, -1)))
            first += count
        assert first <= self.num_blocks
        return tables

    def whole_sequence_gradient(self, job_id: str) -> tuple[Tensor, float]:
        """Oracle: autograd through the same decoder, one whole example at a time; (summed gradient, summed
        loss)."""
        from weft_kernels.attention import AttentionBatch, make_chunk
        from weft_kernels.lora import LoraBatch
        from weft_server.model.batch import TokenBatch
        from weft_server.training.data import IGNORED, ExampleOrder

        job, slot = self.jobs[job_id], self.slots[job_id]
        arena = AdapterArena(1 << 20, 8, self.config.num_layers, dtype=self.dtype, device=CPU)
        arena.weights.requires_grad_()
        with torch.no_grad():
            image = HostImage.build(job.adapter, self.dtype)
            arena.weights[: image.num_elements] = job.optimizer.master.data.to(self.dtype)
        arena.table.set_slot(slot, 0, image.entries)
        spec, dataset, total = job.spec, job._dataset, 0.0
        for idx in ExampleOrder(len(dataset), spec.batch_size, spec.seed).of_step(job.num_steps_done):
            example = dataset[idx]
            length = len(example.tokens)
            num_blocks = -(-length // BLOCK_SIZE)
            cache = KvCache(
                num_layers=self.config.num_layers,
                num_blocks=num_blocks,
                block_size=BLOCK_SIZE,
                num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim,
                dtype=self.dtype,
                device=CPU,
            )
            chunk = make_chunk(0, length, 0, length, torch.arange(num_blocks), BLOCK_SIZE)
            batch = TokenBatch(
                positions=torch.arange(length),
                slot_mapping=torch.arange(length),
                attention=AttentionBatch((), [chunk]),
                lora=LoraBatch.build([(slot, 0, length)], CPU),
            )
            hidden = self.decoder.embed(example.tokens)
            for layer in range(self.config.num_layers):
                hidden, _ = self.decoder.forward_layer(
                    layer, hidden, batch, cache, arena.table, self.decoder.rotation(batch)
                )
            logits = self.decoder.logits(hidden)
            loss = torch.nn.functional.cross_entropy(
                logits, example.labels, ignore_index=IGNORED, reduction="sum"
            )
            loss.backward()
            total += float(loss.detach())
        assert arena.weights.grad is not None
        return arena.weights.grad[: image.num_elements].clone(), total


@pytest.fixture(params=[False, True], ids=["recompute", "keep"])
def bench(request: pytest.FixtureRequest) -> Callable[..., Bench]:
    return partial(Bench, keeps_activations=request.param)


@pytest.fixture
def make() -> object:
    """The builders of this file, for tests (test files cannot import one another)."""

    class Make:
        config = staticmethod(tiny_config)
        spec = staticmethod(job_spec)
        dataset = staticmethod(random_dataset)
        dataset_of = staticmethod(dataset_of)
        adapter = staticmethod(random_adapter)

    return Make
