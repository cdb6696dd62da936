"""Files, jobs and adapters over HTTP, on the bundled model."""

from __future__ import annotations

import io
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

PROMPT = "Once upon a time"
STORIES = [{"text": f"The cat number {n} sat on the mat."} for n in range(4)]


def test_a_file_lives_from_upload_to_deletion(contract_server: Any) -> None:
    client, files = contract_server.client, contract_server.client.files
    content = b'{"text": "The cat sat."}\n'
    created = files.create(file=("cat.jsonl", content), purpose="fine-tune")
    assert (created.filename, created.bytes, created.purpose) == ("cat.jsonl", len(content), "fine-tune")
    assert files.retrieve(created.id) == created
    assert created.id in [file.id for file in files.list()]
    assert files.content(created.id).read() == content
    assert files.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError):
        files.retrieve(created.id)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model=contract_server.model, training_file=created.id)


def test_an_upload_over_the_limit_is_a_413(contract_server: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        contract_server.client.files.create(file=("big.jsonl", b"x" * (3 << 20)), purpose="fine-tune")
    assert caught.value.status_code == 413
    assert "--max-upload-mb" in caught.value.message


def test_a_job_is_listed_watched_and_its_model_deleted(contract_server: Any) -> None:
    client = contract_server.client
    job_id = contract_server.finetune(STORIES, num_epochs=2)
    job = contract_server.finished_job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.fine_tuned_model == f"ft-{job_id}"
    assert job.trained_tokens > 0
    assert client.fine_tuning.jobs.list(limit=1).data[0].id == job_id
    assert list(contract_server.losses(job_id)) == list(range(1, 9))
    messages = [event.message for event in contract_server.events(job_id)]
    assert any(message.startswith("Step 8/8: training loss=") for message in messages)
    contract_server.greedy(PROMPT, 4, model=job.fine_tuned_model)
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        contract_server.greedy(PROMPT, 4, model=job.fine_tuned_model)


def test_events_come_in_pages_newest_first(contract_server: Any) -> None:
    jobs = contract_server.client.fine_tuning.jobs
    job_id = contract_server.finetune(STORIES)
    contract_server.finished_job(job_id)
    page = jobs.list_events(job_id, limit=3)
    assert page.has_more
    assert page.data[0].message == "The job has successfully completed"
    every = [event.id for event in jobs.list_events(job_id, limit=3)]
    assert len(every) == len(set(every)) > 6


def test_a_running_job_is_cancelled(contract_server: Any, helpers: Any) -> None:
    jobs = contract_server.client.fine_tuning.jobs
    job_id = contract_server.finetune(STORIES, num_epochs=1000)
    contract_server.wait_for_event(job_id, "Step 2/4000")
    assert jobs.cancel(job_id).status == "cancelled"
    running = "weft_num_finetune_jobs_running"
    helpers.wait_until(lambda: contract_server.metric(running) == 0, "the engine to drop the job")
    assert jobs.retrieve(job_id).fine_tuned_model is None
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        jobs.cancel(job_id)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"weft": {"learning_rte": 1}}, 422, "weft.learning_rte"),
        ({"weft": {"lora": {"r": 0}}}, 422, "weft.lora.r"),
        ({"weft": {"lora": {"target_modules": ["lm_head"]}}}, 422, "weft.lora.target_modules"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"method": {"type": "dpo"}}, 400, "method.type"),
        ({"validation_file": "file-1"}, 400, "validation_file"),
        (
            {"weft": {"learning_rate": 0.1}, "hyperparameters": {"learning_rate_multiplier": 2}},
            400,
            "weft.learning_rate",
        ),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_by_field(
    contract_server: Any, body: dict[str, Any], status: int, param: str
) -> None:
    file_id = contract_server.upload_jsonl(STORIES)
    answer = contract_server.http.post(
        "/v1/fine_tuning/jobs", json={"model": contract_server.model, "training_file": file_id, **body}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_an_adapter_lives_from_upload_to_deletion(
    contract_server: Any, helpers: Any, bundled_model: Any
) -> None:
    http = contract_server.http
    files = [helpers.lora_files(bundled_model, seed=seed) for seed in (1, 2)]
    for number in (1, 2):
        answer = contract_server.upload_adapter("poet", files[number - 1])
        assert answer.status_code == 200, answer.text
        assert answer.json()["newest"] == number
    assert "poet" in [adapter["name"] for adapter in http.get("/v1/adapters").json()["data"]]
    versions = http.get("/v1/adapters/poet").json()["versions"]
    assert [version["version"] for version in versions] == [1, 2]
    assert versions[0]["target_modules"] == ["q_proj", "down_proj"]
    names = (contract_server.model, "poet@1", "poet@2")
    base, first, second = (contract_server.greedy(PROMPT, 12, model=name) for name in names)
    assert len({base, first, second}) == 3
    assert contract_server.greedy(PROMPT, 12, model="poet") == second
    content = http.get("/v1/adapters/poet/download", params={"version": 1}).content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
        weights = tar.extractfile("adapter_model.safetensors")
        assert weights is not None
        assert weights.read() == files[0][1]
    assert http.delete("/v1/adapters/poet").json()["deleted"]
    assert http.get("/v1/adapters/poet").status_code == 404
    assert contract_server.upload_adapter("poet", files[0]).json()["newest"] == 3, "numbers are not reused"
    http.delete("/v1/adapters/poet")


def test_requests_for_different_adapters_do_not_disturb_each_other(
    plain_server: Any, helpers: Any, plain_model: Any
) -> None:
    names = [f"mixed{seed}" for seed in range(4)]
    for seed, name in enumerate(names):
        files = helpers.lora_files(plain_model, seed=seed)
        assert plain_server.upload_adapter(name, files).status_code == 200
    models = [plain_server.model, *names] * 3
    alone = {model: plain_server.greedy(PROMPT, 60, model=model) for model in models}
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(pool.map(lambda model: plain_server.greedy(PROMPT, 60, model=model), models))
    assert together == [alone[model] for model in models]
    assert len(set(together)) == 5


def test_a_deleted_adapter_still_finishes_the_requests_it_began(
    contract_server: Any, helpers: Any, bundled_model: Any
) -> None:
    contract_server.upload_adapter("leaving", helpers.lora_files(bundled_model, seed=5))
    whole = contract_server.greedy(PROMPT, 200, model="leaving")
    stream = contract_server.stream(PROMPT, 200, model="leaving")
    text = next(stream).choices[0].text
    assert contract_server.client.models.delete("leaving").deleted
    assert text + "".join(chunk.choices[0].text for chunk in stream) == whole


def test_vllms_routes_load_from_the_adapter_root_and_unload(
    contract_server: Any, helpers: Any, bundled_model: Any, adapter_root: Any
) -> None:
    http = contract_server.http
    directory = adapter_root / "default" / "local"
    directory.mkdir(parents=True)
    config, weights = helpers.lora_files(bundled_model)
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    body = {"lora_name": "local", "lora_path": "local"}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert contract_server.greedy(PROMPT, 4, model="local")
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 400
    outside = {"lora_name": "outside", "lora_path": "../../../etc"}
    assert http.post("/v1/load_lora_adapter", json=outside).status_code in (403, 404)
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "local"}).status_code == 200
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "local"}).status_code == 404
    shutil.rmtree(adapter_root / "default")


def test_a_name_that_is_taken_or_malformed_is_refused(
    contract_server: Any, helpers: Any, bundled_model: Any
) -> None:
    files = helpers.lora_files(bundled_model)
    assert contract_server.upload_adapter("no spaces", files).status_code == 422
    base = contract_server.upload_adapter(contract_server.model, files)
    assert base.status_code == 409, base.text
