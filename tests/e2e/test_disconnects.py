"""A client that goes away takes its work with it: the engine computes nothing that nobody reads."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest


def send(server: Any, *, stream: bool) -> socket.socket:
    """POST a completion of 20 choices as long as the context, by hand; returns the open connection."""
    body = json.dumps(
        {
            "model": server.model, "prompt": "Once upon a time", "max_tokens": 480, "n": 20,
            "stream": stream, "ignore_eos": True,
        }
    ).encode()  # fmt: skip
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port), timeout=60)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: weft\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_disconnected_client_frees_the_engine(plain_server: Any, helpers: Any, stream: bool) -> None:
    def num_running() -> float:
        return float(plain_server.metric("weft_num_requests_running"))

    helpers.wait_until(lambda: num_running() == 0, "an idle engine")
    finished = plain_server.metric("weft_request_success_total", finished_reason="length")
    aborted = plain_server.metric("weft_request_success_total", finished_reason="abort")
    connection = send(plain_server, stream=stream)
    if stream:
        assert b"200 OK" in connection.recv(1 << 12)
    else:
        helpers.wait_until(lambda: num_running() > 0, "a running request")
    connection.close()
    helpers.wait_until(
        lambda: plain_server.metric("weft_request_success_total", finished_reason="abort") == aborted + 20,
        "20 aborted choices",
    )
    helpers.wait_until(lambda: num_running() == 0, "an idle engine")
    assert plain_server.metric("weft_request_success_total", finished_reason="length") == finished
