"""`plop-dist score` with Transformer Engine's linears multiplying in FP8, as a training run with FP8 would.

python -m tests.gpu.fp8 CONFIG [key=value ...]
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from transformer_engine.pytorch import fp8_autocast  # pyright: ignore[reportMissingImports]

    from plop_dist.cli import main

    sys.argv[:1] = ["plop-dist", "score"]
    with fp8_autocast(enabled=True):
        main()
