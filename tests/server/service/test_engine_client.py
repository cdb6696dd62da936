"""The supervisor against real processes that run a scripted engine."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from weft_server import protocol
from weft_server.engine.config import EngineConfig
from weft_server.errors import EngineCrashed, Unavailable
from weft_server.service.engine_client import EngineClient, EngineObserver
from weft_server.service.engine_port import JobMessage
from weft_server.service.engine_process import EngineLaunch
from weft_server.service.engine_supervisor import EngineStartFailed

SCRIPT = Path(__file__).with_name("scripted_engine.py")
GOOD, POISON, HANG, ABSORBING = 1, 666, 777, 888


@dataclass
class Jobs:
    """Starts jobs as the job service does: again after every restart, unless they are guilty."""

    client: EngineClient
    seeds: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    num_steps: int = 0
    epoch: int = 0

    async def start(self, job_id: str, seed: int) -> None:
        self.seeds[job_id] = seed
        lora = protocol.LoraSpec(4, 8.0, 0.0, ("q_proj",))
        spec = protocol.JobSpec(seed, 1, 1, 40, 1e-4, "linear", 0.0, 0.0, 1.0, 0, lora)
        await self.client.start_job(protocol.StartJob(job_id, "acme", spec, "blob", self.epoch))

    async def restarted(self, guilty: set[str]) -> None:
        self.epoch += 1
        self.ended |= dict.fromkeys(guilty, "guilty")
        for job_id, seed in self.seeds.items():
            if job_id not in self.ended:
                await self.start(job_id, seed)

    async def hear(self, message: JobMessage) -> None:
        if isinstance(message, protocol.JobProgress):
            self.num_steps = message.step
        if isinstance(message, protocol.JobSucceeded):
            self.ended[message.job_id] = "succeeded"


@asynccontextmanager
async def running(
    folder: Path, *, observer: EngineObserver | None = None, **options: Any
) -> AsyncIterator[tuple[EngineClient, Jobs]]:
    """A client over the scripted engine."""

    def config_json(epoch: int, receive: str, send: str, flight_record: Path) -> str:
        return EngineConfig(
            "none", "none", epoch, receive, send, str(flight_record), "sqlite", str(folder)
        ).to_json()

    launch = EngineLaunch(
        config_json, folder / "run", **{"command": (sys.executable, str(SCRIPT)), **options}
    )
    client = EngineClient(launch, observer=observer)
    jobs = Jobs(client)
    client.subscribe_jobs(jobs.hear)
    client.subscribe_restarts(jobs.restarted)
    await client.start()
    try:
        yield client, jobs
    finally:
        await client.stop()


async def tokens(client: EngineClient, request_id: str, kind: int, count: int = 60) -> list[int]:
    request = protocol.Generate(request_id, "acme", [kind], protocol.SamplingParams(count))
    return [token async for delta in client.generate(request) for token in delta.token_ids]


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a coroutine, for a minute at most."""

    def run(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(asyncio.wait_for(work, 60))

    return run


def test_a_poisonous_request_fails_and_those_beside_it_do_not(tmp_path: Path, run: Any) -> None:
    async def work() -> None:
        async with running(tmp_path) as (client, jobs):
            await client.wait_ready()
            await jobs.start("job", GOOD)
            results = await asyncio.gather(
                *(tokens(client, f"good-{idx}", GOOD) for idx in range(3)),
                tokens(client, "poison", POISON),
                *(tokens(client, f"late-{idx}", GOOD) for idx in range(3)),
                return_exceptions=True,
            )
            poison = results.pop(3)
            assert isinstance(poison, EngineCrashed)
            assert results == [list(range(60))] * 6
            while not jobs.ended:
                await asyncio.sleep(0.01)
            assert jobs.ended == {"job": "succeeded"}
            assert jobs.epoch == 3, "the poison needed two deaths"

    run(work())


def test_an_iteration_is_told_of_a_request_that_arrives_meanwhile(tmp_path: Path, run: Any) -> None:
    async def work() -> None:
        async with running(tmp_path) as (client, jobs):
            await client.wait_ready()
            await jobs.start("job", ABSORBING)
            while jobs.num_steps < 2:
                await asyncio.sleep(0.01)
            assert await tokens(client, "arrival", GOOD) == list(range(60))
            assert jobs.epoch == 1, "the iteration went on until the engine was taken for dead"

    run(work())


def test_a_poisonous_job_fails_and_those_beside_it_do_not(tmp_path: Path, run: Any) -> None:
    async def work() -> None:
        async with running(tmp_path) as (client, jobs):
            await client.wait_ready()
            for name, seed in (("a", GOOD), ("poison", POISON), ("b", GOOD)):
                await jobs.start(name, seed)
            assert await tokens(client, "request", GOOD) == list(range(60))
            while len(jobs.ended) < 3:
                await asyncio.sleep(0.01)
            assert jobs.ended == {"a": "succeeded", "b": "succeeded", "poison": "guilty"}
            assert jobs.epoch == 3

    run(work())


def test_an_iteration_that_never_ends_is_as_deadly_as_a_crash(tmp_path: Path, run: Any) -> None:
    async def work() -> None:
        async with running(tmp_path, silence_timeout_s=2.0) as (client, jobs):
            await client.wait_ready()
            good, hang = await asyncio.gather(
                tokens(client, "good", GOOD), tokens(client, "hang", HANG), return_exceptions=True
            )
            assert good == list(range(60))
            assert isinstance(hang, EngineCrashed)
            assert jobs.epoch == 3
            assert await tokens(client, "later", GOOD) == list(range(60))

    run(work())


def test_an_engine_that_does_not_get_ready_is_given_up(tmp_path: Path, run: Any) -> None:
    async def work() -> None:
        command = (sys.executable, "-c", "import time; time.sleep(60)")
        async with running(tmp_path, command=command, start_timeout_s=0.5) as (client, _):
            with pytest.raises(EngineStartFailed, match="was not ready after"):
                await client.wait_ready()

    run(work())


def test_a_first_engine_that_cannot_be_started_ends_the_waiting(tmp_path: Path, run: Any) -> None:
    async def work() -> None:
        (tmp_path / "run").write_text("a file where the folder should be")
        async with running(tmp_path) as (client, _):
            with pytest.raises(EngineStartFailed, match=r"cannot be started: .*File exists.*run"):
                await client.wait_ready()
            with pytest.raises(Unavailable, match="cannot be started"):
                await tokens(client, "request", GOOD)

    run(work())


def test_an_engine_that_cannot_be_started_again_is_tried_five_times(tmp_path: Path, run: Any) -> None:
    async def work() -> None:
        command = [sys.executable, str(SCRIPT)]
        async with running(tmp_path, command=command) as (client, _):
            await client.wait_ready()
            command[:] = [str(tmp_path / "gone")]
            poison = asyncio.create_task(tokens(client, "poison", POISON))
            with pytest.raises(Unavailable, match="died 5 times within 300 s"):
                await poison
            assert client.why_not_ready is not None

    run(work())


def test_a_failure_of_the_supervision_itself_fails_what_waits(tmp_path: Path, run: Any) -> None:
    class Careless:
        def engine_started(self) -> None: ...

        def engine_lost(self) -> None:
            raise LookupError("no such gauge")

        def observe_heartbeat(self, heartbeat: protocol.Heartbeat) -> None: ...

    async def work() -> None:
        async with running(tmp_path, observer=Careless()) as (client, _):
            await client.wait_ready()
            with pytest.raises(Unavailable, match="LookupError: no such gauge"):
                await tokens(client, "poison", POISON)

    run(work())
