"""Layers on padded, fixed buffers compute what layers on the batch itself compute, and nothing else.

On a CPU the kernels run in Triton's interpreter, and what is captured is replayed by issuing it again; they
are compared with the reference. On a GPU graphs are captured, and compared with the same kernels launched one
by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weft_kernels import attention, int8, lora, nf4, norm, rope, swiglu
from weft_kernels.attention import fused as attention_fused
from weft_kernels.lora import fused as lora_fused
from weft_kernels.norm import fused as norm_fused
from weft_kernels.rope import fused as rope_fused
from weft_kernels.swiglu import fused as swiglu_fused
from weft_scheduler.plan import Segment, SegmentKind, StepPlan
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.adapters.packed import new_adapter, repack
from weft_server.cache.kv import KvCache
from weft_server.engine.batch import FlatBatch, build_batch
from weft_server.engine.graph_buffers import BatchLimits
from weft_server.engine.graph_capture import CudaCapture, capture_graphs
from weft_server.engine.graph_shapes import GraphKey, GraphVariant
from weft_server.engine.layer_graphs import Capture, LayerGraphs, supports_graphs
from weft_server.engine.runner import Runner
from weft_server.engine.sequence import Sequence as GeneratedSequence
from weft_server.model import random as random_model
from weft_server.model.config import ModelConfig
from weft_server.model.decoder import Decoder
from weft_server.model.weights import DecoderWeights
from weft_server.protocol import SamplingParams
from weft_server.training.data import Example
from weft_server.training.pack import Pack, make_pack

DECODE, PREFILL, TRAIN = SegmentKind.DECODE, SegmentKind.PREFILL, SegmentKind.TRAIN
OPS = (attention, int8, lora, nf4, norm, rope, swiglu)
FUSED = (attention_fused, lora_fused, norm_fused, rope_fused, swiglu_fused)
BLOCK_SIZE, NUM_BLOCKS, MAX_ROWS, MAX_SEQS = 4, 160, 32, 8
SLOTS = {"a": 0, "b": 1, "c": None, "d": 2, "pack": 2, "other": 0}
RANKS = {0: 3, 1: 16, 2: 40}
EXAMPLES = {"pack": (7, 9, 11), "other": (3, 12)}
CONTEXT = 80

Work = Sequence[tuple[str, SegmentKind, int]]
ITERATIONS: dict[str, Work] = {
    "prompts and windows": [
        ("a", PREFILL, 8),
        ("b", PREFILL, 3),
        ("c", PREFILL, 4),
        ("d", PREFILL, 1),
        ("pack", TRAIN, 8),
        ("other", TRAIN, 7),
    ],
    "decode rows and windows": [
        ("a", DECODE, 1),
        ("b", DECODE, 1),
        ("c", DECODE, 1),
        ("d", PREFILL, 4),
        ("pack", TRAIN, 12),
    ],
    "decode rows of several adapters": [
        ("a", DECODE, 1),
        ("b", DECODE, 1),
        ("c", DECODE, 1),
        ("d", DECODE, 1),
    ],
    "one decode row without an adapter": [("c", DECODE, 1)],
    "one chunk": [("b", PREFILL, 5)],
    "decode rows without adapters, chunks with": [("c", DECODE, 1), ("other", TRAIN, 4)],
    "all decode rows again": [("a", DECODE, 1), ("d", DECODE, 1)],
}


class ReplayByIssuing:
    """Stands in for a capture where there are no graphs."""

    def __init__(self) -> None:
        self.issued: list[Callable[[], None]] = []

    def __call__(self, issue: Callable[[], None]) -> Callable[[], None]:
        self.issued.append(issue)
        return issue

    @staticmethod
    def leave(tensor: Tensor) -> Tensor:
        return tensor


@pytest.fixture
def kernels(device: torch.device) -> Callable[[], ExitStack]:
    """A context in which the kernels compute on this device: on a CPU, in Triton's interpreter."""

    def enter() -> ExitStack:
        stack = ExitStack()
        if device.type == "cpu":
            for op in OPS:
                stack.enter_context(mock.patch.object(op, "_use_kernels", return_value=True))
            stack.enter_context(mock.patch.object(attention_fused, "_DEFAULT_SMS", 4))
        return stack

    return enter


def make_image(config: ModelConfig, seed: int, rank: int, dtype: torch.dtype) -> HostImage:
    """A random adapter of all linear layers."""
    fresh = new_adapter(
        rank=rank,
        alpha=2.0 * rank,
        dropout=0.0,
        target_modules=tuple(config.module_shapes),
        use_rslora=False,
        num_layers=config.num_layers,
        shapes=config.module_shapes,
        seed=seed,
    )
    noise = torch.randn(fresh.num_elements, generator=torch.Generator().manual_seed(seed + 1))
    return HostImage.build(repack(fresh, noise / config.hidden_size**0.5), dtype)


class World:
    """A decoder with adapters, and sequences and packs that advance through it on a cache of NaN."""

    def __init__(self, weights: DecoderWeights, make, *, dropout_p: float = 0.0) -> None:
        config, device = weights.config, weights.device
        self.decoder = Decoder(weights, max_positions=CONTEXT)
        self.cache = KvCache(
            num_layers=config.num_layers,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=weights.dtype,
            device=device,
        )
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.fill_(torch.nan)
        images = {slot: make_image(config, slot, rank, weights.dtype) for slot, rank in RANKS.items()}
        size = sum(image.num_elements for image in images.values())
        self.arena = AdapterArena(size, 6, config.num_layers, dtype=weights.dtype, device=device)
        offset = 0
        for slot, image in images.items():
            self.arena.load(slot, offset, image)
            offset += image.num_elements
        self.sequences = {
            name: GeneratedSequence(name, make.prompt(CONTEXT, seed), SamplingParams(max_tokens=1), 0)
            for seed, name in enumerate("abcd")
        }
        self.packs = {name: self._pack(name, lengths, make, dropout_p) for name, lengths in EXAMPLES.items()}
        self.starts = dict.fromkeys((*self.sequences, *self.packs), 0)

    def _pack(self, name: str, lengths: Sequence[int], make, dropout_p: float) -> Pack:
        examples = []
        for idx, length in enumerate(lengths):
            tokens = torch.tensor(make.prompt(length, 50 + idx))
            examples.append(Example(idx, idx + 1, tokens, tokens.roll(-1)))
        return make_pack(
            name, name, examples, device=self.decoder.device, dropout_p=dropout_p, seed=3, step=1
        )

    def segments(self, work: Work) -> list[Segment]:
        """The next tokens of some sequences and packs."""
        segments, names = [], list(self.starts)
        for name, kind, count in work:
            start = self.starts[name]
            self.starts[name] += count
            first = names.index(name)
            blocks = range(first, NUM_BLOCKS, len(names))[: -(-(start + count) // BLOCK_SIZE)]
            slot = SLOTS[name]
            ends = {"with_loss": True, "keeps_activations": True} if kind is TRAIN else {"samples": True}
            segments.append(Segment(name, kind, start, count, slot, tuple(blocks), **ends))
        return segments

    def batch(self, work: Work) -> FlatBatch:
        batch = build_batch(
            self.segments(work),
            self.sequences,
            self.packs,
            block_size=BLOCK_SIZE,
            device=self.decoder.device,
        )
        for placed in batch.segments[: batch.num_decode]:
            prompt = self.sequences[placed.segment.sequence_id].prompt
            batch.token_ids[placed.row] = prompt[placed.segment.start]
        return batch

    def eager(self, batch: FlatBatch) -> list[Tensor]:
        """Hidden states before every layer and behind the last."""
        decoder, rotation = self.decoder, self.decoder.rotation(batch.tokens)
        states = [decoder.embed(batch.token_ids)]
        for layer in range(decoder.config.num_layers):
            hidden, _ = decoder.forward_layer(
                layer, states[-1], batch.tokens, self.cache, self.arena.table, rotation
            )
            states.append(hidden)
        return states

    def graphs(self, capture: Capture) -> LayerGraphs:
        limits = BatchLimits(max_rows=MAX_ROWS, max_num_seqs=MAX_SEQS, max_blocks=NUM_BLOCKS)
        return LayerGraphs(self.decoder, self.cache, self.arena.table, limits, capture)

    def replay(self, graphs: LayerGraphs, key: GraphKey, batch: FlatBatch) -> list[Tensor]:
        """The same states, from the graphs' buffers."""
        hidden = self.decoder.embed(batch.token_ids)
        forward = graphs.load(key, hidden, batch.tokens)
        states = [hidden]
        for layer in range(self.decoder.config.num_layers):
            hidden, _ = forward(layer, hidden)
            states.append(hidden.clone())
        return states


def capture_all(graphs: LayerGraphs, *sizes: int, dropout: bool = False) -> None:
    """The graphs of these sizes: a variant without adapters, and one for all ranks here."""
    with torch.no_grad():
        for size in sizes:
            for variant in (GraphVariant(False, 0), GraphVariant(False, 64), GraphVariant(True, 64, dropout)):
                if variant.has_chunks or size <= MAX_SEQS:
                    graphs.capture(GraphKey(size, variant))


@torch.no_grad()
def run_all(
    expected: World,
    actual: World,
    graphs: LayerGraphs,
    kernels,
    iterations: Sequence[Work] = tuple(ITERATIONS.values()),
    *,
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> list[GraphKey]:
    """Some iterations on both worlds; the keys of the graphs that ran."""
    keys = []
    for work in iterations:
        states = expected.eager(expected.batch(work))
        batch = actual.batch(work)
        with kernels():
            key = graphs.find(batch.tokens)
            assert key is not None, work
            replayed = actual.replay(graphs, key, batch)
        for layer, (one, other) in enumerate(zip(states, replayed, strict=True)):
            assert bool(one.isfinite().all())
            torch.testing.assert_close(
                other, one, rtol=rtol, atol=atol, msg=lambda m, w=work, n=layer: f"{w}, layer {n}: {m}"
            )
        keys.append(key)
    for name in ("keys", "values"):
        for one, other in zip(getattr(expected.cache, name), getattr(actual.cache, name), strict=True):
            torch.testing.assert_close(other, one, rtol=rtol, atol=atol, equal_nan=True)
    return keys


# ---------------------------------------------------------------- on every device


def test_padded_replays_equal_layers_on_the_batch_itself_whatever_ran_before(weights, make, kernels) -> None:
    """Large batches before small ones, with and without adapters: nothing stale is read, padding writes
    nothing."""
    expected, actual = (World(weights, make) for _ in range(2))
    with kernels():
        graphs = actual.graphs(ReplayByIssuing())
        capture_all(graphs, 1, 4, 16, MAX_ROWS)
    graphs._buckets[MAX_ROWS].hidden.fill_(torch.nan)
    keys = run_all(expected, actual, graphs, kernels)
    assert [key.num_rows for key in keys] == [32, 32, 4, 1, 16, 16, 4]
    assert [key.variant.max_rank for key in keys] == [64, 64, 64, 0, 64, 64, 64]
    assert [key.variant.has_chunks for key in keys] == [True, True, False, False, True, True, False]


def test_graphs_with_adapters_and_dropout_serve_batches_without_them(weights, make, kernels) -> None:
    """Windows that drop out; then, in the same rows, prompts without an adapter, and with one."""
    expected, actual = (World(weights, make, dropout_p=0.4) for _ in range(2))
    with kernels():
        graphs = actual.graphs(ReplayByIssuing())
        capture_all(graphs, MAX_ROWS, dropout=True)
    iterations = [
        ITERATIONS["prompts and windows"],
        ITERATIONS["decode rows and windows"],
        [("c", PREFILL, 20)],
        [("d", PREFILL, 20)],
    ]
    keys = run_all(expected, actual, graphs, kernels, iterations)
    assert set(keys) == {GraphKey(MAX_ROWS, GraphVariant(True, 64, True))}


def test_the_runner_keeps_the_same_of_all_layers_and_losses_and_tokens(weights, make, kernels) -> None:
    results = []
    for with_graphs in (False, True):
        world = World(weights, make)
        with kernels() as stack:
            graphs = world.graphs(ReplayByIssuing())
            if with_graphs:
                capture_all(graphs, MAX_ROWS)
            else:
                stack.close()
            runner = Runner(
                world.decoder,
                world.cache,
                world.arena.table,
                max_num_seqs=MAX_SEQS,
                window_tokens=16,
                graphs=graphs if with_graphs else None,
            )
            sequences = {
                name: replace(sequence, params=SamplingParams(max_tokens=1, temperature=0.0))
                for name, sequence in world.sequences.items()
            }
            for sequence in sequences.values():
                runner.add_sequence(sequence)
            for pack in world.packs.values():
                runner.add_pack(pack)
            work = ITERATIONS["prompts and windows"]
            plan = StepPlan(iteration=0, forward=tuple(world.segments(work)))
            results.append((runner.submit(plan, {}).result().sampled, world.packs))
    (tokens, packs), (replayed_tokens, replayed_packs) = results
    assert tokens == replayed_tokens
    pack, replayed = packs["pack"], replayed_packs["pack"]
    for name in ("layer_inputs", "d_hidden", "losses"):
        one, other = getattr(pack, name), getattr(replayed, name)
        rows = slice(None, 8)
        one, other = (t[:, rows] if name == "layer_inputs" else t[rows] for t in (one, other))
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    for name in ("qkv", "context", "mid", "gate_up"):
        one, other = (getattr(p.activations, name)[:, :8] for p in (pack, replayed))
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_batches_that_no_graph_holds_run_eagerly(weights, make, kernels) -> None:
    world = World(weights, make)
    with kernels(), torch.no_grad():
        graphs = world.graphs(ReplayByIssuing())
        one_decode = world.batch([("c", DECODE, 1)]).tokens
        assert graphs.find(one_decode) is None
        graphs.capture(GraphKey(4, GraphVariant(False, 16)))
        assert graphs.find(one_decode) == GraphKey(4, GraphVariant(False, 16))
        assert graphs.find(world.batch([("b", DECODE, 1)]).tokens) is not None
        assert graphs.find(world.batch([("d", DECODE, 1)]).tokens) is None, "rank 40"
        assert graphs.find(world.batch([("c", PREFILL, 3)]).tokens) is None, "chunks"
        large = world.batch([("c", DECODE, 1)] * 5).tokens
        assert graphs.find(large) is None, "five rows"


def test_the_smallest_graphs_without_needless_work_are_chosen(weights, make, kernels) -> None:
    world = World(weights, make)
    with kernels(), torch.no_grad():
        graphs = world.graphs(ReplayByIssuing())
        for variant in (GraphVariant(True, 64), GraphVariant(False, 64), GraphVariant(False, 0)):
            for size in (4, 2):
                graphs.capture(GraphKey(size, variant))
        assert graphs.find(world.batch([("c", DECODE, 1)]).tokens) == GraphKey(2, GraphVariant(False, 0))
        assert graphs.find(world.batch([("a", DECODE, 1)]).tokens) == GraphKey(2, GraphVariant(False, 64))
        chunk = world.batch([("a", DECODE, 1), ("c", PREFILL, 2)]).tokens
        assert graphs.find(chunk) == GraphKey(4, GraphVariant(True, 64))
        empty = replace(chunk, lora=lora.LoraBatch.build([(5, 0, 1)], world.decoder.device))
        assert graphs.find(empty) == GraphKey(4, GraphVariant(True, 64)), "an adapter that adapts nothing"


# ---------------------------------------------------------------- what is captured


class _Nothing:
    """Stands in for a kernel: launches that do nothing."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


@contextmanager
def no_kernels() -> Iterator[None]:
    with ExitStack() as stack:
        for module in FUSED:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, _Nothing()))
        yield


@dataclass
class _Operations(TorchDispatchMode):
    """Notes the operations that torch is asked for."""

    def __post_init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


ON_THE_DEVICE = {
    *("empty", "new_empty", "mm", "linear", "add", "add_", "_fused_rms_norm", "rms_norm"),
    *("t", "transpose", "view", "_unsafe_view", "slice", "select", "alias", "detach", "as_strided"),
    *(
        "linalg_vector_norm",
        "div",
        "mul_",
        "rsqrt",
        "mul",
        "_reshape_alias",
        "reshape",
        "expand",
        "addmm",
        "clone",
    ),
}
"""Operations that take tensors where they lie: none brings values from the host or to it."""


def test_nothing_that_is_captured_moves_values_between_host_and_device(weights, make, kernels) -> None:
    world, capture, seen = World(weights, make), ReplayByIssuing(), set()
    with kernels(), no_kernels(), torch.no_grad():
        graphs = world.graphs(capture)
        capture_all(graphs, 4, MAX_ROWS, dropout=True)
        capture_all(graphs, MAX_ROWS)
        for issue in capture.issued:
            with _Operations() as operations:
                issue()
            seen |= operations.seen
    assert seen
    assert seen <= ON_THE_DEVICE


def test_the_watch_over_operations_sees_uploads_and_reads() -> None:
    """What the test before forbids is indeed noticed."""
    with _Operations() as operations:
        torch.tensor([1, 2]).sum().item()
    assert {"lift_fresh", "_local_scalar_dense"} <= operations.seen
    assert not operations.seen <= ON_THE_DEVICE


def _addresses(graphs: LayerGraphs) -> list[int]:
    addresses = []
    for bucket in graphs._buckets.values():
        batch = bucket.token_batch(GraphVariant(True, 64, True))
        (tables,) = batch.attention._kept.values()
        tensors = [bucket.hidden, *bucket.rotation, batch.slot_mapping, *batch.lora.tables]
        tensors += [batch.lora.token_idx, batch.dropout.p, batch.dropout.keys]
        tensors += [tables.decode.rows, tables.decode.parts, tables.decode.block_ids]
        tensors += [tables.chunks.chunks, tables.chunks.query_tiles, tables.chunks.block_ids]
        addresses += [tensor.data_ptr() for tensor in tensors]
    return addresses


def test_buffers_stay_where_they_are(weights, make, kernels) -> None:
    world = World(weights, make, dropout_p=0.3)
    with kernels(), no_kernels(), torch.no_grad():
        graphs = world.graphs(ReplayByIssuing())
        capture_all(graphs, 1, 4, 16, MAX_ROWS, dropout=True)
        before = _addresses(graphs)
        for work in ITERATIONS.values():
            batch = world.batch(work)
            key = graphs.find(batch.tokens)
            assert key is not None
            world.replay(graphs, key, batch)
        assert _addresses(graphs) == before


# ---------------------------------------------------------------- real graphs

WIDE = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU that graphs are captured on."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return torch.device("cuda")


def wide_world(make, device: torch.device, quantization: str, dropout_p: float) -> World:
    weights = random_model.random_weights(
        WIDE, seed=4, dtype=torch.bfloat16, device=device, quantization=quantization
    )
    return World(weights, make, dropout_p=dropout_p)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_captured_graphs_equal_layers_launched_one_kernel_at_a_time(
    quantization: str, dropout_p: float, make, cuda
) -> None:
    expected, actual = (wide_world(make, cuda, quantization, dropout_p) for _ in range(2))
    graphs = actual.graphs(CudaCapture(cuda))
    capture_graphs(graphs, cuda, max_bytes=1 << 30)
    keys = run_all(expected, actual, graphs, ExitStack, rtol=0.05, atol=0.1)
    assert len({key.variant for key in keys}) >= 3


@pytest.mark.gpu
def test_a_replayed_layer_is_one_launch(make, cuda) -> None:
    from torch.profiler import ProfilerActivity, profile

    world = wide_world(make, cuda, "nf4", 0.0)
    graphs = world.graphs(CudaCapture(cuda))
    capture_graphs(graphs, cuda, max_bytes=1 << 30)
    batch = world.batch(ITERATIONS["prompts and windows"])
    key = graphs.find(batch.tokens)
    assert key is not None
    with torch.no_grad():
        hidden = world.decoder.embed(batch.token_ids)
        forward = graphs.load(key, hidden, batch.tokens)
        forward(0, hidden)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for layer in range(WIDE.num_layers):
                forward(layer, hidden)
            torch.cuda.synchronize()
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls.get("cudaGraphLaunch") == WIDE.num_layers
    assert not [name for name in calls if name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]


@pytest.mark.gpu
def test_capturing_ends_when_its_memory_is_spent(make, cuda) -> None:
    world = wide_world(make, cuda, "nf4", 0.0)
    graphs = world.graphs(CudaCapture(cuda))
    capture_graphs(graphs, cuda, max_bytes=0)
    assert graphs.find(world.batch(ITERATIONS["one chunk"]).tokens) is None


def test_graphs_are_possible_where_the_kernels_run(weights, device) -> None:
    config = weights.config
    cache = KvCache(
        num_layers=1,
        num_blocks=1,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=weights.dtype,
        device=device,
    )
    assert supports_graphs(Decoder(weights, max_positions=8), cache) == (device.type == "cuda")
