"""Hugging Face folders (config.json, safetensors, tokenizer files), seen as if llama.cpp had converted them."""
