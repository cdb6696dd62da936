"""Collects, while a simulation runs, what its report is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from weft_scheduler.scheduler import Scheduler
from weft_scheduler.simulator.report import (
    Percentiles,
    Report,
    RequestRecord,
    Slo,
    jain_index,
    percentile,
    weighted_percentiles,
)
from weft_scheduler.simulator.trace import TraceRequest

FAIRNESS_WINDOW_S = 10.0
PROMPT_SERVICE, OUTPUT_SERVICE = 1, 2
"""What a token of a prompt and of an answer counts as service."""


@dataclass(slots=True)
class Sample:
    """The state at a moment, for curves: rates are of the time since the sample before."""

    time_s: float
    requests_per_s: float = 0.0
    generated_per_s: float = 0.0
    trained_per_s: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    budget_s: float = 0.0
    gap_p95_s: float | None = None
    ttft_p95_s: float | None = None


@dataclass(slots=True)
class _Interval:
    """What has happened since the last sample."""

    num_requests: int = 0
    num_generated: int = 0
    trained_before: float = 0.0
    gaps: Counter[float] = field(default_factory=Counter)
    ttfts: list[float] = field(default_factory=list)
    service: Counter[str] = field(default_factory=Counter)
    contended: frozenset[str] = frozenset()


class Recorder:
    """Counts tokens, gaps and service; samples the scheduler every `FAIRNESS_WINDOW_S`."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` are those of the scheduler; tenants without one have 1."""
        self._weights = weights
        self.records: dict[str, RequestRecord] = {}
        self.samples: list[Sample] = []
        self.trained_by_tenant: dict[str, float] = {}
        self.num_refused = 0
        self.num_generated = 0
        self.num_steps = 0
        self.num_iterations = 0
        self.busy_s = 0.0
        self._waiting: Counter[str] = Counter()
        self._gaps: list[tuple[float, int]] = []
        self._service: Counter[str] = Counter()
        self._contended: list[tuple[float, float]] = []
        self._interval = _Interval()
        self._next_sample_s = FAIRNESS_WINDOW_S
        self._kv_seconds = 0.0
        self._kv_peak = 0.0

    # ------------------------------------------------------------ events

    def arrived(self, sequence_id: str, request: TraceRequest, was_resident: bool | None) -> None:
        """A request has been queued."""
        self.records[sequence_id] = RequestRecord(
            request.tenant,
            request.arrival_s,
            request.num_prompt_tokens,
            request.num_output_tokens,
            was_resident=was_resident,
        )
        self._waiting[request.tenant] += 1
        self._interval.num_requests += 1

    def tokens(self, sequence_ids: list[str], now_s: float) -> None:
        """Every one of these has got a token."""
        interval, records = self._interval, self.records
        service = interval.service
        gaps: dict[float, int] = {}
        for sequence_id in sequence_ids:
            record = records[sequence_id]
            record.num_tokens += 1
            if record.first_token_s is None:
                self._first_token(record, now_s)
            else:
                gap = now_s - record.last_token_s
                gaps[gap] = gaps.get(gap, 0) + 1
            record.last_token_s = now_s
            service[record.tenant] += OUTPUT_SERVICE
        self._gaps.extend(gaps.items())
        interval.gaps.update(gaps)
        self.num_generated += len(sequence_ids)
        interval.num_generated += len(sequence_ids)

    def _first_token(self, record: RequestRecord, now_s: float) -> None:
        record.first_token_s = now_s
        self._waiting[record.tenant] -= 1
        self._interval.ttfts.append(now_s - record.arrival_s)
        self._interval.service[record.tenant] += PROMPT_SERVICE * record.num_prompt_tokens

    def trained(self, tenant: str, tokens: float) -> None:
        """So many tokens of a tenant's packs have been through the backward of all layers."""
        self.trained_by_tenant[tenant] = self.trained_by_tenant.get(tenant, 0.0) + tokens

    def iteration(self, seconds: float, kv_usage: float) -> None:
        """An iteration took so long, with this part of the KV blocks held."""
        self.num_iterations += 1
        self.busy_s += seconds
        self._kv_seconds += seconds * kv_usage
        self._kv_peak = max(self._kv_peak, kv_usage)

    def sample(self, scheduler: Scheduler, now_s: float) -> None:
        """Close the interval if it is over."""
        if now_s < self._next_sample_s:
            return
        interval, start_s = self._interval, self.samples[-1].time_s if self.samples else 0.0
        elapsed_s, trained = now_s - start_s, sum(self.trained_by_tenant.values())
        self.samples.append(
            Sample(
                now_s,
                interval.num_requests / elapsed_s,
                interval.num_generated / elapsed_s,
                (trained - interval.trained_before) / elapsed_s,
                scheduler.num_running,
                scheduler.num_waiting,
                scheduler.kv_usage,
                scheduler.budget_s,
                weighted_percentiles(interval.gaps.items()).p95,
                percentile(sorted(interval.ttfts), 95.0),
            )
        )
        waiting = frozenset(tenant for tenant, num in self._waiting.items() if num > 0)
        contended = interval.contended & waiting
        if len(contended) > 1:
            index = jain_index(interval.service[tenant] / self._weight(tenant) for tenant in contended)
            self._contended.append((index, elapsed_s))
        self._service.update(interval.service)
        self._interval = _Interval(trained_before=trained, contended=waiting)
        self._next_sample_s = now_s + FAIRNESS_WINDOW_S

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    # ------------------------------------------------------------ result

    def report(
        self,
        *,
        policy: str,
        scheduler: Scheduler,
        slo: Slo,
        duration_s: float,
        training_s: float,
        num_adapter_loads: int,
    ) -> Report:
        """Everything so far; finetuning ran for `training_s` of the `duration_s` seconds."""
        records = list(self.records.values())
        finished = [record for record in records if record.finished_s is not None]
        attained = sum(record.attains(slo) for record in records)
        known = [record.was_resident for record in records if record.was_resident is not None]
        trained = sum(self.trained_by_tenant.values())
        service = self._service + self._interval.service
        tenants = {record.tenant for record in records}
        return Report(
            policy=policy,
            duration_s=duration_s,
            num_requests=len(records) + self.num_refused,
            num_finished=len(finished),
            num_refused=self.num_refused,
            ttft=Percentiles.of(record.ttft_s for record in records if record.ttft_s is not None),
            tpot=Percentiles.of(r.tpot_s for r in finished if r.num_tokens > 1 and r.tpot_s is not None),
            gap=weighted_percentiles(self._gaps),
            e2e=Percentiles.of(r.finished_s - r.arrival_s for r in finished if r.finished_s is not None),
            attainment=attained / max(1, len(records) + self.num_refused),
            goodput_per_s=attained / duration_s,
            generated_per_s=self.num_generated / duration_s,
            trained_tokens=trained,
            trained_per_s=trained / training_s if training_s > 0.0 else 0.0,
            dedicated_per_s=None,
            num_steps=self.num_steps,
            service_fairness=jain_index(service[tenant] / self._weight(tenant) for tenant in tenants),
            contended_fairness=self._contended_fairness(),
            training_fairness=self._training_fairness(),
            adapter_hit_rate=sum(known) / len(known) if known else None,
            prefix_hit_rate=(
                scheduler.num_prefix_hits / scheduler.num_prefix_queries
                if scheduler.num_prefix_queries
                else None
            ),
            num_adapter_loads=num_adapter_loads,
            kv_mean=self._kv_seconds / self.busy_s if self.busy_s else 0.0,
            kv_peak=self._kv_peak,
            num_preemptions=scheduler.num_preemptions,
            num_packs_dropped=scheduler.num_packs_dropped,
            num_iterations=self.num_iterations,
            busy_share=min(1.0, self.busy_s / duration_s),
            cost_error_p50=scheduler.cost.error_p50,
            cost_error_p95=scheduler.cost.error_p95,
            ttft_p95_by_tenant=self._ttft_by_tenant(records),
            trained_by_tenant=dict(self.trained_by_tenant),
        )

    def _contended_fairness(self) -> float | None:
        total_s = sum(seconds for _, seconds in self._contended)
        return sum(index * seconds for index, seconds in self._contended) / total_s if total_s else None

    def _training_fairness(self) -> float | None:
        if not self.trained_by_tenant:
            return None
        return jain_index(tokens / self._weight(tenant) for tenant, tokens in self.trained_by_tenant.items())

    @staticmethod
    def _ttft_by_tenant(records: list[RequestRecord]) -> dict[str, float]:
        by_tenant: dict[str, list[float]] = {}
        for record in records:
            if record.ttft_s is not None:
                by_tenant.setdefault(record.tenant, []).append(record.ttft_s)
        return {name: percentile(sorted(times), 95.0) or 0.0 for name, times in sorted(by_tenant.items())}
