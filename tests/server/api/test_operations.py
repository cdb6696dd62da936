"""/health, /ready and /metrics."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from weft_server.protocol import Heartbeat

BASE = "base-model"


def samples(api: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(api: Any, name: str, **labels: str) -> float:
    return samples(api)[name, frozenset({**labels, "model_name": BASE}.items())]


def test_health_tells_only_that_the_process_answers(api: Any) -> None:
    api.engine.ready = False
    response = api.http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_the_interface_description_lists_the_routes(api: Any) -> None:
    paths = api.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/files", "/ready"} <= set(paths)


def test_ready_is_503_with_the_reason_until_the_engine_serves(api: Any) -> None:
    api.engine.ready, api.engine.why_not_ready = False, "loading the base"
    response = api.http.get("/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["message"] == "loading the base"
    api.engine.ready = True
    response = api.http.get("/ready")
    assert (response.status_code, response.json()["model"]) == (200, BASE)


def test_generation_before_the_engine_is_known_is_a_503(api: Any) -> None:
    api.engine.info = None
    with pytest.raises(openai.InternalServerError) as caught:
        api.client().completions.create(model=BASE, prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "2"


def test_requests_are_counted_and_timed(start_api: Any) -> None:
    api = start_api()
    num_tokens = len(api.tokenizer.encode("Hello there!")) + 1
    api.client().completions.create(model=BASE, prompt="Hi", max_tokens=50, n=2)
    list(api.client().completions.create(model=BASE, prompt="Hi", max_tokens=1, stream=True))
    assert value(api, "weft_request_success_total", tenant="default", finished_reason="stop") == 2
    assert value(api, "weft_request_success_total", tenant="default", finished_reason="length") == 1
    assert value(api, "weft_generation_tokens_total", tenant="default") == 2 * num_tokens + 1
    assert value(api, "weft_prompt_tokens_total", tenant="default") == 2 * len(api.tokenizer.encode("Hi"))
    assert value(api, "weft_time_to_first_token_seconds_count") == 3
    assert value(api, "weft_inter_token_latency_seconds_count") == 2 * (num_tokens - 1)
    assert value(api, "weft_e2e_request_latency_seconds_count") == 3
    assert value(api, "weft_request_generation_tokens_sum") == 2 * num_tokens + 1
    assert value(api, "weft_http_responses_total", status="200") >= 2


def test_heartbeats_become_gauges_counters_and_iteration_times(start_api: Any) -> None:
    api = start_api()
    metrics = api.services.metrics
    metrics.engine_started()
    metrics.observe_heartbeat(
        Heartbeat(
            5, {"num_requests_running": 3}, {"finetune_tokens": 100, "adapter_loads": 2}, [(0.02, 0.01)]
        )
    )
    assert value(api, "weft_num_requests_running") == 3
    assert value(api, "weft_finetune_tokens_total") == 100
    assert value(api, "weft_iteration_time_seconds_count") == 1
    assert value(api, "weft_iteration_time_over_prediction_ratio_sum") == 2
    metrics.engine_lost()
    metrics.engine_started()
    assert ("weft_num_requests_running", frozenset({("model_name", BASE)})) not in samples(api)
    metrics.observe_heartbeat(Heartbeat(1, {"num_requests_running": 1}, {"finetune_tokens": 7}))
    assert value(api, "weft_finetune_tokens_total") == 107
    assert value(api, "weft_adapter_loads_total") == 2
    assert value(api, "weft_engine_starts_total") == 2


def test_what_both_processes_count_is_exposed_once(start_api: Any) -> None:
    api = start_api()
    api.client().completions.create(model=BASE, prompt="Hi", max_tokens=3)
    api.services.metrics.observe_heartbeat(Heartbeat(1, {}, {"generation_tokens": 50, "prompt_tokens": 9}))
    families = [family.name for family in text_string_to_metric_families(api.http.get("/metrics").text)]
    assert len(families) == len(set(families))
    assert value(api, "weft_generation_tokens_total", tenant="default") == 3


def test_two_servers_in_one_process_do_not_share_metrics(start_api: Any, open_api: Any) -> None:
    api = start_api()
    before = open_api.services.metrics.render()
    api.services.metrics.first_token(1.0)
    assert open_api.services.metrics.render() == before


def schema_of(api: Any, path: str, media_type: str = "application/json") -> Any:
    document = api.http.get("/openapi.json").json()
    return document["paths"][path]["post"]["requestBody"]["content"][media_type]["schema"]


@pytest.mark.parametrize(
    ("path", "required", "some"),
    [
        ("/v1/completions", {"model", "prompt"}, {"best_of", "temperature", "stream_options"}),
        ("/v1/chat/completions", {"model", "messages"}, {"top_logprobs", "n", "seed"}),
        ("/v1/fine_tuning/jobs", {"model", "training_file"}, {"method", "suffix", "weft"}),
        ("/v1/load_lora_adapter", {"lora_name", "lora_path"}, {"load_inplace"}),
        ("/v1/unload_lora_adapter", {"lora_name"}, {"lora_int_id"}),
    ],
)
def test_the_generated_description_has_the_bodies_of_json_routes(
    api: Any, path: str, required: set[str], some: set[str]
) -> None:
    schema = schema_of(api, path)
    assert set(schema["required"]) == required
    assert required | some <= set(schema["properties"])
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/files", {"purpose", "file"}),
        ("/v1/adapters", {"name", "adapter_config.json", "adapter_model.safetensors"}),
    ],
)
def test_the_generated_description_has_the_forms_of_uploads(api: Any, path: str, fields: set[str]) -> None:
    schema = schema_of(api, path, "multipart/form-data")
    assert set(schema["properties"]) == set(schema["required"]) == fields


def test_the_generated_description_has_no_reference_that_leads_nowhere(api: Any) -> None:
    text = api.http.get("/openapi.json").text
    components = json.loads(text).get("components", {}).get("schemas", {})
    references = re.findall(r'"\$ref":\s*"([^"]*)"', text)
    assert {name.removeprefix("#/components/schemas/") for name in references} <= set(components)


def test_the_generated_description_allows_all_forms_of_a_field(api: Any) -> None:
    prompt = schema_of(api, "/v1/completions")["properties"]["prompt"]
    assert {entry["type"] for entry in prompt["anyOf"]} == {"string", "array"}
    method = schema_of(api, "/v1/fine_tuning/jobs")["properties"]["method"]["anyOf"][0]["properties"]
    supervised = method["supervised"]["anyOf"][0]["properties"]
    for field in supervised["hyperparameters"]["anyOf"][0]["properties"].values():
        assert "auto" in [entry.get("const") for entry in field["anyOf"]]
