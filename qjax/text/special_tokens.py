"""Which tokens end a generation, and which types llama.cpp corrects, by the tokens' text.

GGUF files seldom name all the tokens that end a turn, and converters mistype some. llama.cpp settles both by
lists of well-known texts (`llama_vocab::impl::load` in src/llama-vocab.cpp); so do we.
"""

from collections.abc import Mapping
from enum import IntEnum


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as in gguf.TokenType."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
"""Tokens of these texts end a generation; whatever the file says, they are control tokens."""

_FILL_IN_MIDDLE = {
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_FILL_IN_MIDDLE_ENDS = ("fim_pad", "fim_rep", "fim_sep")
_HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def settle_special_tokens(token_ids: Mapping[str, int], types: list[int], named: Mapping[str, int]) -> frozenset[int]:
    """Correct `types` in place, and find the tokens that end a generation.

    Args:
        token_ids: token text to id.
        types: a TokenType for each id; corrected in place.
        named: the ids that the metadata name, among the keys "eos", "eot", "eom", "fim_pre", "fim_suf",
            "fim_mid", "fim_pad", "fim_rep", "fim_sep".

    Returns:
        The ids after any of which a generation is over.
    """
    ends = {named[role] for role in ("eos", "eot", "eom", *_FILL_IN_MIDDLE_ENDS) if role in named}
    for role, texts in _FILL_IN_MIDDLE.items():
        found = next((token_ids[text] for text in texts if text in token_ids), None)
        if role in named or found is None:
            continue
        types[found] = TokenType.CONTROL
        if role in _FILL_IN_MIDDLE_ENDS:
            ends.add(found)
    for text in END_TEXTS:
        if text in token_ids:
            types[token_ids[text]] = TokenType.CONTROL
            ends.add(token_ids[text])
    for text in _HARMONY_TEXTS:
        if text in token_ids:
            types[token_ids[text]] = TokenType.USER_DEFINED

    present = {text for text in (*END_TEXTS, "<|plamo:eos|>") if token_ids.get(text) in ends}
    # In gpt-oss and solar-open "<|end|>" closes a message, not the turn.
    if "<|end|>" in present and ({"<|return|>", "<|call|>"} <= present or _solar_open(present)):
        ends.discard(token_ids["<|end|>"])
        types[token_ids["<|end|>"]] = TokenType.USER_DEFINED
    # In gemma4 and plamo "</s>" is text.
    if "</s>" in present and present & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.discard(token_ids["</s>"])
        types[token_ids["</s>"]] = TokenType.NORMAL
    return frozenset(ends)


def _solar_open(present: set[str]) -> bool:
    return "<|flush|>" in present and bool(present & {"<|call|>", "<|calls|>"})
