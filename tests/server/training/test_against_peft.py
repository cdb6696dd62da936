"""A finetune job in windows and packs against PEFT and PyTorch's own training loop, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers

from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.peft import read_peft
from weft_server.model.config import ModelConfig
from weft_server.model.loading import load_weights
from weft_server.training.data import IGNORED, ExampleOrder
from weft_server.training.job import StepReport

NUM_STEPS = 30
LENGTHS = (31, 12, 44, 7, 26, 19, 33, 9, 15, 40)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Trajectory:
    losses: list[float]
    norms: list[float]
    first_gradients: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def _peft_model(base: Path, adapter_dir: Path, use_rslora: bool) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(3)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS), use_rslora=use_rslora, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    wrapped.save_pretrained(adapter_dir)
    return wrapped


def _train_with_peft(model: peft.PeftModel, dataset, spec) -> Trajectory:
    """transformers' recipe: summed loss over the step's target tokens, clip at 1.0, AdamW, its own
    scheduler."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=spec.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=spec.weight_decay
    )
    warmup = -(-spec.total_steps * 10 // 100)
    schedule = transformers.get_scheduler(spec.lr_scheduler, optimizer, warmup, spec.total_steps)
    losses, norms, first = [], [], {}
    for step in range(spec.total_steps):
        examples = [dataset[i] for i in ExampleOrder(len(dataset), spec.batch_size, spec.seed).of_step(step)]
        num_targets = sum(e.num_targets for e in examples)
        loss = torch.zeros(())
        for example in examples:
            logits = model(input_ids=example.tokens.unsqueeze(0)).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(
                logits, example.labels, ignore_index=IGNORED, reduction="sum"
            )
        loss = loss / num_targets
        loss.backward()
        if not first:
            first = {name: p.grad.clone() for name, p in trained.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), spec.max_grad_norm)))
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Trajectory(losses, norms, first, {name: p.detach() for name, p in trained.items()})


def _by_peft_name(adapter: PackedAdapter, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {}
    for entry in adapter.layout:
        block = "self_attn" if entry.module < 4 else "mlp"
        prefix = f"base_model.model.model.layers.{entry.layer}.{block}.{entry.module_name}"
        named[f"{prefix}.lora_A.default.weight"] = adapter.layout.a(flat, entry.layer, entry.module)
        named[f"{prefix}.lora_B.default.weight"] = adapter.layout.b(flat, entry.layer, entry.module).t()
    return named


@pytest.mark.parametrize(("scheduler", "use_rslora"), [("linear", False), ("cosine", True)])
def test_thirty_steps_follow_peft(scheduler, use_rslora, base, tmp_path, bench, make):
    config = ModelConfig.from_directory(base)
    weights = load_weights(
        base, config, device=torch.device("cpu"), dtype=torch.float32, quantization="none", low_memory=False
    )
    dataset = make.dataset(LENGTHS, config.vocab_size)
    spec = make.spec(
        total_steps=NUM_STEPS,
        batch_size=4,
        learning_rate=2e-3,
        lr_scheduler=scheduler,
        warmup_ratio=0.1,
        weight_decay=0.01,
    )
    model = _peft_model(base, tmp_path, use_rslora)
    adapter = read_peft(
        (tmp_path / "adapter_config.json").read_bytes(),
        (tmp_path / "adapter_model.safetensors").read_bytes(),
        num_layers=config.num_layers,
        shapes=config.module_shapes,
    ).to(torch.float32)
    expected = _train_with_peft(model, dataset, spec)

    b = bench(config, torch.float32, 16, weights=weights)
    job = b.add_job(dataset, adapter, spec, max_pack_tokens=64)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        b.accumulate_gradients("job")
        if step == 0:
            num_targets = sum(pack.num_targets for pack in job._packs)
            gradients = _by_peft_name(adapter, job.optimizer.grad / num_targets)
            assert gradients.keys() == expected.first_gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected.first_gradients[name], rtol=1e-4, atol=1e-4)
        report = b.finish_step("job").steps["job"]
        assert isinstance(report, StepReport), report
        losses.append(report.loss)
        norms.append(report.grad_norm)
    assert losses == pytest.approx(expected.losses, abs=1e-4)
    assert norms == pytest.approx(expected.norms, rel=1e-3)
    assert max(norms) > spec.max_grad_norm, "clipping was never exercised"
    assert losses[-1] < losses[0]
    final = _by_peft_name(adapter, job.optimizer.master.detach())
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, expected.final[name], rtol=1e-3, atol=2e-4)
