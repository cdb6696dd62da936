"""Servers as users run them: `weft serve` in a process group of its own, reached over a real socket.

`start_weft` starts one for a test; `contract_server` (the bundled model, quantized) and `plain_server`
(unquantized float32, comparable with transformers) are shared by all tests that leave them usable.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil  # type: ignore[import-untyped]
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save

import weft_server

BUNDLED_MODEL = Path(weft_server.__file__).parent / "demo" / "base_model"
WEFT = Path(sys.executable).with_name("weft")
TIMEOUT_S = 90.0
PLAIN = ("--quantization", "none", "--dtype", "float32", "--tpot-slo-ms", "100")
"""Comparable with transformers; training that does not wait for a quieter machine."""
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of `condition`; fails naming `what` when none comes."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain for {what}"
        time.sleep(0.02)
    return value


def clean_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a user's shell: none of the tests' own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WEFT_") and k != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1", **(extra or {})}


def run_weft(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `weft` to its end."""
    return subprocess.run(
        [WEFT, *arguments], env=clean_environment(env), capture_output=True, text=True, timeout=TIMEOUT_S
    )


class Weft:
    """A running `weft serve`."""

    def __init__(
        self, model: str | Path, data_dir: Path, *flags: str, env: dict[str, str] | None = None
    ) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir = data_dir
        self._log_path = data_dir / "log"
        with self._log_path.open("a") as log:
            self.process = subprocess.Popen(
                [WEFT, "serve", str(model), "--port", "0", "--data-dir", str(data_dir), *flags],
                env=clean_environment(env),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._clients: list[openai.OpenAI] = []
        self._ready_line = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._ready_line = self.process.stdout.readline()

    def wait_ready(self) -> Weft:
        """Wait for the line that says where it listens; returns itself."""
        self._reader.join(TIMEOUT_S)
        assert self._ready_line.startswith("Weft is ready: http://"), self.log
        self.url = self._ready_line.split()[-1]
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)
        self.client = self.openai_client()
        self.model: str = self.http.get("/ready").json()["model"]
        return self

    def openai_client(self, key: str = "no-key", **options: Any) -> openai.OpenAI:
        """A client of OpenAI's that tries once."""
        options = {"max_retries": 0, "timeout": TIMEOUT_S, **options}
        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options))
        return self._clients[-1]

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log_path.read_text()

    # ------------------------------------------------------------ processes

    @property
    def engine(self) -> psutil.Process | None:
        """The engine process, if one is alive."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):
                    if "weft_server.engine" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        return child
        return None

    def kill_engine(self) -> None:
        """SIGKILL, then wait until the API process has noticed."""
        engine = self.engine
        assert engine is not None
        engine.kill()
        wait_until(lambda: (new := self.engine) is not None and new.pid != engine.pid, "a new engine process")

    def wait_serving(self) -> None:
        """Wait until `/ready` says so."""
        wait_until(lambda: self.http.get("/ready").status_code == 200, "/ready")

    def planned_ids(self) -> set[str]:
        """Requests and jobs in the plan that the engine runs now (freeze it for a lasting answer)."""
        data = (self.data_dir / "run" / "plan").read_bytes()
        length = int.from_bytes(data[:4], "little")
        return set(data[4 : 4 + length].decode().split("\n")) - {""}

    def kill_engine_while_it_plans(self, *ids: str) -> None:
        """SIGKILL the engine at a moment when requests or jobs whose ids begin so are in its plan."""
        engine = self.engine
        assert engine is not None

        def frozen_in_the_act() -> bool:
            engine.suspend()
            wait_until(lambda: engine.status() == psutil.STATUS_STOPPED, "a stopped engine")
            planned = self.planned_ids()
            if all(any(found.startswith(prefix) for found in planned) for prefix in ids):
                return True
            engine.resume()
            return False

        wait_until(frozen_in_the_act, f"a plan with {ids}", timeout_s=20)
        self.kill_engine()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the API process and wait; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)

    def destroy(self) -> None:
        """Kill the whole group and close the clients."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for client in self._clients:
            client.close()
        if self._ready_line:
            self.http.close()

    # ------------------------------------------------------------ what tests ask of it

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 if there is none."""
        text = self.http.get("/metrics").text
        return sum(
            float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def greedy(
        self,
        prompt: str,
        max_tokens: int,
        *,
        model: str | None = None,
        client: openai.OpenAI | None = None,
    ) -> str:
        """The most likely continuation of exactly this many tokens."""
        answer = (client or self.client).completions.create(
            model=model or self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].text

    def stream(
        self,
        prompt: str,
        max_tokens: int,
        *,
        model: str | None = None,
        client: openai.OpenAI | None = None,
        seed: int | None = None,
    ) -> Any:
        """The same continuation as a stream."""
        return (client or self.client).completions.create(
            model=model or self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            seed=seed,
            stream=True,
            extra_body={"ignore_eos": True},
        )

    def upload_jsonl(self, lines: Any, *, client: openai.OpenAI | None = None) -> str:
        """Upload a training file of these objects (or raw text); returns its id."""
        text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
        files = (client or self.client).files
        return files.create(file=("train.jsonl", text.encode()), purpose="fine-tune").id

    def finetune(
        self,
        lines: Any,
        *,
        model: str | None = None,
        client: openai.OpenAI | None = None,
        seed: int = 7,
        **weft: Any,
    ) -> str:
        """Submit a job on these lines, one example a step; returns its id. `weft` are Weft's own options."""
        client = client or self.client
        job = client.fine_tuning.jobs.create(
            model=model or self.model,
            training_file=self.upload_jsonl(lines, client=client),
            seed=seed,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"batch_size": 1, "n_epochs": weft.pop("num_epochs", 1)}},
            },
            extra_body={"weft": {"learning_rate": 1e-3, **weft}},
        )
        return job.id

    def finished_job(self, job_id: str, *, client: openai.OpenAI | None = None) -> Any:
        """Wait for a job to end; returns it."""
        jobs = (client or self.client).fine_tuning.jobs

        def finished() -> Any:
            job = jobs.retrieve(job_id)
            return job if job.status in ("succeeded", "failed", "cancelled") else None

        return wait_until(finished, f"the end of {job_id}")

    def events(self, job_id: str) -> list[Any]:
        """All events of a job, oldest first."""
        return list(self.client.fine_tuning.jobs.list_events(job_id, limit=1000))[::-1]

    def losses(self, job_id: str) -> dict[int, float]:
        """Step → loss, from the metrics events, each of which must be of another step than the one before."""
        found: dict[int, float] = {}
        for event in self.events(job_id):
            if event.type == "metrics":
                assert event.data["step"] == len(found) + 1, "steps are reported once each, in order"
                found[event.data["step"]] = event.data["train_loss"]
        return found

    def wait_for_event(self, job_id: str, text: str, *, count: int = 1) -> str:
        """Wait until `count` events have a message with `text`; returns the last one's."""

        def find() -> str | None:
            found = [event.message for event in self.events(job_id) if text in event.message]
            return found[-1] if len(found) >= count else None

        found: str = wait_until(find, f"the event '{text}' of {job_id}")
        return found

    def upload_adapter(
        self, name: str, files: tuple[bytes, bytes], *, key: str | None = None
    ) -> httpx.Response:
        """POST /v1/adapters with the contents of (adapter_config.json, adapter_model.safetensors)."""
        config, weights = files
        return self.http.post(
            "/v1/adapters",
            data={"name": name},
            files={
                "adapter_config.json": ("adapter_config.json", config),
                "adapter_model.safetensors": ("adapter_model.safetensors", weights),
            },
            headers={} if key is None else {"authorization": f"Bearer {key}"},
        )


def lora_files(model_dir: Path, *, seed: int = 0, scale: float = 0.3, **config: Any) -> tuple[bytes, bytes]:
    """A random adapter of rank 4 on q_proj and down_proj, in PEFT's format, strong enough to change texts."""
    base = json.loads((model_dir / "config.json").read_text())
    hidden, inner = base["hidden_size"], base["intermediate_size"]
    width = base["num_attention_heads"] * base.get("head_dim", hidden // base["num_attention_heads"])
    generator = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj": (hidden, width), "mlp.down_proj": (inner, hidden)}
    tensors = {}
    for layer in range(base["num_hidden_layers"]):
        for module, (num_in, num_out) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = scale * torch.randn(4, num_in, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = scale * torch.randn(num_out, 4, generator=generator)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["q_proj", "down_proj"], **config,
    }  # fmt: skip
    return json.dumps(settings).encode(), save(tensors)


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions above, for tests."""

    class Helpers:
        wait_until = staticmethod(wait_until)
        run_weft = staticmethod(run_weft)
        lora_files = staticmethod(lora_files)
        plain = PLAIN

    return Helpers


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The bundled model; the small published one in a tree whose model has not been trained."""
    if (BUNDLED_MODEL / "config.json").is_file():
        return BUNDLED_MODEL
    return _tinystories()


@pytest.fixture(scope="session")
def plain_model() -> Path:
    """The smallest real model at hand: the published one, or the bundled one without WEFT_TEST_DATA."""
    if "WEFT_TEST_DATA" not in os.environ and (BUNDLED_MODEL / "config.json").is_file():
        return BUNDLED_MODEL
    return _tinystories()


def _tinystories() -> Path:
    if "WEFT_TEST_DATA" not in os.environ:
        pytest.skip("WEFT_TEST_DATA is not set, and there is no bundled model")
    return Path(os.environ["WEFT_TEST_DATA"]) / "models" / "tinystories-656k"


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Weft]]:
    """Start a server for the session; `data_dir` defaults to a new one."""
    servers: list[Weft] = []

    def start(model: str | Path, *flags: str, data_dir: Path | None = None) -> Weft:
        servers.append(Weft(model, data_dir or tmp_path_factory.mktemp("data"), *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.destroy()


@pytest.fixture
def start_weft(tmp_path: Path) -> Iterator[Callable[..., Weft]]:
    """Start a server for one test; it may not be ready yet."""
    servers: list[Weft] = []

    def start(
        model: str | Path, *flags: str, data_dir: Path | None = None, env: dict[str, str] | None = None
    ) -> Weft:
        servers.append(Weft(model, data_dir or tmp_path / f"data{len(servers)}", *flags, env=env))
        return servers[-1]

    yield start
    for server in servers:
        server.destroy()


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the contract server may load adapters from."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def contract_server(
    launch: Callable[..., Weft],
    bundled_model: Path,
    adapter_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Weft:
    """The bundled model, quantized as by default; in float32, so that equal requests have equal texts."""
    flags = ["--dtype", "float32", "--max-upload-mb", "1", "--adapter-root", str(adapter_root)]
    model: str | Path = "demo"
    if bundled_model != BUNDLED_MODEL:
        template = tmp_path_factory.mktemp("template") / "template.jinja"
        template.write_text(TEMPLATE)
        model, flags = bundled_model, [*flags, "--chat-template", str(template)]
    return launch(model, *flags).wait_ready()


@pytest.fixture(scope="session")
def plain_server(launch: Callable[..., Weft], plain_model: Path) -> Weft:
    """Unquantized float32, so that its numbers are transformers'."""
    return launch(plain_model, *PLAIN).wait_ready()
