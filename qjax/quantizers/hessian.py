"""What GPTQ knows of a matrix' inputs: H = 2/n sum x x^T over n tokens, streamed in batches of any size.

Tokens wait in a buffer until a tile of `TILE` is full, and tiles are added up in their order: the same tokens give the
same bits however they were batched, in memory of in x in. Cross moments 2/n sum t x^T with what else is known of each
token are summed beside it.

Source: IST-DASLab/gptq's `add_batch`; its running mean is a sum here, divided once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Float32

from qjax.errors import QjaxError

TILE = 1024


@struct.dataclass
class Moments:
    """Sums over the tokens of all full tiles, and those that wait.

    Leaves (arrays):
      h: float32 [in, in], sum of x x^T.
      cross: float32 [extra, in], sum of t x^T; None where no t is looked at.
      x, t: float32 [2 * TILE, in or extra]: tokens that wait, zeros behind them.
      waiting, count: int32 [], tokens that wait, and all that were added.
    """

    h: Any
    cross: Any
    x: Any
    t: Any
    waiting: Any
    count: Any


def begin(columns: int, extra: int | None = None) -> Moments:
    """Of no tokens yet, of so many columns, and of so many numbers t for the cross moments."""
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    no, cross, t = jnp.int32(0), None, None
    if extra is not None:
        cross, t = zeros(extra, columns), zeros(2 * TILE, extra)
    return Moments(zeros(columns, columns), cross, zeros(2 * TILE, columns), t, no, no)


def add(moments: Moments, x: Float[Array, "*tokens in"], t: Float[Array, "*tokens extra"] | None = None) -> Moments:
    """The moments with a batch of tokens added; `moments` is donated: use the one returned."""
    x = x.reshape(-1, x.shape[-1])
    t = None if t is None else t.reshape(-1, t.shape[-1])
    for start in range(0, x.shape[0], TILE):
        count = min(TILE, x.shape[0] - start)
        moments = _push(moments, _piece(x, start, count), None if t is None else _piece(t, start, count), count)
    return moments


def _piece(x: Any, start: int, count: int) -> Any:
    # Always as large: one compiled program serves all batches.
    return jnp.pad(x[start : start + count].astype(jnp.float32), ((0, TILE - count), (0, 0)))


@partial(jax.jit, donate_argnums=0)
def _push(moments: Moments, x: Any, t: Any, count: Any) -> Moments:
    m = moments
    put = lambda buffer, new: None if new is None else lax.dynamic_update_slice(buffer, new, (m.waiting, 0))
    count = jnp.asarray(count, jnp.int32)
    held = Moments(m.h, m.cross, put(m.x, x), put(m.t, t), m.waiting + count, m.count + count)
    return lax.cond(held.waiting >= TILE, _flushed, lambda held: held, held)


def _flushed(m: Moments) -> Moments:
    rest = lambda buffer: None if buffer is None else jnp.concatenate([buffer[TILE:], jnp.zeros_like(buffer[TILE:])])
    h, cross = _sums(m)
    return Moments(h, cross, rest(m.x), rest(m.t), m.waiting - TILE, m.count)


def _sums(m: Moments) -> tuple[Any, Any]:
    """With the first tile of those that wait."""
    products = lambda a: jnp.matmul(a[:TILE].T, m.x[:TILE], precision=lax.Precision.HIGHEST)
    return m.h + products(m.x), None if m.cross is None else m.cross + products(m.t)


@jax.jit
def _means(m: Moments) -> tuple[Any, Any]:
    h, cross = _sums(m)
    share = 2 / m.count.astype(jnp.float32)
    return share * h, None if cross is None else share * cross


def finish(
    moments: Moments, name: str = "a matrix"
) -> tuple[Float32[Array, "in in"], Float32[Array, "extra in"] | None]:
    """H, and 2/n sum t x^T if there is a t.

    Args:
      name: of the weight, for errors.

    Raises:
      QjaxError: there were no tokens, or inputs that are not finite.
    """
    if not int(moments.count):
        raise QjaxError(f"{name}: no calibration tokens: GPTQ needs some")
    H, cross = _means(moments)
    if not bool(jnp.isfinite(jnp.diagonal(H)).all()) or (cross is not None and not bool(jnp.isfinite(cross).all())):
        raise QjaxError(f"{name}: its calibration inputs are not finite: the weights before it are damaged")
    return H, cross
