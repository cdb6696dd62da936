"""From a training file to a tokenized dataset: exactly the tokens that serving would see, with their targets.

A target is a token that the model is trained to predict. In a conversation these are the tokens of each
assistant message and its end token, following the very ids that the chat template and tokenizer give for
the conversation so far with `add_generation_prompt`; of a prompt and completion, the completion and an end
token; of plain text, all but the first token, which nothing precedes. Where a template renders earlier
turns differently once later ones follow (dropping their reasoning, say), no single sequence shows every
turn as it is served; such a line then becomes one example per turn that needs it.

The dataset is one safetensors blob: `tokens` int32 [total], `targets` uint8 [total], `offsets` int64
[examples + 1], `lines` int32 [examples] (the 1-based line each example came from). It is written through
temporary files, so memory holds neither the file nor the tokens. Knows nothing of jobs, HTTP or
hyperparameters beyond the length.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, assert_never

import numpy as np

from weft_server.errors import InvalidRequest
from weft_server.service.dataset_lines import (
    ChatExample,
    CompletionExample,
    Example,
    LineError,
    TextExample,
    parse_line,
    split_lines,
)
from weft_server.service.hyperparameters import Overlength
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.base import BlobStore

MAX_REPORTED_LINES = 5
_COPY_BYTES = 1 << 20


class DatasetError(Exception):
    """The file cannot be trained on; the message names lines, values, limits and remedies."""


class DatasetAbandonedError(Exception):
    """Nobody needs the result any more."""


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
    """A durable but not yet linked dataset blob and what it holds.

    Of the examples left out, `num_dropped` were longer than allowed, and `num_without_targets` would have had
    nothing to learn from after truncation.
    """

    blob: str
    num_examples: int
    num_tokens: int
    num_target_tokens: int
    num_truncated: int = 0
    num_dropped: int = 0
    num_without_targets: int = 0

    def to_value(self) -> dict[str, Any]:
        """As stored in a job's record."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One sequence: ids, and for each whether it is a target. Index 0 is never one."""

    line: int
    tokens: list[int]
    targets: list[bool]


def tokenize_dataset(
    blobs: BlobStore,
    file_blob: str,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    overlength: Overlength,
    cancelled: Callable[[], bool],
) -> TokenizedDataset:
    """Tokenize a training file into a dataset blob. Blocking: run it in a thread.

    Args:
        blobs: where the file is read and the dataset written.
        file_blob: the JSONL file.
        tokenizer: the base model's.
        max_seq_length: longest example, tokens.
        overlength: what happens to a longer one: `error` refuses the file, `truncate` keeps its first
            tokens, `drop`
            leaves it out. An example that truncation leaves without targets is left out too.
        cancelled: asked before every line.

    Raises:
        DatasetError: a line is refused, or no example remains.
        DatasetAbandonedError: `cancelled` said so.
        BlobMissing: the file is gone from the store.
        StoreUnavailable: the store does not answer.
    """
    with tempfile.TemporaryFile() as tokens, tempfile.TemporaryFile() as targets:
        writer = _DatasetWriter(tokens, targets)
        errors: list[LineError] = []
        counts = TokenizedDataset("", 0, 0, 0)
        first_kind: type[Example] | None = None
        for line, raw in split_lines(blobs.read(file_blob)):
            if cancelled():
                raise DatasetAbandonedError
            try:
                example = parse_line(line, raw)
                first_kind = first_kind or type(example)
                _check_same_format(example, first_kind)
                for sequence in tokenize_example(example, tokenizer):
                    fitted = _fit(sequence, max_seq_length, overlength)
                    counts = _counted(counts, sequence, fitted, overlength)
                    if fitted is not None:
                        writer.add(fitted)
            except LineError as error:
                errors.append(error)
                if len(errors) == MAX_REPORTED_LINES:
                    break
        if errors:
            raise DatasetError(_describe(errors))
        if counts.num_examples == 0:
            raise DatasetError(_describe_empty(counts, max_seq_length))
        return replace(counts, blob=blobs.put(writer.chunks()))


def tokenize_example(example: Example, tokenizer: Tokenizer) -> list[TokenizedExample]:
    """The sequences of one line before any length limit: one, unless a template rewrites history.

    Raises:
        LineError: the chat template refuses the conversation, or there is none.
    """
    match example:
        case ChatExample():
            return _tokenize_chat(example, tokenizer)
        case CompletionExample(line, prompt, completion):
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=True)
            ids = _continued(tokenizer, prompt, prompt_ids, completion, add_special_tokens=True)
            num_context = _context(line, "prompt", prompt_ids, ids)
            return [_sequence(line, _with_end(ids, tokenizer), [(num_context, None)])]
        case TextExample(line, text):
            ids = tokenizer.encode(text, add_special_tokens=True)
            return [_sequence(line, _with_end(ids, tokenizer), [(0, None)])]
        case _:
            assert_never(example)


def _tokenize_chat(example: ChatExample, tokenizer: Tokenizer) -> list[TokenizedExample]:
    """Later turns first: a turn whose sequence begins a later turn's only adds targets there."""
    sequences: list[tuple[list[int], list[tuple[int, int | None]]]] = []
    for turn in reversed(example.trained):
        ids, num_context = _tokenize_turn(example, turn, tokenizer)
        for longer, spans in sequences:
            if longer[: len(ids)] == ids:
                spans.append((num_context, len(ids)))
                break
        else:
            sequences.append((ids, [(num_context, len(ids))]))
    return [_sequence(example.line, ids, spans) for ids, spans in reversed(sequences)]


def _tokenize_turn(example: ChatExample, turn: int, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids of the conversation up to and including message `turn`, and how many of them are its context."""
    if tokenizer.chat_template is None:
        raise LineError(
            example.line,
            "this model has no chat template for messages; give prompt and completion, or text, or start the "
            "server with --chat-template.",
        )
    content = example.messages[turn]["content"]
    render = tokenizer.chat_template.render
    try:
        prompt = render(example.messages[:turn], add_generation_prompt=True)
        full = render(example.messages[: turn + 1], add_generation_prompt=False)
    except InvalidRequest as error:
        raise LineError(example.line, error.message) from None
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer = full[len(prompt) :] if full.startswith(prompt) else content
    ids = _continued(tokenizer, prompt, prompt_ids, answer, add_special_tokens=False)
    num_context = _context(example.line, f"text before messages[{turn}]", prompt_ids, ids)
    return ids[:num_context] + _cut_after_end(ids[num_context:], tokenizer), num_context


def _continued(
    tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], answer: str, *, add_special_tokens: bool
) -> list[int]:
    """`prompt_ids` and then the ids of `answer` as the model would generate them.

    Usually the ids of the whole text. Where its tokenization differs across the seam, the answer is encoded
    by itself (without the space that some tokenizers put before every text), provided that this reads the
    same; failing that, the whole text's ids stand, and the seam lies where they first differ from the
    prompt's.
    """
    whole = tokenizer.encode(prompt + answer, add_special_tokens=add_special_tokens)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole
    text = tokenizer.decode(whole, skip_special_tokens=False)
    for part in (answer, answer.removeprefix(" ")):
        ids = prompt_ids + tokenizer.encode(part, add_special_tokens=False)
        if tokenizer.decode(ids, skip_special_tokens=False) == text:
            return ids
    return whole


def _context(line: int, what: str, prompt_ids: Sequence[int], ids: Sequence[int]) -> int:
    """How many of `ids` the prompt gives, at least one: serving refuses an empty prompt, and nothing could
    predict the first token of the answer.
    """
    num_context = _common_prefix(prompt_ids, ids)
    if num_context:
        return num_context
    if prompt_ids:
        reason = "has no token that ends before the answer, so the answer's first token follows nothing"
    else:
        reason = "has no tokens, so the answer's first token follows nothing (requests are refused likewise)"
    raise LineError(line, f"the {what} {reason}; give a longer prompt, or text to train on all of it.")


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for idx, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return idx
    return min(len(first), len(second))


def _cut_after_end(answer_ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """An answer up to its end token: whitespace behind it is dropped, a missing one is added."""
    ends = set(tokenizer.stop_ids)
    for idx in range(len(answer_ids) - 1, -1, -1):
        if answer_ids[idx] in ends:
            rest = tokenizer.decode(answer_ids[idx + 1 :], skip_special_tokens=False)
            return answer_ids[: idx + 1] if not rest.strip() else _with_end(answer_ids, tokenizer)
    return _with_end(answer_ids, tokenizer)


def _with_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    ends = tokenizer.stop_ids
    return ids if not ends or (ids and ids[-1] in ends) else [*ids, ends[0]]


def _sequence(line: int, ids: list[int], spans: Sequence[tuple[int, int | None]]) -> TokenizedExample:
    targets = [False] * len(ids)
    for start, stop in spans:
        stop = len(ids) if stop is None else stop
        targets[start:stop] = [True] * (stop - start)
    if targets:
        targets[0] = False
    if not any(targets):
        raise LineError(
            line, "no token of it can be predicted from one before it; give it a prompt or more text."
        )
    return TokenizedExample(line, ids, targets)


def _fit(sequence: TokenizedExample, max_seq_length: int, overlength: Overlength) -> TokenizedExample | None:
    num_tokens = len(sequence.tokens)
    if num_tokens <= max_seq_length:
        return sequence
    if overlength == "error":
        raise LineError(
            sequence.line,
            f"{num_tokens} tokens, but the longest allowed is {max_seq_length}; shorten it, raise "
            'weft.max_seq_length, or set weft.overlength to "truncate" or "drop".',
        )
    cut = replace(
        sequence, tokens=sequence.tokens[:max_seq_length], targets=sequence.targets[:max_seq_length]
    )
    return cut if overlength == "truncate" and any(cut.targets) else None


def _counted(
    counts: TokenizedDataset,
    sequence: TokenizedExample,
    fitted: TokenizedExample | None,
    overlength: Overlength,
) -> TokenizedDataset:
    if fitted is None and overlength == "truncate":
        return replace(counts, num_without_targets=counts.num_without_targets + 1)
    if fitted is None:
        return replace(counts, num_dropped=counts.num_dropped + 1)
    return replace(
        counts,
        num_examples=counts.num_examples + 1,
        num_tokens=counts.num_tokens + len(fitted.tokens),
        num_target_tokens=counts.num_target_tokens + sum(fitted.targets),
        num_truncated=counts.num_truncated + (fitted is not sequence),
    )


def _check_same_format(example: Example, kind: type[Example]) -> None:
    if not isinstance(example, kind):
        names = {ChatExample: "messages", CompletionExample: "prompt and completion", TextExample: "text"}
        raise LineError(
            example.line,
            f"its format is {names[type(example)]}, but the file began with {names[kind]}; "
            "a file has one format.",
        )


def _describe(errors: Sequence[LineError]) -> str:
    lines = [f"Line {error.line}: {error.message}" for error in errors]
    more = " Later lines were not checked." if len(errors) == MAX_REPORTED_LINES else ""
    return " ".join(lines) + more


def _describe_empty(counts: TokenizedDataset, max_seq_length: int) -> str:
    if counts.num_without_targets:
        return (
            f"All {counts.num_without_targets} examples were truncated to {max_seq_length} tokens, which "
            "left nothing of their answers to train on; raise weft.max_seq_length or shorten their prompts."
        )
    if counts.num_dropped == 0:
        return "The training file holds no examples; give one JSON object per line."
    return (
        f"All {counts.num_dropped} examples were dropped for being longer than {max_seq_length} tokens; "
        "raise weft.max_seq_length or shorten them."
    )


class _DatasetWriter:
    """Collects sequences in two temporary files and streams them as one safetensors file."""

    def __init__(self, tokens: BinaryIO, targets: BinaryIO) -> None:
        self._tokens = tokens
        self._targets = targets
        self._offsets = [0]
        self._lines: list[int] = []

    def add(self, example: TokenizedExample) -> None:
        self._tokens.write(np.asarray(example.tokens, dtype="<i4").tobytes())
        self._targets.write(np.asarray(example.targets, dtype="u1").tobytes())
        self._offsets.append(self._offsets[-1] + len(example.tokens))
        self._lines.append(example.line)

    def chunks(self) -> Iterator[bytes]:
        """The file; widest element type first, so that every tensor is aligned, as safetensors does."""
        num_examples, num_tokens = len(self._lines), self._offsets[-1]
        tensors = (
            ("offsets", "I64", num_examples + 1, 8),
            ("lines", "I32", num_examples, 4),
            ("tokens", "I32", num_tokens, 4),
            ("targets", "U8", num_tokens, 1),
        )
        header: dict[str, Any] = {}
        start = 0
        for name, dtype, length, width in tensors:
            stop = start + length * width
            header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, stop]}
            start = stop
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        yield len(encoded).to_bytes(8, "little") + encoded
        yield np.asarray(self._offsets, dtype="<i8").tobytes()
        yield np.asarray(self._lines, dtype="<i4").tobytes()
        for file in (self._tokens, self._targets):
            file.seek(0)
            while chunk := file.read(_COPY_BYTES):
                yield chunk
