"""Loads model folders, each as scoring does it, in a process that has a stranger's package of kernels.

python -m tests.backends.hf.foreign_code_case ROOT: prints JSON, folder -> [what was said, whether code ran]; a folder
whose name begins with "trusted-" is loaded with model.trust_remote_code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from plop_dist.backends.hf.load import load_model, load_tokenizer
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError


def main() -> None:
    root = Path(sys.argv[1])
    marker, found = root / "marker", {}
    for folder in sorted((root / "models").iterdir()):
        is_trusted = folder.name.startswith("trusted-")
        model = ModelConfig(name_or_path=str(folder), dtype="float32", trust_remote_code=is_trusted)
        said = "loaded"
        try:
            load_model(model)
            load_tokenizer(model)
        except ModelError as error:
            said = str(error)
        found[folder.name] = (said, marker.exists())
        if marker.exists():
            marker.rmdir()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
