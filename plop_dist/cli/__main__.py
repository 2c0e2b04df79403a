"""`python -m plop_dist.cli`, and `python plop_dist/cli` in a checkout."""

from __future__ import annotations

from plop_dist.cli import main

main()
