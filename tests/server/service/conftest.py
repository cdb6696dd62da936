"""Tokenizers of the three kinds, small enough to build in a test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from weft_server.service.tokenizer import Tokenizer

CORPUS = [
    "Once upon a time there was a little girl who loved the sea.",
    "Grüße aus München! Ça va? Привет, мир. 你好，世界。 🙂🙃",
    '{"item": "blue lamp", "qty": 3, "city": "Oslo"}',
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real models and templates."""
    folder = os.environ.get("WEFT_TEST_DATA")
    if not folder:
        pytest.skip("WEFT_TEST_DATA is not set: the real tokenizers and chat templates are missing")
    return Path(folder)


def train_byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>", "two words"])
    return backend


def build_byte_fallback() -> tokenizers.Tokenizer:
    """Llama-2's kind: `▁` for spaces, unknown characters as byte tokens, one leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "e", "h", "l", "o", "▁a", "he", "ll", "o▁", "\ufffd", "▁▁"]
    vocab = {piece: idx for idx, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("h", "e"), ("l", "l"), ("o", "▁"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """A byte-level BPE with ChatML specials and template."""
    return Tokenizer(
        train_byte_level(),
        special_tokens={"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"},
        stop_ids=[0],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """A SentencePiece-like BPE with byte fallback."""
    return Tokenizer(build_byte_fallback(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of the byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    train_byte_level().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
