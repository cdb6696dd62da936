"""Public trace formats, from tiny files written here and from the real ones where they are."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from pathlib import Path

import pytest

from weft_scheduler.simulator.readers import TraceError, detect_format, read_trace
from weft_scheduler.simulator.trace import mean_rate

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
    "2023-11-16 18:16:46.6805900,91,0\n"
)
MOONCAKE = (
    '{"timestamp": 1500, "input_length": 1100, "output_length": 6, "hash_ids": [4, 5, 6]}\n'
    '{"timestamp": 0, "input_length": 512, "output_length": 3, "hash_ids": [4]}\n'
)


def write_azure(folder: Path) -> Path:
    path = folder / "conv.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    return path


def write_clients(folder: Path, *, lengths: bool = True) -> Path:
    """Two clients: one busy for 600 s and silent after, one four times slower all along."""
    folder.mkdir(exist_ok=True)
    (folder / "chunk-0-trace.csv").write_text("0,4.0,1.0,Gamma,1.0,0.25\n600,0,0,,0,0\n")
    (folder / "chunk-1-trace.csv").write_text("0,1.0,1.0,Weibull,0.8,0.88\n600,1.0,1.0,Weibull,0.8,0.88\n")
    if lengths:
        for idx, (prompt, output) in enumerate(((10, 20), (30, 40))):
            table = {"0": {"input_tokens": f"{{{prompt}: 1.0}}", "output_tokens": f"{{{output}: 1.0}}"}}
            (folder / f"chunk-{idx}-dataset.json").write_text(json.dumps(table))
    return folder


def pack(folder: Path, pattern: str, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.glob(pattern)):
            tar.add(path, f"data/{path.name}")


def test_azure_rows_arrive_relative_to_the_first(tmp_path: Path) -> None:
    trace = read_trace(str(write_azure(tmp_path)))
    assert [request.arrival_s for request in trace] == pytest.approx([0.0, 4.314579, 60.0])
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in trace] == [(374, 44), (396, 109), (91, 1)]


def test_mooncake_records_are_sorted_and_keep_their_prefix_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE)
    first, second = read_trace(str(path))
    assert (first.arrival_s, first.prefix_hashes, first.prefix_block_tokens) == (0.0, (4,), 512)
    assert (second.arrival_s, second.prefix_hashes) == (1.5, (4, 5, 6))


def test_clients_become_tenants_by_rank_with_their_own_lengths(tmp_path: Path) -> None:
    trace = read_trace(str(write_clients(tmp_path / "clients")), seed=3, duration_s=600.0)
    by_tenant = {tenant: [r for r in trace if r.tenant == tenant] for tenant in ("client-00", "client-01")}
    assert len(by_tenant["client-00"]) == pytest.approx(2400, rel=0.1)
    assert len(by_tenant["client-01"]) == pytest.approx(600, rel=0.2)
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in by_tenant["client-01"]} == {(30, 40)}
    assert trace == read_trace(str(tmp_path / "clients"), seed=3, duration_s=600.0)
    assert trace != read_trace(str(tmp_path / "clients"), seed=4, duration_s=600.0)


def test_rates_follow_the_clock_of_the_client(tmp_path: Path) -> None:
    trace = read_trace(str(write_clients(tmp_path / "clients")), start_s=600.0, duration_s=600.0)
    assert {request.tenant for request in trace} == {"client-00"}
    assert {request.num_prompt_tokens for request in trace} == {30}


def test_a_rate_scales_the_clients_together(tmp_path: Path) -> None:
    folder = write_clients(tmp_path / "clients")
    trace = read_trace(str(folder), duration_s=600.0, requests_per_s=1.0)
    assert len(trace) == pytest.approx(600, rel=0.15)
    only = read_trace(str(folder), duration_s=600.0, requests_per_s=1.0, num_clients=1)
    assert {request.tenant for request in only} == {"client-00"}
    assert len(only) == pytest.approx(600, rel=0.15)


def test_rates_without_lengths_take_those_of_the_archive_beside_them(tmp_path: Path) -> None:
    folder = write_clients(tmp_path / "clients")
    pack(folder, "*-trace.csv", tmp_path / "small-rates.tar.gz")
    with pytest.raises(TraceError, match="no lengths"):
        read_trace(str(tmp_path / "small-rates.tar.gz"))
    pack(folder, "*-dataset.json", tmp_path / "other-lengths.tar.gz")
    trace = read_trace(str(tmp_path / "small-rates.tar.gz"), duration_s=100.0)
    assert {request.num_prompt_tokens for request in trace} == {10, 30}


def test_a_window_and_a_rate_cut_and_speed_up_a_recorded_trace(tmp_path: Path) -> None:
    path = write_azure(tmp_path)
    assert [r.num_prompt_tokens for r in read_trace(str(path), start_s=4.0, duration_s=10.0)] == [396]
    assert mean_rate(read_trace(str(path), requests_per_s=2.0)) == pytest.approx(2.0)
    with pytest.raises(TraceError, match="no request arrives"):
        read_trace(str(path), start_s=10.0, duration_s=1.0)


def test_the_format_is_told_from_the_content(tmp_path: Path) -> None:
    assert detect_format(write_azure(tmp_path)) == "azure"
    assert read_trace(f"azure:{write_azure(tmp_path)}")
    path = tmp_path / "other.txt"
    path.write_text("hello\n")
    with pytest.raises(TraceError, match="first line is 'hello"):
        read_trace(str(path))


@pytest.mark.parametrize(
    ("location", "message"),
    [("{}/absent.csv", "no such file"), ("burst:{}/x.csv", "unknown format 'burst'; known are azure")],
)
def test_what_cannot_be_found_is_named(location: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(location.format(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 3, "output_length": 1}\n{"timestamp": 0}\n'),
    ],
)
def test_a_bad_line_is_named_by_its_number(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match="line 2"):
        read_trace(str(tmp_path / name))


@pytest.fixture(scope="module")
def traces() -> Path:
    root = os.environ.get("WEFT_TEST_DATA")
    if root is None:
        pytest.skip("WEFT_TEST_DATA is not set: the real traces are not here")
    return Path(root) / "traces"


def test_the_real_azure_trace_has_its_published_size(traces: Path) -> None:
    trace = read_trace(str(traces / "azure2023" / "AzureLLMInferenceTrace_conv.csv.gz"))
    assert len(trace) == 19366
    assert mean_rate(trace) == pytest.approx(5.53, abs=0.01)
    prompts = sorted(request.num_prompt_tokens for request in trace)
    assert prompts[len(prompts) // 2] == 1020


def test_the_real_mooncake_trace_shares_prefixes(traces: Path) -> None:
    trace = read_trace(str(traces / "mooncake" / "synthetic_trace.jsonl.gz"))
    assert all(len(r.prefix_hashes) * 512 <= r.num_prompt_tokens + 512 for r in trace)
    blocks = [block for request in trace for block in request.prefix_hashes]
    assert len(set(blocks)) < len(blocks)


def test_the_real_clients_are_as_unequal_as_published(traces: Path) -> None:
    rates = str(traces / "servegen" / "m-small-rates.tar.gz")
    trace = read_trace(rates, duration_s=300.0, requests_per_s=5.0)
    assert len(trace) == pytest.approx(1500, rel=0.2)
    assert 10 <= len({request.tenant for request in trace}) <= 43
