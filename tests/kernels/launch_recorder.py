"""Records what host wrappers would launch: stand-ins for their kernels note every launch's signature."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

_TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_KEYS = ("kernel", "signature", "constants", "attributes", "options")


@dataclass(frozen=True, slots=True)
class Launch:
    """All that decides the machine code of one launch, as `triton.compile` wants it."""

    op: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        return repr([self.kernel.__name__, *(getattr(self, name) for name in _KEYS[1:])])


class Recorder:
    """Stands in for a kernel and notes its launches; equal ones count once."""

    def __init__(self, op: str, kernel: Any, launches: dict[str, Launch]) -> None:
        self._op = op
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: Any) -> Any:
        return self._record

    def _record(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        values = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
        launch = Launch(self._op, self._kernel, {}, {}, {}, options)
        for idx, parameter in enumerate(self._kernel.params):
            _specialize(launch, idx, parameter, values[parameter.name])
        self._launches.setdefault(launch.key, launch)


def record(op: str, module: ModuleType, launches: dict[str, Launch]) -> None:
    """Replace every kernel that a host module holds (its globals called `*_kernel`) by a recorder."""
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel") and hasattr(value, "arg_names"):
            setattr(module, name, Recorder(op, value, launches))


def _specialize(launch: Launch, idx: int, parameter: Any, value: Any) -> None:
    """What Triton's launcher would make of one argument: a constant, or a type and perhaps a divisibility."""
    is_one = type(value) is int and value == 1
    if parameter.is_constexpr or value is None or (is_one and not parameter.do_not_specialize):
        launch.signature[parameter.name] = "constexpr"
        launch.constants[(idx,)] = value
        return
    if isinstance(value, torch.Tensor):
        launch.signature[parameter.name] = "*" + _TYPE_NAMES[value.dtype]
        # Allocations are aligned, views of them where they begin (a tensor on `meta` has no address).
        aligned = value.storage_offset() * value.itemsize % 16 == 0
    elif isinstance(value, float):
        launch.signature[parameter.name] = "fp32"
        aligned = False
    elif isinstance(value, bool):
        launch.signature[parameter.name] = "u1"
        aligned = False
    else:
        launch.signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        aligned = value % 16 == 0 and not parameter.do_not_specialize
    if aligned:
        launch.attributes[(idx,)] = [["tt.divisibility", 16]]
