"""A Weft API over a real socket, a real embedded store, and an engine whose tokens a test scripts."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
import tokenizers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers, trainers

from weft_server import protocol
from weft_server.api.app import create_app
from weft_server.config import Settings, load_settings
from weft_server.errors import Conflict, InvalidRequest, WeftError
from weft_server.metrics import Metrics
from weft_server.service.admission import QueueLimits
from weft_server.service.engine_port import JobHandler, RestartHandler
from weft_server.service.generation import GenerationService
from weft_server.service.models import ADAPTER_KIND, ModelService
from weft_server.service.sampling import GenerationDefaults
from weft_server.service.services import Services
from weft_server.service.tenants import TenantRegistry
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.base import Create, Delete, RecordStore
from weft_server.store.opening import open_store

BASE = "base-model"
EOS = 2
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Script = Callable[[protocol.Generate], list[protocol.ChoiceDelta | WeftError | None]]
"""What the engine does for a request: deltas, an error, or None: wait until the generation is aborted."""


def engine_info(**changes: Any) -> protocol.EngineReady:
    values: dict[str, Any] = {
        "max_model_len": 128,
        "vocab_size": 400,
        "max_num_seqs": 16,
        "max_batch_tokens": 512,
        "kv_cache_tokens": 4096,
        "adapter_arena_bytes": 1 << 20,
        "device": "cpu",
        "dtype": "float32",
        "quantization": "none",
        "base_fingerprint": "f" * 64,
        "tpot_slo_ms": 50.0,
        "ttft_slo_ms": 2000.0,
    }
    return protocol.EngineReady(**{**values, **changes})


class ScriptedEngine:
    """Implements `EnginePort`; remembers what it was asked and what was aborted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.requests: list[protocol.Generate] = []
        self.aborted: list[str] = []
        self.abort_seen = threading.Event()
        self.info: protocol.EngineReady | None = engine_info()
        self.ready = True
        self.tenant_weights: dict[str, float] = {}
        self.tenant_concurrency: dict[str, int] = {}
        self.why_not_ready: str | None = None
        self.script: Script = lambda request: self.say(request, "Hello there!")

    def reset(self) -> None:
        self.__init__(self._tokenizer)  # type: ignore[misc]

    def say(
        self, request: protocol.Generate, text: str, *, end: bool = True, num_cached: int = 0
    ) -> list[protocol.ChoiceDelta | WeftError | None]:
        """One delta per token of `text`, obeying `max_tokens` and the stop ids; `num_cached` in the first."""
        ids = self._tokenizer.encode(text, add_special_tokens=False) + ([EOS] if end else [])
        sampling = request.sampling
        deltas: list[protocol.ChoiceDelta | WeftError | None] = []
        for count, token_id in enumerate(ids, start=1):
            reason: protocol.FinishReason | None = None
            if token_id in sampling.stop_token_ids:
                reason = "stop"
            elif count == sampling.max_tokens:
                reason = "length"
            prompt = None
            if count == 1 and sampling.prompt_logprobs is not None:
                prompt = [None, *(self._score(t, sampling.prompt_logprobs) for t in request.prompt[1:])]
            scored = None if sampling.logprobs is None else [self._score(token_id, sampling.logprobs)]
            cached = num_cached if count == 1 else None
            deltas.append(
                protocol.ChoiceDelta(request.request_id, [token_id], scored, reason, prompt, cached)
            )
            if reason is not None:
                return deltas
        return [*deltas, None]

    @staticmethod
    def _score(token_id: int, num_top: int) -> protocol.TokenLogprob:
        top = tuple(((token_id + rank) % 300, -0.5 - rank) for rank in range(num_top))
        return protocol.TokenLogprob(token_id, -0.5, top)

    async def generate(self, request: protocol.Generate) -> AsyncGenerator[protocol.ChoiceDelta, None]:
        self.requests.append(request)
        finished = False
        try:
            for item in self.script(request):
                if item is None:
                    await asyncio.Event().wait()
                elif isinstance(item, WeftError):
                    finished = True
                    raise item
                else:
                    finished = item.finish_reason is not None
                    yield item
                    await asyncio.sleep(0)
        finally:
            if not finished:
                self.aborted.append(request.request_id)
                self.abort_seen.set()

    async def check_adapter(self, config_blob: str, weights_blob: str) -> protocol.AdapterChecked:
        raise InvalidRequest("no adapter is scripted")

    async def start_job(self, message: protocol.StartJob) -> None:
        raise InvalidRequest("no job is scripted")

    async def cancel_job(self, job_id: str) -> None:
        return None

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        self.tenant_weights = dict(weights)

    def set_tenant_concurrency(self, max_concurrency: Mapping[str, int]) -> None:
        self.tenant_concurrency = dict(max_concurrency)

    def set_pinned_adapters(self, adapters: Sequence[protocol.AdapterRef]) -> None:
        return None

    def subscribe_jobs(self, handler: JobHandler) -> None:
        return None

    def subscribe_restarts(self, handler: RestartHandler) -> None:
        return None


class StoredAdapters:
    """The part of the adapter service that the model routes use."""

    def __init__(self, records: RecordStore) -> None:
        self._records = records

    async def delete(self, tenant: str, name: str) -> None:
        record = self._records.get(ADAPTER_KIND, tenant, name)
        if record is None:
            raise Conflict("gone")
        self._records.apply([Delete(record)])


@dataclass
class Api:
    """A running server and its parts."""

    url: str
    engine: ScriptedEngine
    tokenizer: Tokenizer
    services: Services
    server: uvicorn.Server
    keys_file: Path | None = None
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The real SDK, without its retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, **options)

    def store_adapter(self, tenant: str, name: str, newest: int = 1) -> None:
        """Write an adapter record with versions 1 to `newest`."""
        versions = {
            str(number): {
                "digest": f"digest-{name}-{number}",
                "config_blob": "sha256:c",
                "weights_blob": f"sha256:w{number}",
                "weights_bytes": 10,
                "created_at": 1000 + number,
                "max_rank": 8,
                "target_modules": ["q_proj"],
                "num_parameters": 4,
                "job_id": None,
            }
            for number in range(1, newest + 1)
        }
        value = {"name": name, "newest": newest, "versions": versions, "created_at": 1001}
        self.services.records.apply([Create(ADAPTER_KIND, tenant, name, value)])


@pytest.fixture(scope="session")
def api_tokenizer() -> Tokenizer:
    """A byte-level BPE with ChatML specials and template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Hello there! How are you? one two three"], trainer)
    return Tokenizer(
        backend,
        special_tokens={"eos_token": "<|im_end|>"},
        chat_template=CHATML,
    )


def make_services(
    tmp_path: Path,
    tokenizer: Tokenizer,
    *,
    keys_file: Path | None = None,
    defaults: GenerationDefaults | None = None,
    **flags: object,
) -> Services:
    """Services over an embedded store and a scripted engine."""
    given: dict[str, object] = {
        "model": "demo",
        "data_dir": str(tmp_path),
        "served_model_name": BASE,
        **flags,
    }
    if keys_file is not None:
        given["api_keys"] = str(keys_file)
    settings: Settings = load_settings(given, environ={})
    store = open_store("sqlite", tmp_path)
    engine = ScriptedEngine(tokenizer)
    metrics = Metrics(BASE)
    models_service = ModelService(store.records, BASE, 1_700_000_000)
    tenants = TenantRegistry(settings.api_keys)
    generation = GenerationService(
        engine,
        tokenizer,
        models_service,
        defaults or GenerationDefaults(),
        metrics,
        draw_seed=itertools.count(7).__next__,
        limits=QueueLimits.of(settings.max_queued_requests, settings.max_queued_requests_total),
        weights=lambda: tenants.weights,
    )
    return Services(
        settings=settings,
        records=store.records,
        blobs=store.blobs,
        engine=engine,
        tokenizer=tokenizer,
        tenants=tenants,
        models=models_service,
        generation=generation,
        files=cast(Any, None),
        jobs=cast(Any, None),
        adapters=cast(Any, StoredAdapters(store.records)),
        metrics=metrics,
    )


def run_api(services: Services, keys_file: Path | None = None) -> Iterator[Api]:
    """Serve in a thread on a free port until the generator is closed."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(services), host="127.0.0.1", port=0, log_level="warning")
    )
    started = threading.Event()
    startup = server.startup

    async def startup_and_tell(*arguments: Any, **options: Any) -> None:
        await startup(*arguments, **options)
        started.set()

    server.startup = startup_and_tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(30)
    port = server.servers[0].sockets[0].getsockname()[1]
    api = Api(
        f"http://127.0.0.1:{port}",
        cast(ScriptedEngine, services.engine),
        services.tokenizer,
        services,
        server,
        keys_file,
    )
    try:
        yield api
    finally:
        api.http.close()
        server.should_exit = True
        thread.join(30)
        services.records.close()


@pytest.fixture
def start_api(tmp_path: Path, api_tokenizer: Tokenizer) -> Iterator[Callable[..., Api]]:
    """Start a server with options of its own; `keys` is the text of a keys file."""
    with ExitStack() as stack:

        def start(*, keys: str | None = None, tokenizer: Tokenizer | None = None, **options: Any) -> Api:
            keys_file = None
            if keys is not None:
                keys_file = tmp_path / "keys.toml"
                keys_file.write_text(keys, encoding="utf-8")
            services = make_services(tmp_path, tokenizer or api_tokenizer, keys_file=keys_file, **options)
            return stack.enter_context(contextmanager(run_api)(services, keys_file))

        yield start


@pytest.fixture(scope="module")
def open_api(tmp_path_factory: pytest.TempPathFactory, api_tokenizer: Tokenizer) -> Iterator[Api]:
    """A server without keys."""
    yield from run_api(make_services(tmp_path_factory.mktemp("data"), api_tokenizer))


@pytest.fixture
def api(open_api: Api) -> Api:
    """The server without keys, its engine back to saying hello."""
    open_api.engine.reset()
    return open_api
