"""Chat templates: a conversation in the format that a model was trained on."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import QjaxError, QjaxWarning
from qjax.text.chat_sandbox import run_template
from qjax.text.tokenizer import Tokenizer


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The prompt that a chat template makes of messages.

    Args:
        template: jinja source, as in `tokenizer.chat_template`.
        messages: what was said, first to last: {"role": "user", "content": "..."}.
        bos_token, eos_token: the texts of these tokens, for templates that write them.
        add_generation_prompt: end with the start of the assistant's turn.
        extra: more variables of the template (tools, enable_thinking, ...).

    Raises:
        QjaxError: the template is wrong, refuses the messages, or wants too much.
    """
    variables = {
        "messages": messages,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        **extra,
    }
    try:
        return run_template(template, variables)
    # A template may raise whatever Python raises: wrong types, missing keys, endless recursion.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QjaxError(f"chat template: {reason}") from error


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
    """The prompt of messages in the model's own format.

    A model without template gets lines of `role: content`, with a QjaxWarning, and `assistant:` at the end.
    Encode the prompt with `parse_special=True`, and with BOS only where it does not start with it
    (`encode_chat` does).

    Raises:
        QjaxError: the template is wrong, or refuses the messages.
    """
    if tokenizer.chat_template is not None:
        return render_chat(
            tokenizer.chat_template,
            messages,
            bos_token=_text(tokenizer, tokenizer.bos_id),
            eos_token=_text(tokenizer, tokenizer.eos_id),
            **extra,
        )
    warnings.warn("the model has no chat template: using lines of 'role: content'", QjaxWarning, stacklevel=2)
    lines = [f"{message.get('role', 'user')}: {message.get('content', '')}\n" for message in messages]
    return "".join(lines) + "assistant:"


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **extra: Any) -> list[int]:
    """The token ids of messages in the model's own format, with one BOS if the model wants it."""
    prompt = chat_prompt(tokenizer, messages, **extra)
    bos = _text(tokenizer, tokenizer.bos_id)
    add_bos = tokenizer.add_bos and not (bos and prompt.startswith(bos))
    return tokenizer.encode(prompt, add_bos=add_bos, parse_special=True)


def _text(tokenizer: Tokenizer, i: int | None) -> str:
    return "" if i is None else tokenizer.vocabulary.tokens[i]
