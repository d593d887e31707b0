"""Ends of generation and types, told by the tokens' texts as llama.cpp tells them."""

from qjax.text.special_tokens import TokenType, settle_special_tokens

CONTROL, NORMAL, USER_DEFINED = TokenType.CONTROL, TokenType.NORMAL, TokenType.USER_DEFINED


def settled(tokens: list[str], **named: int) -> tuple[set[str], dict[str, int]]:
    types: list[int] = [NORMAL] * len(tokens)
    ends = settle_special_tokens({text: i for i, text in enumerate(tokens)}, types, named)
    return {tokens[i] for i in ends}, dict(zip(tokens, types, strict=True))


def test_well_known_ends_are_control_tokens_whatever_the_file_says() -> None:
    ends, types = settled(["a", "<|im_end|>", "<|eot_id|>", "stop"], eos=3)
    assert ends == {"<|im_end|>", "<|eot_id|>", "stop"}
    assert types == {"a": NORMAL, "<|im_end|>": CONTROL, "<|eot_id|>": CONTROL, "stop": NORMAL}


def test_fill_in_the_middle_tokens() -> None:
    ends, types = settled(["<|fim_prefix|>", "<|fim_pad|>", "<|file_sep|>", "mine"], fim_sep=3)
    assert ends == {"<|fim_pad|>", "mine"}
    assert types["<|fim_prefix|>"] == types["<|fim_pad|>"] == CONTROL
    assert types["<|file_sep|>"] == NORMAL


def test_in_gpt_oss_end_closes_a_message_only() -> None:
    ends, types = settled(["<|end|>", "<|return|>", "<|call|>", "<|channel|>"])
    assert ends == {"<|return|>", "<|call|>"}
    assert types["<|end|>"] == types["<|channel|>"] == USER_DEFINED
    assert settled(["<|end|>", "<|return|>"])[0] == {"<|end|>", "<|return|>"}


def test_in_gemma_4_the_s_tag_is_text() -> None:
    ends, types = settled(["</s>", "<|tool_response>", "<eos>"])
    assert ends == {"<|tool_response>", "<eos>"}
    assert types["</s>"] == NORMAL
