"""The configuration of an engine that runs in the benchmark's own process: no sockets, no store, no files."""

from __future__ import annotations

from typing import Any

from weft_server.engine.config import EngineConfig


def in_process_config(**settings: Any) -> EngineConfig:
    """`EngineConfig` of these settings; prefixes are not cached: every round asks the same again, and
    computing it is what is measured."""
    return EngineConfig(
        model_dir="",
        model_name="bench",
        epoch=1,
        receive_address="",
        send_address="",
        flight_record="",
        store_url="",
        data_dir="",
        prefix_cache=False,
        **settings,
    )
