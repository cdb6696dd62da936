"""What the server says when it begins."""

from weft_server.serving import vocabulary_warning


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_warned_of() -> None:
    warning = vocabulary_warning(1003, 1000)
    assert warning is not None
    assert "1003" in warning
    assert "1000" in warning
    assert vocabulary_warning(1000, 1000) is None
    assert vocabulary_warning(900, 1000) is None
