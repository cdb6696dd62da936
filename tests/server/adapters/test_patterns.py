"""The bounded regular-expression matcher, with Python's `re` as the oracle."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_server.adapters.config import LoraConfig
from weft_server.adapters.errors import AdapterError
from weft_server.adapters.paths import MODULES, module_path
from weft_server.adapters.patterns import MAX_PATTERN_CHARS, PathPattern, PatternError, StepBudget

ATOMS = st.sampled_from(
    [
        *(
            "a",
            "b",
            ".",
            r"\.",
            "[ab]",
            "[^a]",
            "[a-c.]",
            r"[\]b]",
            "[]a]",
            r"\d",
            r"\w",
            r"\W",
            "_",
            "1",
            "{",
        ),
        *("^", "$", r"\b", r"\B", r"\A", r"\Z", "(?=b)", "(?!a)", "(?P<x>ab)", "-"),
    ]
)
QUANTIFIERS = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{0,3}?"])


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: f"({'|'.join(options)})"),
        st.tuples(inner, QUANTIFIERS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda text: f"(?={text})"),
        st.just("|"),
    )


PATTERNS = st.recursive(ATOMS, _grow, max_leaves=8).filter(lambda text: text.count("(?P<x>") < 2)
PATHS = st.text("ab1._-{", min_size=1, max_size=7)


def _pattern(text: str, max_steps: int = 200_000) -> PathPattern:
    return PathPattern(text, StepBudget(max_steps))


@settings(max_examples=600, deadline=None)
@given(PATTERNS, PATHS)
def test_a_pattern_matches_what_re_matches(text, path):
    pattern = _pattern(text)
    assert pattern.matches_all(path) == (re.fullmatch(text, path) is not None)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, PATHS)
def test_a_pattern_key_matches_the_tail_as_peft_matches_it(text, path):
    assert _pattern(text).matches_tail(path) == (re.match(rf"(.*\.)?({text})$", path) is not None)


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r"^(?!.*(?:visual|vision)).*(?:q|k|v|o|gate|up|down)_proj$",
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
        r"model.layers.([0-9]|[1][0-9]).(self_attn|mlp).*proj",
    ],
)
def test_patterns_seen_in_the_wild_select_what_re_selects(text):
    pattern = _pattern(text)
    for layer in (0, 7, 19, 31):
        for module in MODULES:
            path = module_path(layer, module)
            assert pattern.matches_all(path) == (re.fullmatch(text, path) is not None), path


@pytest.mark.parametrize(
    "text",
    [
        "(a*)*c",
        "(((a|b|.)*)*)*\\Z_",
        "(.|.)" * 60,
        "(?:.*.*)*=",
        "((((.*)+)+)+)+=",
        "(.?){4000}=",
        "(?:a|aa|.){,60000}=",
        "(?=(.*)*=).*",
    ],
)
def test_patterns_that_would_run_for_years_are_decided_or_refused_at_once(text):
    path = module_path(0, "q_proj")
    try:
        assert _pattern(text).matches_all(path) is False
    except PatternError as error:
        assert "steps" in str(error)  # noqa: PT017 (either outcome is right; hanging is not)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("(", "not a regular expression"),
        ("*a", "not a regular expression"),
        ("[a", "not a regular expression"),
        (r"(a)\1", r"\\1"),
        ("(?P<x>a)(?P=x)", "P="),
        ("(?<=a)b", r"\?<="),
        ("(?<!a)b", r"\?<!"),
        ("(?>a+)b", r"\?>"),
        ("a++b", "possessive"),
        ("(?i)a", r"\?i"),
        ("(a)?(?(1)b|c)", r"\?\("),
        (r"\x41", r"\\x"),
        ("é", "ASCII"),
        ("a" * (MAX_PATTERN_CHARS + 1), "characters long"),
        ("(" * 60 + "a" + ")" * 60, "deeper"),
        ("(" * 2000 + "a" + ")" * 2000, "regular expression|deeper"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(text, named):
    with pytest.raises(PatternError, match=named):
        _pattern(text)


def test_a_pattern_too_expensive_to_match_is_refused_with_its_key():
    config = LoraConfig(8, 8.0, target_modules="((((((.*)*.*)*.*)*.*)*.*)*.*)*" * 20 + "=")
    with pytest.raises(AdapterError, match="target_modules") as caught:
        config.resolve(2, MODULES)
    assert caught.value.param == "target_modules"


def test_matching_gives_way_to_other_threads_again_and_again():
    pauses = []
    budget = StepBudget(100_000, pause=pauses.append)

    def match_for_ever():
        while True:
            PathPattern("(a|b|.)*(.|m)*(.|x)*z", budget).matches_all(module_path(0, "q_proj"))

    with pytest.raises(PatternError, match="100000 steps"):
        match_for_ever()
    assert len(pauses) >= 40
    assert all(0 < seconds <= 1e-3 for seconds in pauses)


@pytest.mark.parametrize("num_layers", [32, 126])
def test_patterns_of_real_trainers_stay_within_the_budget_on_the_largest_models(num_layers):
    config = LoraConfig(
        8,
        8.0,
        target_modules=r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
    )
    assert len(config.resolve(num_layers, MODULES)) == num_layers * len(MODULES)
