"""Every test runs under the strictest rules JAX has, with shapes and dtypes of signatures checked."""

import os
import shutil

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# jaxtyping annotations of qjax are enforced here, and only here, by beartype.
hook = install_import_hook("qjax", "beartype.beartype")

settings.register_profile("qjax", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("qjax")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def interop() -> Path:
    """Folder of files made by other programs; tests that need it are skipped without it."""
    path = Path(os.environ.get("QJAX_INTEROP", SHARED / "interop"))
    if not path.is_dir():
        pytest.skip(f"no folder of other programs' files at {path} (set QJAX_INTEROP)")
    return path


@pytest.fixture(scope="session")
def vocab_folder() -> Path:
    """Folder of llama.cpp's `ggml-vocab-*.gguf` with their `.inp` and `.out` vectors."""
    path = Path(os.environ.get("QJAX_VOCAB", SHARED / "data" / "vocab"))
    if not path.is_dir():
        pytest.skip(f"no folder of vocabularies at {path} (set QJAX_VOCAB)")
    return path


@pytest.fixture(scope="session")
def llama_quantize() -> str:
    """llama.cpp's program; tests that need it are skipped without it."""
    program = shutil.which(os.environ.get("LLAMA_QUANTIZE", "llama-quantize"))
    if program is None:
        pytest.skip("no llama-quantize on the path (set LLAMA_QUANTIZE)")
    return program
