"""One flat batch with many adapters, saved by PEFT itself, against a PEFT model of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers

from weft_scheduler.plan import Segment, SegmentKind
from weft_server.adapters.arena import AdapterArena
from weft_server.adapters.image import HostImage
from weft_server.adapters.peft import read_peft
from weft_server.cache.kv import KvCache
from weft_server.engine.batch import build_batch
from weft_server.engine.sequence import Sequence
from weft_server.model.config import ModelConfig
from weft_server.model.decoder import Decoder
from weft_server.model.loading import load_weights
from weft_server.protocol import SamplingParams

CPU = torch.device("cpu")
BLOCK_SIZE = 4
TOLERANCE = 1e-4
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTERS = {
    "all linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"r": 16, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 2},
        "alpha_pattern": {"gate_proj": 20, "layers.0.self_attn.o_proj": 1},
    },
    "one layer": {"r": 5, "lora_alpha": 5, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    "wide": {"r": 64, "lora_alpha": 64, "target_modules": ["o_proj", "gate_proj", "up_proj"]},
}
# Per sequence: adapter, and how many tokens each iteration takes (1 after the first is a decode row).
SEQUENCES = [
    (None, (9, 1, 1, 6, 1)),
    ("all linear", (1, 1, 1, 1, 1)),
    ("rslora", (12, 4, 1, 1, 1)),
    ("all linear", (5, 8, 2, 3, 1)),
    ("patterns", (3, 1, 1, 1, 9)),
    ("wide", (17, 1, 1, 2, 2)),
    (None, (4, 4, 4, 4, 4)),
    ("one layer", (6, 1, 5, 1, 1)),
    ("patterns", (7, 1, 1, 1, 1)),
    ("rslora", (1, 16, 1, 1, 3)),
]


@dataclass
class Saved:
    """A base and its adapters on disk, and what PEFT answers."""

    base: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: list[torch.Tensor]


def _quantization(kind: str) -> dict[str, object]:
    if kind == "none":
        return {}
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": config, "device_map": "cpu"}


@pytest.fixture(scope="module", params=["none", "nf4"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Saved]:
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "base")
    prompts = [torch.randint(0, 97, (sum(chunks),)).tolist() for _, chunks in SEQUENCES]
    adapters: dict[str, Path] = {}
    expected: list[torch.Tensor] = [torch.empty(0)] * len(SEQUENCES)
    for name in (None, *ADAPTERS):
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            root / "base", dtype=torch.float32, attn_implementation="eager", **_quantization(request.param)
        )
        if name is not None:
            wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
            for parameter_name, parameter in wrapped.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.1)
            adapters[name] = root / name
            wrapped.save_pretrained(str(adapters[name]))
            model = wrapped
        # No dropout anywhere; outside training bitsandbytes computes in bf16 on processors that have it.
        model.train()
        for i, (adapter, _) in enumerate(SEQUENCES):
            if adapter == name:
                with torch.no_grad():
                    expected[i] = model(torch.tensor([prompts[i]])).logits[0]
    return request.param, Saved(root / "base", adapters, prompts, expected)


@torch.no_grad()
def _run(decoder: Decoder, arena: AdapterArena, slots: dict[str, int], prompts: list[list[int]]):
    """Logits of every position of every sequence, all sequences in one flat batch per iteration."""
    cache = KvCache(
        num_layers=decoder.config.num_layers,
        num_blocks=128,
        block_size=BLOCK_SIZE,
        num_kv_heads=decoder.config.num_kv_heads,
        head_dim=decoder.config.head_dim,
        dtype=torch.float32,
        device=CPU,
    )
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    sequences = {str(i): Sequence(str(i), p, SamplingParams(max_tokens=1), 0) for i, p in enumerate(prompts)}
    collected: list[list[torch.Tensor]] = [[] for _ in prompts]
    starts = [0] * len(prompts)
    num_kinds = []
    for iteration in range(len(SEQUENCES[0][1])):
        segments = []
        for i, (adapter, chunks) in enumerate(SEQUENCES):
            count, start = chunks[iteration], starts[i]
            kind = SegmentKind.DECODE if count == 1 and start else SegmentKind.PREFILL
            blocks = range(i, 128, len(prompts))[: -(-(start + count) // BLOCK_SIZE)]
            slot = None if adapter is None else slots[adapter]
            segments.append(Segment(str(i), kind, start, count, slot, tuple(blocks)))
            starts[i] += count
        batch = build_batch(segments, sequences, {}, block_size=BLOCK_SIZE, device=CPU)
        num_kinds.append(len({segment.kind for segment in segments}))
        ids = batch.token_ids.clone()
        for placed in batch.segments[: batch.num_decode]:
            ids[placed.row] = prompts[int(placed.segment.sequence_id)][placed.segment.start]
        hidden = decoder.embed(ids)
        rotation = decoder.rotation(batch.tokens)
        for layer in range(decoder.config.num_layers):
            hidden, _ = decoder.forward_layer(layer, hidden, batch.tokens, cache, arena.table, rotation)
        logits = decoder.logits(hidden)
        for placed in batch.segments:
            collected[int(placed.segment.sequence_id)].append(logits[placed.rows])
    assert 2 in num_kinds, "prompt chunks and decode rows never met"
    return [torch.cat(parts) for parts in collected]


@pytest.mark.parametrize("low_memory", [False, True])
def test_every_row_of_a_mixed_batch_agrees_with_peft(low_memory, saved):
    kind, case = saved
    config = ModelConfig.from_directory(case.base)
    weights = load_weights(
        case.base, config, device=CPU, dtype=torch.float32, quantization=kind, low_memory=low_memory
    )
    arena = AdapterArena(1 << 18, 16, config.num_layers, dtype=torch.float32, device=CPU)
    slots, offset = {}, 0
    for slot, (name, path) in enumerate(reversed(case.adapters.items()), start=3):
        adapter = read_peft(
            (path / "adapter_config.json").read_bytes(),
            (path / "adapter_model.safetensors").read_bytes(),
            num_layers=config.num_layers,
            shapes=config.module_shapes,
        )
        image = HostImage.build(adapter, torch.float32)
        arena.load(slot, offset, image)
        slots[name], offset = slot, offset + image.num_elements
    actual = _run(Decoder(weights, max_positions=64), arena, slots, case.prompts)
    base = case.expected[0]
    for (adapter, _), logits, expected in zip(SEQUENCES, actual, case.expected, strict=True):
        assert base.abs().max() > 0.5
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=TOLERANCE, msg=lambda m, a=adapter: f"{a}: {m}"
        )


def test_the_adapters_change_what_they_adapt(saved):
    _, case = saved
    for name, path in case.adapters.items():
        assert (path / "adapter_model.safetensors").stat().st_size > 0, name
    outputs = {adapter: e for (adapter, _), e in zip(SEQUENCES, case.expected, strict=True)}
    assert len({round(float(e.abs().sum()), 3) for e in outputs.values()}) == len(outputs)
