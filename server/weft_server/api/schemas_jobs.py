"""Wire forms of finetune jobs: OpenAI's objects, and Weft's `weft` object inside them.

Owns the fields and their types; ranges and what contradicts what are `service/hyperparameters.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from weft_server.api.bodies import NeutralValues, invalid_body, read_json_object, strip_unsupported
from weft_server.api.idempotency import idempotency_key
from weft_server.errors import InvalidRequest
from weft_server.protocol import LrScheduler
from weft_server.service.hyperparameters import (
    BASE_LEARNING_RATE,
    MODULES,
    HyperparameterRequest,
    LoraRequest,
    Overlength,
)
from weft_server.service.job_records import Job
from weft_server.service.jobs import JobEvent, NewJob

MAX_METADATA_PAIRS = 16

Model = TypeVar("Model", bound=BaseModel)


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


_Auto = Literal["auto"]
_AutoInt = Annotated[int | None, BeforeValidator(_auto_is_none, json_schema_input_type=int | _Auto | None)]
_AutoFloat = Annotated[
    float | None, BeforeValidator(_auto_is_none, json_schema_input_type=float | _Auto | None)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SupervisedHyperparameters(_Strict):
    """OpenAI's; `"auto"` and null are Weft's choice."""

    batch_size: _AutoInt = None
    learning_rate_multiplier: _AutoFloat = None
    n_epochs: _AutoInt = None


class SupervisedMethod(_Strict):
    """`method.supervised`."""

    hyperparameters: SupervisedHyperparameters | None = None


class Method(_Strict):
    """`method`; the other types are refused before this is read."""

    type: Literal["supervised"]
    supervised: SupervisedMethod | None = None


class CreateJobRequest(_Strict):
    """POST /v1/fine_tuning/jobs, without the `weft` object."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: Annotated[str, Field(min_length=1, max_length=256)]
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    method: Method | None = None

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and len(value) > MAX_METADATA_PAIRS:
            raise ValueError(f"It has {len(value)} pairs; at most {MAX_METADATA_PAIRS} are allowed")
        for key, item in (value or {}).items():
            if len(key) > 64 or len(item) > 512:
                raise ValueError("A key has at most 64 characters and a value at most 512")
        return value


class LoraOptions(_Strict):
    """`weft.lora`."""

    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: list[str] | None = None
    use_rslora: bool | None = None

    @field_validator(
        "target_modules", mode="before", json_schema_input_type=Literal["all-linear"] | list[str] | None
    )
    @classmethod
    def _check_target_modules(cls, value: Any) -> Any:
        if value == "all-linear":
            return list(MODULES)
        if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise ValueError('Must be "all-linear" or a list of module names')


class WeftOptions(_Strict):
    """The `weft` object of a new job."""

    adapter_name: str | None = None
    lora: LoraOptions | None = None
    learning_rate: float | None = None
    lr_scheduler: LrScheduler | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_seq_length: int | None = None
    overlength: Overlength | None = None
    checkpoint_every: int | None = None
    max_steps: int | None = None


class JobBody(CreateJobRequest):
    """POST /v1/fine_tuning/jobs as a whole; its two parts are read apart because their errors differ."""

    weft: WeftOptions | None = None


def _never(_value: Any) -> bool:
    return False


def _is_empty_list(value: Any) -> bool:
    return bool(value == [])


_NEUTRAL: NeutralValues = {"validation_file": _never, "integrations": _is_empty_list}


async def read_new_job(request: Request) -> NewJob:
    """The body of POST /v1/fine_tuning/jobs: 400 for what is wrong in OpenAI's fields, 422 inside `weft`."""
    body = await read_json_object(request)
    idempotency = idempotency_key(request, "fine_tuning.job", body)
    weft = body.pop("weft", None)
    options = _validated(WeftOptions, {} if weft is None else weft, status=422, prefix=("weft",))
    _refuse_other_methods(body.get("method"))
    openai = _validated(CreateJobRequest, strip_unsupported(body, CreateJobRequest, _NEUTRAL), status=400)
    return NewJob(
        model=openai.model,
        training_file=openai.training_file,
        suffix=openai.suffix,
        adapter_name=options.adapter_name,
        metadata=openai.metadata,
        hyperparameters=_hyperparameters(openai, options),
        idempotency=idempotency,
    )


def _validated(model: type[Model], value: Any, *, status: int, prefix: tuple[str | int, ...] = ()) -> Model:
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        raise invalid_body(error, status=status, prefix=prefix) from None


def _refuse_other_methods(method: Any) -> None:
    if not isinstance(method, Mapping):
        return
    for name in ("dpo", "reinforcement"):
        if method.get("type") == name or method.get(name) is not None:
            param = "method.type" if method.get("type") == name else f"method.{name}"
            raise InvalidRequest(
                f"Unsupported parameter: '{param}' asks for {name}; Weft implements the method 'supervised'.",
                param=param,
                code="unsupported_parameter",
            )


def _hyperparameters(openai: CreateJobRequest, options: WeftOptions) -> HyperparameterRequest:
    given = _openai_hyperparameters(openai)
    lora = options.lora or LoraOptions()
    return HyperparameterRequest(
        num_epochs=given.n_epochs,
        batch_size=given.batch_size,
        learning_rate_multiplier=given.learning_rate_multiplier,
        learning_rate=options.learning_rate,
        lr_scheduler=options.lr_scheduler,
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        max_seq_length=options.max_seq_length,
        overlength=options.overlength,
        checkpoint_every=options.checkpoint_every,
        max_steps=options.max_steps,
        seed=openai.seed,
        lora=LoraRequest(
            rank=lora.r,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=None if lora.target_modules is None else tuple(lora.target_modules),
            use_rslora=lora.use_rslora,
        ),
    )


def _openai_hyperparameters(openai: CreateJobRequest) -> SupervisedHyperparameters:
    supervised = None if openai.method is None else openai.method.supervised
    current = None if supervised is None else supervised.hyperparameters
    if current is not None and openai.hyperparameters is not None and current != openai.hyperparameters:
        raise InvalidRequest(
            "Both 'hyperparameters' (deprecated) and 'method.supervised.hyperparameters' are given and "
            "differ; give the latter alone.",
            param="hyperparameters",
            code="conflicting_parameters",
        )
    return current or openai.hyperparameters or SupervisedHyperparameters()


def job_object(job: Job) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`, and a `weft` object beside its fields."""
    hyperparameters = _reported_hyperparameters(job)
    error = job.error
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish(),
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "status": job.status,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "training_file": job.training_file,
        "validation_file": None,
        "result_files": [],
        "trained_tokens": job.trained_tokens,
        "seed": job.seed,
        "error": None
        if error is None
        else {"code": error.code, "message": error.message, "param": error.param},
        "integrations": [],
        "metadata": job.metadata,
        "suffix": job.suffix,
        "weft": _weft_object(job),
    }


def event_object(event: JobEvent) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.event`."""
    return {"id": event.id, "object": "fine_tuning.job.event", **event.value}


def _reported_hyperparameters(job: Job) -> dict[str, Any]:
    asked, spec = job.hyperparameters, job.spec
    if spec is not None:
        return {
            "n_epochs": spec.num_epochs,
            "batch_size": spec.batch_size,
            "learning_rate_multiplier": asked.learning_rate_multiplier
            if asked.learning_rate_multiplier is not None
            else spec.learning_rate / BASE_LEARNING_RATE,
        }
    return {
        "n_epochs": _or_auto(asked.num_epochs),
        "batch_size": _or_auto(asked.batch_size),
        "learning_rate_multiplier": _or_auto(asked.learning_rate_multiplier),
    }


def _weft_object(job: Job) -> dict[str, Any]:
    lora, spec, asked = job.lora, job.spec, job.hyperparameters
    shown: dict[str, Any] = {
        "adapter_name": job.adapter_name,
        "lora": {
            "r": lora.rank,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "target_modules": list(lora.target_modules),
            "use_rslora": lora.use_rslora,
        },
        "max_seq_length": job.max_seq_length,
        "overlength": asked.overlength or "error",
        "max_steps": asked.max_steps,
        "step": job.step,
        "checkpoint_step": job.checkpoint_step,
    }
    if spec is not None:
        shown |= {
            "total_steps": spec.total_steps,
            "learning_rate": spec.learning_rate,
            "lr_scheduler": spec.lr_scheduler,
            "warmup_ratio": spec.warmup_ratio,
            "weight_decay": spec.weight_decay,
            "max_grad_norm": spec.max_grad_norm,
            "checkpoint_every": spec.checkpoint_every,
        }
    return shown


def _or_auto(value: float | None) -> float | Literal["auto"]:
    return "auto" if value is None else value
