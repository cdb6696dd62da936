"""The base model's tokenizer: text to ids and back, special tokens, chat template.

Owns reading the tokenizer files of a Hugging Face directory. Knows nothing of requests; incremental decoding
is `service/detokenizer.py`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from weft_server.errors import ConfigError, InvalidRequest
from weft_server.service.chat_template import ChatTemplate

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Thread-safe; one per server."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        stop_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        """
        Args:
            backend: the `tokenizers` object.
            special_tokens: `bos_token`, `eos_token`, … → text.
            stop_ids: ids that end a generation, besides the `eos_token`.
            chat_template: Jinja source, or None.

        Raises:
            ConfigError: the chat template is not valid Jinja.
        """
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_id = self._named_id("eos_token")
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos, *stop_ids)))
        self.chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(idx for idx, token in added.items() if token.special)
        # Asked for an added token, the library may answer with its normalized spelling instead.
        self._added_spellings = {idx: token.content for idx, token in added.items()}
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self.cuts_characters = _decoder_has(backend, b"ByteLevel")
        self.has_byte_fallback = _decoder_has(backend, b"ByteFallback")
        self._bytes_of = lru_cache(maxsize=65_536)(self._find_bytes)

    @classmethod
    def from_directory(cls, directory: Path, *, chat_template: Path | None = None) -> Tokenizer:
        """Read `tokenizer.json` (or GPT-2's `vocab.json` + `merges.txt`) and what is beside it.

        Whether a BOS or EOS is added is what tokenizer.json's post-processor says; as in transformers 5,
        `add_bos_token` beside it does not count.

        Args:
            directory: a Hugging Face model directory.
            chat_template: a Jinja file that replaces the directory's template.

        Raises:
            ConfigError: files are missing or malformed; the message says which and what to do.
        """
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(directory, config)
        backend = _load_backend(directory, config, special_tokens)
        _add_missing_tokens(directory, backend, config, special_tokens)
        backend.no_truncation()
        backend.no_padding()
        return cls(
            backend,
            special_tokens=special_tokens,
            stop_ids=_stop_ids(directory),
            chat_template=_chat_template_source(directory, config, chat_template),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included (the model's may be padded to more)."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def max_chars_per_token(self) -> int:
        """Characters of a text that one token can stand for: the length of the longest token.

        A byte-level vocabulary without normalizer spells every byte of a text. Others may shorten a text
        first, or join what they do not know into one token; they get four times as much, which is what
        composing characters (NFC) can take. Only texts that lose still more, such as long runs of spaces in
        front of a tokenizer that collapses them, could have fitted beyond that.
        """
        longest = max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)
        is_exact = self.is_byte_level and self._backend.normalizer is None
        return longest if is_exact else 4 * longest

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. With `add_special_tokens`, what the tokenizer puts around a text (often a BOS)."""
        # The library releases the interpreter lock in its batch calls alone.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        """Token ids, and for each the character of `text` at which it starts (special tokens: where they
        stand).
        """
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        starts: list[int] = []
        for (start, end), is_special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            previous = starts[-1] if starts else 0
            starts.append(previous if is_special and end == 0 else max(previous, start))
        return list(encoding.ids), starts

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render a conversation with the chat template and encode it; the template writes the special tokens.

        Raises:
            InvalidRequest: there is no chat template, or it refuses the conversation.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the chat template's text, to be encoded without adding special tokens.

        Raises:
            InvalidRequest: there is no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "This model has no chat template, so it cannot take messages. Use /v1/completions, or start "
                "the server with --chat-template FILE.",
                param="messages",
                code="no_chat_template",
            )
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; a cut character shows as U+FFFD."""
        # The library itself skips only some of the tokens that a file marks as special.
        hidden = self.special_ids if skip_special_tokens else frozenset()
        shown = [token_id for token_id in token_ids if token_id not in hidden]
        return str(self._backend.decode(shown, skip_special_tokens=False))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's own spelling, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The tokenizer's own spelling of an id; None for ids that pad the vocabulary."""
        found: str | None = self._added_spellings.get(token_id)
        return self._backend.id_to_token(token_id) if found is None else found

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for inside a text; perhaps a part of a character. Cached."""
        return self._bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        """A printable name: the token's text, or `bytes:\\xe4\\xb8` where it is no whole text."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_byte_token(self, token_id: int) -> bool:
        """Whether the id is a byte-fallback token, `<0xE4>`."""
        if not self.has_byte_fallback:
            return False
        token = self.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.special_ids:
            return token.encode()
        if self.is_byte_level:
            return byte_level_bytes(token)
        byte = _BYTE_TOKEN.fullmatch(token) if self.has_byte_fallback else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        # A decoder may strip at the start of a text, so the token is decoded behind itself.
        alone = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        return (twice[len(alone) :] if twice.startswith(alone) else alone).encode()


def _decoder_has(backend: tokenizers.Tokenizer, step: bytes) -> bool:
    return backend.decoder is not None and step in backend.decoder.__getstate__()


def byte_level_bytes(token: str) -> bytes:
    """The bytes behind a byte-level BPE token, in GPT-2's printable alphabet (others: themselves)."""
    table = _byte_level_table()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return token.encode()


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """GPT-2's mapping of printable characters to bytes: printable Latin-1 is itself, the rest follows from
    U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + idx): byte for idx, byte in enumerate(others)})
    return table


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}.") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a JSON object.")
    return document


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, … → text, from tokenizer_config.json, else special_tokens_map.json."""
    fallback = _read_json(directory / "special_tokens_map.json")
    found: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config[name] if name in config else fallback.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _load_backend(
    directory: Path, config: Mapping[str, Any], special_tokens: dict[str, str]
) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            # The library raises bare Exception for anything it cannot parse.
            raise ConfigError(f"{path}: not a tokenizer that can be read: {error}.") from None
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    is_gpt2 = (
        config.get("tokenizer_class") in _GPT2_CLASSES
        and _read_json(directory / "config.json").get("model_type", "gpt2") == "gpt2"
    )
    if vocab.is_file() and merges.is_file() and is_gpt2:
        return _gpt2_backend(vocab, merges, special_tokens)
    raise ConfigError(
        f"{directory} has no tokenizer.json. Make one with transformers: "
        "`AutoTokenizer.from_pretrained(directory).save_pretrained(directory)`."
    )


def _gpt2_backend(vocab: Path, merges: Path, special_tokens: dict[str, str]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise ConfigError(f"{vocab}, {merges}: not a BPE vocabulary: {error}.") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    if backend.token_to_id(end) is not None:
        backend.add_special_tokens([end])
        for name in ("bos_token", "eos_token", "unk_token"):
            special_tokens.setdefault(name, end)
    return backend


def _add_missing_tokens(
    directory: Path,
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
) -> None:
    """Register added tokens that only tokenizer_config.json lists; their ids must come out as it says."""
    listed = config.get("added_tokens_decoder") or {}
    for key, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        content = entry["content"]
        if backend.token_to_id(content) is not None:
            continue
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word", "special")}
        backend.add_tokens([AddedToken(content, normalized=bool(entry.get("normalized")), **flags)])
        if backend.token_to_id(content) != int(key):
            raise ConfigError(
                f"{directory}: tokenizer_config.json gives {content!r} the id {key}, but tokenizer.json "
                f"leads to {backend.token_to_id(content)}."
            )
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = [token for token in special_tokens.values() if backend.token_to_id(token) is not None]
    backend.add_special_tokens([token for token in dict.fromkeys(named) if token not in special])


def _stop_ids(directory: Path) -> list[int]:
    """The model's end-of-sequence ids: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        if isinstance(value, int):
            return [value]
        if isinstance(value, list) and value:
            return [int(entry) for entry in value]
    return []


def _chat_template_source(directory: Path, config: Mapping[str, Any], override: Path | None) -> str | None:
    """The file given, else chat_template.jinja, else tokenizer_config.json's (its `default`, if it names
    several).
    """
    path = override if override is not None else directory / "chat_template.jinja"
    if override is not None or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {path}: cannot be read: {error}.") from None
    value = config.get("chat_template")
    if value is None:
        value = _read_json(directory / "chat_template.json").get("chat_template")
    if value is None or isinstance(value, str):
        return value
    named = {entry["name"]: entry["template"] for entry in value} if isinstance(value, list) else dict(value)
    if "default" not in named:
        raise ConfigError(
            f"{directory}: tokenizer_config.json has the templates {', '.join(map(repr, named))}, "
            "but no 'default'. Choose one with --chat-template FILE."
        )
    return str(named["default"])
