"""What the demo asks of its server, over HTTP as any client would: adapters, files, jobs, chat."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx


class DemoClient:
    """One tenant's view of the server."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(120.0),
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def publish_adapter(self, name: str, directory: Path) -> None:
        """Upload a PEFT directory."""
        files = {
            part: (part, (directory / part).read_bytes())
            for part in ("adapter_config.json", "adapter_model.safetensors")
        }
        _checked(await self._http.post("/v1/adapters", data={"name": name}, files=files))

    async def download(self, name: str, directory: Path) -> None:
        """Download an adapter as a PEFT directory."""
        response = await self._http.get(f"/v1/adapters/{name}/download")
        if response.is_error:
            _checked(response)
        directory.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
            for member in archive.getmembers():
                content = archive.extractfile(member)
                if content is not None:
                    (directory / Path(member.name).name).write_bytes(content.read())

    async def start_job(self, train_file: Path, body: dict[str, Any]) -> str:
        """Upload a training file and submit a job on it; returns the job's id."""
        upload = {"file": (train_file.name, train_file.read_bytes())}
        file = _checked(await self._http.post("/v1/files", data={"purpose": "fine-tune"}, files=upload))
        job = _checked(
            await self._http.post("/v1/fine_tuning/jobs", json=body | {"training_file": file["id"]})
        )
        return str(job["id"])

    async def job(self, job_id: str) -> dict[str, Any]:
        """The job object."""
        return _checked(await self._http.get(f"/v1/fine_tuning/jobs/{job_id}"))

    async def metrics_events(self, job_id: str, limit: int = 100) -> list[dict[str, Any]]:
        """The newest metrics events, oldest first."""
        page = _checked(
            await self._http.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": limit})
        )
        return [event["data"] for event in reversed(page["data"]) if event["type"] == "metrics"]

    async def answer(self, model: str, prompt: str, max_tokens: int = 48) -> str:
        """The greedy answer to one user message."""
        reply = _checked(
            await self._http.post(
                "/v1/chat/completions",
                json={
                    "model": model,
                    "messages": [{"role": "user", "content": prompt}],
                    "temperature": 0,
                    "max_tokens": max_tokens,
                },
            )
        )
        return str(reply["choices"][0]["message"]["content"])

    async def stream(self, model: str, prompt: str, max_tokens: int = 96) -> AsyncIterator[str]:
        """Stream the pieces of one answer."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.3,
            "max_tokens": max_tokens,
            "stream": True,
        }
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                await response.aread()
                _checked(response)
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise DemoError(chunk["error"]["message"])
                if chunk["choices"] and (piece := chunk["choices"][0]["delta"].get("content")):
                    yield piece


class DemoError(Exception):
    """The server answered with an error; the message is its own."""


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError):
            message = response.text[:500]
        raise DemoError(
            f"{response.request.method} {response.request.url.path}: {response.status_code} {message}"
        )
    value: dict[str, Any] = response.json()
    return value
