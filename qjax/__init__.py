"""qjax: open, make and run quantized LLMs with their weights still packed, as pure JAX functions."""
