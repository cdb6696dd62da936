"""The real engine in this process, over random weights and with its blobs in memory: what requests and jobs
go through, without sockets.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import safetensors.numpy
import safetensors.torch
from torch import Tensor

from weft_scheduler.policies import Policy
from weft_server.adapters.packed import PackedAdapter
from weft_server.adapters.peft import write_peft
from weft_server.bench.in_process import in_process_config
from weft_server.bench.report import BenchError
from weft_server.engine.build import assemble_engine
from weft_server.engine.jobs import BlobIO
from weft_server.model.weights import DecoderWeights
from weft_server.protocol import (
    AdapterRef,
    CancelJob,
    FromEngine,
    Generate,
    JobCheckpointed,
    JobFailed,
    JobProgress,
    JobSpec,
    JobStopped,
    RequestFailed,
    SamplingParams,
    StartJob,
    StepOutput,
)

_POLL_S = 2e-4
_MAX_IDLE_S = 60.0
_MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Generation:
    """What a batch of requests got, and when.

    `tokens` and `logprobs` are by request. `first_s` is the time until the last of them had its first token;
    `decode_s` what the `num_decoded` tokens after that took.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    first_s: float
    decode_s: float
    num_decoded: int


class BenchEngine:
    """One engine, single-threaded: whoever calls steps it.

    Args:
        weights: the frozen base.
        max_num_seqs: sequences that run at a time.
        cache_tokens: tokens of the KV cache.
        arena_bytes: of the adapter arena.
        policy: how iterations are shared; a server's by default.
        enforce_eager: on a GPU, launch kernels one by one.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        max_num_seqs: int,
        cache_tokens: int,
        arena_bytes: int,
        policy: Policy | None = None,
        enforce_eager: bool = False,
    ) -> None:
        self._blobs: dict[str, bytes] = {}
        config = in_process_config(
            max_model_len=min(cache_tokens, weights.config.max_position_embeddings),
            max_num_seqs=max_num_seqs,
            kv_cache_tokens=cache_tokens,
            adapter_arena_mb=max(1, -(-arena_bytes // _MB)),
            enforce_eager=enforce_eager,
        )
        blobs = BlobIO(self._blobs.__getitem__, self._put)
        built = assemble_engine(config, weights, blobs, base_fingerprint="bench", policy=policy)
        self._engine = built.engine
        self._num_batches = 0
        self._checkpoints: list[str] = []

    def store(self, adapter: PackedAdapter) -> AdapterRef:
        """Put an adapter where the engine fetches it from, as an upload would."""
        config_json, tensors = write_peft(adapter, base_model_name="bench")
        return AdapterRef(adapter.digest, self._put([config_json]), self._put([tensors]), len(tensors))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[AdapterRef | None],
        *,
        max_tokens: int,
        logprobs: bool = False,
    ) -> Generation:
        """Greedy answers of exactly `max_tokens` tokens, all requests sent at once.

        Raises:
            BenchError: a request failed.
        """
        self._num_batches += 1
        names = [f"request-{self._num_batches}-{idx}" for idx in range(len(prompts))]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=0 if logprobs else None)
        tokens: dict[str, list[int]] = defaultdict(list)
        logs: dict[str, list[float]] = defaultdict(list)
        started = time.perf_counter()
        for name, prompt, adapter in zip(names, prompts, adapters, strict=True):
            self._engine.handle(Generate(name, "reader", list(prompt), params, adapter=adapter))
        first_s, num_before = 0.0, 0
        while any(len(tokens[name]) < max_tokens for name in names):
            for message in self._step():
                if isinstance(message, StepOutput):
                    for delta in message.deltas:
                        tokens[delta.request_id] += delta.token_ids
                        logs[delta.request_id] += [entry.logprob for entry in delta.logprobs or ()]
            if not first_s and all(tokens[name] for name in names):
                first_s = time.perf_counter() - started
                num_before = sum(map(len, tokens.values()))
        return Generation(
            tokens=[tokens[name] for name in names],
            logprobs=[logs[name] for name in names],
            first_s=first_s,
            decode_s=time.perf_counter() - started - first_s,
            num_decoded=len(names) * max_tokens - num_before,
        )

    def start_job(
        self, job_id: str, spec: JobSpec, examples: Sequence[Sequence[int]], adapter: AdapterRef
    ) -> None:
        """Begin a job that trains on every token of the examples, starting from an adapter."""
        dataset = self._put([dataset_blob(examples)])
        self._engine.handle(StartJob(job_id, "trainer", spec, dataset, 1, base_adapter=adapter))

    def cancel_job(self, job_id: str) -> None:
        """End a job and wait until it has left the engine."""
        self._engine.handle(CancelJob(job_id))
        while not any(isinstance(message, JobStopped) for message in self._step()):
            pass

    def train(self, num_steps: int) -> list[JobProgress]:
        """Iterate until so many further optimizer steps were reported.

        Raises:
            BenchError: a job failed.
        """
        reports: list[JobProgress] = []
        while len(reports) < num_steps:
            for message in self._step():
                if isinstance(message, JobFailed):
                    raise BenchError(f"the finetune job failed: {message.message}")
                if isinstance(message, JobProgress):
                    reports.append(message)
        return reports

    def checkpoint(self) -> dict[str, Tensor]:
        """The optimizer's vectors (`master`, `m`, `v`) in the newest checkpoint; waits for one."""
        while not self._checkpoints:
            self._step()
        tensors: dict[str, Tensor] = safetensors.torch.load(self._blobs[self._checkpoints[-1]])
        return tensors

    def close(self) -> None:
        """Stop its threads."""
        self._engine.close()

    def _step(self) -> list[FromEngine]:
        """Iterate until something was computed; background work is given time."""
        deadline = time.perf_counter() + _MAX_IDLE_S
        for _ in count():
            messages = self._engine.step()
            for message in messages:
                if isinstance(message, RequestFailed):
                    raise BenchError(f"request {message.request_id} failed: {message.message}")
                if isinstance(message, JobCheckpointed):
                    self._checkpoints.append(message.blob)
            if self._engine.ran or messages:
                return messages
            if time.perf_counter() > deadline:
                break
            time.sleep(_POLL_S)
        raise BenchError("the engine has not computed anything for a minute")

    def _put(self, chunks: Iterable[bytes]) -> str:
        name = f"blob-{len(self._blobs)}"
        self._blobs[name] = b"".join(chunks)
        return name


def dataset_blob(examples: Sequence[Sequence[int]]) -> bytes:
    """Tokenized examples as the engine reads them; every token but an example's first is a target."""
    offsets = np.cumsum([0, *map(len, examples)], dtype=np.int64)
    blob: bytes = safetensors.numpy.save(
        {
            "tokens": np.concatenate([np.asarray(example, dtype=np.int32) for example in examples]),
            "targets": np.ones(int(offsets[-1]), dtype=np.uint8),
            "offsets": offsets,
            "lines": np.arange(1, len(examples) + 1, dtype=np.int32),
        }
    )
    return blob


def random_tokens(num_sequences: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids, uniform over the vocabulary."""
    rng = np.random.default_rng((seed, num_sequences, length))
    tokens: list[list[int]] = rng.integers(0, vocab_size, (num_sequences, length)).tolist()
    return tokens
