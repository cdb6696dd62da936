"""`weft serve`: wires stores, engine and services together and runs the API process until it is told to
stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from weft_server.api.app import create_app
from weft_server.config import Settings
from weft_server.engine.config import EngineConfig
from weft_server.errors import WeftError
from weft_server.log import configure_logging
from weft_server.metrics import Metrics
from weft_server.model.config import ModelConfig
from weft_server.model.hub import resolve_model
from weft_server.protocol import EngineReady
from weft_server.service.adapters import AdapterService
from weft_server.service.admission import QueueLimits
from weft_server.service.engine_client import EngineClient
from weft_server.service.engine_process import EngineLaunch
from weft_server.service.files import FileService
from weft_server.service.generation import GenerationService
from weft_server.service.jobs import JobService
from weft_server.service.models import ModelService
from weft_server.service.sampling import read_generation_defaults
from weft_server.service.services import Services
from weft_server.service.tenants import TenantRegistry
from weft_server.service.tokenizer import Tokenizer
from weft_server.store.lock import DataDirLock
from weft_server.store.opening import Store, open_store

log = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).parent / "demo" / "base_model"
_GRACE_S = 5
_COLLECT_INTERVAL_S = 3600.0
_EXIT_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 0}


class CannotServe(WeftError):
    """Serving cannot begin (a taken port, …): exit status 1."""

    default_code = "cannot_serve"


class StoppedWhileStarting(CannotServe):
    """A signal came before the engine was ready; `exit_status` is what the signal asks for."""

    def __init__(self, exit_status: int) -> None:
        super().__init__("stopped before the engine was ready")
        self.exit_status = exit_status


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is up: where it listens and what the engine announced."""

    url: str
    model_name: str
    info: EngineReady
    services: Services
    engine: EngineClient


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    Raises:
        WeftError: it cannot begin; nothing is left running.
    """
    configure_logging(settings.log_level)
    try:
        return asyncio.run(_serve(settings))
    except StoppedWhileStarting as error:
        return error.exit_status


async def _serve(settings: Settings) -> int:
    async with running_server(settings) as (server, stopped):
        print(_banner(server, settings), file=sys.stderr)
        print(f"Weft is ready: {server.url}", flush=True)
        return await stopped


@contextlib.asynccontextmanager
async def running_server(settings: Settings) -> AsyncIterator[tuple[RunningServer, asyncio.Future[int]]]:
    """A server from the moment it is ready; the future resolves to the exit status when a signal asks it to
    stop.

    Leaving the context stops it: open requests get a few seconds, jobs are checkpointed.

    Raises:
        WeftError: it cannot begin.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(settings.host, settings.port))
        model_dir = DEMO_MODEL if settings.model == "demo" else resolve_model(settings.model)
        ModelConfig.from_directory(model_dir)  # what is wrong with it is said before its tokenizer is
        stack.enter_context(DataDirLock(settings.data_dir))
        # What a crash may have left; where the system has unnamed files, there is nothing.
        shutil.rmtree(settings.upload_dir, ignore_errors=True)
        store = stack.enter_context(
            open_store(settings.store, settings.data_dir, redis_volatile=settings.redis_volatile)
        )
        services, engine = _wire(settings, model_dir, store)
        stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        with _exit_on_signals(stopped):
            async with _serving(services, engine, listener, stopped) as info:
                warning = vocabulary_warning(services.tokenizer.vocab_size, info.vocab_size)
                if warning is not None:
                    log.warning("%s", warning)
                host, port = listener.getsockname()[:2]
                url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
                yield RunningServer(url, services.models.base_name, info, services, engine), stopped


def vocabulary_warning(num_tokenizer_ids: int, num_model_ids: int) -> str | None:
    """What to say at start if the tokenizer may produce ids that the model has no embedding for."""
    if num_tokenizer_ids <= num_model_ids:
        return None
    return (
        f"the tokenizer knows {num_tokenizer_ids} tokens, the model {num_model_ids}: requests with one "
        f"of the others are refused; resize the model's embeddings or remove the added tokens"
    )


def _wire(settings: Settings, model_dir: Path, store: Store) -> tuple[Services, EngineClient]:
    name = settings.served_model_name or _base_name(settings)
    metrics = Metrics(name)
    tenants = TenantRegistry(settings.api_keys)
    engine = EngineClient(_launch(settings, model_dir, tenants), observer=metrics)
    tokenizer = Tokenizer.from_directory(model_dir, chat_template=settings.chat_template)
    models = ModelService(store.records, name, int(time.time()))
    defaults = read_generation_defaults(
        settings.generation_config or model_dir, required=settings.generation_config is not None
    )
    adapters = AdapterService(
        store.records,
        store.blobs,
        engine,
        metrics,
        base_name=name,
        adapter_root=settings.adapter_root,
        pin_share=tenants.share,
    )
    jobs = JobService(
        store.records,
        store.blobs,
        engine,
        tokenizer,
        adapters,
        metrics,
        base_name=name,
        exclusive_store=settings.store == "sqlite",
    )
    services = Services(
        settings=settings,
        records=store.records,
        blobs=store.blobs,
        engine=engine,
        tokenizer=tokenizer,
        tenants=tenants,
        models=models,
        generation=GenerationService(
            engine,
            tokenizer,
            models,
            defaults,
            metrics,
            limits=QueueLimits.of(settings.max_queued_requests, settings.max_queued_requests_total),
            weights=lambda: tenants.weights,
        ),
        files=FileService(store.records, store.blobs),
        jobs=jobs,
        adapters=adapters,
        metrics=metrics,
    )
    return services, engine


def _base_name(settings: Settings) -> str:
    """A directory's name, or the hub id itself."""
    if settings.model == "demo":
        return "weft-demo"
    directory = Path(settings.model)
    return directory.resolve().name if directory.is_dir() else settings.model


def _launch(settings: Settings, model_dir: Path, tenants: TenantRegistry) -> EngineLaunch:
    def config_json(epoch: int, receive_address: str, send_address: str, flight_record: Path) -> str:
        return EngineConfig(
            model_dir=str(model_dir),
            model_name=_base_name(settings),
            epoch=epoch,
            receive_address=receive_address,
            send_address=send_address,
            flight_record=str(flight_record),
            store_url=settings.store,
            data_dir=str(settings.data_dir),
            device=settings.device,
            dtype=settings.dtype,
            quantization=settings.quantization,
            low_memory=settings.low_memory,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_batch_tokens=settings.max_batch_tokens,
            kv_cache_tokens=settings.kv_cache_tokens,
            adapter_arena_mb=settings.adapter_arena_mb,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            tpot_slo_ms=settings.tpot_slo_ms,
            ttft_slo_ms=settings.ttft_slo_ms,
            slo_percentile=settings.slo_percentile,
            flex_tpot_slo_ms=settings.flex_tpot_slo_ms,
            flex_ttft_slo_ms=settings.flex_ttft_slo_ms,
            prefix_cache=not settings.no_prefix_cache,
            enforce_eager=settings.enforce_eager,
            tenant_weights=tenants.weights,
            tenant_max_concurrency=tenants.max_concurrency,
            log_level=settings.log_level,
        ).to_json()

    return EngineLaunch(config_json, settings.data_dir / "run")


@contextlib.asynccontextmanager
async def _serving(
    services: Services, engine: EngineClient, listener: socket.socket, stopped: asyncio.Future[int]
) -> AsyncIterator[EngineReady]:
    """HTTP and engine up; on leaving, requests first, then the engine, then what the jobs still have to
    record."""
    server = _Server(
        uvicorn.Config(
            create_app(services),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    await services.jobs.start()
    await engine.start()
    http = asyncio.create_task(server.serve(sockets=[listener]))
    collector = asyncio.create_task(_collect_forever(services))
    ready = asyncio.create_task(engine.wait_ready())
    try:
        waited: set[asyncio.Future[Any]] = {ready, stopped, http}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            yield ready.result()
        elif http.done():
            http.result()
            raise CannotServe("the HTTP server ended before the engine was ready")
        else:
            raise StoppedWhileStarting(stopped.result())
    finally:
        collector.cancel()
        ready.cancel()
        server.should_exit = True
        await asyncio.gather(http, collector, ready, return_exceptions=True)
        await engine.stop()
        await services.jobs.aclose()


async def _collect_forever(services: Services) -> None:
    """Once an hour, delete blobs that nobody ever linked."""
    while True:
        await asyncio.sleep(_COLLECT_INTERVAL_S)
        try:
            await asyncio.to_thread(services.records.collect, _COLLECT_INTERVAL_S)
        except WeftError as error:
            log.warning("collecting abandoned blobs failed: %s", error.message)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: signals stop the server and the engine in order, here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _exit_on_signals(stopped: asyncio.Future[int]) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def stop(status: int) -> Callable[[], None]:
        return lambda: None if stopped.done() else stopped.set_result(status)

    for number, status in _EXIT_SIGNALS.items():
        loop.add_signal_handler(number, stop(status))
    try:
        yield
    finally:
        for number in _EXIT_SIGNALS:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)
        except OSError as error:
            raise CannotServe(
                f"cannot listen on {host}:{port}: {error.strerror or error}; "
                "stop what uses it or choose another --port"
            ) from error
        yield listener


def _banner(server: RunningServer, settings: Settings) -> str:
    info = server.info
    return (
        f"base {server.model_name} ({settings.model}): {info.quantization} weights, "
        f"{info.dtype} compute on {info.device}\n"
        f"context {info.max_model_len} tokens, {info.max_num_seqs} sequences, "
        f"{info.max_batch_tokens} tokens an iteration, "
        f"KV cache {info.kv_cache_tokens} tokens, adapter arena {info.adapter_arena_bytes >> 20} MiB\n"
        f"finetuning yields to {info.tpot_slo_ms:.1f} ms per token and {info.ttft_slo_ms:.0f} ms to the "
        f"first (p{settings.slo_percentile:g}); store {settings.store}, data in {settings.data_dir}"
    )
