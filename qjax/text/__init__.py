"""Text in and out of models: tokenizers, chat templates, streaming. Imports nothing of qjax but its errors."""
