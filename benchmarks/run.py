"""All benchmarks of this folder, one after another, as processes of their own.

The comparison with llama.cpp is among them where the variable LLAMA_BENCH names its llama-bench.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

COMMANDS = [["startup.py"], ["decode.py"], ["kernels.py"], ["activations.py"]]
if peer := os.environ.get("LLAMA_BENCH"):
    COMMANDS.append(["vs_llamacpp.py", "--llama-bench", peer])

for name, *options in COMMANDS:
    print(f"\n## {name}\n", flush=True)
    subprocess.run([sys.executable, str(HERE / name), *options], check=True)
