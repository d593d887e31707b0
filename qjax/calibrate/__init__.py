"""A model over text, keeping what quantizers need to know of its weights."""

from qjax.calibrate.importance import importance as importance
