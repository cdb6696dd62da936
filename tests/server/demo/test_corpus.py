"""The generated text: deterministic, split without leaks, with one right answer per prompt."""

from __future__ import annotations

import hashlib
import itertools
import json
from random import Random

import pytest

from weft_server.demo import corpus, lexicon
from weft_server.demo.exchanges import SCORED_TASKS, TASK_WEIGHTS, TASKS
from weft_server.demo.structured import LABEL_SETS

NUM_DRAWS = 400


def digest_of(seed: int, num_documents: int) -> str:
    digest = hashlib.sha256()
    for document in itertools.islice(corpus.training_documents(seed), num_documents):
        digest.update(corpus.document_text(document).encode())
    return digest.hexdigest()


def test_the_text_that_the_shipped_base_was_trained_on_has_not_changed():
    assert digest_of(1, 5000) == "827869c410aee9eddbf6d9f6024c076f5619d5f7bbb174aa57e47bb3850209af"


def test_another_seed_gives_another_text():
    assert digest_of(2, 50) != digest_of(1, 50)


def test_no_prompt_of_the_training_text_is_held_out():
    prompts = []
    for document in itertools.islice(corpus.training_documents(1), 5000):
        for span in document:
            prompts += [
                turn.removesuffix(corpus.TURN_END + "\n")
                for turn in span.text.split(corpus.TURN_START + "user\n")[1:]
                for turn in [turn.split(corpus.TURN_START)[0]]
            ]
    assert len(prompts) > 2500
    assert not any(corpus.is_held_out(prompt) for prompt in prompts)


def test_held_out_exchanges_are_held_out_and_different_from_one_another():
    exchanges = corpus.held_out_exchanges(3, num_per_task=10)
    prompts = [exchange.prompt for exchange in exchanges]
    assert all(corpus.is_held_out(prompt) for prompt in prompts)
    assert len(set(prompts)) == len(prompts)
    assert {exchange.task for exchange in exchanges} == set(SCORED_TASKS)


def test_every_task_has_a_weight():
    assert set(TASK_WEIGHTS) == set(TASKS)


@pytest.mark.parametrize("task", SCORED_TASKS)
def test_a_scored_prompt_has_one_right_answer(task):
    rng = Random(5)
    answers: dict[str, str] = {}
    for _ in range(NUM_DRAWS * 5):
        prompt, answer = SCORED_TASKS[task](rng)
        assert answers.setdefault(prompt, answer) == answer


def test_no_two_tasks_answer_the_same_prompt_differently():
    rng = Random(6)
    answers: dict[str, str] = {}
    for make in SCORED_TASKS.values():
        for _ in range(NUM_DRAWS):
            prompt, answer = make(rng)
            assert answers.setdefault(prompt, answer) == answer


@pytest.mark.parametrize("task", ["json_format", "json_extract"])
def test_json_answers_are_compact_json(task):
    rng = Random(7)
    for _ in range(NUM_DRAWS):
        _, answer = SCORED_TASKS[task](rng)
        assert json.dumps(json.loads(answer), separators=(",", ":"), ensure_ascii=False) == answer


def test_label_answers_name_a_label_of_the_asked_set():
    rng = Random(8)
    labels = {f"label: {name}" for labels in LABEL_SETS.values() for name in labels}
    for _ in range(NUM_DRAWS):
        _, answer = SCORED_TASKS["label"](rng)
        assert answer in labels


def test_a_repeated_list_is_the_list():
    rng = Random(9)
    for _ in range(NUM_DRAWS):
        prompt, answer = SCORED_TASKS["repeat"](rng)
        assert prompt.endswith(f": {answer}")


def test_copying_drills_fade_to_a_few():
    assert corpus.drill_share(0) > 0.5
    assert corpus.drill_share(corpus.NUM_DRILLED_DOCUMENTS) == corpus.drill_share(10**9) < 0.05


def test_word_lists_have_no_duplicates():
    for name in ("FIRST_NAMES", "CITIES", "GOODS", "THINGS", "PROFESSIONS", "TRAITS", "COLOURS"):
        words = getattr(lexicon, name)
        assert len(set(words)) == len(words), name
    kinds = [word for words in lexicon.KINDS.values() for word in words]
    assert len(set(kinds)) == len(kinds)


def test_a_chat_is_written_as_the_template_renders_it(tokenizer):
    exchanges = [corpus.Exchange("t", "Hi!", "Hello!"), corpus.Exchange("t", "1 + 1 = ?", "2")]
    messages = [{"role": "system", "content": "Answer briefly."}]
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.prompt})
        messages.append({"role": "assistant", "content": exchange.answer})
    document = corpus.chat_document(exchanges, "Answer briefly.")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == corpus.document_text(document)


def test_encoding_span_by_span_equals_encoding_the_whole_document(tokenizer):
    for document in itertools.islice(corpus.training_documents(4), 300):
        by_span = [token_id for span in document for token_id in tokenizer.encode(span.text)]
        assert by_span == tokenizer.encode(corpus.document_text(document))
