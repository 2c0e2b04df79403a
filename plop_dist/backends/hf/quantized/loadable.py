"""Whether a quantised model can be loaded here and its weights read, found out before anything is loaded.

transformers' own quantisers say what they need; what quantises plain weights is tried on a model of one small layer,
because a missing kernel shows in no other way.
"""

from __future__ import annotations

import copy
import inspect
import re
from importlib.util import find_spec
from typing import Any

import torch

from plop_dist.backends.hf.dtype import weights_dtype
from plop_dist.backends.hf.silence import unheard
from plop_dist.config.schema import Config, ModelConfig
from plop_dist.errors import ModelError, first_line, suggest
from plop_dist.measure.weight import readable_methods
from plop_dist.registry import BACKENDS, load

_SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
# The packages of the extra `quantization`, by the kinds that need them.
_PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "compressed-tensors": "compressed_tensors",
             "quanto": "optimum"}  # fmt: skip
_OTHER = "use an unquantised checkpoint, or a kind of quantisation that this machine can run"


# How checkpoints of some kinds are loaded: unpacked, as compressed-tensors' first forward pass would do it, or
# dequantised, because MXFP4's kernels hold experts in a form that nothing here reads.
_LOADED_AS = {"compressed-tensors": {"run_compressed": False}, "mxfp4": {"dequantize": True}}


def loading_options(model: ModelConfig, hf_config: Any) -> dict[str, Any]:
    """Return what from_pretrained is to be told of the quantisation: nothing for a checkpoint that says it all."""
    own = _own(hf_config)
    kind = None if own is None else own.get("quant_method")
    asked = {**(model.quantization or {}), **_LOADED_AS.get(str(kind), {})}
    if not asked:
        return {}
    return {"quantization_config": quantization_config({"quant_method": kind, **asked})}


def is_mxfp4(hf_config: Any) -> bool:
    """Tell whether a checkpoint's experts are stored as MXFP4."""
    own = _own(hf_config)
    return own is not None and own.get("quant_method") == "mxfp4"


def _own(hf_config: Any) -> dict[str, Any] | None:
    own = getattr(hf_config, "quantization_config", None)
    return own if own is None or isinstance(own, dict) else own.to_dict()


def wanted_config(model: ModelConfig, hf_config: Any) -> dict[str, Any] | None:
    """Return the quantisation in which the model comes or is to be loaded, as a mapping; None: none. Raises ModelError.

    A checkpoint that is quantised is what it is: model.quantization may only say how it is loaded (dequantize: true).
    """
    own, asked = _own(hf_config), model.quantization
    if own is None:
        return asked
    kind = own.get("quant_method")
    if asked is None:
        return {**own, **_LOADED_AS.get(str(kind), {})}
    if asked["quant_method"] != kind or not set(asked) <= {"quant_method", "dequantize"}:
        raise ModelError(
            f"model.quantization is {asked['quant_method']}, but model.name_or_path '{model.name_or_path}' is "
            f"quantised already, by {kind}; leave model.quantization out, or point model.name_or_path at the "
            "unquantised model."
        )
    return {**own, **asked, **_LOADED_AS.get(str(kind), {})}


def check_quantized(config: Config, hf_config: Any) -> None:
    """Raise LayoutError or ModelError for quantised weights that this layout, or this machine, does not take. Local."""
    wanted = wanted_config(config.model, hf_config)
    if wanted is not None:
        where = f"The quantisation of model.name_or_path '{config.model.name_or_path}'"
        load(BACKENDS, config.parallel.backend).check_quantized(config, where, str(wanted.get("quant_method")))
    check_loadable(config.model, hf_config)


def quantization_config(asked: dict[str, Any]) -> Any:
    """Return model.quantization as transformers' object. Raises ModelError for a key that it would pass over."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    found: Any = AutoQuantizationConfig.from_dict(copy.deepcopy(asked))
    known = {"quant_method", *inspect.signature(type(found).__init__).parameters, *found.to_dict()}
    for key in asked:
        if key not in known:
            raise ModelError(f"model.quantization: '{key}' is no key of {type(found).__name__}. {suggest(key, known)}")
    return found


def check_loadable(model: ModelConfig, hf_config: Any) -> None:
    """Raise ModelError, naming the kind, for a quantisation that cannot be loaded here or whose weights are not read.

    Local; reads no weights.
    """
    wanted = wanted_config(model, hf_config)
    if wanted is None:
        return
    kind = str(wanted.get("quant_method"))
    is_own = getattr(hf_config, "quantization_config", None) is not None
    where = (
        f"model.name_or_path '{model.name_or_path}' is quantised by {kind}" if is_own else f"model.quantization: {kind}"
    )
    unreadable = ModelError(
        f"{where}, whose weights nothing here can read; use a checkpoint in float32, bfloat16 or float16, or quantised "
        f"by {', '.join(_known())}."
    )
    try:
        is_dense = _try(wanted, model, hf_config, is_own=is_own)
    except ModelError:
        raise
    except Exception as error:  # transformers' quantisers and their packages raise a dozen unrelated kinds
        if kind not in _known():
            raise unreadable from None
        is_missing = kind in _PACKAGES and find_spec(_PACKAGES[kind]) is None
        remedy = f": pip install 'plop-dist[quantization]', or {_OTHER}" if is_missing else f"; {_OTHER}"
        raise ModelError(f"{where}, which cannot be loaded here ({_said(error)}){remedy}.") from None
    if kind not in readable_methods() and not is_dense:
        raise unreadable


def _known() -> list[str]:
    return sorted({*readable_methods(), *_LOADED_AS})


def _try(wanted: dict[str, Any], model: ModelConfig, hf_config: Any, *, is_own: bool) -> bool:
    """Let transformers check what it needs; where it can, quantise, load and run a model of one layer.

    Returns whether it dequantises such weights as it loads them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    class OneLayer(LlamaForCausalLM):
        """Says why its weights could not be quantised, which transformers only logs."""

        def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
            if loading_info.conversion_errors:
                text = next(iter(loading_info.conversion_errors.values()))
                loading_info.conversion_errors.clear()  # or transformers raises an error of its own in place of this
                raise RuntimeError(next(iter(re.findall(r"^\w+(?:Error|Exception): .*", text, re.MULTILINE)), text))
            super()._adjust_missing_and_unexpected_keys(loading_info)

    if not is_own:
        quantization_config(wanted)
    quantizer: Any = AutoHfQuantizer.from_config(copy.deepcopy(wanted), pre_quantized=is_own)
    dtype = weights_dtype(model, hf_config)
    with unheard():
        quantizer.validate_environment(dtype=dtype, device_map=None, weights_only=True)
    is_dense = bool(getattr(quantizer.quantization_config, "dequantize", False))
    if is_dense or (is_own and not _quantises_on_load(quantizer)):
        return is_dense
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with unheard(), torch.random.fork_rng(devices=[]), torch.no_grad():
        small: Any = OneLayer
        plain: Any = LlamaForCausalLM(LlamaConfig(**_SMALL))
        loaded = small.from_pretrained(
            None,
            config=LlamaConfig(**_SMALL),
            state_dict=plain.to(dtype).state_dict(),
            dtype=dtype,
            quantization_config=quantization_config(wanted),
        )
        loaded.to(device).eval()(input_ids=torch.ones(1, 4, dtype=torch.int64, device=device))
    return False


def _said(error: Exception) -> str:
    text = first_line(error)
    return text if re.match(r"\w+(Error|Exception): ", text) else f"{type(error).__name__}: {text}"


def _quantises_on_load(quantizer: Any) -> bool:
    """Tell whether the same configuration also quantises plain weights."""
    try:
        type(quantizer)(copy.deepcopy(quantizer.quantization_config), pre_quantized=False)
    except Exception:
        return False
    return True
