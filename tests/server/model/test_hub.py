"""resolve_model against a local server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from weft_server.errors import ConfigError
from weft_server.model.config import ModelError
from weft_server.model.hub import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": b"first shard",
    "model-00002-of-00002.safetensors": b"second shard",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "consolidated.safetensors": b"the same weights once more",
    "original/params.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"import os",
    "README.md": b"# model",
}
WANTED = {name for name in FILES if name.endswith((".json", ".jinja", ".safetensors"))} - {
    "consolidated.safetensors",
    "original/params.json",
}


class Hub(ThreadingHTTPServer):
    """One public model `org/model`, one gated `org/gated`; remembers what was downloaded."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._answer_api("/".join(parts[2:4]), parts[4:], with_body)
        elif "/".join(parts[:2]) == "org/model" and parts[2:4] in (["resolve", COMMIT], ["resolve", "main"]):
            self._answer_file("/".join(parts[4:]), with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body)

    def _answer_api(self, model: str, rest: list[str], with_body: bool) -> None:
        if model == "org/gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif model != "org/model":
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif rest[:1] == ["revision"] and rest[1:2] not in (["main"], [COMMIT]):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in FILES.items()]
            self._send(200, json.dumps(tree).encode(), {}, with_body)
        else:
            info = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self._send(200, json.dumps(info).encode(), {}, with_body)

    def _answer_file(self, name: str, with_body: bool) -> None:
        if with_body:
            self.server.downloads.append(name)
        body = FILES[name]
        self._send(200, body, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": COMMIT}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keeps the test output clean."""


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == Path("org/model")


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no revision 'main'"):
        resolve_model(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    "name", ["", "model", "/no/such/directory", "./org/model", "a/b/c", "org/mo del", "../x"]
)
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="neither an existing directory nor a hub id"):
        resolve_model(name)


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds no config\.json, so it is not a Hugging Face model directory"
    ):
        resolve_model(str(tmp_path))


def test_a_hub_model_is_downloaded_without_pickle_code_or_duplicates(hub: Hub, tmp_path: Path) -> None:
    path = resolve_model("org/model", cache_dir=tmp_path, endpoint=hub.url)
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} == WANTED
    assert set(hub.downloads) == WANTED
    for name in WANTED:
        assert (path / name).read_bytes() == FILES[name]


def test_a_second_resolution_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    first = resolve_model("org/model", cache_dir=tmp_path, endpoint=hub.url)
    hub.downloads.clear()
    assert resolve_model("org/model", revision=COMMIT, cache_dir=tmp_path, endpoint=hub.url) == first
    assert hub.downloads == []


def test_a_cached_model_is_served_while_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    path = resolve_model("org/model", cache_dir=tmp_path, endpoint=hub.url)
    assert resolve_model("org/model", cache_dir=tmp_path, endpoint=_closed_port_url()) == path


def test_an_unreachable_hub_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be reached"):
        resolve_model("org/model", cache_dir=tmp_path, endpoint=_closed_port_url())


def test_an_unknown_model_is_an_error_that_names_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'org/absent' is neither a directory here nor on the hub"):
        resolve_model("org/absent", cache_dir=tmp_path, endpoint=hub.url)


def test_an_unknown_revision_is_an_error_that_names_it(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"revision 'v9'.*no such revision"):
        resolve_model("org/model", revision="v9", cache_dir=tmp_path, endpoint=hub.url)


def test_a_gated_model_is_an_error_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gated.*HF_TOKEN"):
        resolve_model("org/gated", cache_dir=tmp_path, endpoint=hub.url)


def _closed_port_url() -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_port
    server.server_close()
    return f"http://127.0.0.1:{port}"
