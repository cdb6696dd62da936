"""The shipped base, run by transformers and finetuned by peft: it does what its card and the demo claim."""

from __future__ import annotations

import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from weft_server.demo.corpus import held_out_exchanges
from weft_server.demo.evaluate import Score, score_by_task, total
from weft_server.demo.tasks import (
    BASE_MODEL_DIR,
    FINETUNE_TASKS,
    ORDER_EXTRACTION,
    TICKET_ROUTING,
    FinetuneTask,
    from_jsonl,
)
from weft_server.demo.train_base import greedy_answerer

each_task = pytest.mark.parametrize("task", FINETUNE_TASKS, ids=lambda task: task.name)


def test_the_weights_are_bf16_and_a_few_megabytes():
    path = BASE_MODEL_DIR / "model.safetensors"
    assert path.stat().st_size < 12 * 2**20
    with safe_open(path, framework="pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}


def test_the_base_is_a_llama_of_about_five_million_parameters(base):
    assert base.config.model_type == "llama"
    assert 4_000_000 < base.num_parameters() < 6_000_000


def test_generation_stops_at_the_end_of_a_turn_and_of_a_text(base, tokenizer):
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(base.generation_config.eos_token_id) == ends
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    "text", ["plain words", "Zürich, 東京, 🧵", "tabs\tand\n\nlines  ", '{"a":[1,2]}', "\x00\x7f"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_stored_tokenizer_neither_pads_nor_cuts():
    stored = Tokenizer.from_file(str(BASE_MODEL_DIR / "tokenizer.json"))
    assert stored.padding is None
    assert stored.truncation is None


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("2026")) == ["2", "0", "2", "6"]


def test_the_base_answers_nine_in_ten_held_out_prompts(answer_of_base):
    scores = score_by_task(held_out_exchanges(99, num_per_task=5), answer_of_base)
    assert total(scores).accuracy >= 0.9, scores


@each_task
def test_without_an_adapter_the_base_fails_the_demo_tasks(task, answer_of_base):
    examples = from_jsonl(task.held_out_path, task.name)[:40]
    assert total(score_by_task(examples, answer_of_base)).accuracy <= 0.1


def batches_of(task: FinetuneTask, tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[list[int], int]]]:
    """The steps of a job: batches of `(token ids, number of prompt tokens)`, the end token last."""
    encoded = []
    for line in task.train_path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        answer = tokenizer.encode(messages[1]["content"] + tokenizer.eos_token)
        encoded.append((prompt + answer, len(prompt)))
    batches = []
    for epoch in range(task.num_epochs):
        order = random.Random(task.seed + epoch).sample(encoded, len(encoded))
        batches += [order[i : i + task.batch_size] for i in range(0, len(order), task.batch_size)]
    return batches


def finetuned_score(task: FinetuneTask, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Score:
    """Train a LoRA as the demo's job does and score it on the held-out examples."""
    torch.manual_seed(task.seed)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    batches = batches_of(task, tokenizer)
    optimizer = torch.optim.AdamW(
        [p for p in tuned.parameters() if p.requires_grad], lr=task.learning_rate, weight_decay=0.0
    )
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.03 * len(batches)), len(batches))
    for batch in batches:
        padded_length = max(len(ids) for ids, _ in batch)
        token_ids = torch.tensor(
            [ids + [tokenizer.pad_token_id] * (padded_length - len(ids)) for ids, _ in batch]
        )
        labels = torch.full_like(token_ids, -100)
        for row, (ids, num_prompt_tokens) in enumerate(batch):
            labels[row, num_prompt_tokens : len(ids)] = torch.tensor(ids[num_prompt_tokens:])
        tuned(
            input_ids=token_ids, attention_mask=labels.new_ones(labels.shape), labels=labels
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    tuned.eval()
    return total(score_by_task(from_jsonl(task.held_out_path, task.name), greedy_answerer(tuned, tokenizer)))


@pytest.mark.slow
@each_task
def test_peft_teaches_the_demo_task_with_the_settings_of_the_demo(task):
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_DIR, dtype=torch.float32)
    score = finetuned_score(task, model, AutoTokenizer.from_pretrained(BASE_MODEL_DIR))
    assert score.accuracy >= 0.8, score


def test_the_two_tasks_want_different_answers_of_similar_messages():
    routed = {example.answer for example in from_jsonl(TICKET_ROUTING.train_path, TICKET_ROUTING.name)}
    assert len(routed) == 6
    assert all(
        example.answer.startswith('{"item":')
        for example in from_jsonl(ORDER_EXTRACTION.train_path, ORDER_EXTRACTION.name)
    )
