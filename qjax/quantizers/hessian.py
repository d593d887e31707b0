"""What GPTQ knows of a matrix' inputs: H = 2/n sum x x^T over n tokens, streamed in batches of any size.

Tokens wait in a buffer until a tile of `TILE` is full, and tiles are added up in their order: the same tokens give the
same bits however they were batched, in memory of in x in. Cross moments 2/n sum t x^T with what else is known of each
token are summed beside it.

Source: IST-DASLab/gptq's `add_batch`; its running mean is a sum here, divided once. Beside it stands how H is made
positive definite, and factored.
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
# Of the damping where Cholesky fails, until it is so many times the mean of H's diagonal.
_GROWTH, _MOST = 10.0, 1e6


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
    # Each an array of its own: all are donated.
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    none = lambda: jnp.zeros((), jnp.int32)
    cross, t = (None, None) if extra is None else (zeros(extra, columns), zeros(2 * TILE, extra))
    return Moments(zeros(columns, columns), cross, zeros(2 * TILE, columns), t, none(), none())


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


def plus_diagonal(H: Float32[Array, "in in"], d: Float32[Array, "*in"]) -> Float32[Array, "in in"]:
    """H + diag(d), of one number for all or one a column."""
    # By a mask: XLA:CPU scatters number by number, with a copy of H for each.
    at = jnp.arange(H.shape[0])
    return jnp.where(at[:, None] == at[None], H + jnp.broadcast_to(d, H.shape[:1])[None], H)


def alive(H: Float32[Array, "in in"]) -> Float32[Array, "in in"]:
    """H with the mean of the rest of its diagonal for columns that no token moves (dead), which leaves the mean."""
    diag = jnp.diagonal(H)
    mean = jnp.sum(diag) / jnp.maximum(jnp.sum(diag != 0), 1).astype(jnp.float32)
    return plus_diagonal(H, jnp.where(diag == 0, jnp.where(mean == 0, jnp.float32(1), mean), jnp.float32(0)))


def factor(H: Float32[Array, "in in"], percdamp: float) -> tuple[Float32[Array, "in in"], Float32[Array, ""]]:
    """R, upper, with R R^T = H + damp mean(diag(H)) I, and the damp that it took.

    That is `percdamp`, and ten times more as often as Cholesky fails.
    """
    mean = jnp.mean(jnp.diagonal(H))
    # Cholesky gives lower factors: of the matrix in reverse, an upper one in reverse.
    reverse = H[::-1, ::-1]

    def attempt(state: Any) -> Any:
        following, _, _ = state
        L = lax.linalg.cholesky(plus_diagonal(reverse, following * mean), symmetrize_input=False)
        return jnp.maximum(following * jnp.float32(_GROWTH), jnp.float32(1e-6)), following, L

    failed = lambda state: jnp.isnan(state[2][0, 0]) & (state[0] < _MOST)
    first = jnp.float32(percdamp), jnp.float32(percdamp), jnp.full_like(H, jnp.nan)
    _, damp, L = lax.while_loop(failed, attempt, first)
    return L[::-1, ::-1], damp
