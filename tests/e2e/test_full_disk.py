"""A disk without room, played by a limit on the size of files: writes wait or are refused, nothing breaks."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped]

PROMPT = "Once upon a time"
STORIES = [{"text": "The cat sat on the mat."}, {"text": "The dog sat on the cat."}]


@contextmanager
def no_file_above(num_bytes: int, pid: int) -> Iterator[None]:
    """The process cannot make any file larger than this meanwhile."""
    process = psutil.Process(pid)
    process.rlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_an_upload_that_does_not_fit_is_refused_and_the_server_goes_on(plain_server: Any) -> None:
    def upload() -> Any:
        return plain_server.http.post(
            "/v1/files",
            data={"purpose": "fine-tune"},
            files={"file": ("big.jsonl", (b'{"text": "' + b"x" * 100 + b'"}\n') * 200_000)},
        )

    expected = plain_server.greedy(PROMPT, 20)
    with no_file_above(16 << 20, plain_server.process.pid):
        refused = upload()
        assert refused.status_code == 503, refused.text
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        assert int(refused.headers["retry-after"]) >= 1
        assert plain_server.greedy(PROMPT, 20) == expected
    accepted = upload()
    assert accepted.status_code == 200
    plain_server.client.files.delete(accepted.json()["id"])


def test_a_finished_job_waits_until_its_adapter_fits(plain_server: Any, helpers: Any) -> None:
    with no_file_above(256 << 10, plain_server.engine.pid):
        job_id = plain_server.finetune(STORIES, checkpoint_every=1, lora={"r": 64})
        helpers.wait_until(lambda: f"{job_id}: its adapter cannot be stored" in plain_server.log, "a retry")
        assert plain_server.client.fine_tuning.jobs.retrieve(job_id).status == "running"
        assert plain_server.greedy(PROMPT, 5)
    job = plain_server.finished_job(job_id)
    assert job.status == "succeeded", job.error
    assert plain_server.greedy(PROMPT, 5, model=job.fine_tuned_model)
