"""Finetuning work: packs on their way through forward windows and backward waves, and the steps of their
jobs.

    queued → forwarding → ready → in wave → done        (dropped: back to queued, resuming at its cursor
layer)

Owns the order of windows and slices; it does not know budgets or clocks, and blocks only as lists that it is
handed. A wave goes from its first layer to layer 0 and, within a layer, from the last window to window 0. A
pack dropped between two layers keeps its cursor: it is forwarded again without loss and goes on in a wave
that starts there, so that every (layer, window) of a pack runs exactly once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from weft_scheduler.plan import BackwardSlice


@dataclass(frozen=True, slots=True)
class PackSpec:
    """Examples of one optimizer step, concatenated: `num_tokens` tokens, `num_target_tokens` of them trained.

    `adapter` is the key that the job's training adapter was added under.
    """

    pack_id: str
    job_id: str
    tenant: str
    num_tokens: int
    adapter: str
    num_target_tokens: int


class PackStatus(Enum):
    """Where a pack is."""

    QUEUED = "queued"
    FORWARDING = "forwarding"
    READY = "ready"
    IN_WAVE = "in wave"
    DONE = "done"
    REMOVED = "removed"


@dataclass(slots=True, eq=False)
class Pack:
    """The state of one pack, counting plans in flight: `num_forwarded` of its tokens have been forwarded.

    `order` is its place among the packs that have been given blocks; `cursor_layer` is the layer at which
    its backward begins or goes on; `has_loss` says that all windows have been forwarded with their loss,
    `keeps_activations` that its backward need not recompute them; `is_protected` that it has waited so long
    that requests may not take its blocks.
    """

    spec: PackSpec
    num_windows: int
    cursor_layer: int
    waiting_since_s: float
    status: PackStatus = PackStatus.QUEUED
    num_forwarded: int = 0
    has_loss: bool = False
    keeps_activations: bool = False
    is_protected: bool = False
    last_planned: int = 0
    order: int = 0
    block_ids: tuple[int, ...] = ()

    @property
    def num_kept_tokens(self) -> int:
        """Tokens whose activations it keeps."""
        return self.spec.num_tokens if self.keeps_activations else 0


@dataclass(slots=True, eq=False)
class Job:
    """The open optimizer step of one job. `packs` are those whose backward is not committed, oldest first."""

    job_id: str
    adapter: str
    packs: list[Pack] = field(default_factory=list)
    tenant: str | None = None
    waiting_since_s: float | None = None
    step_is_closed: bool = False
    step_is_planned: bool = False
    last_planned: int = 0

    @property
    def step_is_due(self) -> bool:
        """Whether the optimizer step can be planned: closed, every backward committed, not planned yet."""
        return self.step_is_closed and not self.packs and not self.step_is_planned

    @property
    def has_work(self) -> bool:
        """Whether its open step has packs to compute or an optimizer step to run."""
        return bool(self.packs) or self.step_is_closed

    def head(self) -> Pack | None:
        """The first pack that has no blocks yet."""
        return next((pack for pack in self.packs if pack.status is PackStatus.QUEUED), None)


@dataclass(slots=True, eq=False)
class Wave:
    """Packs that go through the layers together; `(layer, window)` is the next slice."""

    wave_id: int
    packs: list[Pack]
    layer: int
    window: int

    @property
    def keeps_activations(self) -> bool:
        """Whether its packs do, all or none."""
        return self.packs[0].keeps_activations

    @property
    def num_windows(self) -> int:
        """Windows of its longest pack."""
        packs = self.packs
        return packs[0].num_windows if len(packs) == 1 else max(pack.num_windows for pack in packs)

    @property
    def is_between_layers(self) -> bool:
        """Whether no window of the next slice's layer has been planned yet."""
        return self.window == self.num_windows - 1

    def members(self) -> list[Pack]:
        """The packs that take part in the next slice."""
        window = self.window
        return [pack for pack in self.packs if pack.num_windows > window]


class _Retiring(NamedTuple):
    """Activations of a pack that has left; free once iteration `fence` is committed."""

    fence: int
    num_tokens: int
    num_kept_tokens: int

    @staticmethod
    def of(pack: Pack, fence: int) -> _Retiring:
        """Those of `pack`."""
        return _Retiring(fence, pack.spec.num_tokens, pack.num_kept_tokens)


class TrainingQueue:
    """All jobs, their packs, and the active wave."""

    def __init__(self, num_layers: int, window_tokens: int) -> None:
        """Start without jobs."""
        self.num_layers = num_layers
        self.window_tokens = window_tokens
        self.jobs: dict[str, Job] = {}
        self.alive: list[Pack] = []
        self.wave: Wave | None = None
        self.alive_tokens = 0
        self.kept_tokens = 0
        self._pack_ids: set[str] = set()
        self._num_waves = 0
        self._num_admitted = 0
        self._retiring: list[_Retiring] = []

    # ------------------------------------------------------------ jobs and packs

    def add_job(self, job_id: str, adapter: str) -> Job:
        """Register a job.

        Raises:
            ValueError: it is registered already.
        """
        if job_id in self.jobs:
            raise ValueError(f"job {job_id} has a training adapter already")
        job = self.jobs[job_id] = Job(job_id, adapter)
        return job

    def add_pack(self, spec: PackSpec, now_s: float) -> Pack:
        """Queue a pack of the job's open step.

        Raises:
            ValueError: the job is unknown, its step is closed, the adapter is another one, or the id is in
        use.
        """
        job = self.jobs.get(spec.job_id)
        if job is None or job.adapter != spec.adapter:
            raise ValueError(f"pack {spec.pack_id}: add the training adapter {spec.adapter} of its job first")
        if job.step_is_closed:
            raise ValueError(
                f"pack {spec.pack_id}: the step of job {spec.job_id} is closed until its StepDone"
            )
        if spec.pack_id in self._pack_ids:
            raise ValueError(f"pack {spec.pack_id} exists already")
        num_windows = -(-spec.num_tokens // self.window_tokens)
        pack = Pack(spec, num_windows, self.num_layers - 1, now_s)
        job.packs.append(pack)
        job.tenant = spec.tenant
        self._pack_ids.add(spec.pack_id)
        return pack

    def remove_job(self, job_id: str) -> tuple[Job, list[Pack]] | None:
        """Forget a job; returns it and its packs that hold blocks (to be freed), or None if it is unknown."""
        job = self.jobs.pop(job_id, None)
        if job is None:
            return None
        holders = [pack for pack in job.packs if pack.block_ids]
        for pack in job.packs:
            if pack in self.alive:
                self._retire(pack, pack.last_planned)
            self._leave_wave(pack)
            pack.status = PackStatus.REMOVED
            self._pack_ids.discard(pack.spec.pack_id)
        return job, holders

    def admit(self, pack: Pack, block_ids: list[int], *, keeps_activations: bool = False) -> None:
        """Give a queued pack the blocks for all its tokens; its forward begins."""
        pack.block_ids = tuple(block_ids)
        pack.keeps_activations = keeps_activations
        pack.status = PackStatus.FORWARDING
        pack.num_forwarded = 0
        self._num_admitted += 1
        pack.order = self._num_admitted
        self.alive.append(pack)
        self.alive_tokens += pack.spec.num_tokens
        self.kept_tokens += pack.num_kept_tokens

    def drop(self, pack: Pack, now_s: float) -> tuple[int, ...]:
        """Take the blocks of an alive pack away; returns them.

        What was forwarded before the last window had its loss is forgotten; after that the cotangent at the
        cursor is kept, and the pack is forwarded again without loss.

        Raises:
            ValueError: its wave is inside a layer.
        """
        if not self.can_drop(pack):
            raise ValueError(f"pack {pack.spec.pack_id} ({pack.status.value}) cannot be dropped now")
        if pack.status is PackStatus.IN_WAVE and self.wave is not None:
            pack.cursor_layer = self.wave.layer
        self._leave_wave(pack)
        self._retire(pack, pack.last_planned)
        pack.status = PackStatus.QUEUED
        pack.waiting_since_s = now_s
        pack.is_protected = False
        block_ids, pack.block_ids = pack.block_ids, ()
        return block_ids

    def can_drop(self, pack: Pack) -> bool:
        """Whether the pack holds blocks and is at a boundary."""
        if pack.status is PackStatus.IN_WAVE:
            return self.wave is not None and self.wave.is_between_layers
        return pack.status in (PackStatus.FORWARDING, PackStatus.READY)

    def drop_candidates(self) -> Iterator[Pack]:
        """Alive packs, those whose loss costs least first."""
        for status in (PackStatus.FORWARDING, PackStatus.READY, PackStatus.IN_WAVE):
            yield from (pack for pack in reversed(self.alive) if pack.status is status)

    def release_retired(self, committed: int) -> None:
        """Count the activations of packs that left as free, once no plan in flight touches them."""
        if self._retiring:
            for item in self._retiring:
                if item.fence <= committed:
                    self.alive_tokens -= item.num_tokens
                    self.kept_tokens -= item.num_kept_tokens
            self._retiring = [item for item in self._retiring if item.fence > committed]

    @property
    def num_packs(self) -> int:
        """Packs whose backward is not committed."""
        return sum(len(job.packs) for job in self.jobs.values())

    # ------------------------------------------------------------ forward and backward

    def window_range(self, pack: Pack, window: int) -> tuple[int, int]:
        """Start and number of tokens of a window."""
        start = window * self.window_tokens
        return start, min(self.window_tokens, pack.spec.num_tokens - start)

    def slice_tokens(self, wave: Wave) -> int:
        """Tokens of the wave's next slice."""
        start, most = wave.window * self.window_tokens, self.window_tokens
        tokens = 0
        for pack in wave.packs:
            rest = pack.spec.num_tokens - start
            if rest > 0:
                tokens += rest if rest < most else most
        return tokens

    def most_forward(self, pack: Pack) -> int:
        """Tokens of the pack's next forward window, if it is of the usual length."""
        return min(self.window_tokens, pack.spec.num_tokens - pack.num_forwarded)

    def forwarded(self, pack: Pack, num_tokens: int) -> None:
        """The pack's next tokens are planned."""
        pack.num_forwarded += num_tokens
        if pack.num_forwarded >= pack.spec.num_tokens:
            pack.status = PackStatus.READY
            pack.has_loss = True

    def next_wave(self, may_join: Callable[[Pack], bool] | None = None) -> Wave | None:
        """The active wave; if there is none, one of all ready packs (of those that `may_join`) which begin at
        the layer of the oldest and keep their activations, or do not, as it does.
        """
        if self.wave is None:
            ready = [pack for pack in self.alive if pack.status is PackStatus.READY]
            if may_join is not None:
                ready = list(filter(may_join, ready))
            if ready:
                layer, keeps = ready[0].cursor_layer, ready[0].keeps_activations
                packs = [p for p in ready if (p.cursor_layer, p.keeps_activations) == (layer, keeps)]
                for pack in packs:
                    pack.status = PackStatus.IN_WAVE
                self._num_waves += 1
                self.wave = Wave(self._num_waves, packs, layer, 0)
                self.wave.window = self.wave.num_windows - 1
        return self.wave

    def sliced(self, wave: Wave, iteration: int) -> tuple[BackwardSlice, list[Pack]]:
        """The wave's next slice is planned: advance the cursor. Returns the slice and the packs that it
        completes.
        """
        members = wave.members()
        part = BackwardSlice(
            wave.wave_id, tuple([pack.spec.pack_id for pack in members]), wave.layer, wave.window
        )
        for pack in members:
            pack.last_planned = iteration
        if wave.window > 0:
            wave.window -= 1
            return part, []
        wave.layer -= 1
        wave.window = wave.num_windows - 1
        if wave.layer >= 0:
            return part, []
        self.wave = None
        for pack in wave.packs:
            pack.status = PackStatus.DONE
            self._retire(pack, iteration)
        return part, wave.packs

    def rewind(self, waves: Iterable[Wave], part: BackwardSlice, iteration: int) -> list[Pack]:
        """Neither `part` nor any slice planned after it has run: it is the next one again.

        Args:
            waves: those with slices in the plan.
            part: the first slice of the plan that has not run.
            iteration: of the plan, which is the only one in flight.

        Returns:
            The packs that the plan was to complete and has not; they hold blocks again.
        """
        # A wave may have been formed for which the plan had no room.
        touched = dict.fromkeys([*waves, *([] if self.wave is None else [self.wave])])
        self.wave = None
        revived = []
        for wave in touched:
            wave.packs = [pack for pack in wave.packs if pack.status is not PackStatus.REMOVED]
            if wave.wave_id < part.wave_id or not wave.packs:
                continue
            for pack in wave.packs:
                if pack.status is PackStatus.DONE:
                    self._retiring.remove(_Retiring.of(pack, iteration))
                    insort(self.alive, pack, key=lambda other: other.order)
                    revived.append(pack)
            is_current = wave.wave_id == part.wave_id
            for pack in wave.packs:
                pack.status = PackStatus.IN_WAVE if is_current else PackStatus.READY
            if is_current:
                self.wave = wave
                wave.layer, wave.window = part.layer, min(part.window, wave.num_windows - 1)
        return revived

    def committed(self, pack: Pack) -> None:
        """The pack's last slice has run."""
        self.jobs[pack.spec.job_id].packs.remove(pack)
        self._pack_ids.discard(pack.spec.pack_id)

    def check_invariants(self) -> None:
        """Statuses, the wave and the alive list agree.

        Raises:
            AssertionError: they do not.
        """
        packs = [pack for job in self.jobs.values() for pack in job.packs]
        holding = (PackStatus.FORWARDING, PackStatus.READY, PackStatus.IN_WAVE)
        assert {id(p) for p in packs if p.status in holding} == {id(p) for p in self.alive}
        assert all(bool(pack.block_ids) == (pack.status in holding) for pack in packs)
        in_wave = [pack for pack in packs if pack.status is PackStatus.IN_WAVE]
        assert {id(pack) for pack in in_wave} == {id(p) for p in (self.wave.packs if self.wave else [])}
        retiring = self._retiring
        tokens = [item.num_tokens for item in retiring] + [pack.spec.num_tokens for pack in self.alive]
        kept = [item.num_kept_tokens for item in retiring] + [pack.num_kept_tokens for pack in self.alive]
        assert (self.alive_tokens, self.kept_tokens) == (sum(tokens), sum(kept))
        if self.wave is not None:
            assert len({pack.keeps_activations for pack in self.wave.packs}) == 1
        assert self._pack_ids == {pack.spec.pack_id for pack in packs}
        if self.wave is not None:
            assert 0 <= self.wave.layer < self.num_layers
            assert 0 <= self.wave.window < self.wave.num_windows

    def _retire(self, pack: Pack, fence: int) -> None:
        self.alive.remove(pack)
        self._retiring.append(_Retiring.of(pack, fence))

    def _leave_wave(self, pack: Pack) -> None:
        wave = self.wave
        if wave is None or pack not in wave.packs:
            return
        wave.packs = [other for other in wave.packs if other is not pack]
        if not wave.packs:
            self.wave = None
        elif wave.window >= wave.num_windows:
            wave.window = wave.num_windows - 1
