"""Which optional frameworks are installed, and the marks of the tests that need one."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

# It exists for Python 3.12 alone, and holds transformers back, so `make test-newest` does without.
HAS_BRIDGE = find_spec("megatron") is not None and find_spec("megatron.bridge") is not None
# Most processors of images build on it; it is as large as the rest of what they need, and comes with no test extra.
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
needs_bridge = pytest.mark.skipif(not HAS_BRIDGE, reason="Megatron-Bridge is not installed")
