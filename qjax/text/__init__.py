"""Text in and out of models: tokenizers, chat templates, streaming. Imports nothing of qjax but its errors."""

from qjax.text.chat import chat_prompt as chat_prompt
from qjax.text.chat import encode_chat as encode_chat
from qjax.text.chat import render_chat as render_chat
from qjax.text.streaming import StopStrings as StopStrings
from qjax.text.streaming import StreamDecoder as StreamDecoder
from qjax.text.tokenizer import Tokenizer as Tokenizer
