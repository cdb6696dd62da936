"""Two servers that share one real Redis: what one makes, both serve; what one leaves, the other takes up."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

pytestmark = pytest.mark.redis

PROMPT = "Once upon a time"
STORIES = [{"text": f"The {animal} saw a big red ball in the park."} for animal in ("dog", "cat", "bird")]


class Redis:
    """A redis-server with an append-only file, on one port through stops and starts."""

    def __init__(self, directory: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory),
            "--save", "", "--appendonly", "yes", "--appendfsync", "always", *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait_until: Callable[..., Any]) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            try:
                with redis.Redis(port=self.port) as client:
                    return bool(client.ping())
            except redis.ConnectionError:
                return False

        wait_until(answers, "redis-server")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def start_redis(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Iterator[Callable[..., Redis]]:
    if shutil.which("redis-server") is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed")
        pytest.skip("redis-server is not installed")
    started: list[Redis] = []

    def start(*options: str) -> Redis:
        started.append(Redis(tmp_path_factory.mktemp("redis"), *options))
        started[-1].start(helpers.wait_until)
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def shared(start_redis: Callable[..., Redis]) -> Redis:
    return start_redis()


@pytest.fixture(scope="module")
def servers(shared: Redis, launch: Callable[..., Any], plain_model: Path, helpers: Any) -> tuple[Any, Any]:
    """Two servers on the shared Redis, each with a data directory of its own."""
    first, second = (launch(plain_model, *helpers.plain, "--store", shared.url) for _ in range(2))
    return first.wait_ready(), second.wait_ready()


def test_an_adapter_uploaded_to_one_server_is_served_by_both(
    servers: tuple[Any, Any], helpers: Any, plain_model: Path
) -> None:
    first, second = servers
    assert first.upload_adapter("poet", helpers.lora_files(plain_model)).status_code == 200
    poem = first.greedy(PROMPT, 30, model="poet")
    assert second.greedy(PROMPT, 30, model="poet@1") == poem != first.greedy(PROMPT, 30)
    assert second.upload_adapter("poet", helpers.lora_files(plain_model, seed=9)).json()["newest"] == 2
    newer = second.greedy(PROMPT, 30, model="poet")
    helpers.wait_until(lambda: first.greedy(PROMPT, 30, model="poet") == newer, "the newer version")
    assert newer != poem


def test_a_job_of_one_server_is_seen_and_served_by_both(servers: tuple[Any, Any]) -> None:
    first, second = servers
    job_id = first.finetune(STORIES, num_epochs=2)
    job = second.finished_job(job_id)
    assert job.status == "succeeded", job.error
    assert second.losses(job_id) == first.losses(job_id)
    tuned = job.fine_tuned_model
    assert second.greedy(PROMPT, 30, model=tuned) == first.greedy(PROMPT, 30, model=tuned)
    assert second.client.files.content(job.training_file).read()


def test_while_redis_is_away_residents_are_served_and_writes_are_told_to_come_back(
    servers: tuple[Any, Any], shared: Redis, helpers: Any, plain_model: Path
) -> None:
    server, _ = servers
    files = helpers.lora_files(plain_model, seed=3)
    assert server.upload_adapter("resident", files).status_code == 200
    poem = server.greedy(PROMPT, 30, model="resident")
    base = server.greedy(PROMPT, 30)
    job_id = server.finetune(STORIES, num_epochs=100)
    server.wait_for_event(job_id, "Step 1/300")
    shared.stop()
    assert server.greedy(PROMPT, 30) == base
    assert server.greedy(PROMPT, 30, model="resident") == poem
    for answer in (
        server.upload_adapter("late", files),
        server.http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b'{"text": "x"}\n')}
        ),
        server.http.get("/v1/fine_tuning/jobs"),
    ):
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
    assert server.http.get("/ready").status_code == 200
    shared.start(helpers.wait_until)
    helpers.wait_until(lambda: server.upload_adapter("late", files).status_code == 200, "writes to work")
    job = server.finished_job(job_id)
    assert job.status == "succeeded", job.error
    assert len(server.losses(job_id)) == 300, "what was trained meanwhile was written afterwards"


def test_a_redis_that_would_lose_data_is_refused(
    start_redis: Callable[..., Redis], plain_model: Path, helpers: Any, tmp_path: Path
) -> None:
    lossy = start_redis("--appendonly", "no")
    ended = helpers.run_weft(
        "serve", str(plain_model), "--port", "0", "--data-dir", str(tmp_path), "--store", lossy.url
    )
    assert ended.returncode == 2
    assert "appendonly yes" in ended.stderr
    assert "--redis-volatile" in ended.stderr


def test_a_redis_that_is_not_there_is_a_failure(plain_model: Path, helpers: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    ended = helpers.run_weft(
        "serve", str(plain_model), "--port", "0", "--data-dir", str(tmp_path), "--store", url
    )
    assert ended.returncode == 1
    assert f"127.0.0.1:{port}" in ended.stderr


@pytest.mark.slow
def test_a_server_that_hung_does_not_disturb_the_one_that_took_its_job_over(
    servers: tuple[Any, Any], helpers: Any
) -> None:
    """Slow: a server's lease lapses 20 seconds after its last renewal."""
    first, second = servers
    job_id = first.finetune(STORIES, num_epochs=200, checkpoint_every=5)
    first.wait_for_event(job_id, "Checkpoint saved")
    os.killpg(first.process.pid, signal.SIGSTOP)
    message = second.wait_for_event(job_id, "The server restarted; continuing from step")
    os.killpg(first.process.pid, signal.SIGCONT)
    assert int(message.split()[-1]) >= 5
    job = second.finished_job(job_id)
    assert job.status == "succeeded", job.error
    assert len(second.losses(job_id)) == 600
    messages = [event.message for event in second.events(job_id)]
    assert sum(message.startswith("New fine-tuned model created") for message in messages) == 1
    idle = "weft_num_finetune_jobs_running"
    helpers.wait_until(lambda: first.metric(idle) == 0, "the first server to drop the job")
    assert first.greedy(PROMPT, 10, model=job.fine_tuned_model)


@pytest.mark.slow
def test_the_job_of_a_killed_server_is_finished_by_the_other(servers: tuple[Any, Any]) -> None:
    """Slow, as above; the first server is gone afterwards."""
    first, second = servers
    job_id = first.finetune(STORIES, num_epochs=100, checkpoint_every=5)
    first.wait_for_event(job_id, "Checkpoint saved")
    os.killpg(first.process.pid, signal.SIGKILL)
    second.wait_for_event(job_id, "The server restarted; continuing from step")
    job = second.finished_job(job_id)
    assert job.status == "succeeded", job.error
    assert len(second.losses(job_id)) == 300
    assert second.greedy(PROMPT, 10, model=job.fine_tuned_model)
