"""Two tenants and an operator on one server: nobody sees what is not theirs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

PROMPT = "Once upon a time"
STORIES = [{"text": "The cat sat on the mat."}, {"text": "The dog sat on the cat."}]


def keys_file(path: Path, tenants: dict[str, str], *, admin: str) -> None:
    from weft_server.service.tenants import key_digest

    path.write_text(
        "".join(
            f'[[tenants]]\nname = "{name}"\nadmin = {"true" if name == admin else "false"}\n'
            f'keys = ["{key_digest(key)}"]\n'
            for name, key in tenants.items()
        )
    )


@pytest.fixture(scope="module")
def keys_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.toml"


@pytest.fixture(scope="module")
def server(launch: Any, plain_model: Any, helpers: Any, keys_path: Path) -> Any:
    keys_file(keys_path, {"ann": "key-ann", "bob": "key-bob", "ops": "key-ops"}, admin="ops")
    return launch(plain_model, *helpers.plain, "--api-keys", str(keys_path)).wait_ready()


def test_without_a_key_or_with_a_wrong_one_nothing_is_told(server: Any) -> None:
    assert server.http.get("/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError) as caught:
        server.openai_client("key-eve").models.list()
    assert caught.value.code == "invalid_api_key"
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 200


def test_metrics_are_the_operators(server: Any) -> None:
    for key, status in (("key-ann", 403), ("key-ops", 200), ("key-eve", 401)):
        answer = server.http.get("/metrics", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status


def test_another_tenants_objects_do_not_exist(server: Any, helpers: Any, plain_model: Any) -> None:
    ann, bob = server.openai_client("key-ann"), server.openai_client("key-bob")
    assert server.upload_adapter("poet", helpers.lora_files(plain_model), key="key-ann").status_code == 200
    job_id = server.finetune(STORIES, client=ann)
    job = server.finished_job(job_id, client=ann)
    assert job.status == "succeeded", job.error
    file_id, tuned = job.training_file, job.fine_tuned_model
    bobs_file = server.upload_jsonl(STORIES, client=bob)
    attempts: list[Callable[[], Any]] = [
        lambda: bob.files.retrieve(file_id),
        lambda: bob.files.content(file_id),
        lambda: bob.files.delete(file_id),
        lambda: bob.fine_tuning.jobs.retrieve(job_id),
        lambda: bob.fine_tuning.jobs.list_events(job_id),
        lambda: bob.fine_tuning.jobs.cancel(job_id),
        lambda: bob.fine_tuning.jobs.create(model=server.model, training_file=file_id),
        lambda: bob.fine_tuning.jobs.create(model=tuned, training_file=bobs_file),
        lambda: bob.models.retrieve(tuned),
        lambda: bob.models.delete(tuned),
        lambda: bob.completions.create(model=tuned, prompt=PROMPT, max_tokens=1),
        lambda: bob.completions.create(model="poet@1", prompt=PROMPT, max_tokens=1),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError):
            attempt()
    for path in ("/v1/adapters/poet", "/v1/adapters/poet/download"):
        assert server.http.get(path, headers={"authorization": "Bearer key-bob"}).status_code == 404
    assert [model.id for model in bob.models.list()] == [server.model]
    assert job_id not in [other.id for other in bob.fine_tuning.jobs.list()]
    assert ann.files.content(file_id).read()
    assert ann.completions.create(model=tuned, prompt=PROMPT, max_tokens=1)


def test_two_tenants_use_one_name_for_two_adapters(server: Any, helpers: Any, plain_model: Any) -> None:
    texts = []
    for seed, key in enumerate(("key-ann", "key-bob")):
        files = helpers.lora_files(plain_model, seed=seed)
        assert server.upload_adapter("voice", files, key=key).json()["newest"] == 1
    for key in ("key-ann", "key-bob"):
        client = server.openai_client(key)
        answer = client.completions.create(model="voice", prompt=PROMPT, max_tokens=20, temperature=0)
        texts.append(answer.choices[0].text)
    assert texts[0] != texts[1]


def test_sighup_takes_over_new_keys_and_drops_old_ones(server: Any, helpers: Any, keys_path: Path) -> None:
    def status(key: str) -> int:
        answer = server.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        return int(answer.status_code)

    keys_file(keys_path, {"ann": "key-ann-2", "bob": "key-bob", "ops": "key-ops"}, admin="ops")
    server.process.send_signal(signal.SIGHUP)
    helpers.wait_until(lambda: status("key-ann-2") == 200, "the new key")
    assert (status("key-ann"), status("key-bob")) == (401, 200)
    keys_path.write_text("not toml [")
    server.process.send_signal(signal.SIGHUP)
    helpers.wait_until(lambda: "keeping the previous API keys" in server.log, "the log's complaint")
    assert status("key-ann-2") == 200
