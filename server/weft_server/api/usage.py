"""What completions and chat answers share: the usage object and the system fingerprint."""

from __future__ import annotations

import hashlib
from typing import Any

from weft_server.protocol import EngineReady


def usage(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    """OpenAI's `usage`. Prompt tokens are counted once per prompt, generated ones over all choices.

    `num_cached` of the prompt tokens were in the prefix cache.
    """
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def system_fingerprint(info: EngineReady | None) -> str | None:
    """Changes when the same seed may give another text: with the base, its numeric format or the device."""
    if info is None:
        return None
    identity = "|".join((info.base_fingerprint, info.quantization, info.dtype, info.device))
    return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:10]
