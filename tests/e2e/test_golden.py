"""The published model's golden text, over HTTP."""

from __future__ import annotations

import os
from typing import Any

import pytest

GOLDEN_PROMPT = "Once upon a time, there was a little girl"
GOLDEN_PROMPT_IDS = [1, 80, 147, 201, 282, 215, 286, 1890]
GOLDEN_IDS = [
    1205, 1161, 81, 77, 809, 89, 67, 555, 163, 436, 1432, 309, 1432, 81, 251, 796, 615, 242, 328, 552,
    319, 1283, 149, 1243, 77, 776, 115, 1251, 1299, 933, 71, 305, 1218, 720, 122, 892, 645, 876, 108, 1198,
]  # fmt: skip


@pytest.mark.skipif("WEFT_TEST_DATA" not in os.environ, reason="WEFT_TEST_DATA is not set")
def test_the_published_model_writes_its_golden_text(plain_server: Any, plain_model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain_model)
    expected = str(tokenizer.decode(GOLDEN_IDS))
    for prompt in (GOLDEN_PROMPT, GOLDEN_PROMPT_IDS):
        answer = plain_server.client.completions.create(
            model=plain_server.model, prompt=prompt, max_tokens=40, temperature=0, logprobs=1
        )
        assert answer.choices[0].text.strip() == expected.strip()
        assert len(answer.choices[0].logprobs.tokens) == 40
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 40)
