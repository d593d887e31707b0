"""All benchmarks of this folder, one after another, as processes of their own."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

for name in ("startup.py", "decode.py", "kernels.py"):
    print(f"\n## {name}\n", flush=True)
    subprocess.run([sys.executable, str(HERE / name)], check=True)
