"""What a model is worth and what it costs: perplexity, memory, speed."""

from qjax.evaluate.perplexity import Perplexity as Perplexity
from qjax.evaluate.perplexity import perplexity as perplexity
