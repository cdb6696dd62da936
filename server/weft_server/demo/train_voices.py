"""Makes the two adapters of `voices.py`: one finetune job each on a Weft server that this script runs.

python -m weft_server.demo.train_voices [--out DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from weft_server.config import load_settings
from weft_server.demo.client import DemoClient, DemoError
from weft_server.demo.tasks import to_jsonl
from weft_server.demo.voices import ADAPTERS_DIR, VOICES, Voice
from weft_server.serving import running_server

_POLL_S = 0.5


async def train_voices(out: Path) -> None:
    """Train both voices on the bundled base and write their PEFT directories below `out`."""
    with tempfile.TemporaryDirectory(prefix="weft-voices-") as scratch:
        flags = {
            "model": "demo",
            "port": "0",
            "dtype": "float32",
            "tpot_slo_ms": "100",
            "data_dir": str(Path(scratch) / "data"),
        }
        async with running_server(load_settings(flags, config=None)) as (server, _):
            client = DemoClient(server.url, "")
            for voice in VOICES:
                await _train(client, voice, server.model_name, Path(scratch))
                await client.download(voice.name, out / voice.name)
            await client.aclose()


async def _train(client: DemoClient, voice: Voice, base: str, scratch: Path) -> None:
    file = scratch / f"{voice.name}.jsonl"
    file.write_text(to_jsonl(voice.examples()))
    job_id = await client.start_job(
        file,
        {
            "model": base,
            "seed": voice.seed,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}},
            },
            "weft": {"adapter_name": voice.name, "learning_rate": 4e-3, "lora": {"r": 4, "alpha": 8}},
        },
    )
    while (job := await client.job(job_id))["status"] not in ("succeeded", "failed", "cancelled"):
        await asyncio.sleep(_POLL_S)
    if job["status"] != "succeeded":
        raise DemoError(f"{voice.name}: {job['error']}")
    events = await client.metrics_events(job_id)
    print(f"{voice.name}: loss {events[0]['train_loss']:.3f} → {events[-1]['train_loss']:.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo's two published adapters.")
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR, help="directory to write")
    asyncio.run(train_voices(parser.parse_args(arguments).out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
