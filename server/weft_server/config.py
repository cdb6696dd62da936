"""The configuration: one table of options, from which flags, environment names and TOML keys follow.

Owns precedence (flag > `WEFT_…` variable > TOML file > default), validation and the only environment reads of
the program. Knows nothing of what the options mean to the parts that use them: `None` stands for "sized or
decided from the model, the device and its free memory".
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from weft_server.errors import ConfigError

ENV_PREFIX = "WEFT_"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option, validated.

    Names are the flags' with underscores; see `OPTIONS` for meanings and limits.
    """

    model: str
    host: str
    port: int
    data_dir: Path
    store: str
    redis_volatile: bool
    device: str
    dtype: str
    quantization: str
    low_memory: bool
    max_model_len: int | None
    max_num_seqs: int | None
    max_batch_tokens: int | None
    kv_cache_tokens: int | None
    no_prefix_cache: bool
    enforce_eager: bool
    adapter_arena_mb: int | None
    gpu_memory_utilization: float
    max_queued_requests: int
    max_queued_requests_total: int | None
    tpot_slo_ms: float | None
    ttft_slo_ms: float | None
    slo_percentile: float
    flex_tpot_slo_ms: float | None
    flex_ttft_slo_ms: float | None
    served_model_name: str | None
    chat_template: Path | None
    generation_config: Path | None
    api_keys: Path | None
    no_auth: bool
    adapter_root: Path | None
    max_upload_mb: int
    log_level: str

    @property
    def upload_dir(self) -> Path:
        """Where uploads lie while they arrive: on the blobs' disk, so that there is one limit."""
        return self.data_dir / "uploads"


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    `read` takes a flag's or variable's text, or a TOML value, and raises ValueError on a bad one.
    """

    name: str
    default: Any
    read: Callable[[object], Any]
    allowed: str
    help: str
    is_switch: bool = False

    @property
    def flag(self) -> str:
        """`--max-num-seqs`; the model is positional."""
        return "MODEL" if self.name == "model" else "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """`WEFT_MAX_NUM_SEQS`."""
        return ENV_PREFIX + self.name.upper()


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _path(value: object) -> Path:
    return Path(_text(value)).expanduser()


def _existing(value: object) -> Path:
    path = _path(value)
    if not path.exists():
        raise ValueError
    return path


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ValueError


def _choice(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return read


def _integer(minimum: int, maximum: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ValueError
        return value

    return read


def _number(above: float, maximum: float = math.inf) -> Callable[[object], float]:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not (above < number <= maximum and math.isfinite(number)):
            raise ValueError
        return number

    return read


def _matching(pattern: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        text = _text(value)
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return read


_MAX_INT = 2**31 - 1
_MAX_SEQS = 65_536
_MAX_BATCH_TOKENS = 1 << 22
_SIZED = "default: sized from free memory and device"


def _size(name: str, maximum: int, meaning: str) -> Option:
    """A size that is chosen where it is not given; what this machine can hold is checked when it is known."""
    return Option(name, None, _integer(1, maximum), f"1 to {maximum}", meaning)


OPTIONS: tuple[Option, ...] = (
    Option("model", None, _text, "a directory, a hub id, or demo", "Hugging Face directory, hub id, or demo"),
    Option("host", "127.0.0.1", _text, "an address or host name", "address to listen on"),
    Option("port", 8000, _integer(0, 65535), "0 to 65535", "port to listen on; 0 takes any free one"),
    Option("data_dir", None, _path, "a folder", "where records, files and adapters live"),
    Option(
        "store",
        "sqlite",
        _matching(r"sqlite|rediss?://[^/\s]+(/\d+)?|unix://\S+"),
        "sqlite or redis://host:port/db",
        "sqlite, or redis://host:port/db (may be shared by several servers)",
    ),
    Option(
        "redis_volatile",
        False,
        _switch,
        "true or false",
        "accept a Redis that may lose acknowledged writes",
        is_switch=True,
    ),
    Option("device", "auto", _matching(r"auto|cpu|cuda(:\d+)?"), "auto, cpu, cuda or cuda:N", "device"),
    Option(
        "dtype",
        "auto",
        _choice("auto", "bfloat16", "float16", "float32"),
        "auto, bfloat16, float16 or float32",
        "compute dtype; auto is bfloat16 where the hardware has it, else float32",
    ),
    Option(
        "quantization",
        "auto",
        _choice("auto", "nf4", "int8", "none"),
        "auto, nf4, int8 or none",
        "weights of the base; auto is the checkpoint's own, else nf4",
    ),
    Option(
        "low_memory",
        False,
        _switch,
        "true or false",
        "CPU: do not expand quantized weights",
        is_switch=True,
    ),
    _size("max_model_len", _MAX_INT, f"context in tokens; {_SIZED}"),
    _size("max_num_seqs", _MAX_SEQS, f"sequences in flight; {_SIZED}"),
    _size("max_batch_tokens", _MAX_BATCH_TOKENS, f"tokens of one iteration; {_SIZED}"),
    _size("kv_cache_tokens", _MAX_INT, f"KV cache in tokens; {_SIZED}"),
    Option(
        "no_prefix_cache",
        False,
        _switch,
        "true or false",
        "compute every prompt whole, even where its beginning is cached",
        is_switch=True,
    ),
    Option(
        "enforce_eager",
        False,
        _switch,
        "true or false",
        "GPU: capture no CUDA graphs",
        is_switch=True,
    ),
    _size("adapter_arena_mb", _MAX_INT, f"MiB for resident adapters; {_SIZED}"),
    Option(
        "gpu_memory_utilization",
        0.90,
        _number(0.0, 1.0),
        "a number above 0, at most 1",
        "share of the GPU's memory to use",
    ),
    Option(
        "max_queued_requests",
        1024,
        _integer(1, 1_000_000),
        "1 to 1000000",
        "choices of a tenant that may wait for their first token; more are refused with 429",
    ),
    Option(
        "max_queued_requests_total",
        None,
        _integer(1, 1_000_000),
        "1 to 1000000",
        "the same for all tenants together; default: 8 times the limit of a tenant",
    ),
    Option(
        "tpot_slo_ms",
        None,
        _number(0.0),
        "a number above 0",
        "time per output token that finetuning yields to; default: GPU 50, CPU 2x the calibrated decode",
    ),
    Option(
        "ttft_slo_ms",
        None,
        _number(0.0),
        "a number above 0",
        "time to first token that finetuning yields to; default: GPU 2000, CPU 5000",
    ),
    Option("slo_percentile", 95.0, _number(0.0, 100.0), "above 0, at most 100", "percentile of all targets"),
    Option(
        "flex_tpot_slo_ms",
        None,
        _number(0.0),
        "a number above 0",
        "time per output token while all requests are of the flex tier; default: 4x that of the default tier",
    ),
    Option(
        "flex_ttft_slo_ms",
        None,
        _number(0.0),
        "a number above 0",
        "time to first token while all requests are of the flex tier; default: 4x that of the default tier",
    ),
    Option(
        "served_model_name",
        None,
        _matching(r"[A-Za-z0-9._/:-]{1,128}"),
        "1 to 128 of A-Z a-z 0-9 . _ / : -",
        "name of the base in requests; default: the directory's name",
    ),
    Option("chat_template", None, _existing, "an existing file", "Jinja file; default: the tokenizer's own"),
    Option(
        "generation_config",
        None,
        _existing,
        "an existing file, or a folder that has generation_config.json",
        "sampling defaults; default: the model's, else OpenAI's",
    ),
    Option("api_keys", None, _existing, "an existing TOML file", "tenants and keys; reloaded on SIGHUP"),
    Option(
        "no_auth",
        False,
        _switch,
        "true or false",
        "listen beyond loopback without keys",
        is_switch=True,
    ),
    Option(
        "adapter_root",
        None,
        _existing,
        "an existing folder",
        "load_lora_adapter may read <root>/<tenant>/…; default: it may read nothing",
    ),
    Option("max_upload_mb", 512, _integer(1, 1024 * 1024), "1 to 1048576", "largest upload in MiB"),
    Option(
        "log_level",
        "info",
        _choice("debug", "info", "warning", "error"),
        "debug, info, warning or error",
        "least severe messages that are logged",
    ),
)

CONFIG_ENV = ENV_PREFIX + "CONFIG"

_OTHERS_VARIABLES = frozenset({CONFIG_ENV, "WEFT_TEST_DATA", "WEFT_API_KEY", "WEFT_BASE_URL"})
"""Read by the command line, the tests or the client library, not options."""

_SERVICE_LINKS = re.compile(r"WEFT_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")
"""What Kubernetes injects into every pod beside a Service called weft."""


def default_data_dir() -> Path:
    """The user's data folder for Weft."""
    return Path(platformdirs.user_data_dir("weft", appauthor=False))


def load_settings(
    flags: Mapping[str, object],
    *,
    config: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Merge flags, environment, TOML file and defaults, and validate the whole.

    Args:
        flags: option name → text or bool; absent or None where the flag was not given.
        config: the `--config` file; None means `WEFT_CONFIG`, if that is set.
        environ: for tests; the process environment by default.

    Raises:
        ConfigError: naming the key as the user wrote it, the value, and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {option.name: option.default for option in OPTIONS}
    values["data_dir"] = default_data_dir()
    values.update(_from_file(config or environ.get(CONFIG_ENV) or None))
    values.update(_from_environment(environ))
    for option in OPTIONS:
        if flags.get(option.name) is not None:
            values[option.name] = _read(option, option.flag, flags[option.name])
    if values["model"] is None:
        raise ConfigError("No model given: `weft serve MODEL`, WEFT_MODEL, or `model` in the --config file.")
    settings = Settings(**values)
    _check_together(settings)
    return settings


def _from_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        document = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror or error}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}.") from None
    by_key = {option.name: option for option in OPTIONS}
    values: dict[str, Any] = {}
    for key, value in document.items():
        option = by_key.get(key.replace("-", "_"))
        if option is None:
            raise ConfigError(f"--config {path}: unknown key '{key}'. Allowed: {', '.join(by_key)}.")
        if option.name in values:
            raise ConfigError(f"--config {path}: '{key}' is given twice, with a dash and with an underscore.")
        values[option.name] = _read(option, f"--config {path}: {key}", value)
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    by_env = {option.env: option for option in OPTIONS}
    values: dict[str, Any] = {}
    for key, value in environ.items():
        if not key.startswith(ENV_PREFIX) or key in _OTHERS_VARIABLES or _SERVICE_LINKS.fullmatch(key):
            continue
        option = by_env.get(key)
        if option is None:
            raise ConfigError(
                f"Unknown variable {key}={value!r}. Allowed: {', '.join((*by_env, CONFIG_ENV))}."
            )
        if key == "WEFT_PORT" and value.startswith(("tcp://", "udp://")):
            raise ConfigError(
                f"WEFT_PORT={value!r} was set by Kubernetes for a Service called weft, and is not a port. "
                "Set `enableServiceLinks: false` in the pod, or rename the Service."
            )
        if value != "":
            values[option.name] = _read(option, key, value)
    return values


def _read(option: Option, source: str, value: object) -> Any:
    try:
        return option.read(value)
    except ValueError:
        raise ConfigError(f"{source}: {value!r} is not allowed. Allowed: {option.allowed}.") from None


def _check_together(settings: Settings) -> None:
    """Rules about more than one option."""
    if settings.api_keys is None and not settings.no_auth and not is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines, and no API keys are configured. "
            "Give --api-keys FILE, or --no-auth to serve anyone, or listen on 127.0.0.1."
        )
    if settings.api_keys is not None and settings.no_auth:
        raise ConfigError("--no-auth and --api-keys contradict each other; give one of them.")
    if settings.redis_volatile and settings.store == "sqlite":
        raise ConfigError("--redis-volatile needs --store redis://…")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server listening on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
