"""The LoRA hyperparameters of one adapter and what they mean on a base model.

Owns the resolution of PEFT's target and pattern rules to a rank and a scale per (layer, module). Knows
neither tensors nor the JSON that the values came from (`peft_config.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from weft_server.adapters.errors import AdapterError
from weft_server.adapters.layout import MAX_RANK
from weft_server.adapters.paths import MODULES, OUTER_MODULES, module_path
from weft_server.adapters.patterns import PathPattern, PatternError, StepBudget

ALL_LINEAR = "all-linear"
_MAX_SCALE = 3.0e38
_MAX_PATTERNS = 4096
_MAX_MATCH_STEPS = 1_000_000

ResolvedModules: TypeAlias = Mapping[tuple[int, str], "ResolvedModule"]


@dataclass(frozen=True, slots=True)
class ResolvedModule:
    """Rank and scale of one adapted module. `scale` multiplies the product B A x."""

    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Hyperparameters as PEFT means them.

    Attributes:
        rank, alpha: of modules that no pattern names.
        use_rslora: scale alpha/√rank instead of alpha/rank.
        dropout: probability in [0, 1); training only.
        target_modules: path suffixes; or one regular expression for whole paths; or `all-linear`.
        exclude_modules: the same without `all-linear`; exclusion wins.
        layers_to_transform: None means all layers; refused beside a regular expression, as PEFT does.
        layers_pattern: names of the layer list that `layers_to_transform` counts in; empty means any.
        rank_pattern, alpha_pattern: (regular expression for the end of a path, value); the first match wins.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for where, rank in (
            ("r", self.rank),
            *((f"rank_pattern[{key!r}]", r) for key, r in self.rank_pattern),
        ):
            if not 1 <= rank <= MAX_RANK:
                raise AdapterError(f"{where} is {rank}; the rank must be 1 to {MAX_RANK}", param=where)
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(f"lora_dropout is {self.dropout}; it must be at least 0 and below 1")
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform is not None or self.layers_pattern
        ):
            raise AdapterError(
                "layers_to_transform needs target_modules to be a list, not a regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern is given without layers_to_transform; give both or neither")

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of B A x for a module of this rank and alpha."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def resolve(self, num_layers: int, modules: Collection[str]) -> ResolvedModules:
        """Which modules of a base are adapted, with which rank and scale, in layer and module order.

        Args:
            num_layers: decoder layers of the base.
            modules: module names that the base has.

        Raises:
            AdapterError: nothing is targeted, the embeddings or the head are, or a pattern cannot be used.
        """
        budget = StepBudget(_MAX_MATCH_STEPS)
        targets = _Targets(self, num_layers, budget)
        for path in OUTER_MODULES:
            if self.target_modules != ALL_LINEAR and targets.include(path, None):
                raise AdapterError(
                    f"target_modules includes {path}, which cannot be adapted on a shared base; "
                    f"target linear layers of the decoder ({', '.join(MODULES)})",
                    param="target_modules",
                )
        ranks = _PatternTable("rank_pattern", self.rank_pattern, self.rank, budget)
        alphas = _PatternTable("alpha_pattern", self.alpha_pattern, self.alpha, budget)
        resolved: dict[tuple[int, str], ResolvedModule] = {}
        for layer in range(num_layers):
            for module in MODULES:
                path = module_path(layer, module)
                if module in modules and targets.include(path, layer):
                    resolved[layer, module] = self._resolve_one(path, int(ranks.at(path)), alphas.at(path))
        paths = [module_path(layer, module) for layer in range(num_layers) for module in modules]
        if not resolved:
            raise self._nothing_adapted(targets, paths, modules)
        for table in (ranks, alphas):
            table.check_all_used((*paths, *OUTER_MODULES))
        return resolved

    def _nothing_adapted(
        self, targets: _Targets, paths: Collection[str], modules: Collection[str]
    ) -> AdapterError:
        """Which of the settings is the reason that no layer is left."""
        named = [path for path in paths if targets.names(path)]
        if not named:
            return AdapterError(
                f"target_modules {shown(self.target_modules)} names no linear layer of this base model; "
                f"it has {', '.join(m for m in MODULES if m in modules)}",
                param="target_modules",
            )
        if all(targets.excludes(path) for path in named):
            return AdapterError(
                f"exclude_modules {shown(self.exclude_modules)} excludes every layer that target_modules "
                f"{shown(self.target_modules)} names; narrow it",
                param="exclude_modules",
            )
        return AdapterError(
            f"layers_to_transform {shown(self.layers_to_transform)} with layers_pattern "
            f"{shown(self.layers_pattern)} leaves no layer that target_modules {shown(self.target_modules)} "
            "names",
            param="layers_pattern" if self.layers_pattern else "layers_to_transform",
        )

    def _resolve_one(self, path: str, rank: int, alpha: float) -> ResolvedModule:
        scale = self.scale(rank, alpha)
        if not abs(scale) <= _MAX_SCALE:
            raise AdapterError(
                f"lora_alpha {alpha} of {path} gives the scale {scale}, beyond float32's range"
            )
        return ResolvedModule(rank, alpha, scale)


class _Targets:
    """Decides whether a module path is adapted, as PEFT's `check_target_module_exists` does."""

    def __init__(self, config: LoraConfig, num_layers: int, budget: StepBudget) -> None:
        self._include = _matcher("target_modules", config.target_modules, budget)
        self._exclude = _matcher("exclude_modules", config.exclude_modules, budget)
        self._whole_paths = frozenset(config.target_modules)
        self._layer_lists = frozenset(config.layers_pattern)
        self._layers = None if config.layers_to_transform is None else frozenset(config.layers_to_transform)
        beyond = sorted(layer for layer in self._layers or () if not 0 <= layer < num_layers)
        if beyond:
            raise AdapterError(
                f"layers_to_transform names layer {beyond[0]}, but the base model has {num_layers} layers",
                param="layers_to_transform",
            )

    def names(self, path: str) -> bool:
        """Whether `target_modules` alone would adapt it."""
        return self._include.matches(path)

    def excludes(self, path: str) -> bool:
        """Whether `exclude_modules` takes it out."""
        return self._exclude.matches(path)

    def include(self, path: str, layer: int | None) -> bool:
        """Whether it is adapted."""
        if self.excludes(path) or not self.names(path):
            return False
        if self._layers is None or path in self._whole_paths:
            return True
        return layer in self._layers and self._in_layer_list(path)

    def _in_layer_list(self, path: str) -> bool:
        parent, layer_list = path.split(".")[:2]
        spellings = {layer_list, f"{parent}.{layer_list}"}
        return not self._layer_lists or not self._layer_lists.isdisjoint(spellings)


class _Suffixes:
    """Matches a path that ends, at a dot, with one of the names."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def matches(self, path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[start:]) in self._names for start in range(len(parts)))


class _Whole:
    """Matches a path that one regular expression matches from end to end."""

    def __init__(self, where: str, text: str, budget: StepBudget) -> None:
        self._where = where
        self._pattern = _compile(where, text, budget)

    def matches(self, path: str) -> bool:
        try:
            return self._pattern.matches_all(path)
        except PatternError as error:
            raise AdapterError(f"{self._where} {error}", param=self._where) from error


class _AllLinear:
    """Matches every linear layer of the decoder."""

    def matches(self, path: str) -> bool:
        return path not in OUTER_MODULES


def _matcher(where: str, value: tuple[str, ...] | str, budget: StepBudget) -> _Suffixes | _Whole | _AllLinear:
    if value == ALL_LINEAR and where == "target_modules":
        return _AllLinear()
    return _Whole(where, value, budget) if isinstance(value, str) and value else _Suffixes(value)


class _PatternTable:
    """Values by pattern; the first pattern that matches the end of a path wins."""

    def __init__(
        self, where: str, items: Collection[tuple[str, float]], default: float, budget: StepBudget
    ) -> None:
        if len(items) > _MAX_PATTERNS:
            raise AdapterError(f"{where} has {len(items)} keys; at most {_MAX_PATTERNS} are allowed")
        self._where = where
        self._patterns = [(key, _compile(where, key, budget), value) for key, value in items]
        self._default = default
        self._unused = {key for key, _ in items}

    def at(self, path: str) -> float:
        """The value for a path."""
        for key, pattern, value in self._patterns:
            if self._matches(pattern, path):
                self._unused.discard(key)
                return value
        return self._default

    def check_all_used(self, paths: Collection[str]) -> None:
        """Refuse a key that matches none of the base's modules, adapted or not: PEFT would ignore it.

        Raises:
            AdapterError: naming the key.
        """
        for key, pattern, _ in self._patterns:
            if key in self._unused and not any(self._matches(pattern, path) for path in paths):
                raise AdapterError(
                    f"{self._where}[{shown(key)}] matches no module of this base model and would have no "
                    "effect; correct or remove the key (it must match the end of a module's path, from a dot "
                    "on)",
                    param=self._where,
                )

    def _matches(self, pattern: PathPattern, path: str) -> bool:
        try:
            return pattern.matches_tail(path)
        except PatternError as error:
            raise AdapterError(f"{self._where} {error}", param=self._where) from error


def _compile(where: str, text: str, budget: StepBudget) -> PathPattern:
    try:
        return PathPattern(text, budget)
    except PatternError as error:
        raise AdapterError(f"{where} {shown(text)} {error}", param=where) from error


def shown(value: object) -> str:
    """A value for an error message: its repr, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
