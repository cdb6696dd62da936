"""How long an iteration takes, predicted from what it computes.

    seconds = pace · (curve(forward_tokens) + Σ weight_j · feature_j)

The curve is piecewise linear and never falls, so that it shows the memory-bound plateau below which extra
tokens are nearly free; weights are never negative. Both are one non-negative least-squares problem over
relative errors: a prior from calibration that fades while iterations are seen, and these, forgotten
exponentially. Once it has faded, the prior decides only what iterations have said nothing of, so that a
calibration on a busy machine is lived down. The pace follows within a few iterations what slows all of them
down alike (`pace`). Knows numbers alone, no hardware.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import isfinite
from statistics import median
from typing import Any

from weft_scheduler.features import LINEAR_NAMES, PlanFeatures
from weft_scheduler.least_squares import NormalEquations
from weft_scheduler.outliers import OutlierGuard
from weft_scheduler.pace import Pace

KNOTS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Forward tokens at which the curve bends; beyond the last one it goes on at the last slope."""

_SIZE = len(KNOTS) + len(LINEAR_NAMES)
_NOMINAL_CURVE = (10e-3, 0.1e-3, 0.1e-3, 0.1e-3, 0.5e-3, 2e-3, 8e-3, 20e-3, 40e-3, 80e-3, 160e-3)
_NOMINAL_WEIGHTS = (1e-8, 5e-10, 5e-6, 1e-5, 1.2e-6, 5e-5, 2e-5, 2e-3, 7e-13, 5e-5, 5e-5, 8e-7, 2e-5)
_PRIOR_OBSERVATIONS = 32.0
_NOMINAL_SHARE = 1e-3
_PRIOR_FADING = 0.97
_LEAST_PRIOR = 1.0 / 300.0
_FORGETTING = 0.995
_REFIT_INTERVAL = 16
_EARLY_INTERVAL = 4
_NUM_EARLY = 64
_ERROR_WINDOW = 256
_SPEED_WINDOW = 32
_NUM_SWEEPS = 8
_LEAST_WEIGHT = 1e-15
_LEAST_S, _MOST_S = 1e-6, 1e4


class CostModel:
    """Predicts iteration seconds. Starts from a nominal device; `calibrate` makes it this one, `observe`
    keeps it so.
    """

    def __init__(self) -> None:
        """Start from the nominal device."""
        self._theta = [*_NOMINAL_CURVE, *_NOMINAL_WEIGHTS]
        self._prior = NormalEquations.of_parameters(self._theta)
        self._online = NormalEquations(_SIZE)
        self._gain = 1.0
        self._num_observed = 0
        self._errors: deque[float] = deque(maxlen=_ERROR_WINDOW)
        self._speeds: deque[float] = deque(maxlen=_SPEED_WINDOW)
        self._outliers = OutlierGuard()
        self._pace = Pace()
        self._prior_weight = 1.0
        self._prior_theta = list(self._theta)
        self._tabulate()

    @property
    def error_p50(self) -> float:
        """Median relative error of the last predictions (0.1 is 10 %); 0 before the first observation."""
        return self._error_at(0.50)

    @property
    def error_p95(self) -> float:
        """95th percentile of the relative error of the last predictions; 0 before the first observation."""
        return self._error_at(0.95)

    @property
    def pace(self) -> float:
        """What all times are multiplied by at present, against the usual ones."""
        return self._pace.factor

    def predict(self, features: PlanFeatures) -> float:
        """Seconds that an iteration with these features takes."""
        f, w = features, self._weights
        return (
            self._curve(f.forward_tokens)
            + w[0] * f.kv_tokens_read
            + w[1] * f.attention_products
            + w[2] * f.num_sequences
            + w[3] * f.loss_tokens
            + w[4] * f.backward_token_layers
            + w[5] * f.num_backward_slices
            + w[6] * f.num_adapters
            + w[7] * f.optimizer_steps
            + w[8] * f.adapter_elements
            + w[9] * f.num_loss_windows
            + w[10] * f.num_backward_layers
            + w[11] * f.recomputed_token_layers
            + w[12] * f.num_chunks
        )

    def decode_s(self, context: int) -> float:
        """Seconds of one decode with `context` keys, alone."""
        return self._decode_s + self._weights[0] * context

    def chunk_s(self, num_tokens: int, context: int, loss_tokens: int = 0) -> float:
        """Seconds of `num_tokens` tokens of one sequence that end at `context` keys, alone."""
        w = self._weights
        keys_s = w[0] * context + w[1] * num_tokens * context
        loss_s = w[3] * loss_tokens + w[9] if loss_tokens else 0.0
        return self._curve(num_tokens) + keys_s + loss_s + w[12]

    def backward_s(
        self, token_layers: int, num_slices: float, num_layers: float, recomputed_token_layers: int
    ) -> float:
        """Seconds of backward slices over so many tokens times layers, which go through `num_layers`."""
        w = self._weights
        products_s = w[4] * token_layers + w[11] * recomputed_token_layers
        return products_s + w[5] * num_slices + w[10] * num_layers

    def adapter_s(self, num_elements: int) -> float:
        """Seconds of one adapter in a batch, whatever number of tokens uses it."""
        return self._weights[6] + self._weights[8] * num_elements

    def adapters_s(self, features: PlanFeatures) -> float:
        """Seconds of all adapters of a batch, part of `predict`."""
        return self._weights[6] * features.num_adapters + self._weights[8] * features.adapter_elements

    @property
    def optimizer_step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self._weights[7]

    def calibrate(self, samples: Sequence[tuple[PlanFeatures, float]]) -> None:
        """Fit to measurements `(features, seconds)`; what they leave open stays at the nominal device's
        ratios.

        Raises:
            ValueError: there are no samples, or a time is not positive.
        """
        if not samples or any(not (isfinite(s) and s > 0.0 and _phi(features)) for features, s in samples):
            raise ValueError("calibration needs samples with work and positive times")
        nominal = [*_NOMINAL_CURVE, *_NOMINAL_WEIGHTS]
        speed = median(seconds / _dot(nominal, _phi(features)) for features, seconds in samples)
        self._theta = [value * speed for value in nominal]
        prior = NormalEquations.of_parameters(self._theta)
        prior.scale(_NOMINAL_SHARE)
        share = _PRIOR_OBSERVATIONS / len(samples)
        for features, seconds in samples:
            prior.add(_phi(features), seconds, share)
        self._prior = prior
        self._online = NormalEquations(_SIZE)
        self._gain = self._prior_weight = 1.0
        self._num_observed = 0
        prior.solve(self._theta, num_sweeps=400)
        self._prior_theta = list(self._theta)
        for window in (self._errors, self._speeds, self._outliers):
            window.clear()
        self._pace.reset()
        self._tabulate()

    def to_dict(self) -> dict[str, Any]:
        """What predictions at the usual pace follow from, as JSON-able values, and how far off the last ones
        were.
        """
        curve = accumulate(self._theta[: len(KNOTS)])
        return {
            "curve": {str(knot): value for knot, value in zip(KNOTS, curve, strict=True)},
            "weights": dict(zip(LINEAR_NAMES, self._theta[len(KNOTS) :], strict=True)),
            "error_p50": self.error_p50,
            "error_p95": self.error_p95,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> CostModel:
        """A model that predicts as the one that wrote `values` did at its usual pace, and has observed
        nothing.

        Raises:
            ValueError: a knot or weight is missing, unknown, negative, or the curve falls.
        """
        curve, weights = values.get("curve"), values.get("weights")
        if not isinstance(curve, Mapping) or list(curve) != [str(knot) for knot in KNOTS]:
            raise ValueError(f"`curve` must map the forward tokens {', '.join(map(str, KNOTS))} to seconds")
        if not isinstance(weights, Mapping) or set(weights) != set(LINEAR_NAMES):
            raise ValueError(f"`weights` must have exactly {', '.join(LINEAR_NAMES)}")
        levels = [0.0, *(float(value) for value in curve.values())]
        theta = [high - low for low, high in pairwise(levels)]
        theta += [float(weights[name]) for name in LINEAR_NAMES]
        if min(theta) < 0.0:
            raise ValueError("`curve` must not fall, and no weight may be negative")
        model = CostModel()
        model._theta = theta
        model._prior = NormalEquations.of_parameters([max(value, _LEAST_WEIGHT) for value in theta])
        model._prior_theta = list(theta)
        model._tabulate()
        return model

    def observe(self, features: PlanFeatures, elapsed_s: float) -> None:
        """Learn from an iteration that took `elapsed_s`.

        The pace takes it as it is. For the fit, a time that others of its kind do not share is clipped
        (`OutlierGuard`), and weighs no more than its relative error allows: an outlier moves the fit little,
        while a machine that has changed, or a kind of iteration that is predicted wrongly, is followed.
        A time that is not positive and finite is not one.
        """
        if not (isfinite(elapsed_s) and elapsed_s > 0.0):
            return
        elapsed_s = min(max(elapsed_s, _LEAST_S), _MOST_S)
        predicted_s = self.predict(features)
        phi = _phi(features)
        if not phi or predicted_s <= 0.0:
            return
        self._errors.append(abs(predicted_s - elapsed_s) / elapsed_s)
        prior_s = _dot(self._prior_theta, phi)
        if prior_s > 0.0:
            self._speeds.append(elapsed_s / prior_s)
        usual_s = predicted_s / self.pace
        self._pace.observe(elapsed_s / usual_s)
        clipped_s = self._outliers.clip(features.kind, usual_s, elapsed_s)
        self._gain /= _FORGETTING
        self._prior_weight = max(_LEAST_PRIOR, self._prior_weight * _PRIOR_FADING)
        self._online.add(phi, clipped_s, self._gain * min(1.0, clipped_s / elapsed_s) ** 2)
        self._num_observed += 1
        interval = _EARLY_INTERVAL if self._num_observed <= _NUM_EARLY else _REFIT_INTERVAL
        if self._num_observed % interval == 0:
            self._refit()
        self._tabulate()

    def _refit(self) -> None:
        self._online.scale(1.0 / self._gain)
        self._gain = 1.0
        speed = median(self._speeds) if self._speeds else 1.0
        both = self._online.plus(self._prior.for_speed(speed, self._prior_weight))
        both.solve(self._theta, _NUM_SWEEPS)

    def _tabulate(self) -> None:
        pace = self.pace
        theta = [pace * value for value in self._theta]
        self._weights = tuple(theta[len(KNOTS) :])
        values = self._curve_values = list(accumulate(theta[: len(KNOTS)]))
        self._decode_s = values[0] + self._weights[2]
        self._slopes = [
            (high - low) / (right - left)
            for low, high, left, right in zip(values, values[1:], KNOTS, KNOTS[1:], strict=False)
        ]

    def _curve(self, num_tokens: int) -> float:
        if num_tokens <= 0:
            return 0.0
        idx = bisect_right(KNOTS, num_tokens) - 1
        if idx == len(self._slopes):
            idx -= 1
        return self._curve_values[idx] + (num_tokens - KNOTS[idx]) * self._slopes[idx]

    def _error_at(self, quantile: float) -> float:
        if not self._errors:
            return 0.0
        errors = sorted(self._errors)
        return errors[min(int(quantile * len(errors)), len(errors) - 1)]


def _phi(features: PlanFeatures) -> dict[int, float]:
    """The features as sparse coefficients of the parameters (curve increments, then weights)."""
    num_tokens = features.forward_tokens
    phi: dict[int, float] = {}
    if num_tokens > 0:
        phi[0] = 1.0
        last = len(KNOTS) - 1
        for idx in range(1, len(KNOTS)):
            left, right = KNOTS[idx - 1], KNOTS[idx]
            if num_tokens <= left:
                break
            part = (num_tokens - left) / (right - left)
            phi[idx] = part if idx == last else min(part, 1.0)
    for idx, value in enumerate(features.linear, start=len(KNOTS)):
        if value:
            phi[idx] = float(value)
    return phi


def _dot(theta: Sequence[float], phi: dict[int, float]) -> float:
    return sum(theta[idx] * value for idx, value in phi.items())
