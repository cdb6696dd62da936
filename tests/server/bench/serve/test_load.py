"""The load generator against a real server with random weights."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft_server.bench.arguments import add_bench_arguments
from weft_server.bench.report import BenchError
from weft_server.bench.serve.client import Client
from weft_server.bench.serve.load import send_all
from weft_server.bench.serve.main import run
from weft_server.bench.serve.server import served
from weft_server.bench.serve.target import target
from weft_server.bench.serve.tenants import Account, Keys
from weft_server.bench.serve.workload import LoadRequest
from weft_server.errors import ConfigError


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    return parser.parse_args(["serve", *flags])


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten requests in two seconds, in Mooncake's format."""
    rows = [
        {"timestamp": 200 * i, "input_length": 20 + i, "output_length": 3 + i % 4, "hash_ids": []}
        for i in range(10)
    ]
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def server(trace: Path) -> Iterator[tuple[str, Keys]]:
    """A server with two tenants and three adapters."""
    flags = ("--model", "tiny", "--tenants", "2", "--adapters", "3", "--adapter-rank", "4")
    with target(parse("--trace", str(trace), *flags, "--", "--dtype", "float32")) as (url, keys, shape):
        assert shape is not None
        yield url, keys


def request(model: str, *, arrival_s: float = 0.0, num_tokens: int = 4, tenant_idx: int = 0) -> LoadRequest:
    body = {
        "model": model,
        "prompt": [101, 102, 103],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 0,
    }
    return LoadRequest(arrival_s, tenant_idx, 3, num_tokens, json.dumps(body).encode())


def send(url, requests, keys, seconds=0.0, timeout_s=60.0):
    async def all_of_them():
        client = Client(url, timeout_s)
        try:
            return await send_all(client, requests, keys, seconds)
        finally:
            await client.close()

    return asyncio.run(all_of_them())


def test_requests_leave_at_their_times_and_are_answered_in_full(server):
    url, keys = server
    base = Account(url, keys.tenants[0]).ready()["model"]
    requests = [request(base, arrival_s=0.2 * i, num_tokens=3 + i, tenant_idx=i % 2) for i in range(5)]
    started = time.perf_counter()
    done = send(url, requests, keys.tenants, seconds=1.0)
    assert time.perf_counter() - started >= 1.0
    for item in done.sent:
        assert item.reply.error is None
        assert item.reply.num_tokens == item.request.num_output_tokens
        assert 1 <= len(item.reply.pieces_s) <= item.request.num_output_tokens
        assert item.reply.pieces_s == sorted(item.reply.pieces_s)
        assert item.reply.sent_s >= item.due_s


def test_each_tenant_has_its_adapters_and_errors_are_told_apart(server):
    url, keys = server
    accounts = [Account(url, key) for key in keys.tenants]
    base = accounts[0].ready()["model"]
    names = [account.adapters(base) for account in accounts]
    assert [sorted(own) for own in names] == [["adapter-00000", "adapter-00002"], ["adapter-00001"]]
    other = request("adapter-00001", tenant_idx=0)
    good = request("adapter-00001", tenant_idx=1)
    done = send(url, [other, good], keys.tenants)
    assert [item.reply.error for item in done.sent] == ["404 model_not_found", None]
    wrong = send(url, [request(base)], ["no-such-key"])
    assert wrong.sent[0].reply.error == "401 invalid_api_key"


def test_a_server_that_is_not_there_is_an_error_of_the_connection(server):
    done = send("http://127.0.0.1:9", [request("base")], [None])
    assert done.sent[0].reply.error == "connection: ConnectionRefusedError"
    url, keys = server
    slow = send(url, [request(Account(url, keys.tenants[0]).ready()["model"])], keys.tenants, timeout_s=1e-6)
    assert slow.sent[0].reply.error == "client timeout"


def test_the_command_measures_a_running_server(server, trace, tmp_path, capsys):
    url, keys = server
    flags = [f"--key={key}" for key in keys.tenants]
    given = parse(
        "--trace", str(trace), "--url", url, *flags, "--adapters", "2", "--warm-up", "0", "--duration", "3"
    )
    given.out = tmp_path
    assert run(given) == 0
    report = json.loads((tmp_path / "serve-url.json").read_text())
    load = report["data"]["phases"][0]["load"]
    assert (load["num_requests"], load["errors"]) == (10, {})
    assert load["generated_per_s"] > 0.0
    assert (tmp_path / "serve-url.png").stat().st_size > 10_000
    assert "not measured" not in capsys.readouterr().out


def test_flags_that_belong_to_the_other_kind_of_server_are_refused(trace):
    with pytest.raises(ConfigError, match="--key is for a server at --url"):
        run(parse("--trace", str(trace), "--key", "x"))
    with pytest.raises(ConfigError, match="flags after"):
        run(parse("--trace", str(trace), "--url", "http://127.0.0.1:9", "--", "--dtype", "float32"))
    with pytest.raises(ConfigError, match="--url is 'ftp"):
        Client("ftp://x", 1.0)


def test_a_server_that_does_not_start_is_an_error(tmp_path):
    with pytest.raises(BenchError, match="did not start"), served("no-such-model", tmp_path / "data"):
        pass


@pytest.mark.slow
def test_finetune_jobs_beside_requests_are_measured(trace, tmp_path):
    flags = ("--model", "demo", "--jobs", "1", "--duration", "3", "--warm-up", "0")
    given = parse("--trace", str(trace), *flags, "--", "--dtype", "float32")
    given.out = tmp_path
    assert run(given) == 0
    phases = json.loads((tmp_path / "serve-demo.json").read_text())["data"]["phases"]
    assert [phase["name"] for phase in phases] == ["requests alone", "finetuning alone", "both"]
    assert [phase["trained_per_s"] is None for phase in phases] == [True, False, False]
    assert min(phase["trained_per_s"] for phase in phases[1:]) > 0.0
