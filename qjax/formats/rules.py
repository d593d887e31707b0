"""Which scheme each matrix of a model gets: one ordered list of rules, the first that fits decides.

A rule is a text REGEX=SCHEME, such as "ffn_down=w8", "layers\\.0\\.=keep" or "v_proj=w4g32-asym". The expression is
searched, in any case, in the matrix' GGUF name ("blk.0.attn_v.weight") and in the name of its Hugging Face module
("model.layers.0.self_attn.v_proj"). What no rule fits gets the scheme of all; the embedding and the output matrix are
kept unless a rule names them, as the makers of such checkpoints do.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qjax.arrays.scheme import Scheme, parse_scheme
from qjax.errors import QjaxError, QjaxWarning
from qjax.formats.gguf.mixes import pattern
from qjax.formats.huggingface.weights import module_name

KEEP = "keep"
ENDS = ("token_embd.weight", "output.weight")


class Rule(NamedTuple):
    """expression: see the module. scheme: None to keep the matrix as it is."""

    expression: re.Pattern[str]
    scheme: Scheme | None

    def fits(self, name: str) -> bool:
        """Whether the expression is found in one of the names of a matrix, given its GGUF name."""
        return any(self.expression.search(known) for known in (name, module_name(name)) if known is not None)

    def __str__(self) -> str:
        return f"{self.expression.pattern}={self.scheme or KEEP}"


def parse_rule(text: str) -> Rule:
    """The rule of a text.

    Raises:
      QjaxError: no such form, a broken expression, or an unknown scheme.
    """
    expression, sign, scheme = text.rpartition("=")
    if not sign or not expression:
        raise QjaxError(f"expected REGEX=SCHEME such as 'ffn_down=w8' or 'attn_v=keep', got {text!r}")
    try:
        return Rule(pattern(expression), None if scheme == KEEP else parse_scheme(scheme))
    except QjaxError as error:
        raise QjaxError(f"in {text!r}: {error}") from None


def schemes_by(
    shapes: Mapping[str, tuple[int, int]], scheme: Scheme | None, rules: Sequence[Rule]
) -> dict[str, Scheme]:
    """The scheme of each matrix that gets one, by its GGUF name; warns of rules that decided over none.

    Args:
      shapes: [out, in] of the matrices, by their GGUF names.
      scheme: of those in layers that no rule fits; None to keep them.

    Raises:
      QjaxError: rows that are no whole groups; names the matrix.
    """
    used: set[int] = set()
    found = {}
    for name, (_, columns) in shapes.items():
        at = next((i for i, rule in enumerate(rules) if rule.fits(name)), None)
        if at is None:
            wanted = None if name in ENDS else scheme
        else:
            used.add(at)
            wanted = rules[at].scheme
        if wanted is None:
            continue
        try:
            wanted.groups(columns)
        except QjaxError as error:
            raise QjaxError(
                f"{name}: {error}: give it another scheme by a rule such as '{_literally(name)}=w{wanted.bits}' (a "
                f"scale a row) or '{_literally(name)}=keep', or another group size"
            ) from None
        found[name] = wanted
    for at, rule in enumerate(rules):
        if at not in used:
            fitting = any(rule.fits(name) for name in shapes)
            why = "rules before it decide over all that it fits" if fitting else "found in the name of no matrix"
            warnings.warn(f"rule {str(rule)!r} is not used: {why}", QjaxWarning, stacklevel=2)
    return found


def _literally(name: str) -> str:
    """An expression for this matrix and those of its kind in all layers."""
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)
