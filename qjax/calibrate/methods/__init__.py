"""Methods that quantize a block: frozen dataclasses of their options (`calibrate.blocks.Method`)."""
