"""From prompts to tokens: sampling strategies, prefill and decode loops."""

from qjax.generate.engine import decode as decode
from qjax.generate.engine import generate_ids as generate_ids
from qjax.generate.engine import prefill as prefill
from qjax.generate.engine import slots_for as slots_for
from qjax.generate.many import generate_many_ids as generate_many_ids
from qjax.generate.sampling import Greedy as Greedy
from qjax.generate.sampling import Sample as Sample
from qjax.generate.sampling import make_sampler as make_sampler
from qjax.generate.text import Piece as Piece
from qjax.generate.text import stream_text as stream_text
