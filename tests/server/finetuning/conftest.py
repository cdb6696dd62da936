"""Finetuning without an engine: real stores, tokenizer, app and sockets around a scripted `EnginePort`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import tokenizers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers, trainers

from weft_server import protocol
from weft_server.api.app import create_app
from weft_server.config import load_settings
from weft_server.errors import InvalidRequest, Unavailable
from weft_server.metrics import Metrics
from weft_server.service.adapters import AdapterService
from weft_server.service.engine_port import JobHandler, JobMessage, RestartHandler
from weft_server.service.files import FileService
from weft_server.service.generation import GenerationService
from weft_server.service.jobs import JobService
from weft_server.service.models import ModelService
from weft_server.service.sampling import GenerationDefaults
from weft_server.service.services import Services
from weft_server.service.tenants import TenantRegistry, new_key
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.opening import Store, open_store

BASE = "tiny-base"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INFO = protocol.EngineReady(
    max_model_len=512,
    vocab_size=400,
    max_num_seqs=8,
    max_batch_tokens=256,
    kv_cache_tokens=4096,
    adapter_arena_bytes=1 << 20,
    device="cpu",
    dtype="float32",
    quantization="none",
    base_fingerprint="base-1",
    tpot_slo_ms=50.0,
    ttft_slo_ms=2000.0,
    pinned_arena_bytes=20_000,
    max_pinned_adapters=5,
)
Result = TypeVar("Result")


class ScriptedEngine:
    """An `EnginePort` that records what it is sent and says what a test tells it to."""

    def __init__(self) -> None:
        self.info: protocol.EngineReady | None = INFO
        self.ready = True
        self.started: list[protocol.StartJob] = []
        self.cancelled: list[str] = []
        self.pinned: list[list[str]] = []
        self._job_handlers: list[JobHandler] = []
        self._restart_handlers: list[RestartHandler] = []

    @property
    def why_not_ready(self) -> str | None:
        return None if self.ready else "the engine is loading the base model"

    async def generate(self, request: protocol.Generate) -> AsyncGenerator[protocol.ChoiceDelta, None]:
        yield protocol.ChoiceDelta(request.request_id, [1], finish_reason="length")

    async def check_adapter(self, config_blob: str, weights_blob: str) -> protocol.AdapterChecked:
        if not self.ready:
            raise Unavailable("the engine is loading", retry_after_s=2.0)
        if weights_blob == _blob_id(b"garbage"):
            raise InvalidRequest("adapter_model.safetensors is not safetensors.", code="invalid_adapter")
        digest = hashlib.sha256((config_blob + weights_blob).encode()).hexdigest()
        return protocol.AdapterChecked("check", digest, 8, ["q_proj", "v_proj"], 1024, 4096)

    async def start_job(self, message: protocol.StartJob) -> None:
        if not self.ready:
            raise Unavailable("the engine is loading", retry_after_s=2.0)
        self.started.append(message)

    async def cancel_job(self, job_id: str) -> None:
        self.cancelled.append(job_id)

    def set_tenant_concurrency(self, max_concurrency: Mapping[str, int]) -> None:
        del max_concurrency

    def set_tenant_weights(self, weights: Mapping[str, float]) -> None:
        del weights

    def set_pinned_adapters(self, adapters: Sequence[protocol.AdapterRef]) -> None:
        self.pinned.append([adapter.digest for adapter in adapters])

    def subscribe_jobs(self, handler: JobHandler) -> None:
        self._job_handlers.append(handler)

    def subscribe_restarts(self, handler: RestartHandler) -> None:
        self._restart_handlers.append(handler)

    async def say(self, *messages: JobMessage) -> None:
        for message in messages:
            for handler in self._job_handlers:
                await handler(message)

    async def restart(self, *guilty: str) -> None:
        self.ready = True
        for handler in self._restart_handlers:
            await handler(set(guilty))

    def run_of(self, job_id: str) -> protocol.StartJob:
        """The latest start of a job."""
        return [message for message in self.started if message.job_id == job_id][-1]


def _blob_id(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def make_progress(start: protocol.StartJob, step: int, **changes: Any) -> protocol.JobProgress:
    message = protocol.JobProgress(
        job_id=start.job_id,
        lease_epoch=start.lease_epoch,
        step=step,
        total_steps=start.spec.total_steps,
        train_loss=2.0 / step,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-4,
        grad_norm=0.75,
        tokens_per_second=1000.0,
        trained_tokens=10 * step,
    )
    return replace(message, **changes)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make_chat_lines(count: int = 3) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"count to {idx}"},
                {"role": "assistant", "content": "one"},
            ]
        }
        for idx in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE with a ChatML template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant system count to one two three"], trainer)
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"}, chat_template=CHATML)


@pytest.fixture
def progress() -> Callable[..., protocol.JobProgress]:
    """One finished step of a started job."""
    return make_progress


@pytest.fixture
def chat_lines() -> Callable[..., bytes]:
    """A training file of so many conversations."""
    return make_chat_lines


@dataclass
class Server:
    """The services of one server over a store; several may share one."""

    store: Store
    engine: ScriptedEngine
    files: FileService
    adapters: AdapterService
    jobs: JobService
    metrics: Metrics


@dataclass
class Kit:
    """What tests build with, so that they need not import from here."""

    base: str
    info: protocol.EngineReady
    store: Store
    tokenizer: Tokenizer
    progress: Callable[..., protocol.JobProgress]
    chat_lines: Callable[..., bytes]
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    until: Callable[..., Coroutine[Any, Any, None]]
    server: Callable[..., Server]


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 30))


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that another task brings about; awaitable conditions are awaited."""
    async with asyncio.timeout(10):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return
            await asyncio.sleep(0.005)


def _make_kit(store: Store, tokenizer: Tokenizer) -> Kit:
    def server(
        *,
        exclusive_store: bool = True,
        records: Any = None,
        adapter_root: Path | None = None,
        **options: Any,
    ) -> Server:
        engine = ScriptedEngine()
        metrics = Metrics(BASE)
        chosen = store.records if records is None else records
        adapters = AdapterService(
            chosen, store.blobs, engine, metrics, base_name=BASE, adapter_root=adapter_root
        )
        jobs = JobService(
            chosen,
            store.blobs,
            engine,
            tokenizer,
            adapters,
            metrics,
            base_name=BASE,
            exclusive_store=exclusive_store,
            **options,
        )
        return Server(store, engine, FileService(chosen, store.blobs), adapters, jobs, metrics)

    return Kit(BASE, INFO, store, tokenizer, make_progress, make_chat_lines, run_async, until, server)


@pytest.fixture
def kit(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Kit]:
    """Servers over one embedded store."""
    with open_store("sqlite", tmp_path / "data") as store:
        yield _make_kit(store, tokenizer)


@pytest.fixture
def redis_kit(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Kit]:
    """Servers over one real redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed")
        pytest.skip("redis-server is not installed")
    address = tmp_path / "redis.sock"
    options = ("--port", "0", "--unixsocket", str(address), "--dir", str(tmp_path), "--appendonly", "yes")
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not address.exists():
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.01)
        with open_store(f"unix://{address}", tmp_path / "data") as store:
            yield _make_kit(store, tokenizer)
    finally:
        process.terminate()
        process.wait(10)


@dataclass
class Live:
    """A listening server and its clients."""

    url: str
    engine: ScriptedEngine
    store: Store
    client: openai.OpenAI
    other: openai.OpenAI
    http: httpx.Client
    loop: asyncio.AbstractEventLoop
    adapter_root: Path
    upload_dir: Path
    base: str = BASE
    keys: list[str] = field(default_factory=list)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "nothing happened for 10 s"
            time.sleep(0.005)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Live]:
    """A server on a real socket with two tenants, acme and other."""
    folder = tmp_path_factory.mktemp("live")
    root = folder / "adapters"
    (root / "acme").mkdir(parents=True)
    keys = [new_key() for _ in range(2)]
    keys_file = folder / "keys.toml"
    keys_file.write_text(
        "".join(
            f'[[tenants]]\nname = "{name}"\nkeys = ["{key.digest}"]\n'
            for name, key in zip(("acme", "other"), keys, strict=True)
        )
    )
    settings = load_settings(
        {"model": "x", "data_dir": str(folder), "max_upload_mb": "1", "adapter_root": str(root)}, environ={}
    )
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with open_store("sqlite", folder / "data") as store:
        engine = ScriptedEngine()
        metrics = Metrics(BASE)
        registry = ModelService(store.records, BASE, 0)
        adapters = AdapterService(
            store.records,
            store.blobs,
            engine,
            metrics,
            base_name=BASE,
            adapter_root=root,
            pin_share=lambda _tenant: 0.5,
        )
        jobs = JobService(
            store.records,
            store.blobs,
            engine,
            tokenizer,
            adapters,
            metrics,
            base_name=BASE,
            exclusive_store=True,
        )
        services = Services(
            settings=settings,
            records=store.records,
            blobs=store.blobs,
            engine=engine,
            tokenizer=tokenizer,
            tenants=TenantRegistry(keys_file),
            models=registry,
            generation=GenerationService(engine, tokenizer, registry, GenerationDefaults(), metrics),
            files=FileService(store.records, store.blobs),
            jobs=jobs,
            adapters=adapters,
            metrics=metrics,
        )
        server = uvicorn.Server(uvicorn.Config(create_app(services), log_level="warning"))
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            await jobs.start()
            await server.serve(sockets=[listener])
            await jobs.aclose()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        clients = [
            openai.OpenAI(base_url=f"{url}/v1", api_key=key.secret, max_retries=0, timeout=20) for key in keys
        ]
        http = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {keys[0].secret}"}, timeout=20, trust_env=False
        )
        yield Live(url, engine, store, *clients, http, loop, root, settings.upload_dir)
        http.close()
        for client in clients:
            client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        loop.close()
