"""qjax: open, make and run quantized LLMs with their weights still packed, as pure JAX functions.

model = qjax.load("tinyllama-1.1b.Q4_K_M.gguf")
for piece in model.generate("Once upon a time", max_tokens=64):
    print(piece, end="")
"""

from typing import TYPE_CHECKING, Any

from qjax.version import __version__

# Resolved on first use: `import qjax.formats.gguf` need not wait for all of JAX.
_PUBLIC = {
    "Model": "qjax.api",
    "convert": "qjax.api",
    "load": "qjax.api",
    "save": "qjax.api",
    "push_to_hub": "qjax.api",
    "Provenance": "qjax.formats.huggingface.card",
    "quantizer": "qjax.api",
    "RTN": "qjax.calibrate.recipes",
    "INT8": "qjax.calibrate.recipes",
    "GPTQ": "qjax.calibrate.recipes",
    "AWQ": "qjax.calibrate.recipes",
    "Learned": "qjax.calibrate.recipes",
    "SmoothQuant": "qjax.calibrate.recipes",
    "Calibration": "qjax.calibrate.data",
    "forward": "qjax.models",
    "init_cache": "qjax.models",
    "qmatmul": "qjax.kernels",
    "qtake": "qjax.kernels",
    "explain": "qjax.kernels",
    "memory": "qjax.arrays.memory",
    "partition": "qjax.arrays.partition",
    "perplexity": "qjax.evaluate.perplexity",
}
__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from qjax.api import Model as Model
    from qjax.api import convert as convert
    from qjax.api import load as load
    from qjax.api import push_to_hub as push_to_hub
    from qjax.api import quantizer as quantizer
    from qjax.api import save as save
    from qjax.arrays.memory import memory as memory
    from qjax.arrays.partition import partition as partition
    from qjax.calibrate.data import Calibration as Calibration
    from qjax.calibrate.recipes import AWQ as AWQ
    from qjax.calibrate.recipes import GPTQ as GPTQ
    from qjax.calibrate.recipes import INT8 as INT8
    from qjax.calibrate.recipes import RTN as RTN
    from qjax.calibrate.recipes import Learned as Learned
    from qjax.calibrate.recipes import SmoothQuant as SmoothQuant
    from qjax.evaluate.perplexity import perplexity as perplexity
    from qjax.formats.huggingface.card import Provenance as Provenance
    from qjax.kernels import explain as explain
    from qjax.kernels import qmatmul as qmatmul
    from qjax.kernels import qtake as qtake
    from qjax.models import forward as forward
    from qjax.models import init_cache as init_cache


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'qjax' has no attribute {name!r}")
