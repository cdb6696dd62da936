"""The demo's finetuning data: small, split without overlap, foreign to the base's own text."""

from __future__ import annotations

import itertools
import json

import pytest

from weft_server.demo import corpus
from weft_server.demo.tasks import FINETUNE_TASKS, ORDER_EXTRACTION, from_jsonl, generate, main, to_jsonl

MAX_JOB_TOKENS = 60_000

each_task = pytest.mark.parametrize("task", FINETUNE_TASKS, ids=lambda task: task.name)


@each_task
def test_the_shipped_files_are_what_the_generator_writes(task):
    train, held_out = generate(task)
    assert task.train_path.read_text(encoding="utf-8") == to_jsonl(train)
    assert task.held_out_path.read_text(encoding="utf-8") == to_jsonl(held_out)


def test_the_command_writes_every_file(tmp_path):
    assert main(["--out", str(tmp_path)]) == 0
    for task in FINETUNE_TASKS:
        assert from_jsonl(tmp_path / task.train_path.name, task.name) == generate(task)[0]
        assert from_jsonl(tmp_path / task.held_out_path.name, task.name) == generate(task)[1]


@each_task
def test_no_held_out_prompt_is_trained_on(task):
    train, held_out = generate(task)
    assert not {example.prompt for example in train} & {example.prompt for example in held_out}
    assert len(held_out) >= 100


@each_task
def test_a_job_trains_at_most_sixty_thousand_tokens(task, tokenizer):
    num_tokens = 0
    for line in task.train_path.read_text(encoding="utf-8").splitlines():
        num_tokens += len(tokenizer.apply_chat_template(json.loads(line)["messages"])["input_ids"])
    assert num_tokens * task.num_epochs <= MAX_JOB_TOKENS


# The documents of both training phases: 3.3M and 0.9M tokens.
def test_the_text_of_the_base_has_no_prompt_of_the_demo():
    prompts = {example.prompt for task in FINETUNE_TASKS for split in generate(task) for example in split}
    openings = [corpus.turn("user", prompt) for prompt in prompts]
    turns = set()
    documents = itertools.chain(
        itertools.islice(corpus.training_documents(1), 100_000),
        itertools.islice(corpus.training_documents(2), 30_000),
    )
    for document in documents:
        for span in document:
            turns.add(span.text[span.text.find(corpus.TURN_START + "user") :].split(corpus.TURN_END)[0])
    assert len(turns) > 10_000
    assert not any(opening.split(corpus.TURN_END)[0] in turns for opening in openings)


def test_orders_say_what_their_json_says():
    for example in generate(ORDER_EXTRACTION)[0]:
        fields = json.loads(example.answer)
        assert list(fields) == ["item", "qty", "city"]
        assert all(str(value) in example.prompt for value in fields.values())
