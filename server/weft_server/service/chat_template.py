"""Chat templates: a conversation rendered to text by the tokenizer's Jinja template, in a sandbox.

Renders as transformers does (same environment options, filters and globals), so that a model sees the text it
was trained on. Templates come from model directories and are not trusted; messages come from clients and are
plain JSON values. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from weft_server.errors import ConfigError, InvalidRequest

RESERVED_VARIABLES = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training tools.

    Here it renders its body.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares a set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            source: the Jinja source.
            special_tokens: `bos_token`, `eos_token`, … → text, available to the template.

        Raises:
            ConfigError: the source is not valid Jinja.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"The chat template is not valid Jinja, line {error.lineno}: {error.message}."
            ) from None
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; special tokens are written out, so encode it without adding any.

        Args:
            messages: `{"role", "content", …}` objects of plain JSON values.
            add_generation_prompt: whether to open the assistant's turn at the end.
            variables: further template variables (`enable_thinking`, …); none of `RESERVED_VARIABLES`.

        Raises:
            InvalidRequest: a reserved variable, or a conversation that the template refuses or fails on.
        """
        reserved = sorted(RESERVED_VARIABLES & set(variables or ()))
        if reserved:
            raise InvalidRequest(
                f"'chat_template_kwargs' must not set {', '.join(map(repr, reserved))}.",
                param="chat_template_kwargs",
                code="invalid_value",
            )
        context = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise InvalidRequest(
                f"The model's chat template refuses this conversation: {error}.",
                param="messages",
                code="invalid_messages",
            ) from None


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escaping, which would change what the model reads."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(date_format: str) -> str:
    # Local time without a zone, as transformers gives the templates.
    return datetime.now().strftime(date_format)  # noqa: DTZ005
