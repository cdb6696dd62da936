"""The bundled base in transformers, loaded once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from weft_server.demo.evaluate import Answerer
from weft_server.demo.tasks import BASE_MODEL_DIR
from weft_server.demo.train_base import greedy_answerer


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """These tests are matrix work on a small model; more threads than cores only slow them."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE_MODEL_DIR)


@pytest.fixture(scope="session")
def base() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def answer_of_base(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Answerer:
    return greedy_answerer(base, tokenizer)
