"""Weft as a contender: one `Engine`, stepped in this process, under any of the policies.

Inference and finetuning belong to one tenant, so that shares between tenants, which no other contender has,
decide nothing here. Imports what a bare GPU machine has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from weft_scheduler.budget import BudgetController, LatencyTargets
from weft_scheduler.draft import PlanDraft
from weft_scheduler.policies import AlternatingPolicy, Policy, WeftPolicy
from weft_scheduler.state import SchedulerState
from weft_scheduler.training_policy import plan_training
from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.paths import MODULES
from weft_server.adapters.peft import write_peft
from weft_server.bench.coserve.checks import Check, FirstStep
from weft_server.bench.coserve.replay import Replay
from weft_server.bench.coserve.setup import Setup, make_adapters, make_dataset
from weft_server.bench.coserve.window import Outcome, TrainMeter, Window
from weft_server.bench.coserve.workload import BenchRequest, make_requests
from weft_server.bench.in_process import in_process_config
from weft_server.engine.build import assemble_engine
from weft_server.engine.config import EngineConfig
from weft_server.engine.jobs import BlobIO
from weft_server.engine.sizing import choose_device, use_device
from weft_server.model.loading import Quantization
from weft_server.model.weights import DecoderWeights
from weft_server.protocol import (
    Abort,
    AdapterRef,
    CancelJob,
    ChoiceDelta,
    FromEngine,
    Generate,
    JobFailed,
    JobProgress,
    JobSpec,
    JobStopped,
    LoraSpec,
    RequestFailed,
    SamplingParams,
    StartJob,
    StepOutput,
)

_TENANT = "bench"
_IDLE_S = 5e-4
_DEDICATED_PLAN_S = 1.0
_ENDLESS = 1_000_000_000


class DedicatedPolicy:
    """Finetuning and nothing else, in plans that are long enough not to cost it anything: the trainer's own
    machine.
    """

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """See `Policy.fill`."""
        del budget
        plan_training(state, draft, _DEDICATED_PLAN_S, is_due=False)
        return _DEDICATED_PLAN_S


@dataclass(slots=True)
class MeteredPolicy:
    """A policy that can be exchanged, and what it has planned of finetuning: tokens times layers."""

    num_layers: int
    policy: Policy = field(default_factory=WeftPolicy)
    forward: float = 0.0
    backward: float = 0.0

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """See `Policy.fill`."""
        budget_s = self.policy.fill(state, draft, budget)
        self.forward += draft.training_tally.forward_tokens * self.num_layers
        self.backward += draft.training_tally.backward_token_layers
        return budget_s

    def take(self) -> tuple[float, float]:
        """Forward and backward since the last call."""
        taken = (self.forward, self.backward)
        self.forward = self.backward = 0.0
        return taken


class WeftContender:
    """One engine over the given weights, with adapters and a dataset in memory."""

    def __init__(self, setup: Setup) -> None:
        """Builds and calibrates the engine."""
        self._setup = setup
        use_device(choose_device(setup.device))
        model = setup.random_model()
        weights = model.weft_weights(cast(Quantization, setup.quantization))
        self._blobs: dict[str, bytes] = {}
        self._policy = MeteredPolicy(weights.config.num_layers)
        built = assemble_engine(
            _config(setup, weights),
            weights,
            BlobIO(self._blobs.__getitem__, self._put),
            base_fingerprint="bench",
            policy=self._policy,
        )
        self._engine, self._scheduler = built.engine, built.scheduler
        self._adapters = [self._store(adapter) for adapter in make_adapters(setup, model)]
        self._dataset = self._put([make_dataset(setup)])
        self._job: str | None = None
        self._num_jobs = 0

    def _put(self, chunks: Iterable[bytes]) -> str:
        name = f"blob-{len(self._blobs)}"
        self._blobs[name] = b"".join(chunks)
        return name

    def _store(self, adapter: PackedAdapter) -> AdapterRef:
        config, tensors = write_peft(adapter, base_model_name="bench")
        return AdapterRef(adapter.digest, self._put([config]), self._put([tensors]), len(tensors))

    # ------------------------------------------------------------ the contender's commands

    def run(self, window: Window) -> Outcome:
        """Run one window."""
        requests = make_requests(window.workload) if window.workload else ()
        self._scheduler.set_targets(LatencyTargets(window.tpot_s, window.ttft_s))
        self._policy.policy = _POLICIES[window.policy]()
        self._set_training(window.trains)
        replay, meter = Replay(requests, window), TrainMeter(self._policy.num_layers)
        busy_s, num_iterations, num_decodes = 0.0, 0, 0
        self._engine.heartbeat()
        self._policy.take()
        while not replay.is_over:
            for request in replay.take_due():
                self._generate(request)
            deltas = self._step()
            for delta in deltas:
                replay.token(delta.request_id)
            if any(planned := self._policy.take()):
                meter.add(replay.now_s, forward=planned[0], backward=planned[1])
            if not self._engine.ran:
                time.sleep(replay.wait_s(_IDLE_S))
            for elapsed_s, _ in self._engine.heartbeat().iterations:
                end_s = replay.now_s
                busy_s += max(0.0, min(end_s, window.seconds) - max(end_s - elapsed_s, 0.0))
                num_iterations += 1
                num_decodes += len(deltas)
        for request_id in replay.open_ids:
            self._engine.handle(Abort(request_id))
        gauges = self._engine.heartbeat().gauges
        details = {
            "num_iterations": float(num_iterations),
            "tokens_per_iteration": num_decodes / max(1, num_iterations),
            "decode_budget_s": gauges["iteration_budget_seconds"],
            "cost_model_error_p50": gauges["cost_model_error_p50"],
            "cost_model_error_p95": gauges["cost_model_error_p95"],
        }
        return Outcome(replay.answers(), meter.between(0.0, window.seconds), busy_s, details)

    def answer_alone(self, requests: list[BenchRequest]) -> list[list[float]]:
        """Answer requests one after the other with nothing else running; seconds from sending to each
        token."""
        self._policy.policy = WeftPolicy()
        self._scheduler.set_targets(LatencyTargets(1.0, 5.0))
        self._set_training(False)
        times: list[list[float]] = []
        for request in requests:
            self._generate(request)
            started, own = time.monotonic(), list[float]()
            while len(own) < request.num_output_tokens:
                own += [time.monotonic() - started for _ in self._step()]
                if not self._engine.ran:
                    time.sleep(_IDLE_S)
            times.append(own)
        return times

    def check(self, requests: list[BenchRequest]) -> Check:
        """Log-probabilities of the requests' prompts, and the first optimizer step."""
        logprobs = []
        for request in requests:
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            self._engine.handle(self._message(request, params))
            while not (deltas := self._step()):
                time.sleep(_IDLE_S)
            entries = deltas[0].prompt_logprobs or []
            logprobs.append([entry.logprob for entry in entries if entry is not None])
        return Check(logprobs, self._first_step())

    def close(self) -> None:
        """Ends the engine's threads."""
        self._engine.close()

    # ------------------------------------------------------------ inside

    def _first_step(self) -> FirstStep:
        self._policy.policy = DedicatedPolicy()
        self._set_training(True)
        while True:
            for message in self._messages():
                if isinstance(message, JobProgress):
                    return FirstStep(message.train_loss, message.grad_norm)

    def _set_training(self, runs: bool) -> None:
        """Have a job, or none; waits until it is so."""
        if runs and self._job is None:
            self._num_jobs += 1
            self._job = f"job-{self._num_jobs}"
            spec, base = _job_spec(self._setup), self._adapters[0]
            self._engine.handle(StartJob(self._job, _TENANT, spec, self._dataset, 1, base_adapter=base))
        elif not runs and self._job is not None:
            self._engine.handle(CancelJob(self._job))
            self._job = None
            while not any(isinstance(message, JobStopped) for message in self._messages()):
                time.sleep(_IDLE_S)

    def _generate(self, request: BenchRequest) -> None:
        params = SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0)
        self._engine.handle(self._message(request, params))

    def _message(self, request: BenchRequest, params: SamplingParams) -> Generate:
        adapter = self._adapters[request.adapter_idx]
        return Generate(request.request_id, _TENANT, list(request.prompt), params, adapter=adapter)

    def _step(self) -> list[ChoiceDelta]:
        outputs = [message for message in self._messages() if isinstance(message, StepOutput)]
        return [delta for output in outputs for delta in output.deltas]

    def _messages(self) -> list[FromEngine]:
        """One iteration.

        Raises:
            RuntimeError: a request or job failed.
        """
        messages = self._engine.step()
        for message in messages:
            if isinstance(message, JobFailed | RequestFailed):
                raise RuntimeError(f"the engine failed a request or job: {message}")
        return messages


_POLICIES: dict[str, type[Policy]] = {
    "weft": WeftPolicy,
    "alternating": AlternatingPolicy,
    "dedicated": DedicatedPolicy,
}


def _config(setup: Setup, weights: DecoderWeights) -> EngineConfig:
    return in_process_config(
        device=setup.device,
        dtype=str(weights.dtype).removeprefix("torch."),
        quantization=setup.quantization,
        max_model_len=setup.max_model_len,
        max_num_seqs=setup.max_batch,
        tpot_slo_ms=1000.0,
        ttft_slo_ms=5000.0,
    )


def _job_spec(setup: Setup) -> JobSpec:
    return JobSpec(
        seed=setup.seed,
        num_epochs=_ENDLESS,
        batch_size=setup.examples_per_step,
        total_steps=_ENDLESS,
        learning_rate=setup.learning_rate,
        lr_scheduler="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        checkpoint_every=_ENDLESS,
        lora=LoraSpec(setup.rank, 2.0 * setup.rank, 0.0, MODULES),
    )
