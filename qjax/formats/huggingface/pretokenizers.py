"""Which `tokenizer.ggml.pre` a tokenizer.json stands for.

llama.cpp's converter knows models by the ids that they make of one text, so it knows those vocabularies alone that it
was told of. Here the pre-tokenizer's own steps are looked at: they say how text is cut, whatever the vocabulary.
"""

from typing import Any

from qjax.errors import UnsupportedError
from qjax.formats.gguf.cursor import shown

_DIGIT, _GPT2 = "each digit", "GPT-2's regex"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_LLAMA3 = (rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_BLANKS}",)
_QWEN2 = (rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}|{_SYMBOLS}[\r\n]*|{_BLANKS}",)
_TEKKEN = (rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_BLANKS}",)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", _DIGIT)

# (steps, ignore_merges) -> name.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
    # llama.cpp takes whole words in both cases.
    (_TEKKEN, True): "tekken",
    (_TEKKEN, False): "tekken",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_GPT2,), False): "gpt-2",
    (_DEEPSEEK_CODER, False): "deepseek-coder",
}


def pre_tokenizer_name(tokenizer: dict[str, Any], where: str) -> str:
    """The name for a byte-level BPE tokenizer; `where` opens the error's message.

    Args:
        tokenizer: the object of a tokenizer.json.

    Raises:
        UnsupportedError: it cuts text as none of the known names does; says how.
    """
    steps = tuple(step for part in _parts(tokenizer.get("pre_tokenizer")) for step in _step(part))
    model = tokenizer.get("model")
    ignore_merges = isinstance(model, dict) and model.get("ignore_merges") is True
    name = _NAMES.get((steps, ignore_merges))
    if name is None:
        known = ", ".join(dict.fromkeys(_NAMES.values()))
        found = ", then ".join(map(shown, steps)) or "nothing"
        raise UnsupportedError(
            f"{where}: the pre-tokenizer (it cuts by {found}; ignore_merges {ignore_merges}) is none that qjax has a "
            f"tokenizer.ggml.pre for; known are {known}"
        )
    return name


def pre_tokenizer_json(name: str) -> tuple[dict[str, Any], bool] | None:
    """The `pre_tokenizer` of a tokenizer.json that cuts text so, and its model's ignore_merges; None if not known."""
    found = next((key for key, known in _NAMES.items() if known == name), None)
    if found is None:
        return None
    steps, ignore_merges = found
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts: list[dict[str, Any]] = []
    for step in steps:
        if step == _DIGIT:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step == _GPT2:
            parts.append({**byte_level, "use_regex": True})
        else:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    if _GPT2 not in steps:
        parts.append({**byte_level, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}, ignore_merges


def _parts(pre_tokenizer: Any) -> list[Any]:
    """The steps, one after another, out of nested sequences."""
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        inner = pre_tokenizer.get("pretokenizers")
        return [part for step in inner for part in _parts(step)] if isinstance(inner, list) else [inner]
    return [pre_tokenizer]


def _step(part: Any) -> tuple[str, ...]:
    """How one step cuts text, in words that `_NAMES` knows; what it does not know, as it stands."""
    match part:
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} if not part.get("invert"):
            return (regex,)
        # What does not match is dropped: nothing, for the patterns that are known.
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return (regex,)
        case {"type": "Digits", "individual_digits": True}:
            return (_DIGIT,)
        case {"type": "ByteLevel"} if not part.get("add_prefix_space"):
            return (_GPT2,) if part.get("use_regex", True) else ()
    return (str(part),)
