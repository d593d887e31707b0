"""Conversations in the formats of models."""

from collections.abc import Callable
from typing import Any

import pytest

from qjax.errors import QjaxError, QjaxWarning
from qjax.text.chat import chat_prompt, encode_chat, render_chat
from qjax.text.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' + message.content | trim + '<|im_end|>\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi {{ bos_token }}"}]
RENDERED = (
    "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ bos_token }}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def test_a_template_is_rendered() -> None:
    assert render_chat(CHATML, MESSAGES, bos_token="<s>", eos_token="</s>") == RENDERED
    short = render_chat(CHATML, MESSAGES, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
    assert short == RENDERED.removesuffix("<|im_start|>assistant\n")
    assert render_chat("{{ tools[0] }}", [], tools=["x"]) == "x"


def test_errors_are_one_line() -> None:
    for template in ("{% if %}", "{{ raise_exception('roles must\nalternate') }}", "{{ none.x.y }}", "{{ 1/0 }}"):
        with pytest.raises(QjaxError, match=r"^chat template: [^\n]+$"):
            render_chat(template, MESSAGES)


def test_the_prompt_of_a_model(spm: Callable[..., dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_gguf(spm({"\u2581": -1.0}) | {"tokenizer.chat_template": CHATML})
    assert chat_prompt(tokenizer, MESSAGES) == RENDERED
    assert encode_chat(tokenizer, MESSAGES)[:2] == [1, tokenizer.encode("<")[0]]
    assert encode_chat(tokenizer, MESSAGES).count(1) == 1


def test_bos_is_put_first_where_the_template_does_not(spm: Callable[..., dict[str, Any]]) -> None:
    metadata = spm({"\u2581": -1.0}) | {"tokenizer.chat_template": "hello"}
    assert encode_chat(Tokenizer.from_gguf(metadata), [])[0] == 1
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert encode_chat(Tokenizer.from_gguf(metadata), [])[0] != 1


def test_a_model_without_template_gets_plain_lines(spm: Callable[..., dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_gguf(spm({"\u2581": -1.0}))
    with pytest.warns(QjaxWarning, match="no chat template"):
        assert chat_prompt(tokenizer, MESSAGES[:1]) == "system: Be brief. \nassistant:"
