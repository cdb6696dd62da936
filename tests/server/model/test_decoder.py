"""Logits of the flat, paged, chunked decoder against transformers, for every family."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from weft_kernels.lora import LoraTable
from weft_scheduler.plan import Segment, SegmentKind, StepPlan
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
GOLDEN = """
1205 1161 81 77 809 89 67 555 163 436 1432 309 1432 81 251 796 615 242 328 552
319 1283 149 1243 77 776 115 1251 1299 933 71 305 1218 720 122 892 645 876 108 1198
"""

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 8}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 11}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def _build(family: str, changes: dict[str, object], path: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return model


def _decoder(path: Path) -> Decoder:
    config = ModelConfig.from_directory(path)
    weights = load_weights(
        path, config, device=CPU, dtype=torch.float32, quantization="none", low_memory=False
    )
    return Decoder(weights, max_positions=config.max_position_embeddings)


def _cache(decoder: Decoder, num_blocks: int) -> KvCache:
    config = decoder.config
    return KvCache(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=CPU,
    )


@torch.no_grad()
def _logits(decoder: Decoder, prompts: list[list[int]], splits: list[int]) -> list[torch.Tensor]:
    """Logits of every position: all prompts in shared flat batches, in chunks that end at `splits`, then one
    by one."""
    cache = _cache(decoder, 128)
    table = LoraTable(torch.zeros(64), 1, decoder.config.num_layers, 7)
    sequences = {str(i): Sequence(str(i), p, SamplingParams(max_tokens=1), 0) for i, p in enumerate(prompts)}
    blocks_each = 128 // len(prompts)
    collected: list[list[torch.Tensor]] = [[] for _ in prompts]
    longest = max(map(len, prompts))
    edges = [0, *splits, *range(splits[-1] + 1, longest + 1)]
    for start, end in pairwise(edges):
        segments = []
        for i, prompt in enumerate(prompts):
            count = min(end, len(prompt)) - start
            if count > 0:
                kind = SegmentKind.DECODE if count == 1 and start > 0 else SegmentKind.PREFILL
                table_ids = tuple(range(i * blocks_each, (i + 1) * blocks_each))[
                    : -(-(start + count) // BLOCK_SIZE)
                ]
                segments.append(Segment(str(i), kind, start, count, None, table_ids))
        batch = build_batch(
            StepPlan(0, tuple(segments)).forward,
            sequences,
            {},
            block_size=BLOCK_SIZE,
            device=CPU,
        )
        ids = batch.token_ids.clone()
        for placed in batch.segments[: batch.num_decode]:
            ids[placed.row] = sequences[placed.segment.sequence_id].prompt[placed.segment.start]
        hidden = decoder.embed(ids)
        for layer in range(decoder.config.num_layers):
            hidden, _ = decoder.forward_layer(
                layer, hidden, batch.tokens, cache, table, decoder.rotation(batch.tokens)
            )
        logits = decoder.logits(hidden)
        for placed in batch.segments:
            collected[int(placed.segment.sequence_id)].append(logits[placed.rows])
    return [torch.cat(parts) for parts in collected]


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case, tmp_path):
    family, changes = CASES[case]
    model = _build(family, changes, tmp_path)
    decoder = _decoder(tmp_path)
    torch.manual_seed(1)
    prompts = [torch.randint(0, 211, (length,)).tolist() for length in (70, 41, 9, 66)]
    for prompt, actual in zip(prompts, _logits(decoder, prompts, [13, 33, 60]), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_tinystories_greedy_text_is_the_golden_one():
    root = os.environ.get("WEFT_TEST_DATA")
    if root is None:
        pytest.skip("WEFT_TEST_DATA is not set: no real model to read")
    decoder = _decoder(Path(root) / "models" / "tinystories-656k")
    prompt = [1, 80, 147, 201, 282, 215, 286, 1890]
    golden = [int(token) for token in GOLDEN.split()]
    logits = _logits(decoder, [prompt + golden[:-1]], [len(prompt)])[0]
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == golden
    top = logits[len(prompt) - 1].topk(3)
    assert top.indices.tolist() == [1205, 163, 1836]
    torch.testing.assert_close(top.values, torch.tensor([14.6440, 14.6320, 13.0387]), rtol=0, atol=1e-3)
