"""The typed messages between the API process and the engine process.

Standard-library dataclasses alone, so that both sides import it without msgspec, sockets or torch;
`transport.py` encodes them as tagged MessagePack and stamps each with the engine's epoch. The engine knows
tokens, adapters and jobs by id; names, text and HTTP stay in the API process.

Everything durable is referred to by blob id: whoever writes a blob has made it durable before its id is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]
Tier: TypeAlias = Literal["default", "flex"]
LrScheduler: TypeAlias = Literal["linear", "cosine", "constant"]

# ---------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable adapter version: what the engine needs to fetch it and to key everything derived from
    it."""

    digest: str
    config_blob: str
    weights_blob: str
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one choice is sampled; every default is neutral. Validated by the API before it is sent.

    `stop_token_ids` already contains the end-of-sequence ids (unless the request ignores them). `logprobs` is
    the number of top alternatives to report besides the sampled token (0 = only the sampled token's), None =
    none. `prompt_logprobs` asks the same of every prompt token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the most likely alternatives at its position, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The adapter that a job trains. `target_modules` are Weft's module names, e.g. `q_proj`."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Resolved hyperparameters of a finetune job (no `auto` left). Steps count optimizer steps.

    An optimizer step is `batch_size` examples (fewer at the end of an epoch); `total_steps` is fixed at
    submission: min(max_steps, epochs · ceil(examples / batch_size)).
    """

    seed: int
    num_epochs: int
    batch_size: int
    total_steps: int
    learning_rate: float
    lr_scheduler: LrScheduler
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    checkpoint_every: int
    lora: LoraSpec
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8


# ---------------------------------------------------------------- API process → engine


@dataclass(frozen=True, slots=True)
class Generate:
    """Generate one choice. `generated` are tokens already sent to the client (after an engine restart).

    `remaining_s` counts from when the message is sent (the processes' clocks differ): what is unfinished
    then is dropped, with `RequestFailed` 504. Lower `priority` goes first within the tenant and tier.
    """

    request_id: str
    tenant: str
    prompt: list[int]
    sampling: SamplingParams
    choice_idx: int = 0
    adapter: AdapterRef | None = None
    generated: list[int] = field(default_factory=list)
    tier: Tier = "default"
    priority: int = 0
    remaining_s: float | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget this choice; nothing more is sent for it. Unknown ids are ignored (it may just have
    finished)."""

    request_id: str


@dataclass(frozen=True, slots=True)
class StartJob:
    """Run (or, with `checkpoint_blob`, continue) a finetune job on a tokenized dataset (`training/data.py`).

    `lease_epoch` fences: it is echoed in every message about the job, and the API drops messages of older
    epochs.
    """

    job_id: str
    tenant: str
    spec: JobSpec
    dataset_blob: str
    lease_epoch: int
    base_adapter: AdapterRef | None = None
    checkpoint_blob: str | None = None


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Stop a job; answered by `JobStopped`."""

    job_id: str


@dataclass(frozen=True, slots=True)
class CheckAdapter:
    """Validate an uploaded adapter strictly against the base; answered by `AdapterChecked` or
    `CheckFailed`."""

    check_id: str
    config_blob: str
    weights_blob: str


@dataclass(frozen=True, slots=True)
class SetTenantWeights:
    """New fair shares, by tenant; those of tenants not named stay."""

    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class SetTenantConcurrency:
    """How many choices of a tenant may run at a time; tenants not named have no such limit."""

    max_concurrency: dict[str, int]


@dataclass(frozen=True, slots=True)
class SetPinnedAdapters:
    """Keep exactly these adapters on the device, the first of them first, as far as pins have room there."""

    adapters: list[AdapterRef]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Checkpoint running jobs, then exit."""


# ---------------------------------------------------------------- engine → API process


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Sent once, when the base is loaded and calibrated. Sizes are tokens unless named otherwise.

    Pinned adapters may take `pinned_arena_bytes` of the adapter arena, and be `max_pinned_adapters`.
    """

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    max_batch_tokens: int
    kv_cache_tokens: int
    adapter_arena_bytes: int
    device: str
    dtype: str
    quantization: str
    base_fingerprint: str
    tpot_slo_ms: float
    ttft_slo_ms: float
    pinned_arena_bytes: int = 0
    max_pinned_adapters: int = 0


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine cannot start (bad model directory, out of memory, …); it exits after sending this."""

    message: str
    code: str


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """New tokens of one choice. `finish_reason` set means that this was the last delta.

    `stop` means that the last token of `token_ids` is one of the request's stop ids (it is included).
    `prompt_logprobs` comes once, in the first delta: one entry per prompt token, the first None. So does
    `num_cached_tokens`: how many of the prompt's tokens were in the prefix cache.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All deltas of one iteration."""

    deltas: list[ChoiceDelta]


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """One choice failed alone (its adapter could not be loaded, …). `status` and `code` as in `errors.py`."""

    request_id: str
    status: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class AdapterChecked:
    """The uploaded adapter fits the base."""

    check_id: str
    digest: str
    max_rank: int
    target_modules: list[str]
    num_parameters: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class CheckFailed:
    """The uploaded adapter is refused; the message names the key or feature."""

    check_id: str
    status: int
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """One finished optimizer step."""

    job_id: str
    lease_epoch: int
    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class JobCheckpointed:
    """A durable checkpoint taken after `step` optimizer steps."""

    job_id: str
    lease_epoch: int
    step: int
    blob: str


@dataclass(frozen=True, slots=True)
class JobSucceeded:
    """All steps are done and the adapter is durable in the blob store, in PEFT format."""

    job_id: str
    lease_epoch: int
    step: int
    trained_tokens: int
    adapter: AdapterRef
    max_rank: int
    target_modules: list[str]
    num_parameters: int


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The job failed alone (NaN loss, unreadable dataset, …)."""

    job_id: str
    lease_epoch: int
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class JobStopped:
    """A cancelled job has left the engine."""

    job_id: str
    lease_epoch: int


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """A tenant's choices that wait for admission, and the predicted seconds until all have been admitted."""

    num_waiting: int
    drain_s: float


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent at least once a second, also while a long iteration runs (but not while one hangs): the engine's
    gauges and counters.

    `gauges` and `counters` are keyed by metric name without prefix (`num_requests_running`,
    `finetune_tokens`, …); counters are cumulative within the engine's epoch. `iterations` are (seconds,
    predicted seconds) since the last one. `queues` are the longest queues, by tenant, 64 at most.
    """

    iteration: int
    gauges: dict[str, float]
    counters: dict[str, float]
    iterations: list[tuple[float, float]] = field(default_factory=list)
    queues: dict[str, TenantQueue] = field(default_factory=dict)


ToEngine: TypeAlias = (
    Generate
    | Abort
    | StartJob
    | CancelJob
    | CheckAdapter
    | SetTenantWeights
    | SetTenantConcurrency
    | SetPinnedAdapters
    | Shutdown
)
FromEngine: TypeAlias = (
    EngineReady
    | EngineFailed
    | StepOutput
    | RequestFailed
    | AdapterChecked
    | CheckFailed
    | JobProgress
    | JobCheckpointed
    | JobSucceeded
    | JobFailed
    | JobStopped
    | Heartbeat
)
