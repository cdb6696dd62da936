"""How an iteration is shared between inference and finetuning: Weft's policy, and those it is compared with.

A policy composes the plan functions of `inference_policy` and `training_policy`; it owns no sequences, packs
or blocks. A server runs Weft's; the others exist for benchmarks and simulations, and may keep what they
remember from plan to plan to themselves, so every scheduler needs one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Protocol

from weft_scheduler.budget import SAFETY, BudgetController
from weft_scheduler.draft import PlanDraft
from weft_scheduler.inference_policy import make_room_for_the_overdue, plan_decodes, plan_prefills
from weft_scheduler.state import SchedulerState
from weft_scheduler.training_policy import (
    finish_layer,
    num_kept_blocks,
    plan_capped_training,
    plan_training,
    trickle_is_due,
)


class Policy(Protocol):
    """Decides what a plan runs."""

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """Add segments, slices and optimizer steps to the draft; returns the seconds it was made within.

        The draft must not stay empty while something could run. Adapters have been seen to before.
        """
        ...


class WeftPolicy:
    """Everything that decodes, prompts as far as the budget goes, then finetuning up to the budget.

    A tenant that is ahead of another tenant's finetuning admits no prompts, unless nothing else could run.
    """

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """See `Policy.fill`."""
        make_room_for_the_overdue(state, draft)
        plan_decodes(state, draft)
        decode_s, open_s = budget.decode_budget_s, budget.open_budget_s
        budget_s = decode_s if draft.num_decodes else max(decode_s, open_s)
        is_due = trickle_is_due(state, budget)
        num_kept_tokens = state.limits.window_tokens if is_due else 0
        plan_prefills(state, draft, budget_s, num_kept_tokens, num_kept_blocks(state, draft.now_s))
        left_s = min(decode_s, open_s) if draft.forward else open_s
        if is_due or not budget.wants_probe(draft.num_decodes, draft.num_prefill_tokens):
            plan_training(state, draft, left_s, is_due=is_due)
        if draft.is_empty:
            plan_prefills(state, draft, budget_s, yields=False)
        return budget_s


class StaticCapPolicy:
    """Inference first, then a fixed amount of finetuning, whatever it takes.

    Prompts fill a fixed number of tokens. A plan then holds forward windows of at most `max_train_tokens`
    tokens (and of what is left of `max_tokens`; one window where anything is left), or the backward of the
    whole wave through `num_layers` layers. No latency model, no targets. This is what FlexLLM's released code
    does (`request_manager.cc`), with several jobs where that has one.
    """

    def __init__(self, max_tokens: int = 512, max_train_tokens: int = 256, num_layers: int = 1) -> None:
        """`max_tokens` is the token budget of a forward batch.

        Raises:
            ValueError: a cap is below 1.
        """
        if min(max_tokens, max_train_tokens, num_layers) < 1:
            raise ValueError(
                f"caps of {max_tokens}, {max_train_tokens} and {num_layers}: each must be at least 1"
            )
        self.max_tokens = max_tokens
        self.max_train_tokens = max_train_tokens
        self.num_layers = num_layers

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """See `Policy.fill`; the budget is not looked at, and infinite."""
        del budget
        plan_decodes(state, draft)
        num_kept_tokens = max(0, state.limits.max_batch_tokens - self.max_tokens)
        num_kept = num_kept_blocks(state, draft.now_s)
        plan_prefills(state, draft, inf, num_kept_tokens, num_kept, yields=False)
        left = self.max_tokens - draft.tally.forward_tokens
        plan_capped_training(state, draft, min(self.max_train_tokens, left), self.num_layers)
        return inf


class AlternatingPolicy:
    """Iterations of inference and of finetuning in turn; a pair takes no longer than the per-token target.

    The inference half is Weft's; the finetuning half gets what it leaves of the target, so that finetuning is
    sliced as finely as Weft's, but shares no iteration, and no reading of the weights, with decodes. A turn
    for which nothing is left is skipped, up to the same trickle as Weft's.
    """

    def __init__(self) -> None:
        """Begin with inference."""
        self._inference_s = 0.0
        self._is_training_turn = False
        self._must_finish_layer = False
        self._stops_between_layers = False

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """See `Policy.fill`."""
        target_s = budget.tpot_s * SAFETY
        if self._is_training_turn:
            self._is_training_turn = False
            left_s = self._train(state, draft, budget, max(0.0, target_s - self._inference_s), may_skip=True)
            if not draft.is_empty:
                return left_s
        plan_decodes(state, draft)
        budget_s = target_s if draft.num_decodes else budget.open_budget_s
        plan_prefills(state, draft, budget_s, 0, num_kept_blocks(state, draft.now_s), yields=False)
        self._inference_s = draft.predicted_s
        self._must_finish_layer = draft.must_finish_layer
        self._stops_between_layers = draft.stops_between_layers
        self._is_training_turn = bool(draft.forward)
        if draft.forward:
            return budget_s
        return self._train(state, draft, budget, budget.open_budget_s, may_skip=False)

    def _train(
        self,
        state: SchedulerState,
        draft: PlanDraft,
        budget: BudgetController,
        budget_s: float,
        *,
        may_skip: bool,
    ) -> float:
        draft.must_finish_layer |= self._must_finish_layer
        draft.stops_between_layers |= self._stops_between_layers
        self._must_finish_layer = self._stops_between_layers = False
        is_due = trickle_is_due(state, budget)
        plan_training(state, draft, budget_s, is_due=is_due, may_be_empty=may_skip)
        return budget_s


class NoCoservingPolicy:
    """Inference alone while there is any; finetuning runs when nothing can be generated."""

    def fill(self, state: SchedulerState, draft: PlanDraft, budget: BudgetController) -> float:
        """See `Policy.fill`."""
        plan_decodes(state, draft)
        budget_s = budget.decode_budget_s if draft.num_decodes else budget.open_budget_s
        plan_prefills(state, draft, budget_s, yields=False)
        if draft.must_finish_layer:
            finish_layer(state, draft)
        if not draft.forward:
            plan_training(state, draft, budget_s, is_due=False)
        return budget_s


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "weft": WeftPolicy,
    "static-cap": StaticCapPolicy,
    "alternating": AlternatingPolicy,
    "no-coserving": NoCoservingPolicy,
}
"""Policies by the names that command lines use."""
