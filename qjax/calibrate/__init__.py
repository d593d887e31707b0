"""A model over text, keeping what quantizers need to know."""
