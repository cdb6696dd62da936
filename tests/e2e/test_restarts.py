"""Servers that end, politely or not, and what the next one on the same data directory finds."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from weft_scheduler.simulator.fitted import read_fitted

PROMPT = "Once upon a time"
STORIES = [{"text": f"The {animal} saw a big red ball in the park."} for animal in ("dog", "cat", "bird")]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_nothing_acknowledged_is_lost_when_servers_end(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any, tmp_path: Any
) -> None:
    """One data directory through kill -9, SIGTERM and SIGINT, a job running all the while."""
    data_dir = tmp_path / "data"

    def start() -> Any:
        return start_weft(plain_model, *helpers.plain, data_dir=data_dir)

    server = start().wait_ready()
    server.upload_adapter("poet", helpers.lora_files(plain_model))
    poem = server.greedy(PROMPT, 40, model="poet")
    finished = server.finished_job(server.finetune(STORIES))
    tuned = server.greedy(PROMPT, 40, model=finished.fine_tuned_model)
    long_job = server.finetune(STORIES, num_epochs=1000, checkpoint_every=5)
    server.wait_for_event(long_job, "Checkpoint saved at step 5")

    second = helpers.run_weft("serve", str(plain_model), "--port", "0", "--data-dir", str(data_dir))
    assert second.returncode == 2
    assert f"in use by another Weft server (process {server.process.pid})" in second.stderr

    engine = server.engine
    server.process.kill()
    helpers.wait_until(lambda: gone(engine), "the engine to end by itself", timeout_s=10)
    server.process.wait()
    left_behind = data_dir / "uploads" / "left"
    left_behind.parent.mkdir(exist_ok=True)
    left_behind.write_bytes(b"half an upload")

    server = start().wait_ready()
    assert not left_behind.exists()
    assert server.greedy(PROMPT, 40, model="poet@1") == poem
    assert server.greedy(PROMPT, 40, model=finished.fine_tuned_model) == tuned
    jobs = server.client.fine_tuning.jobs
    assert jobs.retrieve(finished.id) == finished
    assert server.client.files.content(finished.training_file).read()
    message = server.wait_for_event(long_job, "The server restarted; continuing from step")
    assert int(message.split()[-1]) >= 5
    step = jobs.retrieve(long_job).weft["step"]
    helpers.wait_until(lambda: jobs.retrieve(long_job).weft["step"] > step, "the job to go on")

    assert server.stop(signal.SIGTERM) == 0
    assert read_fitted((server.data_dir / "cost_model.json").read_text()).noise > 0.0
    server = start().wait_ready()
    server.wait_for_event(long_job, "The server restarted", count=2)
    messages = [event.message for event in server.events(long_job)]
    *_, restart = (idx for idx, message in enumerate(messages) if message.startswith("The server restarted"))
    last_step = next(message for message in messages[restart::-1] if message.startswith("Step"))
    assert messages[restart].endswith(f"continuing from step {last_step.split()[1].split('/')[0]}"), (
        "SIGTERM checkpoints: nothing is computed twice"
    )
    assert len(server.losses(long_job)) >= 5, "steps are reported once each, whatever was repeated"

    assert server.stop(signal.SIGINT) == 130
    assert "Traceback" not in server.log


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_stopped_while_it_starts_ends_at_once(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any, number: signal.Signals, status: int
) -> None:
    server = start_weft(plain_model, *helpers.plain)
    engine = helpers.wait_until(lambda: server.engine, "an engine process")
    assert server.stop(number) == status
    helpers.wait_until(lambda: gone(engine), "the engine to end")
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_an_engine_that_dies_five_times_is_given_up(
    start_weft: Callable[..., Any], plain_model: Any, helpers: Any
) -> None:
    server = start_weft(plain_model, *helpers.plain).wait_ready()
    for _ in range(4):
        server.kill_engine()
    server.engine.kill()

    def given_up() -> bool:
        answer = server.http.get("/ready")
        return answer.status_code == 503 and "died 5 times" in answer.json()["error"]["message"]

    helpers.wait_until(given_up, "the server to give up")
    assert server.engine is None
    answer = server.http.post("/v1/completions", json={"model": server.model, "prompt": PROMPT})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert server.stop() == 0
