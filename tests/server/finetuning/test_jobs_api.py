"""/v1/fine_tuning/jobs through the unmodified openai SDK and plain HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from weft_server import protocol


@pytest.fixture
def file_id(live: Any, chat_lines: Callable[..., bytes]) -> str:
    return str(live.client.files.create(file=("train.jsonl", chat_lines(4)), purpose="fine-tune").id)


def _start(live: Any, job_id: str) -> protocol.StartJob:
    """The engine's view of a job, once it has it."""
    live.until(lambda: any(message.job_id == job_id for message in live.engine.started))
    return live.engine.run_of(job_id)


def _messages(live: Any, job_id: str) -> list[str]:
    events = live.client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [event.message for event in events][::-1]


def _put(live: Any, data: bytes) -> str:
    return str(live.store.blobs.put([data]))


def _success(live: Any, start: protocol.StartJob, content: bytes) -> protocol.JobSucceeded:
    adapter = protocol.AdapterRef(
        f"digest-{start.job_id}",
        _put(live, b'{"r": 16, "lora_alpha": 32}'),
        _put(live, content),
        len(content),
    )
    return protocol.JobSucceeded(
        start.job_id, start.lease_epoch, start.spec.total_steps, 77, adapter, 16, ["q_proj"], 1234
    )


def test_a_job_runs_from_submission_to_a_model_that_can_be_named(
    live: Any, file_id: str, progress: Callable[..., protocol.JobProgress]
) -> None:
    job = live.client.fine_tuning.jobs.create(
        model=live.base,
        training_file=file_id,
        suffix="greeter",
        seed=5,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
    )
    assert job.object == "fine_tuning.job"
    assert job.status in ("validating_files", "queued")
    assert (job.training_file, job.model, job.organization_id) == (file_id, live.base, "acme")
    assert job.fine_tuned_model is None
    assert job.finished_at is None
    assert job.error is None
    assert job.result_files == []
    start = _start(live, job.id)
    assert (start.spec.num_epochs, start.spec.batch_size, start.spec.total_steps) == (2, 1, 8)
    job = live.client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "queued"
    assert job.hyperparameters.n_epochs == 2
    assert job.method.supervised.hyperparameters.batch_size == 1
    assert (job.seed, job.metadata) == (5, {"team": "a"})

    live.call(live.engine.say(progress(start, 1), progress(start, 2)))
    live.until(lambda: live.client.fine_tuning.jobs.retrieve(job.id).status == "running")
    live.call(live.engine.say(_success(live, start, b"weights-a")))
    live.until(lambda: live.client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
    job = live.client.fine_tuning.jobs.retrieve(job.id)
    assert job.fine_tuned_model == f"greeter-{job.id}"
    assert job.trained_tokens == 77
    assert job.finished_at >= job.created_at
    assert job.estimated_finish is None
    assert live.client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    messages = _messages(live, job.id)
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[1] == f"Validating training file: {file_id}"
    assert messages[2].startswith("Files validated, moving job to queued state")
    assert messages[3] == "Fine-tuning job started"
    assert messages[4:8] == [f"Step {step}/8: training loss={2 / step:.4f}" for step in (1, 1, 2, 2)]
    assert messages[-2:] == [
        f"New fine-tuned model created: greeter-{job.id}@1",
        "The job has successfully completed",
    ]
    metrics = [
        event
        for event in live.client.fine_tuning.jobs.list_events(job.id, limit=100)
        if event.type == "metrics"
    ]
    assert metrics[-1].data == {
        "step": 1,
        "train_loss": 2.0,
        "train_mean_token_accuracy": 0.5,
        "learning_rate": 1e-4,
        "grad_norm": 0.75,
        "tokens_per_second": 1000.0,
    }
    assert metrics[-1].object == "fine_tuning.job.event"


def test_events_and_jobs_come_in_pages_newest_first(live: Any, file_id: str) -> None:
    create = live.client.fine_tuning.jobs.create
    jobs = [create(model=live.base, training_file=file_id, metadata={"n": str(idx)}) for idx in range(3)]
    _start(live, jobs[-1].id)
    page = live.client.fine_tuning.jobs.list(limit=2)
    assert [job.id for job in page.data] == [jobs[2].id, jobs[1].id]
    assert page.has_more
    everything = [job.id for job in live.client.fine_tuning.jobs.list(limit=2)]
    assert everything[:3] == [job.id for job in reversed(jobs)]
    assert len(set(everything)) == len(everything)
    first = live.client.fine_tuning.jobs.list_events(jobs[2].id, limit=2)
    assert first.has_more
    all_events = [event.id for event in live.client.fine_tuning.jobs.list_events(jobs[2].id, limit=2)]
    assert len(all_events) == 3
    assert [event.id for event in first.data] == all_events[:2]


def test_jobs_are_filtered_by_metadata(live: Any, file_id: str) -> None:
    create = live.client.fine_tuning.jobs.create
    tagged = create(model=live.base, training_file=file_id, metadata={"color": "red", "empty": ""})
    untagged = create(model=live.base, training_file=file_id)
    listed = live.client.fine_tuning.jobs.list

    def ids(**options: Any) -> list[str]:
        return [job.id for job in listed(**options)]

    assert ids(metadata={"color": "red"}) == [tagged.id]
    assert ids(metadata={"color": "red", "empty": ""}) == [tagged.id]
    assert ids(metadata={"color": "blue"}) == []
    assert untagged.id in ids(extra_query={"metadata": "null"})
    assert tagged.id not in ids(extra_query={"metadata": "null"})


def test_a_cancelled_job_leaves_the_engine_and_cannot_be_cancelled_again(live: Any, file_id: str) -> None:
    job = live.client.fine_tuning.jobs.create(model=live.base, training_file=file_id)
    _start(live, job.id)
    cancelled = live.client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    assert job.id in live.engine.cancelled
    with pytest.raises(openai.BadRequestError, match="already been cancelled"):
        live.client.fine_tuning.jobs.cancel(job.id)
    assert _messages(live, job.id)[-1] == "The job was cancelled"


def test_a_bad_training_file_fails_the_job_with_the_line(live: Any) -> None:
    data = b'{"text": "fine"}\n{"text": 3}\n'
    file = live.client.files.create(file=("bad.jsonl", data), purpose="fine-tune")
    job = live.client.fine_tuning.jobs.create(model=live.base, training_file=file.id)
    live.until(lambda: live.client.fine_tuning.jobs.retrieve(job.id).status == "failed")
    error = live.client.fine_tuning.jobs.retrieve(job.id).error
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert error.message == "Line 2: text is a JSON number; it must be a string."
    events = live.client.fine_tuning.jobs.list_events(job.id).data
    assert events[0].level == "error"


def test_a_job_outlives_its_training_file(live: Any, file_id: str) -> None:
    job = live.client.fine_tuning.jobs.create(model=live.base, training_file=file_id)
    live.client.files.delete(file_id)
    start = _start(live, job.id)
    assert live.store.blobs.size(start.dataset_blob) > 0


def test_another_tenants_jobs_files_and_models_are_404s(live: Any, file_id: str) -> None:
    job = live.client.fine_tuning.jobs.create(model=live.base, training_file=file_id)
    jobs = live.other.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.list_events):
        with pytest.raises(openai.NotFoundError):
            call(job.id)
    assert job.id not in [other.id for other in jobs.list()]
    with pytest.raises(openai.NotFoundError) as caught:
        jobs.create(model=live.base, training_file=file_id)
    assert caught.value.param == "training_file"
    with pytest.raises(openai.NotFoundError) as caught:
        live.client.fine_tuning.jobs.create(model="nobody", training_file=file_id)
    assert caught.value.code == "model_not_found"


def test_the_weft_object_reaches_the_engine(live: Any, file_id: str) -> None:
    weft = {
        "adapter_name": "mine",
        "lora": {
            "r": 4,
            "alpha": 8,
            "dropout": 0.1,
            "target_modules": ["v_proj", "q_proj"],
            "use_rslora": True,
        },
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "max_seq_length": 64,
        "overlength": "truncate",
        "checkpoint_every": 2,
        "max_steps": 3,
    }
    job = live.client.fine_tuning.jobs.create(
        model=live.base, training_file=file_id, extra_body={"weft": weft}
    )
    spec = _start(live, job.id).spec
    assert spec.lora == protocol.LoraSpec(4, 8.0, 0.1, ("q_proj", "v_proj"), use_rslora=True)
    assert (spec.learning_rate, spec.lr_scheduler, spec.warmup_ratio) == (1e-3, "cosine", 0.1)
    assert (spec.weight_decay, spec.max_grad_norm) == (0.01, 0.5)
    assert (spec.checkpoint_every, spec.total_steps) == (2, 3)
    shown = live.client.fine_tuning.jobs.retrieve(job.id).weft
    assert shown["adapter_name"] == "mine"
    assert shown["max_seq_length"] == 64
    assert shown["total_steps"] == 3
    assert live.client.fine_tuning.jobs.retrieve(job.id).hyperparameters.learning_rate_multiplier == 5.0


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"learning_rate": 1}, 400, "learning_rate", "unknown_parameter"),
        ({"validation_file": "file-1"}, 400, "validation_file", "unsupported_parameter"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations", "unsupported_parameter"),
        ({"method": {"type": "dpo", "dpo": {}}}, 400, "method.type", "unsupported_parameter"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type", "unsupported_parameter"),
        ({"method": {"type": "supervised", "dpo": {}}}, 400, "method.dpo", "unsupported_parameter"),
        ({"method": {"type": "magic"}}, 400, "method.type", "invalid_value"),
        ({"method": {}}, 400, "method.type", "missing_required_parameter"),
        ({"hyperparameters": {"beta": 1}}, 400, "hyperparameters.beta", "unknown_parameter"),
        ({"hyperparameters": {"n_epochs": "3"}}, 400, "hyperparameters.n_epochs", "invalid_type"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", "invalid_request"),
        ({"hyperparameters": {"n_epochs": 2.5}}, 400, "hyperparameters.n_epochs", "invalid_type"),
        ({"training_file": 3}, 400, "training_file", "invalid_type"),
        ({"training_file": None}, 400, "training_file", "invalid_type"),
        ({"model": ""}, 400, "model", "invalid_value"),
        ({"suffix": "no spaces"}, 400, "suffix", "invalid_request"),
        ({"suffix": "x" * 41}, 400, "suffix", "invalid_request"),
        ({"seed": -1}, 400, "seed", "invalid_request"),
        ({"metadata": {"k": 1}}, 400, "metadata.k", "invalid_type"),
        ({"metadata": {"k" * 65: "v"}}, 400, "metadata", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata", "invalid_value"),
        ({"metadata": {str(idx): "v" for idx in range(17)}}, 400, "metadata", "invalid_value"),
        ({"weft": {"n_epochs": 3}}, 422, "weft.n_epochs", "validation_error"),
        ({"weft": {"lora": {"rank": 3}}}, 422, "weft.lora.rank", "validation_error"),
        ({"weft": {"lora": {"r": 300}}}, 422, "weft.lora.r", "validation_error"),
        (
            {"weft": {"lora": {"target_modules": "q_proj"}}},
            422,
            "weft.lora.target_modules",
            "validation_error",
        ),
        ({"weft": {"max_seq_length": 4096}}, 422, "weft.max_seq_length", "validation_error"),
        ({"weft": {"lr_scheduler": "x"}}, 422, "weft.lr_scheduler", "validation_error"),
        ({"weft": {"adapter_name": "a b"}}, 422, "weft.adapter_name", "validation_error"),
        ({"weft": {"adapter_name": "tiny-base"}}, 409, "weft.adapter_name", "conflict"),
        ({"weft": []}, 422, "weft", "validation_error"),
        (
            {"weft": {"learning_rate": 1e-4}, "hyperparameters": {"learning_rate_multiplier": 1}},
            400,
            "weft.learning_rate",
            "conflicting_parameters",
        ),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            },
            400,
            "hyperparameters",
            "conflicting_parameters",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    live: Any, file_id: str, body: dict[str, Any], status: int, param: str, code: str
) -> None:
    reply = live.http.post("/v1/fine_tuning/jobs", json={"model": live.base, "training_file": file_id} | body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code), error


def test_neutral_values_are_accepted(live: Any, file_id: str) -> None:
    reply = live.http.post(
        "/v1/fine_tuning/jobs",
        json={
            "model": live.base,
            "training_file": file_id,
            "validation_file": None,
            "integrations": [],
            "suffix": None,
            "metadata": None,
            "weft": None,
            "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
            "method": {"type": "supervised"},
        },
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["hyperparameters"] == {
        "n_epochs": "auto",
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
    }


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/fine_tuning/jobs?limit=0", "limit"),
        ("/v1/fine_tuning/jobs?after=ftjob-no", "after"),
        ("/v1/fine_tuning/jobs?metadata=x", "metadata"),
        ("/v1/fine_tuning/jobs?status=running", "status"),
        ("/v1/fine_tuning/jobs/{job}/events?after=ftevent-1", "after"),
        ("/v1/fine_tuning/jobs/{job}/events?limit=x", "limit"),
    ],
)
def test_bad_query_parameters_are_refused_by_name(live: Any, file_id: str, path: str, param: str) -> None:
    job = live.client.fine_tuning.jobs.create(model=live.base, training_file=file_id)
    reply = live.http.get(path.format(job=job.id))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_running_job_tells_when_it_should_be_done(
    live: Any, file_id: str, progress: Callable[..., protocol.JobProgress]
) -> None:
    job = live.client.fine_tuning.jobs.create(model=live.base, training_file=file_id)
    start = _start(live, job.id)

    def step() -> int:
        return int(live.client.fine_tuning.jobs.retrieve(job.id).weft["step"])

    live.call(live.engine.say(progress(start, 1)))
    live.until(lambda: step() == 1)
    assert live.client.fine_tuning.jobs.retrieve(job.id).estimated_finish is None
    live.call(live.engine.say(progress(start, 2)))
    live.until(lambda: step() == 2)
    assert live.client.fine_tuning.jobs.retrieve(job.id).estimated_finish >= int(time.time()) - 5
    live.client.fine_tuning.jobs.cancel(job.id)


def test_jobs_are_refused_with_a_retry_while_the_engine_has_never_been_ready(live: Any, file_id: str) -> None:
    info, live.engine.info, live.engine.ready = live.engine.info, None, False
    try:
        with pytest.raises(openai.APIStatusError) as caught:
            live.client.fine_tuning.jobs.create(model=live.base, training_file=file_id)
    finally:
        live.engine.info, live.engine.ready = info, True
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "5"


# ---------------------------------------------------------------- Idempotency-Key


def submit(live: Any, file_id: str, key: str, *, client: Any = None, **changes: Any) -> Any:
    return (client or live.client).fine_tuning.jobs.create(
        **{"model": live.base, "training_file": file_id, **changes}, extra_headers={"Idempotency-Key": key}
    )


def test_the_same_key_and_body_make_one_job(live: Any, file_id: str) -> None:
    first = submit(live, file_id, "once", suffix="a", metadata={"k": "v", "l": "w"})
    again = submit(live, file_id, "once", metadata={"l": "w", "k": "v"}, suffix="a")
    assert again.id == first.id
    assert submit(live, file_id, "twice", suffix="a").id != first.id
    plain = live.client.fine_tuning.jobs.create(model=live.base, training_file=file_id, suffix="a")
    assert plain.id != first.id


def test_equal_requests_at_a_time_make_one_job(live: Any, file_id: str) -> None:
    def ids() -> set[str]:
        return {job.id for job in live.client.fine_tuning.jobs.list(limit=1000)}

    before = ids()
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: submit(live, file_id, "racing"), range(8)))
    assert len({job.id for job in jobs}) == 1
    assert ids() - before == {jobs[0].id}


def test_the_same_key_with_another_body_is_a_conflict_that_is_not_tried_again(
    live: Any, file_id: str
) -> None:
    submit(live, file_id, "reused", seed=1)
    with pytest.raises(openai.ConflictError) as caught:
        submit(live, file_id, "reused", seed=2)
    assert caught.value.code == "idempotency_key_reused"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_keys_are_a_tenants_own(live: Any, file_id: str, chat_lines: Callable[..., bytes]) -> None:
    job = submit(live, file_id, "mine")
    others_file = live.other.files.create(file=("train.jsonl", chat_lines(4)), purpose="fine-tune").id
    assert submit(live, others_file, "mine", client=live.other).id != job.id


def test_a_refused_request_does_not_use_its_key_up(live: Any, file_id: str) -> None:
    with pytest.raises(openai.NotFoundError):
        submit(live, "file-none", "retried")
    assert submit(live, file_id, "retried").id


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
def test_a_bad_key_is_refused(live: Any, file_id: str, key: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        submit(live, file_id, key)
    assert caught.value.param == "Idempotency-Key"
