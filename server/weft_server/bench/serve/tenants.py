"""What the tenants of a benchmark have: keys, adapters, finetune jobs; and the server's own counts.

Plain requests beside the load, which is sent by `client`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from weft_server import demo
from weft_server.bench.report import BenchError
from weft_server.service.tenants import new_key

_TRAIN_FILE = Path(demo.__file__).parent / "data" / "ticket-routing.train.jsonl"
JOB_BATCH_SIZE = 8
"""Examples in an optimizer step of a benchmark's finetune job."""

_JOB_START_S = 120.0
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of the tenants (None: a server without keys), and one that may read `/metrics`, if any."""

    tenants: tuple[str | None, ...]
    admin: str | None = None


def write_keys(path: Path, num_tenants: int) -> Keys:
    """Make tenants `bench-00`, … and an admin, write the server's keys file, and return the keys."""
    secrets, lines = [], []
    for idx in range(num_tenants + 1):
        key, is_admin = new_key(), idx == num_tenants
        name = "bench-admin" if is_admin else f"bench-{idx:02d}"
        lines += ["[[tenants]]", f'name = "{name}"', f'keys = ["{key.digest}"]']
        lines += ["admin = true"] if is_admin else []
        secrets.append(key.secret)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Keys(tuple(secrets[:-1]), secrets[-1])


class Account:
    """One tenant's view of the server."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def ready(self) -> dict[str, Any]:
        """The base model's name, its context, device, dtype and quantization.

        Raises:
            BenchError: nothing answers there, or the server cannot serve.
        """
        try:
            answer = self._get("/ready")
        except httpx.TransportError as error:
            raise BenchError(
                f"no server answers at {self._http.base_url} ({error}); start one, or give its --url"
            ) from error
        return self._json(answer)

    def adapters(self, base_model: str) -> list[str]:
        """Names that this tenant may ask for, the base's excepted."""
        data = self._json(self._get("/v1/models"))["data"]
        return [card["id"] for card in data if card["id"] != base_model]

    def upload(self, name: str, config: bytes, tensors: bytes) -> None:
        """Upload an adapter in PEFT's format."""
        files = {
            "adapter_config.json": ("adapter_config.json", config),
            "adapter_model.safetensors": ("adapter_model.safetensors", tensors),
        }
        self._json(self._http.post("/v1/adapters", data={"name": name}, files=files))

    def start_jobs(self, model: str, num_jobs: int) -> list[str]:
        """Finetune jobs with far more steps than a window has time for, all running when this returns.

        Raises:
            BenchError: one ends, or does not begin within two minutes.
        """
        with _TRAIN_FILE.open("rb") as data:
            upload = self._http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": data})
        file_id = self._json(upload)["id"]
        jobs = [self._submit(model, file_id, seed) for seed in range(num_jobs)]
        deadline_s = time.monotonic() + _JOB_START_S
        while time.monotonic() < deadline_s:
            states = [self._json(self._get(f"/v1/fine_tuning/jobs/{job}")) for job in jobs]
            if all(state["status"] == "running" for state in states):
                return jobs
            ended = [s for s in states if s["status"] in ("failed", "cancelled", "succeeded")]
            if ended:
                raise BenchError(f"finetune job {ended[0]['id']} ended: {ended[0]['error']}")
            time.sleep(0.1)
        raise BenchError(f"finetune jobs did not begin within {_JOB_START_S:.0f} s")

    def cancel_jobs(self, jobs: Sequence[str]) -> None:
        """End them."""
        for job in jobs:
            self._json(self._http.post(f"/v1/fine_tuning/jobs/{job}/cancel"))

    def trained_tokens(self) -> float | None:
        """Tokens that have gone forward for finetuning so far; None if this key may not read the metrics."""
        return self._counter("finetune_forward_tokens")

    def finetune_steps(self) -> float | None:
        """Optimizer steps so far; None if this key may not read the metrics."""
        return self._counter("finetune_steps")

    def _counter(self, name: str) -> float | None:
        response = self._get("/metrics")
        if response.status_code != httpx.codes.OK:
            return None
        pattern = rf"^weft_{name}_total(?:\{{[^}}]*\}})? (\S+)$"
        return sum(float(value) for value in re.findall(pattern, response.text, re.M))

    def _submit(self, model: str, file_id: str, seed: int) -> str:
        body = {
            "model": model,
            "training_file": file_id,
            "seed": seed,
            "hyperparameters": {"n_epochs": 50, "batch_size": JOB_BATCH_SIZE},
            "weft": {"learning_rate": 1e-4},
        }
        job: str = self._json(self._http.post("/v1/fine_tuning/jobs", json=body))["id"]
        return job

    def _get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    @staticmethod
    def _json(response: httpx.Response) -> dict[str, Any]:
        if response.is_error:
            raise BenchError(f"{response.request.method} {response.request.url.path}: {response.text}")
        answer: dict[str, Any] = response.json()
        return answer
