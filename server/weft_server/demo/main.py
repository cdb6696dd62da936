"""`weft demo`: two tenants generate with their published adapters while two finetune jobs train, on one
frozen base.

Runs a real server and talks to it over HTTP only. Phases: score the base on both tasks' held-out prompts;
generate alone for a while; submit both jobs and go on generating; score each job's adapter the moment it
succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from weft_server.config import Settings, default_data_dir
from weft_server.demo.client import DemoClient, DemoError
from weft_server.demo.screen import Screen
from weft_server.demo.state import DemoState, Job, Latencies, Stream
from weft_server.demo.tasks import FINETUNE_TASKS, FinetuneTask, from_jsonl
from weft_server.demo.voices import VOICES, Voice
from weft_server.errors import ConfigError
from weft_server.log import configure_logging
from weft_server.service.tenants import new_key
from weft_server.serving import RunningServer, StoppedWhileStarting, running_server

TENANTS = ("acme", "globex")
_TPOT_SLO_MS = 40.0
"""The demo's latency target: 25 tokens a second for each reader, well above what the base takes alone,
because server, clients and screen share the same few cores."""
_NUM_SCORED = 60
_NUM_PARALLEL = 12
_ALONE_S = 10.0
_AFTER_S = 2.0
_POLL_S = 0.4
_FRAME_S = 0.125


@dataclass(slots=True)
class _Actor:
    """One tenant: its client, its published adapter and its job."""

    client: DemoClient
    voice: Voice
    task: FinetuneTask
    stream: Stream
    job: Job


def run_demo(settings: Settings, *, exit_when_done: bool) -> int:
    """Show the main job; returns the exit status (1 if a job failed).

    Without `exit_when_done` the server goes on serving until it is interrupted. Nothing is kept on disk
    unless a data directory was chosen.

    Raises:
        ConfigError: an option that the demo cannot honour.
        WeftError: the server cannot start.
    """
    if settings.api_keys is not None:
        raise ConfigError(
            f"--api-keys is {settings.api_keys}, but the demo makes its own two tenants; "
            "use `weft serve demo`"
        )
    configure_logging("warning" if settings.log_level == "info" else settings.log_level)
    try:
        return asyncio.run(_run(settings, exit_when_done))
    except StoppedWhileStarting as stopped:
        return stopped.exit_status


async def _run(settings: Settings, exit_when_done: bool) -> int:
    keys = [new_key() for _ in TENANTS]
    with tempfile.TemporaryDirectory(prefix="weft-demo-") as scratch:
        keys_file = Path(scratch) / "keys.toml"
        keys_file.write_text(
            "".join(
                f'[[tenants]]\nname = "{tenant}"\nkeys = ["{key.digest}"]\n'
                for tenant, key in zip(TENANTS, keys, strict=True)
            )
        )
        # The bundled model is so small that converting to and from bf16 costs more than it saves.
        dtype = (
            "float32" if settings.dtype == "auto" and settings.device in ("auto", "cpu") else settings.dtype
        )
        chosen = dataclasses.replace(
            settings,
            dtype=dtype,
            tpot_slo_ms=_TPOT_SLO_MS if settings.tpot_slo_ms is None else settings.tpot_slo_ms,
            log_level="warning" if settings.log_level == "info" else settings.log_level,
            api_keys=keys_file,
            data_dir=_data_dir(settings, Path(scratch)),
            port=_free_port(settings.host, settings.port),
        )
        state = _new_state()
        screen = Screen(state)
        screen.say("Starting a server on the bundled base model …")
        async with running_server(chosen) as (server, stopped):
            actors = [
                _Actor(DemoClient(server.url, key.secret), voice, task, stream, job)
                for key, voice, task, stream, job in zip(
                    keys, VOICES, FINETUNE_TASKS, state.streams, state.jobs, strict=True
                )
            ]
            show = asyncio.create_task(_show(actors, server, state, screen))
            try:
                await asyncio.wait({show, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not show.done():
                    return stopped.result()
                status = show.result()
                if not exit_when_done:
                    _invite(screen, server, keys[0].secret, state)
                    return await stopped
                return status
            finally:
                show.cancel()
                await asyncio.gather(show, return_exceptions=True)
                for actor in actors:
                    await actor.client.aclose()


def _data_dir(settings: Settings, scratch: Path) -> Path:
    """The chosen data directory; a scratch one instead of the default."""
    return scratch / "data" if settings.data_dir == default_data_dir() else settings.data_dir


def _new_state() -> DemoState:
    return DemoState(
        streams=[Stream(tenant, voice.name) for tenant, voice in zip(TENANTS, VOICES, strict=True)],
        jobs=[
            Job(tenant, task.name, task.title) for tenant, task in zip(TENANTS, FINETUNE_TASKS, strict=True)
        ],
    )


async def _show(actors: list[_Actor], server: RunningServer, state: DemoState, screen: Screen) -> int:
    state.tpot_slo_ms = server.info.tpot_slo_ms
    with screen:
        painter = asyncio.create_task(_paint(screen))
        try:
            await _play(actors, server, state)
        except DemoError as error:
            state.phase = str(error)
            screen.say(f"[red]{error}[/red]")
            return 1
        finally:
            painter.cancel()
            await asyncio.gather(painter, return_exceptions=True)
    screen.summary()
    return 0 if all(job.status == "succeeded" for job in state.jobs) else 1


async def _play(actors: list[_Actor], server: RunningServer, state: DemoState) -> None:
    state.phase = "publishing the two tenants' adapters, scoring the base on the held-out prompts"
    for actor in actors:
        await actor.client.publish_adapter(actor.voice.name, actor.voice.directory)
    for actor in actors:
        actor.job.exact_match_before = await _score(actor, server.model_name)
    async with _generating(actors, state):
        state.phase = "both adapters generate, nothing trains"
        await _measure(state, state.alone, asyncio.sleep(_ALONE_S))
        state.phase = "two finetune jobs train in the iterations that generate"
        followers = [asyncio.create_task(_train(actor, server.model_name)) for actor in actors]
        try:
            await _measure(state, state.beside_training, _until_trained(state, followers))
            state.phase = "scoring the new adapters, which are served from the moment their jobs succeeded"
            await asyncio.gather(*followers)
            await asyncio.sleep(_AFTER_S)
        finally:
            for follower in followers:
                follower.cancel()


async def _measure(state: DemoState, phase: Latencies, done: object) -> None:
    state.measured, started = phase, time.monotonic()
    try:
        await done  # type: ignore[misc]
    finally:
        state.measured = None
        phase.elapsed_s = time.monotonic() - started


async def _until_trained(state: DemoState, followers: list[asyncio.Task[None]]) -> None:
    """Until no job trains any more (or one of them could not even be submitted)."""
    while not all(job.is_finished for job in state.jobs):
        for follower in followers:
            if follower.done():
                follower.result()
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def _generating(actors: list[_Actor], state: DemoState) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(_generate_forever(actor, state)) for actor in actors]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _generate_forever(actor: _Actor, state: DemoState) -> None:
    for prompt in itertools.cycle(actor.voice.prompts):
        actor.stream.prompt, actor.stream.text = prompt, ""
        last: float | None = None
        async for piece in actor.client.stream(actor.voice.name, prompt):
            now = time.monotonic()
            actor.stream.text += piece
            actor.stream.rate.add(now)
            phase = state.measured
            if phase is not None:
                phase.num_tokens += 1
                if last is not None:
                    phase.seconds.append(now - last)
            last = now


async def _train(actor: _Actor, base: str) -> None:
    """Submit the tenant's job, follow it, and score its adapter."""
    job, task = actor.job, actor.task
    job_id = await actor.client.start_job(
        task.train_path,
        {
            "model": base,
            "seed": task.seed,
            "method": {
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {"n_epochs": task.num_epochs, "batch_size": task.batch_size}
                },
            },
            "weft": {"adapter_name": task.name, "learning_rate": task.learning_rate},
        },
    )
    job.started_s = time.monotonic()
    job.total_steps = task.num_epochs * -(-task.num_train // task.batch_size)
    while not job.is_finished:
        await asyncio.sleep(_POLL_S)
        _take(job, await actor.client.metrics_events(job_id))
        current = await actor.client.job(job_id)
        if current["status"] == "succeeded":
            _take(job, await actor.client.metrics_events(job_id))
            job.finished_s = time.monotonic()
        job.model = current["fine_tuned_model"]
        job.error = (current.get("error") or {}).get("message")
        job.trained_tokens = current["trained_tokens"] or job.trained_tokens
        job.status = current["status"]
    if job.model is not None:
        job.exact_match_after = await _score(actor, job.model)


def _take(job: Job, events: list[dict[str, float]]) -> None:
    for event in events:
        if event["step"] > job.step:
            job.step = int(event["step"])
            job.losses.append(event["train_loss"])
            job.tokens_per_second = event["tokens_per_second"]


async def _score(actor: _Actor, model: str) -> float:
    """Exact match on the task's held-out prompts, greedy."""
    examples = from_jsonl(actor.task.held_out_path, actor.task.name)[:_NUM_SCORED]
    limit = asyncio.Semaphore(_NUM_PARALLEL)

    async def is_right(prompt: str, answer: str) -> bool:
        async with limit:
            return (await actor.client.answer(model, prompt)).strip() == answer

    right = await asyncio.gather(*(is_right(example.prompt, example.answer) for example in examples))
    return sum(right) / len(right)


async def _paint(screen: Screen) -> None:
    while True:
        screen.refresh()
        await asyncio.sleep(_FRAME_S)


def _invite(screen: Screen, server: RunningServer, api_key: str, state: DemoState) -> None:
    job = next((job for job in state.jobs if job.model), state.jobs[0])
    body = json.dumps(
        {
            "model": job.model,
            "messages": [{"role": "user", "content": "Hi, where is my parcel?"}],
            "temperature": 0,
        }
    )
    screen.say(
        f"\nThe server goes on at {server.url} until Ctrl-C. Try the adapter of {job.tenant}'s job:\n\n"
        f"  curl {server.url}/v1/chat/completions -H 'Authorization: Bearer {api_key}' \\\n"
        f"    -H 'Content-Type: application/json' -d '{body}'\n"
    )


def _free_port(host: str, port: int) -> int:
    """The wanted port if it is free, else 0 (any)."""
    with _socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return 0
    return port


@contextlib.contextmanager
def _socket(host: str) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        yield probe
