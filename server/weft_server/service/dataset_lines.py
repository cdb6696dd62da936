"""The lines of a training file: JSONL read, checked, and turned into examples.

Three formats, one per file: `{"messages": [...]}`, `{"prompt", "completion"}` and `{"text"}`. Everything
that is refused is refused with its line number. Owns what a line may contain; knows nothing of tokens or
templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

ROLES = ("system", "developer", "user", "assistant")
_FORMATS = '{"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}'
_MESSAGE_KEYS = frozenset({"role", "content", "name", "weight"})
_BOM = b"\xef\xbb\xbf"


class LineError(Exception):
    """One line of the file cannot be trained on; the message does not repeat the line number."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; `trained` are the indices of the assistant messages that are targets."""

    line: int
    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CompletionExample:
    """A prompt, which is context, and its completion, which is the target."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class TextExample:
    """Plain text, all of it a target."""

    line: int
    text: str


Example: TypeAlias = ChatExample | CompletionExample | TextExample


def split_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of every line that is not blank, without its line ending (LF or CRLF).

    A byte-order mark at the start of the file is skipped.
    """
    pending = bytearray()
    line = 0
    for chunk in chunks:
        pending += chunk
        if b"\n" not in chunk:
            continue
        *complete, rest = bytes(pending).split(b"\n")
        pending = bytearray(rest)
        for raw in complete:
            line += 1
            yield from _unless_blank(line, raw)
    yield from _unless_blank(line + 1, bytes(pending))


def _unless_blank(line: int, raw: bytes) -> Iterator[tuple[int, bytes]]:
    if line == 1:
        raw = raw.removeprefix(_BOM)
    raw = raw.rstrip(b"\r")
    if raw.strip():
        yield line, raw


def parse_line(line: int, raw: bytes) -> Example:
    """The example of one line.

    Raises:
        LineError: the line is not UTF-8, not JSON, of no known format, or holds what cannot be honoured.
    """
    value = _parse_object(line, raw)
    for key in ("tools", "functions", "parallel_tool_calls"):
        if value.get(key):
            raise LineError(line, f'"{key}" is not supported: tool calls cannot be trained yet. Remove it.')
    keys = {key for key, item in value.items() if not (key in _NEUTRAL_KEYS and not item)}
    if keys == {"messages"}:
        return _parse_chat(line, value["messages"])
    if keys == {"prompt", "completion"}:
        return _parse_completion(line, value["prompt"], value["completion"])
    if keys == {"text"}:
        text = _text(line, "text", value["text"])
        return TextExample(line, text)
    found = ", ".join(sorted(keys)) or "none"
    raise LineError(line, f"the keys are {found}; a line must be one of {_FORMATS}.")


_NEUTRAL_KEYS = frozenset({"tools", "functions", "parallel_tool_calls"})


def _parse_object(line: int, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(line, f"not UTF-8 (byte {error.start + 1} of the line); save it as UTF-8.") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineError(line, f"not JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise LineError(line, "nested too deeply to be read as JSON.") from None
    except ValueError:
        raise LineError(line, "not JSON: a number in it has too many digits.") from None
    if not isinstance(value, dict):
        raise LineError(line, f"a JSON {_json_type(value)}; a line must be an object: {_FORMATS}.")
    return value


def _parse_completion(line: int, prompt: object, completion: object) -> CompletionExample:
    prompt_text = _string(line, "prompt", prompt)
    return CompletionExample(line, prompt_text, _text(line, "completion", completion))


def _parse_chat(line: int, value: object) -> ChatExample:
    if not isinstance(value, list):
        raise LineError(line, f'"messages" is a JSON {_json_type(value)}; it must be a list of messages.')
    if not value:
        raise LineError(line, '"messages" is empty; it must hold at least one assistant message.')
    messages = []
    trained = []
    for idx, item in enumerate(value):
        message, weight = _parse_message(line, idx, item)
        messages.append(message)
        if message["role"] == "assistant" and weight == 1:
            trained.append(idx)
    if not any(message["role"] == "assistant" for message in messages):
        raise LineError(line, "no message has the role assistant, so there is nothing to learn from it.")
    if not trained:
        raise LineError(line, "every assistant message has weight 0, so there is nothing to learn from it.")
    return ChatExample(line, tuple(messages), tuple(trained))


def _parse_message(line: int, idx: int, item: object) -> tuple[dict[str, Any], int]:
    where = f"messages[{idx}]"
    if not isinstance(item, dict):
        raise LineError(line, f"{where} is a JSON {_json_type(item)}; it must be an object.")
    for key in item:
        if key not in _MESSAGE_KEYS and item[key] not in (None, "", [], {}):
            allowed = ", ".join(sorted(_MESSAGE_KEYS))
            raise LineError(line, f'{where} has the key "{key}", which is not supported; allowed: {allowed}.')
    role = item.get("role")
    if role not in ROLES:
        raise LineError(line, f"{where}.role is {json.dumps(role)}; it must be one of {', '.join(ROLES)}.")
    # `developer` is OpenAI's newer name for `system`; chat is served the same way.
    message = {
        "role": "system" if role == "developer" else role,
        "content": _content(line, where, item.get("content")),
    }
    if item.get("name") is not None:
        message["name"] = _string(line, f"{where}.name", item["name"])
    return message, _weight(line, where, role, item.get("weight"))


def _content(line: int, where: str, value: object) -> str:
    if not isinstance(value, list):
        return _string(line, f"{where}.content", value)
    parts = []
    for part_idx, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise LineError(
                line,
                f'{where}.content[{part_idx}] must be {{"type": "text", "text": "..."}}; only text can be.',
            )
        parts.append(_string(line, f"{where}.content[{part_idx}].text", part["text"]))
    return "\n".join(parts)


def _weight(line: int, where: str, role: str, value: object) -> int:
    if value is None:
        return 1
    if isinstance(value, bool) or value not in (0, 1):
        raise LineError(line, f"{where}.weight is {json.dumps(value)}; it must be 0 or 1.")
    if role != "assistant":
        raise LineError(line, f"{where} has a weight and the role {role}; only assistant messages have one.")
    return int(value == 1)


def _text(line: int, key: str, value: object) -> str:
    text = _string(line, key, value)
    if not text:
        raise LineError(line, f'"{key}" is empty, so there is nothing to learn from it.')
    return text


def _string(line: int, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise LineError(line, f"{key} is a JSON {_json_type(value)}; it must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LineError(line, f"{key} holds half of a surrogate pair, which is no character.") from None
    return value


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "array"
    return "string" if isinstance(value, str) else "number"
