"""Whole engines over a tiny random base, in one process: no sockets, no store, no clock but the test's own.

The suite for a bare GPU machine: it imports torch and Weft alone, and runs on every device that is there.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from weft_kernels.attention import AttentionBatch, make_chunk
from weft_kernels.lora import LoraBatch
from weft_scheduler.limits import Limits
from weft_scheduler.plan import SegmentKind, StepPlan
from weft_scheduler.policies import Policy
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import PackedAdapter, new_adapter, repack
from weft_server.adapters.peft import read_peft, write_peft
from weft_server.cache.kv import KvCache
from weft_server.engine.build import assemble_engine
from weft_server.engine.config import EngineConfig
from weft_server.engine.jobs import BlobIO
from weft_server.engine.sizing import Sizes
from weft_server.model import random as random_model
from weft_server.model.batch import TokenBatch
from weft_server.model.config import ModelConfig
from weft_server.model.decoder import Decoder
from weft_server.model.weights import DecoderWeights
from weft_server.protocol import (
    Abort,
    AdapterRef,
    ChoiceDelta,
    FromEngine,
    Generate,
    JobCheckpointed,
    JobFailed,
    JobProgress,
    JobSpec,
    JobStopped,
    JobSucceeded,
    LoraSpec,
    RequestFailed,
    SamplingParams,
    StartJob,
    StepOutput,
)

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK_SIZE = 4
MAX_SECONDS = 60.0
POLL_S = 2e-4

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the engine runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def weights(device: torch.device) -> DecoderWeights:
    """A base whose answers are far from ties: five times as wide as a fresh model's."""
    with mock.patch.object(random_model, "_INITIAL_STD", 0.15):
        return random_model.random_weights(
            CONFIG, seed=11, dtype=torch.float32, device=device, quantization="none"
        )


class MemoryBlobs:
    """A blob store in a dictionary, addressed by content."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def read(self, blob_id: str) -> bytes:
        return self.content[blob_id]

    def put(self, chunks: Iterable[bytes]) -> str:
        data = b"".join(chunks)
        blob_id = hashlib.sha256(data).hexdigest()
        self.content[blob_id] = data
        return blob_id


@dataclass
class Clock:
    """Time stands still unless a test moves it."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Harness:
    """One engine, what is sent to it and all that it has said."""

    weights: DecoderWeights
    blobs: MemoryBlobs = field(default_factory=MemoryBlobs)
    clock: Clock = field(default_factory=Clock)
    records: list[list[str]] = field(default_factory=list)
    pipeline_depth: int = 0
    max_pack_tokens: int = 64
    tpot_slo_ms: float = 60_000.0
    prefix_cache: bool = True
    limits: dict[str, Any] = field(default_factory=dict)
    read: Callable[[str], bytes] | None = None
    put: Callable[[Iterable[bytes]], str] | None = None
    policy: Policy | None = None
    has_arrivals: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        sizes: dict[str, Any] = {
            "num_blocks": 128,
            "block_size": BLOCK_SIZE,
            "max_num_seqs": 8,
            "max_batch_tokens": 64,
            "max_model_len": 160,
            "num_adapter_slots": 16,
            "arena_elements": 1 << 18,
            "window_tokens": 16,
            "num_layers": CONFIG.num_layers,
            "max_train_tokens": 512,
            "max_kept_tokens": 64,
            "max_inflight": self.pipeline_depth + 1,
        }
        limits = Limits(**(sizes | self.limits))
        config = EngineConfig(
            model_dir="tiny",
            model_name="tiny",
            epoch=1,
            receive_address="",
            send_address="",
            flight_record="",
            store_url="",
            data_dir="",
            dtype="float32",
            quantization="none",
            tpot_slo_ms=self.tpot_slo_ms,
            prefix_cache=self.prefix_cache,
        )
        built = assemble_engine(
            config,
            self.weights,
            BlobIO(self.read or self.blobs.read, self.put or self.blobs.put),
            base_fingerprint="tiny",
            sizes=Sizes(limits, min(self.max_pack_tokens, limits.max_pack_tokens), self.pipeline_depth),
            clock=self.clock,
            policy=self.policy,
        )
        self.engine = built.engine
        self.describe_device = built.describe_device
        self.engine._record_plan = self.records.append
        self.ready = built.ready
        self.scheduler = built.engine._scheduler
        self.runner = built.engine._runner
        self.plans: list[StepPlan] = []
        self.messages: list[FromEngine] = []
        self.deltas: dict[str, list[ChoiceDelta]] = defaultdict(list)
        submit = self.runner.submit

        def record(plan: StepPlan, jobs: Any, *more: Any) -> Any:
            self.plans.append(plan)
            return submit(plan, jobs, *more)

        self.runner.submit = record  # type: ignore[method-assign]

    # ------------------------------------------------------------ what is sent

    def generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        adapter: AdapterRef | None = None,
        tenant: str = "tenant",
        choice_idx: int = 0,
        generated: Sequence[int] = (),
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**({"max_tokens": 12, "temperature": 0.0} | sampling))
        self.engine.handle(
            Generate(request_id, tenant, list(prompt), params, choice_idx, adapter, list(generated))
        )

    def abort(self, request_id: str) -> None:
        self.engine.handle(Abort(request_id))

    def start_job(
        self, job_id: str, dataset: bytes, spec: JobSpec, *, tenant: str = "tenant", **more: Any
    ) -> None:
        blob = self.blobs.put([dataset])
        self.engine.handle(StartJob(job_id, tenant, spec, blob, **({"lease_epoch": 1} | more)))

    def store(self, adapter: PackedAdapter) -> AdapterRef:
        """Put an adapter into the blob store, as an upload would."""
        config_json, tensors = write_peft(adapter, base_model_name="tiny")
        return AdapterRef(
            adapter.digest, self.blobs.put([config_json]), self.blobs.put([tensors]), len(tensors)
        )

    def trained(self, job_id: str) -> PackedAdapter:
        """The adapter that a job has published."""
        message = self.ended(job_id)
        assert isinstance(message, JobSucceeded), message
        return read_peft(
            self.blobs.read(message.adapter.config_blob),
            self.blobs.read(message.adapter.weights_blob),
            num_layers=CONFIG.num_layers,
            shapes=CONFIG.module_shapes,
        )

    # ------------------------------------------------------------ running

    def step(self) -> list[FromEngine]:
        answers = self.engine.step(self.has_arrivals)
        self.messages += answers
        for answer in answers:
            if isinstance(answer, StepOutput):
                for delta in answer.deltas:
                    self.deltas[delta.request_id].append(delta)
        return answers

    def run(self, until: Callable[[], bool] | None = None) -> Harness:
        """Step until the condition holds; without one, until nothing is left to do."""
        for _ in self.steps():
            if until is not None and until():
                return self
            if until is None and not (self.engine.has_work or self.engine.awaits_background):
                self.scheduler.check_invariants()
                return self
        raise AssertionError(f"not finished: {self.messages[-3:]}")

    def steps(self) -> Iterator[int]:
        """Step again and again, giving way to background threads; ends when that took far too long."""
        deadline = time.monotonic() + MAX_SECONDS
        for number in count():
            self.step()
            yield number
            if not self.engine.ran:
                time.sleep(POLL_S)
            if time.monotonic() > deadline:
                return

    # ------------------------------------------------------------ what came back

    def tokens(self, request_id: str) -> list[int]:
        return [token for delta in self.deltas[request_id] for token in delta.token_ids]

    def prefilled(self, request_id: str) -> list[tuple[int, int]]:
        """First token and number of tokens of every chunk that was computed as prompt."""
        segments = (s for plan in self.plans for s in plan.forward if s.kind is SegmentKind.PREFILL)
        return [(s.start, s.num_tokens) for s in segments if s.sequence_id == request_id]

    def num_cached(self, request_id: str) -> int | None:
        """What the first delta says of the prefix cache; no later one says anything."""
        first, *rest = self.deltas[request_id]
        assert all(delta.num_cached_tokens is None for delta in rest)
        return first.num_cached_tokens

    def finish_reason(self, request_id: str) -> str | None:
        deltas = self.deltas[request_id]
        return deltas[-1].finish_reason if deltas else None

    def failures(self) -> dict[str, RequestFailed]:
        return {m.request_id: m for m in self.messages if isinstance(m, RequestFailed)}

    def progress(self, job_id: str) -> list[JobProgress]:
        return [m for m in self.messages if isinstance(m, JobProgress) and m.job_id == job_id]

    def losses(self, job_id: str) -> list[float]:
        return [m.train_loss for m in self.progress(job_id)]

    def checkpoints(self, job_id: str) -> list[JobCheckpointed]:
        return [m for m in self.messages if isinstance(m, JobCheckpointed) and m.job_id == job_id]

    def ended(self, job_id: str) -> JobSucceeded | JobFailed | JobStopped | None:
        kinds = (JobSucceeded, JobFailed, JobStopped)
        found = [m for m in self.messages if isinstance(m, kinds) and m.job_id == job_id]
        assert len(found) <= 1, found
        return found[0] if found else None


@pytest.fixture
def harness(weights: DecoderWeights) -> Iterator[Callable[..., Harness]]:
    """Builds engines on the device and stops their threads afterwards."""
    built: list[Harness] = []

    def build(**changes: Any) -> Harness:
        made = {f.name for f in Harness.__dataclass_fields__.values()}
        limits = {key: changes.pop(key) for key in list(changes) if key not in made}
        built.append(Harness(weights, limits=limits, **changes))
        return built[-1]

    yield build
    for one in built:
        one.engine.close()


class Make:
    """Inputs of all kinds."""

    config = CONFIG

    @staticmethod
    def prompt(length: int, seed: int = 0) -> list[int]:
        return np.random.default_rng((seed, length)).integers(0, CONFIG.vocab_size, length).tolist()

    @staticmethod
    def adapter(
        seed: int, rank: int = 4, modules: tuple[str, ...] = ALL_LINEAR, std: float = 0.2
    ) -> PackedAdapter:
        fresh = new_adapter(
            rank=rank,
            alpha=2.0 * rank,
            dropout=0.0,
            target_modules=modules,
            use_rslora=False,
            num_layers=CONFIG.num_layers,
            shapes=CONFIG.module_shapes,
            seed=seed,
        )
        noise = torch.randn(fresh.num_elements, generator=torch.Generator().manual_seed(seed + 1))
        return repack(fresh, noise * std)

    @staticmethod
    def spec(**changes: Any) -> JobSpec:
        spec = JobSpec(
            seed=7,
            num_epochs=1,
            batch_size=4,
            total_steps=5,
            learning_rate=5e-3,
            lr_scheduler="linear",
            warmup_ratio=0.0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            checkpoint_every=0,
            lora=Make.lora(),
        )
        return replace(spec, **changes)

    @staticmethod
    def lora(**changes: Any) -> LoraSpec:
        return replace(LoraSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=ALL_LINEAR), **changes)

    @staticmethod
    def dataset(lengths: Iterable[int], seed: int = 3) -> bytes:
        rng = np.random.default_rng(seed)
        tokens, targets, offsets = [], [], [0]
        for length in lengths:
            tokens.append(rng.integers(0, CONFIG.vocab_size, length).astype(np.int32))
            targets.append(rng.integers(0, 2, length).astype(np.uint8))
            targets[-1][-1] = 1
            offsets.append(offsets[-1] + length)
        return safetensors.numpy.save(
            {
                "tokens": np.concatenate(tokens),
                "targets": np.concatenate(targets),
                "offsets": np.asarray(offsets, dtype=np.int64),
                "lines": np.arange(1, len(tokens) + 1, dtype=np.int32),
            }
        )


@pytest.fixture
def make() -> type[Make]:
    return Make


class Oracle:
    """The same decoder without an engine: one sequence at a time, in one chunk, on a fresh cache."""

    def __init__(self, weights: DecoderWeights) -> None:
        self.decoder = Decoder(weights, max_positions=256)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], adapter: PackedAdapter | None = None) -> Tensor:
        """Logits of every position, `[n, vocab]` on the CPU."""
        decoder, length = self.decoder, len(tokens)
        device = decoder.device
        arena = AdapterArena(1 << 16, 1, CONFIG.num_layers, dtype=torch.float32, device=device)
        if adapter is not None:
            arena.load(0, 0, HostImage.build(adapter, torch.float32))
        cache = KvCache(
            num_layers=CONFIG.num_layers,
            num_blocks=1,
            block_size=length,
            num_kv_heads=CONFIG.num_kv_heads,
            head_dim=CONFIG.head_dim,
            dtype=torch.float32,
            device=device,
        )
        positions = torch.arange(length, device=device)
        chunk = make_chunk(0, length, 0, length, positions[:1], length)
        batch = TokenBatch(
            positions=positions,
            slot_mapping=positions,
            attention=AttentionBatch((), [chunk]),
            lora=None if adapter is None else LoraBatch.build([(0, 0, length)], device),
        )
        hidden = decoder.embed(torch.tensor(list(tokens), device=device))
        for layer in range(CONFIG.num_layers):
            hidden, _ = decoder.forward_layer(
                layer, hidden, batch, cache, arena.table, decoder.rotation(batch)
            )
        return decoder.logits(hidden).cpu()

    def greedy(
        self, prompt: Sequence[int], num_tokens: int, adapter: PackedAdapter | None = None
    ) -> list[int]:
        """The most likely continuation, computed anew for every token; no two candidates may be close."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            best = self.logits(tokens, adapter)[-1].topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "a tie: choose another seed"
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def oracle(weights: DecoderWeights) -> Oracle:
    return Oracle(weights)
