"""How a finetune job trains: what the caller asked for, checked, and what it resolves to.

`HyperparameterRequest` is the request as given, `None` standing for "auto"; `resolve` turns it into the
engine's `JobSpec` once the number of examples is known. Owns the defaults and ranges. Knows nothing of HTTP
bodies, stores or tokens.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from weft_server.errors import InvalidRequest, Unprocessable
from weft_server.protocol import JobSpec, LoraSpec, LrScheduler

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE_LEARNING_RATE = 2e-4
DEFAULT_NUM_EPOCHS = 3
DEFAULT_RANK = 16
DEFAULT_ALPHA = 32.0
DEFAULT_WARMUP_RATIO = 0.03
DEFAULT_MAX_GRAD_NORM = 1.0
DEFAULT_MAX_SEQ_LENGTH = 2048
MAX_RANK = 256
MAX_SEED = 2**63 - 1

Value = TypeVar("Value")
Overlength: TypeAlias = Literal["error", "truncate", "drop"]


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """The adapter's shape as asked for; None is the default (or, continuing an adapter, that adapter's)."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] | None = None
    use_rslora: bool | None = None


@dataclass(frozen=True, slots=True)
class HyperparameterRequest:
    """Hyperparameters as asked for; None is "auto" or absent. `learning_rate` excludes the multiplier."""

    num_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    learning_rate: float | None = None
    lr_scheduler: LrScheduler | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_seq_length: int | None = None
    overlength: Overlength | None = None
    checkpoint_every: int | None = None
    max_steps: int | None = None
    seed: int | None = None
    lora: LoraRequest = field(default_factory=LoraRequest)

    def to_value(self) -> dict[str, Any]:
        """As stored in a job's record."""
        return asdict(self)

    @classmethod
    def from_value(cls, value: dict[str, Any]) -> HyperparameterRequest:
        """From a job's record."""
        lora = dict(value["lora"])
        if lora["target_modules"] is not None:
            lora["target_modules"] = tuple(lora["target_modules"])
        return cls(**{**value, "lora": LoraRequest(**lora)})


@dataclass(frozen=True, slots=True)
class _Range:
    """Allowed values of one number; `openai` tells whose object it stands in (400) from Weft's own (422)."""

    param: str
    low: float
    high: float
    above: bool = False
    openai: bool = False

    def check(self, value: float) -> None:
        inside = (value > self.low if self.above else value >= self.low) and value <= self.high
        if math.isfinite(value) and inside:
            return
        # Exact: a rounded value may look as if it were within the bounds.
        bound = f"greater than {self.low}" if self.above else f"at least {self.low}"
        message = f"{self.param} is {value}; it must be {bound} and at most {self.high}."
        error = InvalidRequest if self.openai else Unprocessable
        raise error(message, param=self.param)


_RANGES = {
    "num_epochs": _Range("hyperparameters.n_epochs", 1, 1000, openai=True),
    "batch_size": _Range("hyperparameters.batch_size", 1, 1024, openai=True),
    "learning_rate_multiplier": _Range(
        "hyperparameters.learning_rate_multiplier", 0, 1000, above=True, openai=True
    ),
    "learning_rate": _Range("weft.learning_rate", 0, 1, above=True),
    "warmup_ratio": _Range("weft.warmup_ratio", 0, 1),
    "weight_decay": _Range("weft.weight_decay", 0, 10),
    "max_grad_norm": _Range("weft.max_grad_norm", 0, 1_000_000_000, above=True),
    "max_seq_length": _Range("weft.max_seq_length", 2, 2**31 - 1),
    "checkpoint_every": _Range("weft.checkpoint_every", 1, 1_000_000),
    "max_steps": _Range("weft.max_steps", 1, 100_000_000),
    "seed": _Range("seed", 0, MAX_SEED, openai=True),
}
_LORA_RANGES = {
    "rank": _Range("weft.lora.r", 1, MAX_RANK),
    "alpha": _Range("weft.lora.alpha", 0, 65536, above=True),
}


def validate(request: HyperparameterRequest, *, context_tokens: int) -> None:
    """Check every value that can be checked before the data is read.

    Args:
        request: what the caller asked for.
        context_tokens: the longest sequence that the engine takes.

    Raises:
        InvalidRequest: a value of OpenAI's is out of range, or two settings contradict each other.
        Unprocessable: a value of the `weft` object is out of range.
    """
    if request.learning_rate is not None and request.learning_rate_multiplier is not None:
        raise InvalidRequest(
            "Both weft.learning_rate and learning_rate_multiplier are given; give one "
            f"(the multiplier multiplies {BASE_LEARNING_RATE:g}).",
            param="weft.learning_rate",
            code="conflicting_parameters",
        )
    for name, bounds in _RANGES.items():
        value = getattr(request, name)
        if value is not None:
            bounds.check(value)
    _validate_choices(request)
    _validate_lora(request.lora)
    if request.max_seq_length is not None and request.max_seq_length > context_tokens:
        raise Unprocessable(
            f"weft.max_seq_length is {request.max_seq_length}, but the model's context here is "
            f"{context_tokens} tokens; give at most that.",
            param="weft.max_seq_length",
        )


def _validate_choices(request: HyperparameterRequest) -> None:
    for param, value, allowed in (
        ("weft.lr_scheduler", request.lr_scheduler, get_args(LrScheduler)),
        ("weft.overlength", request.overlength, get_args(Overlength)),
    ):
        if value is not None and value not in allowed:
            raise Unprocessable(f"{param} is {value!r}; it must be one of {', '.join(allowed)}.", param=param)


def _validate_lora(lora: LoraRequest) -> None:
    for name, bounds in _LORA_RANGES.items():
        value = getattr(lora, name)
        if value is not None:
            bounds.check(value)
    if lora.dropout is not None and not 0 <= lora.dropout < 1:
        raise Unprocessable(
            f"weft.lora.dropout is {lora.dropout}; it must be at least 0 and less than 1.",
            param="weft.lora.dropout",
        )
    if lora.target_modules is not None:
        _validate_target_modules(lora.target_modules)


def _validate_target_modules(names: tuple[str, ...]) -> None:
    param = "weft.lora.target_modules"
    unknown = [name for name in names if name not in MODULES]
    if unknown:
        raise Unprocessable(
            f'{param} names {", ".join(map(repr, unknown))}; it must be "all-linear" or a list of '
            f"{', '.join(MODULES)}.",
            param=param,
        )
    if not names or len(set(names)) != len(names):
        raise Unprocessable(f"{param} must name at least one module, and each only once.", param=param)


def max_seq_length(request: HyperparameterRequest, *, context_tokens: int) -> int:
    """The longest example in tokens: as asked for, else the context but at most 2048."""
    if request.max_seq_length is not None:
        return request.max_seq_length
    return min(context_tokens, DEFAULT_MAX_SEQ_LENGTH)


def seed_of(request: HyperparameterRequest, job_id: str) -> int:
    """The job's seed: as asked for, else derived from the job's id."""
    if request.seed is not None:
        return request.seed
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4], "big") & 0x7FFFFFFF


def learning_rate_of(request: HyperparameterRequest) -> float:
    """The peak learning rate."""
    if request.learning_rate is not None:
        return request.learning_rate
    return BASE_LEARNING_RATE * _or(request.learning_rate_multiplier, 1.0)


def lora_of(request: LoraRequest, continued: LoraSpec | None = None) -> LoraSpec:
    """The adapter to train.

    Args:
        request: the shape asked for.
        continued: shape of the adapter that the job goes on training, whose shape is given; only dropout,
            which is
            no part of it, may differ.

    Raises:
        InvalidRequest: the request contradicts the continued adapter.
    """
    if continued is None:
        return LoraSpec(
            rank=_or(request.rank, DEFAULT_RANK),
            alpha=_or(request.alpha, DEFAULT_ALPHA),
            dropout=_or(request.dropout, 0.0),
            target_modules=_in_order(_or(request.target_modules, MODULES)),
            use_rslora=_or(request.use_rslora, False),
        )
    for asked, given, param in (
        (request.rank, continued.rank, "weft.lora.r"),
        (request.alpha, continued.alpha, "weft.lora.alpha"),
        (_ordered(request.target_modules), _in_order(continued.target_modules), "weft.lora.target_modules"),
        (request.use_rslora, continued.use_rslora, "weft.lora.use_rslora"),
    ):
        if asked is not None and asked != given:
            raise InvalidRequest(
                f"{param} is {_plain(asked)}, but the adapter that the job continues has {_plain(given)}; "
                "leave it out, or train a new adapter from the base model.",
                param=param,
            )
    return LoraSpec(
        rank=continued.rank,
        alpha=continued.alpha,
        dropout=_or(request.dropout, continued.dropout),
        target_modules=continued.target_modules,
        use_rslora=continued.use_rslora,
    )


def resolve(request: HyperparameterRequest, *, job_id: str, lora: LoraSpec, num_examples: int) -> JobSpec:
    """Decide everything that was left to Weft.

    Args:
        request: validated hyperparameters.
        job_id: source of the seed where none was given.
        lora: as `lora_of` decided at submission.
        num_examples: examples in the tokenized dataset, at least 1.

    Returns:
        The spec; `total_steps` is min(max_steps, epochs · ceil(examples / batch_size)).
    """
    batch_size = _or(request.batch_size, min(max(num_examples // 64, 1), 16))
    num_epochs = _or(request.num_epochs, DEFAULT_NUM_EPOCHS)
    total_steps = num_epochs * math.ceil(num_examples / batch_size)
    if request.max_steps is not None:
        total_steps = min(total_steps, request.max_steps)
    return JobSpec(
        seed=seed_of(request, job_id),
        num_epochs=num_epochs,
        batch_size=batch_size,
        total_steps=total_steps,
        learning_rate=learning_rate_of(request),
        lr_scheduler=_or(request.lr_scheduler, "linear"),
        warmup_ratio=_or(request.warmup_ratio, DEFAULT_WARMUP_RATIO),
        weight_decay=_or(request.weight_decay, 0.0),
        max_grad_norm=_or(request.max_grad_norm, DEFAULT_MAX_GRAD_NORM),
        checkpoint_every=_or(request.checkpoint_every, default_checkpoint_every(total_steps)),
        lora=lora,
    )


def default_checkpoint_every(total_steps: int) -> int:
    """About ten checkpoints a job, but no more often than every 10 steps, no more rarely than every 100."""
    return min(max(math.ceil(total_steps / 10), 10), 100)


def spec_to_value(spec: JobSpec) -> dict[str, Any]:
    """As stored in a job's record."""
    return asdict(spec)


def spec_from_value(value: dict[str, Any]) -> JobSpec:
    """From a job's record."""
    return JobSpec(**{**value, "lora": lora_from_value(value["lora"])})


def lora_from_value(value: dict[str, Any]) -> LoraSpec:
    """From a job's record."""
    return LoraSpec(**{**value, "target_modules": tuple(value["target_modules"])})


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in MODULES if name in names)


def _ordered(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if names is None else _in_order(names)


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
