"""`weft bench serve`, top to bottom: a server, its tenants, the load, the report."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from weft_scheduler.simulator.readers import TraceError, read_trace
from weft_scheduler.simulator.trace import Trace
from weft_server.bench.coserve.workload import check_load, draw_trace
from weft_server.bench.report import BenchError, Report
from weft_server.bench.serve.client import Client
from weft_server.bench.serve.figure import draw
from weft_server.bench.serve.load import Run, send_all
from weft_server.bench.serve.measures import Slo, report_of
from weft_server.bench.serve.report import Phase, fill
from weft_server.bench.serve.target import target
from weft_server.bench.serve.tenants import Account, Keys
from weft_server.bench.serve.workload import LoadRequest, make_requests, shape_trace
from weft_server.bench.settings import check_rank
from weft_server.bench.shapes import SHAPES, Shape
from weft_server.errors import ConfigError
from weft_server.model.config import ModelConfig
from weft_server.serving import DEMO_MODEL

_MAX_WARM_UP_REQUESTS = 64
_LEAST_WINDOW_S = 1.0


def run(arguments: argparse.Namespace) -> int:
    """The command; returns the exit code.

    Raises:
        ConfigError: a flag's value or the trace.
        BenchError: the server does not start, or refuses what the benchmark needs.
    """
    if arguments.url is None and arguments.key:
        raise ConfigError("--key is for a server at --url; the started server gets keys of its own")
    if arguments.url is not None and arguments.server_flags:
        raise ConfigError("flags after `--` are for the started server; --url names one that runs already")
    if arguments.jobs and arguments.url is None:
        _refuse_small_vocabulary(arguments.model)
    check_rank(arguments.adapter_rank)
    if arguments.rate is not None:
        check_load("--rate", arguments.rate, arguments.duration)
    model = "a running server" if arguments.url is not None else Path(arguments.model).name
    trace = _read(arguments)
    report = Report(arguments.name or f"serve-{_short_name(arguments)}", f"Load over HTTP: {model}")
    with target(arguments) as (url, keys, random_shape):
        phases = _Load(arguments, trace, url, keys, random_shape).phases()
    fill(report, arguments, phases)
    if arguments.out is not None:
        draw(phases, arguments.out / f"{report.name}.png")
    report.finish(arguments.out)
    return 0


def _refuse_small_vocabulary(model: str) -> None:
    """Jobs are trained on text, of which every token must be one of the model's.

    Raises:
        ConfigError: random weights of a shape with fewer tokens than the tokenizer.
    """
    wanted = ModelConfig.from_directory(DEMO_MODEL).vocab_size
    if model in SHAPES and SHAPES[model]["vocab_size"] < wanted:
        raise ConfigError(
            f"--jobs needs a model with the tokenizer's {wanted} tokens, {model} has "
            f"{SHAPES[model]['vocab_size']}; give --model demo or bench-200m"
        )


def _short_name(arguments: argparse.Namespace) -> str:
    return "url" if arguments.url is not None else Path(arguments.model).name


class _Load:
    """The phases on one server."""

    def __init__(
        self, arguments: argparse.Namespace, trace: Trace, url: str, keys: Keys, random_shape: Shape | None
    ) -> None:
        self._arguments = arguments
        self._url = url
        self._keys = keys
        self._random_shape = random_shape
        self._accounts = [Account(url, key) for key in keys.tenants]
        self._admin = Account(url, keys.admin)
        self._base = self._accounts[0].ready()
        self._models = [account.adapters(self._base["model"]) for account in self._accounts]
        self._requests = self._make(self._shaped(trace), arguments.seed)
        self._seconds = _window_s(arguments, trace)

    def phases(self) -> list[Phase]:
        """Requests alone; with jobs, these alone and both after it."""
        self._warm_up()
        phases = [self._phase("requests alone", sends=True)]
        if self._arguments.jobs:
            account = self._accounts[0]
            jobs = account.start_jobs(self._base["model"], self._arguments.jobs)
            phases.append(self._phase("finetuning alone", sends=False))
            phases.append(self._phase("both", sends=True))
            account.cancel_jobs(jobs)
        for account in (*self._accounts, self._admin):
            account.close()
        return phases

    def _phase(self, name: str, *, sends: bool) -> Phase:
        requests = self._requests if sends else ()
        before, began_s = self._admin.trained_tokens(), time.perf_counter()
        run = self._send(requests, self._seconds)
        after, seconds = self._admin.trained_tokens(), time.perf_counter() - began_s
        trained = None if before is None or after is None else (after - before) / seconds
        trained = None if name == "requests alone" else trained
        slo = Slo(self._arguments.tpot_slo_ms, self._arguments.ttft_slo_ms)
        return Phase(name, report_of(run, slo) if sends else None, run if sends else None, trained)

    def _send(self, requests: Sequence[LoadRequest], seconds: float) -> Run:
        async def send() -> Run:
            client = Client(self._url, self._arguments.timeout)
            try:
                return await send_all(client, requests, self._keys.tenants, seconds)
            finally:
                await client.close()

        return asyncio.run(send())

    def _warm_up(self) -> None:
        seconds = self._arguments.warm_up
        if seconds > 0.0:
            warm = [one for one in self._requests if one.arrival_s < seconds] or self._requests[:1]
            self._send(warm[:_MAX_WARM_UP_REQUESTS], 0.0)

    def _shaped(self, trace: Trace) -> Trace:
        arguments = self._arguments
        return shape_trace(
            trace,
            length_scale=arguments.length_scale,
            max_model_len=self._base["max_model_len"],
            num_tenants=len(self._accounts),
            num_adapters=arguments.adapters,
            seed=arguments.seed,
        )

    def _make(self, trace: Trace, seed: int) -> tuple[LoadRequest, ...]:
        if self._arguments.adapters and not any(self._models):
            raise BenchError(f"--adapters is {self._arguments.adapters}, but no tenant of the server has any")
        # Most tokens of random weights are no text, so that events would not come with the tokens.
        extra = {"logprobs": 0} if self._random_shape is not None else {}
        return make_requests(
            trace, models=self._models, base_model=self._base["model"], seed=seed, extra=extra
        )


def _read(arguments: argparse.Namespace) -> Trace:
    """The arrivals of the window.

    Raises:
        ConfigError: there is no such trace, or it has none.
    """
    if arguments.trace is None:
        return draw_trace(arguments.rate or 1.0, arguments.duration, arguments.seed)
    try:
        return read_trace(
            arguments.trace,
            seed=arguments.seed,
            start_s=arguments.start,
            duration_s=arguments.duration,
            requests_per_s=arguments.rate,
        )
    except TraceError as error:
        raise ConfigError(f"--trace: {error}") from error


def _window_s(arguments: argparse.Namespace, trace: Trace) -> float:
    """Seconds of a phase: those asked for, or up to the last arrival of a trace that ends before."""
    if arguments.trace is None:
        return float(arguments.duration)
    return min(float(arguments.duration), max(trace[-1].arrival_s, _LEAST_WINDOW_S))
