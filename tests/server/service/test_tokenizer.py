"""The tokenizer against transformers' reading of the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from weft_server.errors import ConfigError, InvalidRequest
from weft_server.service.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle")

TEXTS = [
    "Once upon a time, there was a little girl",
    "",
    "  two  spaces\n\nand\ttabs ",
    "Grüße, 你好 🙂👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>",
    "<|start_story|>hi <|end_story|> there<unk>",
    "x" * 300,
]


@pytest.mark.parametrize("folder", ["models/tinystories-656k", "tokenizers/minimind"])
@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_transformers(test_data: Path, folder: str, text: str) -> None:
    # transformers 5's own LlamaTokenizer class rebuilds the pipeline instead of reading it from the file.
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(test_data / folder)
    tokenizer = Tokenizer.from_directory(test_data / folder)
    assert tokenizer.encode(text) == oracle(text)["input_ids"]
    plain = oracle(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == plain
    decoder = transformers.AutoTokenizer.from_pretrained(test_data / folder)
    assert tokenizer.decode(plain) == decoder.decode(plain, skip_special_tokens=True)


def test_the_golden_prompt_of_the_real_model_has_its_published_ids(test_data: Path) -> None:
    tokenizer = Tokenizer.from_directory(test_data / "models/tinystories-656k")
    ids = tokenizer.encode("Once upon a time, there was a little girl")
    assert ids == [1, 80, 147, 201, 282, 215, 286, 1890]
    assert (tokenizer.eos_token_id, tokenizer.stop_ids) == (2, (2,))
    assert tokenizer.token_text(1) == "<|start_story|>"


def test_gpt2_files_without_tokenizer_json_are_read(test_data: Path) -> None:
    folder = test_data / "tokenizers/gpt2"
    tokenizer = Tokenizer.from_directory(folder)
    oracle = transformers.GPT2Tokenizer(
        vocab=json.loads((folder / "vocab.json").read_text(encoding="utf-8")),
        merges=[
            tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:] if line
        ],
    )
    for text in TEXTS[:4]:
        assert tokenizer.encode(text) == oracle(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    assert tokenizer.eos_token_id == 50256


def test_vocab_and_merges_of_another_family_are_refused_rather_than_read_as_gpt2(
    test_data: Path, tmp_path: Path
) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(test_data / "tokenizers/gpt2" / name, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("says_bos", [True, False])
def test_the_file_decides_about_a_bos_as_in_transformers(
    model_dir: Path, tmp_path: Path, has_bos: bool, says_bos: bool
) -> None:
    document = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    if has_bos:
        bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        pieces = [{"SpecialToken": {"id": bos["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos["id"]: bos},
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "add_bos_token": says_bos,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = Tokenizer.from_directory(tmp_path).encode("the sea")
    assert ids == oracle("the sea")["input_ids"]
    assert (ids[0] == 0) == has_bos


def test_tokens_only_listed_in_tokenizer_config_are_added(model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(model_dir / "tokenizer.json", tmp_path / "tokenizer.json")
    next_id = Tokenizer.from_directory(model_dir).vocab_size
    entry = {"content": "<|call|>", "special": True, "normalized": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {str(next_id): entry}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("a<|call|>")[-1] == next_id
    assert next_id in tokenizer.special_ids
    config["added_tokens_decoder"] = {str(next_id + 5): entry}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"the id {next_id + 5}"):
        Tokenizer.from_directory(tmp_path)


def test_end_ids_are_the_tokenizers_and_the_generation_configs(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_directory(tmp_path / "model").stop_ids == (2, 7)
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert Tokenizer.from_directory(tmp_path / "model").stop_ids == (2, 0)


def test_template_sources_take_precedence_file_then_jinja_then_config(
    model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    messages = [{"role": "user", "content": "hi"}]

    def rendered(override: Path | None = None) -> str:
        template = Tokenizer.from_directory(directory, chat_template=override).chat_template
        assert template is not None
        return template.render(messages, add_generation_prompt=False)

    assert rendered() == "<|im_start|>user\nhi<|im_end|>\n"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered() == "D"
    (directory / "chat_template.jinja").write_text("J")
    assert rendered() == "J"
    (tmp_path / "mine.jinja").write_text("F {{ eos_token }}")
    assert rendered(tmp_path / "mine.jinja") == "F <|im_end|>"


def test_several_templates_without_a_default_are_refused(model_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    config = {"chat_template": [{"name": "tool_use", "template": "T"}]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"'tool_use'.*--chat-template"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{")],
)
def test_malformed_files_are_named(model_dir: Path, tmp_path: Path, name: str, content: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    (directory / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        Tokenizer.from_directory(directory)


def test_a_model_without_chat_template_refuses_messages(byte_fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        byte_fallback.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.code == "no_chat_template"


def test_chat_encoding_adds_no_second_bos(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_chat([{"role": "user", "content": "the sea"}])
    assert byte_level.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n"
    )


def test_token_bytes_concatenate_to_the_text(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    text = "hello 你好 🙂 é"
    ids = byte_level.encode(text)
    assert b"".join(map(byte_level.token_bytes, ids)).decode() == text
    ids = byte_fallback.encode(text)
    assert b"".join(map(byte_fallback.token_bytes, ids)).decode() == " " + text


def test_a_token_that_is_no_whole_character_is_named_by_its_bytes(byte_level: Tokenizer) -> None:
    first_byte = byte_level.encode("🦜", add_special_tokens=False)[0]
    assert byte_level.token_text(first_byte).startswith("bytes:\\xf0")


def test_offsets_point_into_the_text(byte_level: Tokenizer) -> None:
    text = "Grüße aus 🦜 München"
    ids, starts = byte_level.encode_with_offsets(text)
    assert len(ids) == len(starts)
    assert starts == sorted(starts)
    for idx, start in zip(ids, starts, strict=True):
        name = byte_level.token_text(idx)
        if not name.startswith("bytes:"):
            assert text[start:].startswith(name) or text[start:].startswith(name.strip())
