"""What the demo prints fits a terminal of 80 columns."""

from __future__ import annotations

import io
import re

from rich.console import Console

from weft_server.demo.main import TENANTS
from weft_server.demo.screen import Screen
from weft_server.demo.state import DemoState, Job, Latencies, Stream
from weft_server.demo.tasks import FINETUNE_TASKS


def test_the_closing_tables_show_every_name_whole_at_80_columns() -> None:
    jobs = [
        Job(
            tenant,
            task.name,
            task.title,
            "succeeded",
            losses=[12.34, 0.012],
            trained_tokens=1_234_567,
            model=f"{task.name}@12",
            started_s=0.0,
            finished_s=1234.5,
            exact_match_before=1.0,
            exact_match_after=1.0,
        )
        for tenant, task in zip(TENANTS, FINETUNE_TASKS, strict=True)
    ]
    latencies = Latencies([0.1234] * 9, 100_000, 10.0)
    streams = [Stream(tenant, "voice") for tenant in TENANTS]
    out = io.StringIO()
    state = DemoState(streams, jobs, alone=latencies, beside_training=latencies)
    Screen(state, Console(file=out, width=80)).summary()
    text = out.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    shown = re.split(r"\s{2,}", text)
    for job in jobs:
        for value in (job.tenant, job.task, job.model, "12.34 → 0.012", "1,234,567", "100 %"):
            assert value in shown
    assert "while two jobs train" in shown
