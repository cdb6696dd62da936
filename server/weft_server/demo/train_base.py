"""Train the bundled base model: `python -m weft_server.demo.train_base --out DIR`.

Owns the tokenizer's training, the model's shape, the optimizer and its schedule, and the files that are
written: a Hugging Face directory of a few megabytes with its provenance. The text comes from `corpus`, from
one seed; nothing is downloaded and no other model is involved. This is a development tool: it needs
`transformers`, which the server does not, and nothing of the server imports it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weft_server.demo import corpus
from weft_server.demo.evaluate import Answerer, Score, score_by_task, total

HELD_OUT_SEED = 20_001


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training with a learning-rate cycle and optimizers of its own.

    Rows have `row_tokens` tokens, in the last `num_long_steps` steps `long_row_tokens`.
    """

    num_steps: int
    learning_rate: float
    num_warmup_steps: int
    row_tokens: int
    num_long_steps: int
    long_row_tokens: int


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Everything that decides the result besides the corpus.

    Short rows first: most of what the model learns needs little context, and short rows are cheap. A second
    phase goes on with longer ones. `prompt_target_share` is the share of tokens outside the targets that are
    trained as well, at random.
    """

    seed: int = 1
    vocab_size: int = 3072
    num_tokenizer_documents: int = 40_000
    phases: tuple[Phase, ...] = (
        Phase(1600, 3e-3, 60, row_tokens=128, num_long_steps=40, long_row_tokens=1024),
        Phase(420, 2e-3, 30, row_tokens=256, num_long_steps=120, long_row_tokens=512),
    )
    step_tokens: int = 2048
    context_tokens: int = 1024
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    prompt_target_share: float = 0.05
    num_threads: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all phases."""
        return sum(phase.num_steps for phase in self.phases) * self.step_tokens


def train_tokenizer(settings: TrainSettings) -> Tokenizer:
    """Train a byte-level BPE on the corpus: any text encodes, digits stand alone, special tokens last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size - len(corpus.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = itertools.islice(corpus.training_documents(settings.seed), settings.num_tokenizer_documents)
    texts = (corpus.without_special_tokens(corpus.document_text(document)) for document in documents)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(corpus.SPECIAL_TOKENS))
    return tokenizer


def model_config(settings: TrainSettings, tokenizer: Tokenizer) -> LlamaConfig:
    """Return the Llama configuration of the base (about 5M parameters, tied embeddings)."""
    return LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=settings.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(corpus.TURN_END),
        pad_token_id=tokenizer.token_to_id(corpus.PADDING),
    )


def marked_tokens(
    tokenizer: Tokenizer, documents: Iterator[corpus.Document], rng: Random, prompt_target_share: float
) -> Iterator[tuple[int, bool]]:
    """Yield `(token id, whether the model is trained to write it)` of the documents, one after another."""
    while True:
        spans = [span for document in itertools.islice(documents, 500) for span in document]
        encodings = tokenizer.encode_batch_fast([span.text for span in spans], add_special_tokens=False)
        for span, encoding in zip(spans, encodings, strict=True):
            for token_id in encoding.ids:
                yield token_id, span.is_target or rng.random() < prompt_target_share


def next_rows(
    stream: Iterator[tuple[int, bool]], num_rows: int, row_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the next `num_rows` rows from the stream: ids int64 and marks bool, both `[rows, tokens]`."""
    token_ids, marks = zip(*itertools.islice(stream, num_rows * row_tokens), strict=True)
    shape = (num_rows, row_tokens)
    return torch.tensor(token_ids).view(shape), torch.tensor(marks).view(shape)


def mean_loss(model: LlamaForCausalLM, token_ids: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss of the marked tokens, in fp32.

    Args:
        model: the model, fp32.
        token_ids: `[rows, tokens]`, int64.
        marks: `[rows, tokens]`, bool; the head runs only where the next token is marked.
    """
    hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][marks[:, 1:]])  # [marked, vocabulary]
    return nn.functional.cross_entropy(logits.float(), token_ids[:, 1:][marks[:, 1:]])


def make_optimizers(
    model: LlamaForCausalLM, settings: TrainSettings, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the decoder's matrices and AdamW for embeddings and norms, on one scale of rates."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices,
        lr=learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def learning_rate_factor(step: int, phase: Phase) -> float:
    """Return the share of the peak learning rate at `step`: linear warm-up, then a cosine to 2 %."""
    if step < phase.num_warmup_steps:
        return (step + 1) / phase.num_warmup_steps
    progress = (step - phase.num_warmup_steps) / max(1, phase.num_steps - phase.num_warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * progress))


def in_dtype(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """Convert `model` in place to `dtype`, switch it to evaluation and return it."""
    nn.Module.to(model, dtype)
    nn.Module.eval(model)
    return model


def train(
    settings: TrainSettings, tokenizer: Tokenizer, wrapped: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """Train the base from scratch and return it in fp32 with bf16-representable weights.

    `wrapped` is the tokenizer as users load it; it asks the held-out prompts on the way.
    """
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(model_config(settings, tokenizer))
    for idx, phase in enumerate(settings.phases):
        model = run_phase(model, settings, idx, phase, tokenizer, wrapped)
    return model


def run_phase(
    model: LlamaForCausalLM,
    settings: TrainSettings,
    idx: int,
    phase: Phase,
    tokenizer: Tokenizer,
    wrapped: PreTrainedTokenizerFast,
) -> LlamaForCausalLM:
    """Train for one phase, on text of its own, and round the weights to bf16."""
    nn.Module.train(model)
    probe = corpus.held_out_exchanges(HELD_OUT_SEED, num_per_task=3)
    optimizers = make_optimizers(model, settings, phase.learning_rate)
    seed = settings.seed + idx
    stream = marked_tokens(
        tokenizer, corpus.training_documents(seed), Random(seed), settings.prompt_target_share
    )
    started = time.monotonic()
    recent_losses: list[float] = []
    for step in range(phase.num_steps):
        is_long = step >= phase.num_steps - phase.num_long_steps
        row_tokens = phase.long_row_tokens if is_long else phase.row_tokens
        loss = mean_loss(model, *next_rows(stream, settings.step_tokens // row_tokens, row_tokens))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate * learning_rate_factor(step, phase)
            optimizer.step()
            optimizer.zero_grad()
        recent_losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent = sum(recent_losses) / len(recent_losses)
            recent_losses.clear()
            rate = (step + 1) * settings.step_tokens / (time.monotonic() - started)
            print(
                f"phase {idx + 1} step {step + 1}/{phase.num_steps}  loss {recent:.4f}  {rate:.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % 300 == 0:
            accuracy = total(score_by_task(probe, greedy_answerer(model, wrapped))).accuracy
            print(f"step {step + 1}: {accuracy:.0%} of {len(probe)} held-out prompts", flush=True)
    return in_dtype(in_dtype(model, torch.bfloat16), torch.float32)


def greedy_answerer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> Answerer:
    """Return an answerer that decodes greedily with `transformers`, in left-padded batches."""

    def answer_batch(prompts: Sequence[str]) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            output = cast(Any, model).generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        return list(tokenizer.batch_decode(new_tokens, skip_special_tokens=True))

    def answer(prompts: Sequence[str]) -> list[str]:
        by_length = sorted(range(len(prompts)), key=lambda idx: len(prompts[idx]))
        answers = [""] * len(prompts)
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            for idx, text in zip(chosen, answer_batch([prompts[i] for i in chosen]), strict=True):
                answers[idx] = text
        return answers

    return answer


def wrap_tokenizer(tokenizer: Tokenizer, max_tokens: int) -> PreTrainedTokenizerFast:
    """Return a copy of the tokenizer with its chat template and special tokens, ready for `save_pretrained`.

    A copy, because padding a batch for generation switches padding on in the tokenizer itself.
    """
    wrapped: PreTrainedTokenizerFast = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        eos_token=corpus.TURN_END,
        pad_token=corpus.PADDING,
        additional_special_tokens=[corpus.TURN_START, corpus.TEXT_END],
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = corpus.CHAT_TEMPLATE
    return wrapped


def name_portable_tokenizer_class(path: Path) -> None:
    """Set the tokenizer class to the name that transformers 4 and 5 both know."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, provenance: str) -> None:
    """Write the Hugging Face directory: bf16 safetensors, configuration, tokenizer, template, README."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = cast(Any, GenerationConfig)(
        do_sample=False,
        eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in (corpus.TURN_END, corpus.TEXT_END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    in_dtype(model, torch.bfloat16).save_pretrained(out)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(out)
    name_portable_tokenizer_class(out / "tokenizer_config.json")
    (out / "README.md").write_text(provenance, encoding="utf-8")


def provenance_text(
    settings: TrainSettings, scores: dict[str, Score], num_parameters: int, wall_s: float, command: str
) -> str:
    """Return the model card: where the model comes from and what was measured."""
    overall = total(scores)
    rows = "\n".join(
        f"| {task} | {score.num_asked} | {score.accuracy:.1%} |" for task, score in scores.items()
    )
    return f"""# Weft demo base

A Llama-architecture model of {num_parameters:,} parameters that ships with Weft. It answers short prompts of
a small, closed world; it is a stand-in for a real base model, not an assistant.

Licence: Apache-2.0, as Weft. Provenance: every training token was generated by `weft_server.demo.corpus` from
the seed (a phase's text from the seed plus its number); no external text, model or tokenizer was used.

    {command}

Settings: `{json.dumps(asdict(settings))}`

Trained on {settings.num_tokens:,} tokens in {wall_s / 60:.0f} minutes on
{settings.num_threads} CPU thread(s) of a machine that also did other work, torch {torch.__version__}.

Greedy exact match on held-out prompts (none of them occurs in the training text): {overall.num_right} of
{overall.num_asked}, {overall.accuracy:.1%}.

| task | prompts | exact |
| --- | --- | --- |
{rows}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, save; return 0, or 1 where the held-out accuracy is below 90 %."""
    defaults = TrainSettings()
    parser = argparse.ArgumentParser(description="Train Weft's bundled base model from generated text.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of text and weights")
    parser.add_argument("--threads", type=int, default=defaults.num_threads, help="CPU threads")
    options = parser.parse_args(arguments)
    settings = TrainSettings(seed=options.seed, num_threads=options.threads)
    torch.set_num_threads(settings.num_threads)
    started = time.monotonic()
    tokenizer = train_tokenizer(settings)
    wrapped = wrap_tokenizer(tokenizer, settings.context_tokens)
    model = train(settings, tokenizer, wrapped)
    wall_s = time.monotonic() - started
    exchanges = corpus.held_out_exchanges(HELD_OUT_SEED, num_per_task=50)
    scores = score_by_task(exchanges, greedy_answerer(model, wrapped))
    for task, score in scores.items():
        print(f"{task:14} {score.num_right:4}/{score.num_asked:<4} {score.accuracy:.1%}")
    accuracy = total(scores).accuracy
    print(f"held-out accuracy {accuracy:.1%}")
    given = list(arguments) if arguments is not None else sys.argv[1:]
    command = shlex.join(["python", "-m", "weft_server.demo.train_base", *given])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    save(model, wrapped, options.out, provenance_text(settings, scores, num_parameters, wall_s, command))
    return 0 if accuracy >= 0.9 else 1


if __name__ == "__main__":
    raise SystemExit(main())
