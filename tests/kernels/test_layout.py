"""The layout that a weight gets when it is loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.arrays import LaneBlockedArray
from qjax.formats.gguf import from_blocks
from qjax.kernels import layout, native


@pytest.mark.skipif(not native.available(), reason="no native kernels to bring codes into lanes")
def test_lanes_where_the_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    q4_0 = from_blocks("Q4_0", np.zeros((16, 18), np.uint8), np.asarray)
    raw = from_blocks("IQ2_XS", np.zeros((16, 74), np.uint8), np.asarray)
    floats = np.zeros((16, 32), np.float32)
    monkeypatch.setattr(native, "available", lambda: True)
    assert isinstance(layout.lay_out("w", q4_0), LaneBlockedArray)
    # A dtype of scales that the kernels do not read would be brought back from lanes in each product.
    other_scales = q4_0.replace(scale=q4_0.scale.astype(jnp.float8_e5m2))
    for array in (raw, floats, other_scales):
        assert layout.lay_out("w", array) is array
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(jax, "default_backend", lambda: "gpu")
        assert layout.lay_out("w", q4_0) is q4_0
    monkeypatch.setattr(native, "available", lambda: False)
    assert layout.lay_out("w", q4_0) is q4_0
