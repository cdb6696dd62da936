"""Chat templates against transformers' rendering of the same source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weft_server.errors import ConfigError, InvalidRequest
from weft_server.service.chat_template import ChatTemplate
from weft_server.service.tokenizer import Tokenizer

chat_utils = pytest.importorskip(
    "transformers.utils.chat_template_utils", reason="transformers is the oracle"
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>&amp;</b> 'quoted' \"text\" 你好"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "  and 3+3? "},
    ],
]
TEMPLATES = [
    "qwen3.jinja",
    "template_alpaca.jinja",
    "template_chatml.jinja",
    "tool_chat_template_hermes.jinja",
    "tool_chat_template_llama3.1_json.jinja",
    "tool_chat_template_mistral3.jinja",
]


def oracle(source: str, messages: list[dict[str, Any]], add_generation_prompt: bool, **variables: Any) -> str:
    rendered, _ = chat_utils.render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **SPECIAL,
        **variables,
    )
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "several"])
def test_real_templates_render_as_in_transformers(
    test_data: Path, name: str, add_generation_prompt: bool, messages: list[dict[str, Any]]
) -> None:
    source = (test_data / "chat_templates" / name).read_text(encoding="utf-8")
    ours = ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt=add_generation_prompt)
    assert ours == oracle(source, messages, add_generation_prompt)


def test_the_real_template_inside_a_tokenizer_gives_transformers_ids(test_data: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    folder = test_data / "tokenizers/minimind"
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CONVERSATIONS[1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert Tokenizer.from_directory(folder).encode_chat(CONVERSATIONS[1]) == expected


def test_template_variables_reach_the_template(test_data: Path) -> None:
    source = (test_data / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, SPECIAL)
    thinking = template.render(CONVERSATIONS[0], add_generation_prompt=True)
    quiet = template.render(
        CONVERSATIONS[0], add_generation_prompt=True, variables={"enable_thinking": False}
    )
    assert quiet != thinking
    assert quiet == oracle(source, CONVERSATIONS[0], True, enable_thinking=False)


FEATURES = [
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    "  {% set x = 1 %}\n  {{ bos_token }}{{ x }}\n{% if tools %}tools{% endif %}",
    "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = 2 %}{% endfor %}{{ ns.x }}",
]


@pytest.mark.parametrize("source", FEATURES)
def test_template_features_render_as_in_transformers(source: str) -> None:
    ours = ChatTemplate(source, SPECIAL).render(CONVERSATIONS[1], add_generation_prompt=True)
    assert ours == oracle(source, CONVERSATIONS[1], True)


def test_the_date_function_exists() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y') }}", {}).render([], add_generation_prompt=False)
    assert rendered.isdigit()


def test_what_the_template_refuses_is_a_400_with_its_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render([], add_generation_prompt=True)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.format.__globals__['sys'] }}",
        "{% set d = messages[0] %}{{ d.update({'a': 1}) }}",
    ],
)
def test_the_sandbox_stops_a_hostile_template(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], add_generation_prompt=True)


def test_a_template_with_a_syntax_error_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("x\n{% if %}", {})
