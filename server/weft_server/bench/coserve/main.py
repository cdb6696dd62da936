"""`weft bench coserve`, top to bottom: check, tune, measure every window, report.

Contenders run one after the other; the two that are one engine under two policies take turns in every load
and objective. Everything else on the machine should be quiet.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import mean, median

from weft_scheduler.simulator.readers import TraceError
from weft_server.bench.coserve.checks import (
    LOGPROB_TOLERANCE,
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    Check,
    logprob_error,
    step_errors,
)
from weft_server.bench.coserve.measures import ATTAINMENT, PERCENTS, Point, Slo
from weft_server.bench.coserve.options import Options, read_options
from weft_server.bench.coserve.process import ContenderError, ContenderProcess, Tuning, peer_pair
from weft_server.bench.coserve.report import make_report
from weft_server.bench.coserve.results import Results
from weft_server.bench.coserve.tuning import pair_candidates, single_candidates, sweep, turn_candidates
from weft_server.bench.coserve.window import Outcome, Policy, Window
from weft_server.bench.coserve.workload import WorkloadSpec, arrivals, check_load
from weft_server.bench.peers import why_absent
from weft_server.bench.report import BenchError, Report
from weft_server.bench.surroundings import num_cores
from weft_server.errors import ConfigError

_PROBE_REQUESTS = 5
_PROBE_S = 3.0
_LEAST_LOAD = 0.1
"""Requests a second, where they are found only later."""


def run(arguments: argparse.Namespace) -> int:
    """The command; returns the exit code.

    Raises:
        ConfigError: a flag's value.
        BenchError: a contender computes something else than the others, or cannot run.
    """
    options = read_options(arguments)
    _refuse_loads(options)
    results = Results(options.setup.shape_name)
    report = Report(
        f"coserve-{options.setup.shape_name}-{'gpu' if options.is_gpu else 'cpu'}",
        f"Co-serving: {options.setup.shape_name}",
    )
    try:
        Bench(options, results, report).run()
    except ContenderError as error:
        raise BenchError(str(error)) from error
    make_report(report, options, results)
    report.finish(options.out)
    return 0


def _refuse_loads(options: Options) -> None:
    """Before minutes are spent.

    Raises:
        ConfigError: a load with too many requests, or a trace that cannot be read or has too few.
    """
    loads = options.loads or (_LEAST_LOAD,)
    for load in loads:
        check_load("--loads", load, options.seconds)
    config = options.setup
    spec = WorkloadSpec(loads[-1], options.seconds, 1, config.max_model_len, 1, trace=options.trace)
    if options.trace is not None:
        try:
            arrivals(spec)
        except TraceError as error:
            raise ConfigError(f"--trace: {error}") from error


@dataclass(frozen=True, slots=True)
class _Expected:
    """What the peers compute: log-probabilities under the right adapters and wrong ones, the first step."""

    logprobs: Check
    wrong_logprobs: Check
    first_step: Check


@dataclass(slots=True)
class Bench:
    """One run of the benchmark: fills `results` and the report's checks."""

    options: Options
    results: Results
    report: Report
    _started_s: float = field(default_factory=time.monotonic)
    _expected: _Expected | None = None
    _kept: tuple[ContenderProcess, ContenderProcess] | None = None

    def run(self) -> None:
        """All phases, in order."""
        peers_absent = why_absent(self.options.setup.quantization) if self.options.with_peers else "left out"
        self.results.peers_absent = peers_absent
        cores = num_cores()
        with ExitStack() as stack:
            if peers_absent is None and self.options.is_gpu:
                # Nothing is swept there, and loading the peers again would take longer than measuring them.
                everything = (Tuning(cores), Tuning(cores))
                self._kept = stack.enter_context(peer_pair(self.options.setup, everything))
            if peers_absent is None:
                self._measure_peers_alone(cores)
            self._tune_weft(cores)
            with ContenderProcess("weft", self.options.setup, self.results.weft_tuning.best) as weft:
                self._check(weft)
                self._measure_machine(weft)
                self._measure_weft(weft)
            if peers_absent is None:
                self._measure_two_processes(cores)
                self._measure_turns(cores)

    # ------------------------------------------------------------ phases

    def _measure_peers_alone(self, cores: int) -> None:
        """What they compute, to be compared, then how fast each is with the machine to itself."""
        times: dict[Tuning, float] = {}
        trained: dict[Tuning, Outcome] = {}
        for tuning in self._single_candidates(cores):
            self._say(f"transformers + PEFT, each alone, {tuning}")
            with self._pair((tuning, tuning)) as (generator, trainer):
                if not times:
                    self._expected = self._peers_answers(generator, trainer)
                times[tuning] = _unloaded_tpot_s(generator.answer_alone(self._probe()))
                trained[tuning] = self._run(trainer, None, trains=True)
        seconds = self.options.seconds
        generating = {t: (1.0 / tpot_s, f"{1000 * tpot_s:.1f} ms per token") for t, tpot_s in times.items()}
        rates = {tuning: outcome.trained_tokens / seconds for tuning, outcome in trained.items()}
        training = {tuning: (rate, f"{rate:.0f} tokens/s finetuned") for tuning, rate in rates.items()}
        sweeps = [
            sweep("PEFT generating alone", list(times), generating.__getitem__),
            sweep("PEFT training alone", list(times), training.__getitem__),
        ]
        self.results.peer_tunings = sweeps
        self.results.peer_unloaded_tpot_s = times[sweeps[0].best]
        self._record(Point("PEFT training alone", 0.0, None, seconds, trained[sweeps[1].best]))

    def _peers_answers(self, generator: ContenderProcess, trainer: ContenderProcess) -> _Expected:
        workload = self._check_workload()
        right, wrong = generator.check(workload), generator.check(workload, adapter_shift=1)
        return _Expected(right, wrong, trainer.check(workload))

    def _check(self, weft: ContenderProcess) -> None:
        """The first Weft that runs computes what the peers compute, or the benchmark ends."""
        if self._expected is None:
            return
        expected, self._expected = self._expected, None
        self._say("checking that Weft computes the same")
        own = weft.check(self._check_workload())
        self.report.check(
            "log-probabilities of prompts beside transformers + PEFT (rms, of their spread)",
            logprob_error(own, expected.logprobs),
            LOGPROB_TOLERANCE,
            logprob_error(own, expected.wrong_logprobs),
        )
        loss, norm = step_errors(own, expected.first_step)
        self.report.check("loss of the first step beside PEFT (relative)", loss, LOSS_TOLERANCE)
        self.report.check("gradient norm of the first step beside PEFT (relative)", norm, NORM_TOLERANCE)

    def _tune_weft(self, cores: int) -> None:
        def measure(tuning: Tuning) -> tuple[float, str]:
            with ContenderProcess("weft", self.options.setup, tuning) as weft:
                self._check(weft)
                times = weft.answer_alone(self._probe())
                trained = self._run(weft, None, trains=True, policy="dedicated", seconds=_PROBE_S)
            tpot_s, trained_per_s = _unloaded_tpot_s(times), trained.trained_tokens / _PROBE_S
            note = f"{1000 * tpot_s:.1f} ms per token, {trained_per_s:.0f} tokens/s finetuned"
            return math.sqrt(trained_per_s / tpot_s), note

        candidates = self._single_candidates(cores)
        if len(candidates) == 1:
            self.results.weft_tuning = sweep("Weft", candidates, lambda _: (0.0, "not swept"))
            return
        self._say("tuning Weft")
        self.results.weft_tuning = sweep("Weft", candidates, measure)

    def _measure_machine(self, weft: ContenderProcess) -> None:
        """What a token and a request take unloaded, and the loads and objectives that follow."""
        options, results = self.options, self.results
        times = weft.answer_alone(self._probe())
        results.unloaded_tpot_s = _unloaded_tpot_s(times)
        results.slos = tuple(slo.resolve(results.unloaded_tpot_s, options.ttft_s) for slo in options.slos)
        if options.loads is not None:
            results.loads = options.loads
            return
        service_s = mean(own[-1] for own in times)
        # Requests that take `service_s` each keep a machine busy for the part 1 - exp(-rate · service_s).
        results.loads = tuple(-math.log(1.0 - share) / service_s for share in options.load_shares)

    def _measure_weft(self, weft: ContenderProcess) -> None:
        results, options = self.results, self.options
        for load in results.loads:
            self._say(f"Weft, inference alone, {load:.2f} requests/s")
            outcome = self._run(weft, load)
            self._record(Point("inference alone", load, None, options.seconds, outcome))
        alone: Sequence[tuple[str, Policy]] = (
            ("finetuning alone", "dedicated"),
            ("finetuning, ready for requests", "weft"),
        )
        for name, policy in alone:
            self._say(f"Weft, {name}")
            outcome = self._run(weft, None, trains=True, policy=policy)
            self._record(Point(name, 0.0, None, options.seconds, outcome))
        policies: Sequence[tuple[str, Policy]] = (("Weft", "weft"), ("alternating", "alternating"))
        for slo in results.slos:
            for idx, load in enumerate(results.loads):
                for name, policy in policies if idx % 2 == 0 else policies[::-1]:
                    self._say(f"{name}, {slo.name}, {load:.2f} requests/s")
                    outcome = self._run(weft, load, trains=True, policy=policy, slo=slo)
                    self._record(Point(name, load, slo, options.seconds, outcome))

    def _measure_two_processes(self, cores: int) -> None:
        """Both at once. Nothing tells them of an objective, so a window counts for all of them."""
        candidates = self._pair_candidates(pair_candidates, cores)
        best, point = self._tune_pair("two processes", candidates, None)
        self._record(point)
        loads = [load for load in self._peer_loads() if load != point.requests_per_s]
        if loads:
            with self._pair(best) as pair:
                for load in loads:
                    self._say(f"two processes, {load:.2f} requests/s")
                    self._record(self._run_pair("two processes", pair, load, None))

    def _measure_turns(self, cores: int) -> None:
        """The trainer's turn is what the objective leaves of a token's time, if anything."""
        candidates = self._pair_candidates(turn_candidates, cores)
        best, point = self._tune_pair("taking turns", candidates, self.results.slos[-1])
        self._record(point)
        with self._pair(best) as pair:
            for slo in self.results.slos:
                for load in self._peer_loads():
                    if (slo, load) != (point.slo, point.requests_per_s):
                        self._say(f"taking turns, {slo.name}, {load:.2f} requests/s")
                        self._record(self._run_pair("taking turns", pair, load, slo))

    # ------------------------------------------------------------ windows

    @contextmanager
    def _pair(self, tunings: tuple[Tuning, Tuning]) -> Iterator[tuple[ContenderProcess, ContenderProcess]]:
        """Generator and trainer: those that are kept, else new ones."""
        if self._kept is not None:
            yield self._kept
            return
        with peer_pair(self.options.setup, tunings) as pair:
            yield pair

    def _run(
        self,
        contender: ContenderProcess,
        load: float | None,
        *,
        trains: bool = False,
        policy: Policy = "weft",
        slo: Slo | None = None,
        seconds: float | None = None,
    ) -> Outcome:
        return contender.run(self._window(load, trains=trains, policy=policy, slo=slo, seconds=seconds))

    def _run_pair(
        self, name: str, pair: tuple[ContenderProcess, ContenderProcess], load: float, slo: Slo | None
    ) -> Point:
        """A window of both peers; with an objective, in turns."""
        generator, trainer = pair
        window = replace(self._window(load, trains=True, slo=slo), takes_turns=slo is not None)
        trainer.begin(window)
        generator.begin(window)
        generated, trained = generator.outcome(), trainer.outcome()
        outcome = replace(generated, trained_tokens=trained.trained_tokens)
        return Point(name, load, slo, window.seconds, outcome)

    def _tune_pair(
        self, name: str, candidates: Sequence[tuple[Tuning, Tuning]], slo: Slo | None
    ) -> tuple[tuple[Tuning, Tuning], Point]:
        """The candidate that trains most among those that attain the loosest objective, or attains most; and
        its window, with inference half busy.
        """
        points: dict[tuple[Tuning, Tuning], Point] = {}

        def measure(tunings: tuple[Tuning, Tuning]) -> tuple[float, str]:
            self._say(f"{name}: generator {tunings[0]}; trainer {tunings[1]}")
            with self._pair(tunings) as pair:
                point = points[tunings] = self._run_pair(name, pair, self.results.half_busy_load, slo)
            attained = point.attained(self.results.slos[-1]) or 0.0
            note = f"{attained:.0%} attained, {point.trained_per_s:.0f} tokens/s finetuned"
            return point.trained_per_s if attained >= ATTAINMENT else (attained - 1.0) * 1e6, note

        found = sweep(name, candidates, measure)
        self.results.pair_tunings.append(found)
        return found.best, points[found.best]

    def _window(
        self,
        load: float | None,
        *,
        trains: bool = False,
        policy: Policy = "weft",
        slo: Slo | None = None,
        seconds: float | None = None,
    ) -> Window:
        options = self.options
        seconds = seconds or options.seconds
        return Window(
            start_s=time.monotonic() + (options.settle_s if trains else 0.2),
            seconds=seconds,
            drain_s=options.drain_s if load is not None else 0.0,
            workload=None if load is None else self._workload(load, seconds),
            trains=trains,
            policy=policy,
            tpot_s=slo.tpot_s if slo is not None else 1.0,
            ttft_s=options.ttft_s,
        )

    def _workload(self, load: float, seconds: float) -> WorkloadSpec:
        options, setup = self.options, self.options.setup
        return WorkloadSpec(
            requests_per_s=load,
            seconds=seconds,
            vocab_size=int(setup.hf_config["vocab_size"]),
            max_model_len=setup.max_model_len,
            num_adapters=setup.num_adapters,
            length_scale=options.length_scale,
            trace=options.trace,
            seed=setup.seed,
        )

    def _pair_candidates(
        self, candidates: Callable[..., list[tuple[Tuning, Tuning]]], cores: int
    ) -> list[tuple[Tuning, Tuning]]:
        if self.options.is_gpu:
            return [(Tuning(cores), Tuning(cores))]
        return candidates(cores, is_quick=self.options.is_quick)

    def _check_workload(self) -> WorkloadSpec:
        return replace(self._workload(1.0, 4.0), max_model_len=128)

    def _probe(self) -> WorkloadSpec:
        """A few requests to be answered one after the other."""
        return self._workload(1.0, float(_PROBE_REQUESTS))

    def _single_candidates(self, cores: int) -> list[Tuning]:
        if self.options.is_gpu:
            return [Tuning(cores)]
        return single_candidates(cores, is_quick=self.options.is_quick)

    def _peer_loads(self) -> Sequence[float]:
        return (self.results.half_busy_load,) if self.options.is_gpu else self.results.loads

    def _record(self, point: Point) -> None:
        self.results.add(point)
        parts = [f"{point.trained_per_s:.0f} tokens/s finetuned"] if point.outcome.trained_tokens else []
        if point.outcome.answers:
            shown = (point.tpot_ms(percent) for percent in PERCENTS)
            times = " / ".join("–" if value is None else f"{value:.0f}" for value in shown)
            parts.append(f"{times} ms per token")
        if point.slo is not None:
            parts.append(f"{point.attained(point.slo) or 0.0:.0%} attained")
        if point.outcome.busy_s:
            parts.append(f"busy {point.busy_share:.0%}")
        self._say(f"    {', '.join(parts)}")

    def _say(self, what: str) -> None:
        """Progress, on standard error."""
        print(f"[{time.monotonic() - self._started_s:5.0f} s] {what}", file=sys.stderr, flush=True)


def _unloaded_tpot_s(times: list[list[float]]) -> float:
    """Median gap between tokens of requests that were answered alone."""
    return median(later - sooner for own in times for sooner, later in pairwise(own))
