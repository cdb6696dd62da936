"""The scheduler: turns requests, packs, clocks and sizes into plans, and results into outcomes.

`plan` reads as the policy: bring adapters nearer, decode everything that runs, continue and admit prompts, and give
finetuning what the latency budget leaves. Owns no tensors, threads or clocks; `now` is any monotonic time in seconds.

What may exceed the budget (everything else keeps `predicted_s` ≤ `budget_s`):
- decodes are never held back, and prompts get `MIN_PREFILL_TOKENS` tokens in every plan;
- finetuning gets one unit (window, slice or optimizer step) after `TRICKLE_INTERVAL` plans without any;
- a wave finishes its layer when decodes need the blocks of its packs.

Every decision advances the state at once. With several plans in flight, a plan is made as if no sequence ended before
it: a token beyond the end is dropped at commit, and what is freed can be reused once the last plan that could read it
is committed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from heapq import heapify, heappop, heapreplace
from itertools import zip_longest

from weft_scheduler.blocks import BlockAllocator
from weft_scheduler.budget import BudgetController, LatencyTargets
from weft_scheduler.cost import CostModel, PlanFeatures
from weft_scheduler.draft import InFlight, PlanDraft
from weft_scheduler.fairness import FairQueue
from weft_scheduler.limits import Limits
from weft_scheduler.outcomes import Outcome, PackDone, PackForwarded, SequenceToken, StepDone, StepResult
from weft_scheduler.plan import StepPlan
from weft_scheduler.requests import RequestSpec, Sequence, SequenceStatus, WaitingQueue, sequence_key
from weft_scheduler.residency import AdapterState, Entry, Residency
from weft_scheduler.training import Pack, PackSpec, PackStatus, TrainingQueue
