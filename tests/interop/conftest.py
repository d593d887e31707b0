"""Programs of the peers, run by a Python of their own: qjax's has no torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Test files are no package: what several of them use (`loading.py`) is found there.
sys.path.insert(0, str(Path(__file__).parent))

SCRIPTS = Path(__file__).parent / "peers"
Peer = Callable[..., str]


@pytest.fixture(scope="session")
def peer() -> Peer:
    """`peer(script, argument, ...)`: what a script of tests/interop/peers says; skipped without their Python."""
    python = os.environ.get("QJAX_PEERS")
    if not python:
        pytest.skip("no Python with llm-compressor, auto-round and auto-round-lib (set QJAX_PEERS to its path)")

    def run(script: str, *arguments: Any) -> str:
        # More threads than idle cores only wait for each other.
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
        command = [python, str(SCRIPTS / script), *map(str, arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
