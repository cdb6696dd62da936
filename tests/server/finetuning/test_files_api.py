"""/v1/files through the unmodified openai SDK and plain HTTP."""

from __future__ import annotations

import io
from typing import Any

import httpx
import openai
import pytest

from weft_server.store.base import BlobMissing


def _upload(live: Any, data: bytes = b'{"text": "hi"}\n', name: str = "train.jsonl") -> Any:
    return live.client.files.create(file=(name, data), purpose="fine-tune")


def test_an_uploaded_file_comes_back_as_it_was(live: Any) -> None:
    data = bytes(range(256)) * 1000
    file = _upload(live, data, "Grüße 1.jsonl")
    assert (file.object, file.bytes, file.filename, file.purpose) == (
        "file",
        len(data),
        "Grüße 1.jsonl",
        "fine-tune",
    )
    assert file.status == "processed"
    assert live.client.files.retrieve(file.id) == file
    assert live.client.files.content(file.id).read() == data
    assert live.client.files.wait_for_processing(file.id).status == "processed"


def test_files_are_listed_in_pages_newest_first_or_oldest_first(live: Any) -> None:
    ids = [_upload(live).id for _ in range(5)]
    newest = live.client.files.list(limit=2)
    assert [file.id for file in newest.data] == ids[:2:-1]
    assert newest.has_more
    seen = [file.id for file in live.client.files.list(limit=2)]
    assert seen[:5] == ids[::-1]
    assert len(seen) == len(set(seen))
    oldest = [file.id for file in live.client.files.list(order="asc", limit=10_000)]
    assert oldest == seen[::-1]
    assert [file.id for file in live.client.files.list(purpose="batch")] == []
    assert ids[0] in [file.id for file in live.client.files.list(purpose="fine-tune", limit=2)]


def test_a_deleted_file_is_gone_with_its_bytes(live: Any) -> None:
    data = b'{"text": "only here"}\n'
    file = _upload(live, data)
    record = live.store.records.get("file", "acme", file.id)
    deleted = live.client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    for call in (live.client.files.retrieve, live.client.files.content, live.client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(file.id)
        assert caught.value.code == "file_not_found"
    with pytest.raises(BlobMissing):
        live.store.blobs.size(record.value["blob"])


def test_another_tenants_file_is_a_404(live: Any) -> None:
    file = _upload(live)
    for call in (live.other.files.retrieve, live.other.files.content, live.other.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert file.id not in [other.id for other in live.other.files.list()]
    assert live.client.files.retrieve(file.id).id == file.id


def test_a_file_over_the_limit_is_413_even_while_it_is_still_being_sent(live: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        _upload(live, b"x" * (6 << 20))
    assert caught.value.status_code == 413
    assert "--max-upload-mb" in caught.value.message
    with pytest.raises(openai.APIStatusError) as caught:
        _upload(live, b"x" * ((1 << 20) + 1))
    assert caught.value.status_code == 413
    assert _upload(live, b"x" * (1 << 20)).bytes == 1 << 20


def test_an_empty_file_is_refused(live: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _upload(live, b"")
    assert (caught.value.code, caught.value.param) == ("empty_file", "file")


def test_an_unknown_purpose_is_refused_with_the_allowed_ones(live: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.client.files.create(file=("a", b"x"), purpose="assistants")
    assert caught.value.param == "purpose"
    assert "fine-tune" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "purpose", "missing_required_parameter"),
        (
            {"purpose": "fine-tune", "expires_after[seconds]": "3600"},
            "expires_after[seconds]",
            "unsupported_parameter",
        ),
        ({"purpose": "fine-tune", "mood": "glad"}, "mood", "unknown_parameter"),
    ],
)
def test_missing_and_unknown_form_fields_are_named(
    live: Any, fields: dict[str, str], param: str, code: str
) -> None:
    reply = live.http.post("/v1/files", data=fields, files={"file": ("a.jsonl", io.BytesIO(b"x"))})
    assert reply.status_code == 400
    assert (reply.json()["error"]["param"], reply.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize(
    "sent",
    [
        {"content": b"{}", "headers": {"content-type": "application/json"}},
        {"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        {"content": b"garbage", "headers": {"content-type": "multipart/form-data"}},
        {"data": {"purpose": "fine-tune", "file": "text"}, "files": {"other": b"x"}},
        {"data": {"file": "text"}, "files": {"purpose": ("a", b"fine-tune")}},
    ],
)
def test_a_body_that_is_no_such_form_is_a_400(live: Any, sent: dict[str, Any]) -> None:
    reply = live.http.post("/v1/files", **sent)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_filename_beyond_what_a_form_can_hold_is_refused_with_the_remedy(live: Any) -> None:
    reply = live.http.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a" * 10_000 + ".jsonl", b"x")}
    )
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "invalid_multipart"
    assert error["message"].endswith("is too long; shorten the filename.")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=10001", "limit=x", "order=up", "before=1", "after=file-no"]
)
def test_bad_query_parameters_are_refused_by_name(live: Any, query: str) -> None:
    reply = live.http.get(f"/v1/files?{query}")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == query.partition("=")[0]


def test_files_need_a_key(live: Any) -> None:
    assert httpx.get(f"{live.url}/v1/files", trust_env=False).status_code == 401
    reply = httpx.post(f"{live.url}/v1/files", files={"file": b"x"}, trust_env=False)
    assert reply.status_code == 401


def test_uploads_lie_below_the_data_folder_while_they_arrive(live: Any) -> None:
    _upload(live, b'{"text": "hi"}\n' * 1000)
    assert live.upload_dir.is_dir()
    assert list(live.upload_dir.iterdir()) == []
