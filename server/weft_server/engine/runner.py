"""Executes plans: forward over the flat batch, sampling, backward slices, optimizer steps. Decides nothing.

`submit` issues the work of one iteration and returns before the device is done (on a CPU it is done by then);
`StepHandle.result` waits for it and brings tokens, log-probabilities and losses to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from weft_kernels.lora import LoraTable
from weft_kernels.transfer import download, upload_indices
from weft_scheduler.plan import BackwardSlice, MemoryPlan, SegmentKind, StepPlan
from weft_server.cache.kv import KvCache
from weft_server.engine.batch import FlatBatch, PlacedSegment, build_batch
from weft_server.engine.device_clock import DeviceClock
from weft_server.engine.history import TokenHistory, needs_history
from weft_server.engine.layer_graphs import LayerGraphs
from weft_server.engine.logprobs import TopLogprobs, top_logprobs
from weft_server.engine.sampler import SamplingRow, sample
from weft_server.engine.sequence import Sequence as GeneratedSequence
from weft_server.model.activations import LayerActivations
from weft_server.model.batch import TokenBatch
from weft_server.model.decoder import Decoder
from weft_server.protocol import TokenLogprob
from weft_server.training.activation_pool import ActivationPool
from weft_server.training.backward import PackPlacement, WindowedBackward
from weft_server.training.job import FinetuneJob, JobError, StepReport
from weft_server.training.loss import loss_head
from weft_server.training.pack import Pack

_PROMPT_LOGPROB_ROWS = 256
_MAX_FUSED_TOKENS = {"cpu": 256, "cuda": 1024}
"""Rows of a fused backward call: enough for full speed, few enough for its scratch memory; on a CPU an
arrival waits for one."""


@dataclass(slots=True)
class RunResult:
    """What one iteration brought to the host.

    `sampled` and `logprobs` are by sequence, `steps` by job (a report, or the error that ends the job),
    `failed` names sequences whose logits were not finite. `elapsed_s` is the iteration's time on the device.
    `num_slices` and `num_optimizer_steps` of the plan's were issued, from the first on.
    """

    sampled: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprob] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    steps: dict[str, StepReport | JobError] = field(default_factory=dict)
    elapsed_s: float = 0.0
    num_slices: int = 0
    num_optimizer_steps: int = 0


@dataclass(slots=True)
class _Sampling:
    """Sampled rows of an iteration, by sequence. `on_host` `[2, S]` (token ids, and whether the logits were
    finite) and `logprobs` (of those sequences that want them) are complete once the iteration's event has
    passed."""

    request_ids: list[str]
    on_host: Tensor
    logprobs: TopLogprobs | None
    logprobs_of: list[str]


_PromptLogprobs: TypeAlias = tuple[GeneratedSequence, TopLogprobs]
"""Log-probabilities of a part of a sequence's prompt, on their way."""


class StepHandle:
    """An iteration in flight."""

    def __init__(self, collect: Callable[[], RunResult]) -> None:
        self._collect = collect
        self._result: RunResult | None = None

    def result(self) -> RunResult:
        """Wait for the device and return the iteration's results (the same object every time)."""
        if self._result is None:
            self._result = self._collect()
        return self._result


def _is_never_interrupted() -> bool:
    return False


class Runner:
    """Owns what is on the device between iterations: sequences' newest tokens, packs in training, the cache.

    A block or extent that has been freed keeps its contents, even a NaN; nothing reads past what its new
    owner has written.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        table: LoraTable,
        *,
        max_num_seqs: int,
        window_tokens: int,
        graphs: LayerGraphs | None = None,
    ) -> None:
        """Over a decoder, its cache and its adapters; forward layers run as `graphs` where those hold the
        batch."""
        self._decoder = decoder
        self._cache = cache
        self._table = table
        self._graphs = graphs
        self._window_tokens = window_tokens
        self._backward = WindowedBackward(decoder, cache, table, window_tokens=window_tokens)
        self._activations = ActivationPool(decoder.config, decoder.dtype, decoder.device)
        self._max_fused_windows = _MAX_FUSED_TOKENS[decoder.device.type] // window_tokens
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=decoder.device)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._sequences: dict[str, GeneratedSequence] = {}
        self._packs: dict[str, Pack] = {}
        self._placements: dict[str, PackPlacement] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._decoder.device

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows are below this."""
        return self._decoder.config.vocab_size

    # ------------------------------------------------------------ residents

    def add_sequence(self, sequence: GeneratedSequence) -> None:
        """Know a sequence from now on; it gets its device row with its first sampled token."""
        self._sequences[sequence.request_id] = sequence

    def remove_sequence(self, request_id: str) -> GeneratedSequence | None:
        """Forget a sequence (finished, failed or aborted)."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._free_row(sequence)
        return sequence

    def sequence(self, request_id: str) -> GeneratedSequence | None:
        """The sequence of this id, if known."""
        return self._sequences.get(request_id)

    def add_pack(self, pack: Pack) -> None:
        """Know a pack from now on."""
        self._packs[pack.pack_id] = pack

    def remove_pack(self, pack_id: str) -> None:
        """Forget a pack and free what it keeps."""
        pack = self._packs.pop(pack_id, None)
        if pack is not None:
            self._drop_activations(pack)
        self._placements.pop(pack_id, None)
        self._backward.forget_packs()

    # ------------------------------------------------------------ one iteration

    @torch.no_grad()
    def submit(
        self,
        plan: StepPlan,
        jobs: Mapping[str, FinetuneJob],
        is_interrupted: Callable[[], bool] = _is_never_interrupted,
    ) -> StepHandle:
        """Issue one iteration. The plan's adapter loads and evictions have been carried out already.

        Args:
            plan: what runs.
            jobs: those alive, by id.
            is_interrupted: asked between the backward calls and before each optimizer step. Once it says yes,
                what is left of both is not issued; one of them is issued in any case.
        """
        clock = DeviceClock(self._decoder.device)
        self._give_up(plan.memory)
        sampling, prompts = self._forward(plan) if plan.forward else (None, [])
        num_slices, num_steps = self._train(plan, jobs, is_interrupted)
        stepping = {job_id: jobs[job_id] for job_id in plan.optimizer_steps[:num_steps] if job_id in jobs}
        clock.stop()

        def collect() -> RunResult:
            clock.wait()
            result = RunResult(num_slices=num_slices, num_optimizer_steps=num_steps)
            for sequence, logprobs in prompts:
                sequence.prompt_logprobs += logprobs.entries()
            if sampling is not None:
                self._collect_samples(sampling, result)
            for job_id, job in stepping.items():
                if jobs.get(job_id) is job:
                    result.steps[job_id] = _finish_step(job)
            result.elapsed_s = clock.elapsed_s()
            return result

        return StepHandle(collect)

    def _give_up(self, memory: MemoryPlan) -> None:
        """Let go of what preempted sequences and dropped packs hold on the device."""
        for request_id in memory.preempted:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._free_row(sequence)
        for pack_id in memory.dropped_packs:
            if pack_id in self._packs:
                self._drop_activations(self._packs[pack_id])
                self._backward.forget_packs()

    def _drop_activations(self, pack: Pack) -> None:
        activations = pack.drop_activations()
        if activations is not None:
            self._activations.give_back(activations)

    def reads_uncollected_tokens(self, plan: StepPlan) -> bool:
        """True if sampling this plan needs output tokens on the host that an iteration in flight still
        holds."""
        return any(
            segment.samples
            and (sequence := self._sequences.get(segment.sequence_id))
            and needs_history(sequence.params)
            for segment in plan.forward
        )

    # ------------------------------------------------------------ forward

    def _forward(self, plan: StepPlan) -> tuple[_Sampling | None, list[_PromptLogprobs]]:
        # A sequence may have ended since the plan was made.
        segments = [
            s for s in plan.forward if s.sequence_id in self._sequences or s.sequence_id in self._packs
        ]
        if not segments:
            return None, []
        batch = build_batch(
            segments,
            self._sequences,
            self._packs,
            block_size=self._cache.block_size,
            device=self._decoder.device,
        )
        decode = [self._sequences[p.segment.sequence_id] for p in batch.segments[: batch.num_decode]]
        if decode:
            rows = upload_indices([self._row(s) for s in decode], self._decoder.device)
            batch.token_ids[: len(decode)] = self._last_tokens[rows]
        hidden = self._run_layers(batch)
        self._run_loss_heads(batch, hidden)
        return self._sample(batch, hidden), self._prompt_logprobs(batch, hidden)

    def _run_layers(self, batch: FlatBatch) -> Tensor:
        trained = batch.of_kind(SegmentKind.TRAIN)
        for placed in trained:
            self._place_pack(placed)
        keeping = [placed for placed in trained if placed.segment.keeps_activations]
        hidden = self._decoder.embed(batch.token_ids)
        forward_layer = self._layers_of(hidden, batch.tokens)
        for layer in range(self._decoder.config.num_layers):
            for placed in trained:
                self._packs[placed.segment.sequence_id].keep_input(
                    layer, placed.segment.start, hidden[placed.rows]
                )
            hidden, acts = forward_layer(layer, hidden)
            for placed in keeping:
                self._packs[placed.segment.sequence_id].keep_activations(
                    layer, placed.segment.start, acts[placed.rows]
                )
        return hidden

    def _layers_of(
        self, hidden: Tensor, batch: TokenBatch
    ) -> Callable[[int, Tensor], tuple[Tensor, LayerActivations]]:
        """What computes a layer of this batch from its input; `hidden` is that of the first."""
        if self._graphs is not None and (key := self._graphs.find(batch)) is not None:
            return self._graphs.load(key, hidden, batch)
        decoder, cache, table = self._decoder, self._cache, self._table
        rotation = decoder.rotation(batch)
        return lambda layer, x: decoder.forward_layer(layer, x, batch, cache, table, rotation)

    def _place_pack(self, placed: PlacedSegment) -> None:
        segment, config = placed.segment, self._decoder.config
        pack = self._packs[segment.sequence_id]
        pack.allocate(config, self._decoder.dtype)
        if segment.keeps_activations and pack.activations is None:
            pack.activations = self._activations.take(pack.num_tokens)
        if segment.adapter_slot is None:
            raise ValueError(f"finetuning segment of pack {pack.pack_id} has no adapter slot")
        known = self._placements.get(pack.pack_id)
        if known is None or len(known.block_table) != len(segment.block_ids) or segment.start == 0:
            table = upload_indices(segment.block_ids, self._decoder.device)
            self._placements[pack.pack_id] = PackPlacement(pack, segment.adapter_slot, table)

    def _run_loss_heads(self, batch: FlatBatch, hidden: Tensor) -> None:
        weights, eps = self._decoder.weights, self._decoder.config.rms_norm_eps
        for placed in batch.of_kind(SegmentKind.TRAIN):
            segment = placed.segment
            pack = self._packs[segment.sequence_id]
            if not segment.with_loss or pack.d_hidden is None or pack.losses is None or pack.correct is None:
                continue
            window = slice(segment.start, segment.start + segment.num_tokens)
            trained = pack.trained_rows(window.start, window.stop)
            rows, labels = hidden[placed.rows], pack.labels[window]
            head = loss_head(rows, labels, trained, weights.norm, weights.lm_head, eps=eps)
            pack.losses[window], pack.correct[window] = head.loss, head.correct
            pack.d_hidden[window] = head.d_hidden

    def _prompt_logprobs(self, batch: FlatBatch, hidden: Tensor) -> list[_PromptLogprobs]:
        issued = []
        for placed in batch.of_kind(SegmentKind.PREFILL):
            segment = placed.segment
            sequence = self._sequences[segment.sequence_id]
            count = sequence.params.prompt_logprobs
            if count is None:
                continue
            if not sequence.num_prompt_logprobs:
                sequence.prompt_logprobs.append(None)
                sequence.num_prompt_logprobs = 1
            first = max(segment.start, sequence.num_prompt_logprobs - 1)
            end = min(segment.start + segment.num_tokens, len(sequence.prompt) - 1)
            for start in range(first, end, _PROMPT_LOGPROB_ROWS):
                stop = min(start + _PROMPT_LOGPROB_ROWS, end)
                offset = placed.row - segment.start
                logits = self._decoder.logits(hidden[offset + start : offset + stop])
                targets = upload_indices(sequence.prompt[start + 1 : stop + 1], hidden.device)
                issued.append((sequence, top_logprobs(logits, targets, [count] * (stop - start))))
                sequence.num_prompt_logprobs += stop - start
        return issued

    # ------------------------------------------------------------ sampling

    def _sample(self, batch: FlatBatch, hidden: Tensor) -> _Sampling | None:
        placed = [p for p in batch.segments if p.segment.samples]
        if not placed:
            return None
        device = hidden.device
        logits = self._decoder.logits(
            hidden.index_select(0, upload_indices([p.rows.stop - 1 for p in placed], device))
        )
        sequences = [self._sequences[p.segment.sequence_id] for p in placed]
        rows = [
            self._sampling_row(sequence, p.segment.start + p.segment.num_tokens)
            for sequence, p in zip(sequences, placed, strict=True)
        ]
        sampled = sample(logits, rows)
        device_rows = upload_indices([self._row(s) for s in sequences], device)
        self._last_tokens[device_rows] = sampled.token_ids
        both = download(torch.stack((sampled.token_ids, sampled.finite.to(torch.int64))))
        wanted = [(i, s.params.logprobs) for i, s in enumerate(sequences) if s.params.logprobs is not None]
        logprobs = None
        if wanted:
            idx = upload_indices([i for i, _ in wanted], device)
            logprobs = top_logprobs(logits[idx], sampled.token_ids[idx], [count for _, count in wanted])
        names = [s.request_id for s in sequences]
        return _Sampling(names, both, logprobs, [names[i] for i, _ in wanted])

    def _sampling_row(self, sequence: GeneratedSequence, position: int) -> SamplingRow:
        params = sequence.params
        if needs_history(params):
            if sequence.history is None:
                sequence.history = TokenHistory(
                    params, sequence.prompt, self.vocab_size, self._decoder.device
                )
            sequence.history.add(sequence.output)
        num_output = position - len(sequence.prompt)
        return SamplingRow(params, sequence.choice_idx, position, num_output, sequence.history)

    def _row(self, sequence: GeneratedSequence) -> int:
        """The sequence's place in the buffer of newest tokens, assigned at first use."""
        if sequence.last_token_row is None:
            sequence.last_token_row = self._free_rows.pop()
        return sequence.last_token_row

    def _free_row(self, sequence: GeneratedSequence) -> None:
        if sequence.last_token_row is not None:
            self._free_rows.append(sequence.last_token_row)
            sequence.last_token_row = None

    def _collect_samples(self, sampling: _Sampling, result: RunResult) -> None:
        token_ids, finite = sampling.on_host.tolist()
        for i, request_id in enumerate(sampling.request_ids):
            sequence = self._sequences.get(request_id)
            if sequence is None:
                continue
            if not finite[i]:
                result.failed[request_id] = "the model produced NaN or infinite logits"
                continue
            result.sampled[request_id] = token_ids[i]
            sequence.output.append(token_ids[i])
        if sampling.logprobs is not None:
            entries = zip(sampling.logprobs_of, sampling.logprobs.entries(), strict=True)
            result.logprobs = {name: entry for name, entry in entries if name in result.sampled}

    # ------------------------------------------------------------ backward

    def _train(
        self, plan: StepPlan, jobs: Mapping[str, FinetuneJob], is_interrupted: Callable[[], bool]
    ) -> tuple[int, int]:
        """Backward slices, then optimizer steps, up to an interruption; returns how many of each."""
        num_slices = 0
        for item, windows in _fuse_slices(plan.backward, self._max_fused_windows):
            if num_slices and is_interrupted():
                return num_slices, 0
            self._run_backward(item, windows, jobs)
            num_slices += len(windows)
        for num_steps, job_id in enumerate(plan.optimizer_steps):
            if (num_slices or num_steps) and is_interrupted():
                return num_slices, num_steps
            if job_id in jobs:
                jobs[job_id].issue_update()
        return num_slices, len(plan.optimizer_steps)

    def _run_backward(self, item: BackwardSlice, windows: range, jobs: Mapping[str, FinetuneJob]) -> None:
        placements: Sequence[PackPlacement] = [
            self._placements[pack_id] for pack_id in item.pack_ids if pack_id in self._placements
        ]
        if not placements:
            return
        grads = {
            p.adapter_slot: jobs[p.pack.job_id].optimizer.grad for p in placements if p.pack.job_id in jobs
        }
        self._backward.run_slice(item.wave_id, placements, item.layer, windows, grads)


def _fuse_slices(slices: Sequence[BackwardSlice], max_windows: int) -> Iterator[tuple[BackwardSlice, range]]:
    """Neighbouring windows of one wave and layer as one: the slice of the lowest (whose packs include those
    of the others) and the windows. What the plan runs, and its order, stay the same."""
    group: list[BackwardSlice] = []
    for item in slices:
        if group:
            last = group[-1]
            follows = (item.wave_id, item.layer, item.window) == (last.wave_id, last.layer, last.window - 1)
            if not follows or len(group) >= max(1, max_windows // len(item.pack_ids)):
                yield last, range(last.window, group[0].window + 1)
                group = []
        group.append(item)
    if group:
        yield group[-1], range(group[-1].window, group[0].window + 1)


def _finish_step(job: FinetuneJob) -> StepReport | JobError:
    try:
        return job.finish_step()
    except JobError as error:
        return error
