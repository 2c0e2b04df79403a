"""How a Hugging Face model, its configuration and its tokenizer are read, with one clear error for each way to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from plop_dist.backends.hf.built_whole import unpartitioned
from plop_dist.backends.hf.dtype import weights_dtype
from plop_dist.backends.hf.foreign_code import check_foreign_code
from plop_dist.backends.hf.linears import find_linears
from plop_dist.backends.hf.memory import freed_at_once
from plop_dist.backends.hf.model import quantization_of
from plop_dist.backends.hf.own_class import build, own_class
from plop_dist.backends.hf.placing import check_placed, is_placed, placing_options, plan_placing
from plop_dist.backends.hf.quantization_patterns import check_quantization_patterns
from plop_dist.backends.hf.quantized.bitsandbytes import keep_order_of_rows
from plop_dist.backends.hf.quantized.loadable import check_loadable, is_mxfp4, loading_options
from plop_dist.checkpoints.builtin import resolve
from plop_dist.checkpoints.deepspeed import find_weights
from plop_dist.checkpoints.special_tokens import check_special_tokens
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import MissingExtraError, ModelError, PlopError, as_cause, first_line


def load_hf_config(model: ModelConfig) -> Any:
    """Return the model's transformers configuration. Raises ModelError, also for what would run code unasked."""
    from transformers import AutoConfig

    with _explained(model, "configuration"):
        name = resolve(model.name_or_path)
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code)
        check_foreign_code(model, name, hf_config)
        return hf_config


def load_tokenizer(model: ModelConfig) -> Any:
    """Return the model's tokenizer, with a padding token (its value is never looked at). Raises ModelError."""
    from transformers import AutoTokenizer

    with _explained(model, "tokenizer"):
        check_special_tokens(Path(resolve(model.name_or_path)))
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(model.name_or_path), trust_remote_code=model.trust_remote_code
        )
    _give_padding_token(tokenizer)
    return tokenizer


def load_end_tokens(model: ModelConfig, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the checkpoint's generation_config.json.

    Raises ModelError for a file that cannot be read.
    """
    from transformers import GenerationConfig

    name = resolve(model.name_or_path)
    with _explained(model, "generation_config.json"):
        try:
            found = GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:  # most base models have none
            if Path(name, "generation_config.json").is_file():
                raise
            found = None
    further = found if isinstance(found, list) else [found]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *further) if token is not None))


def _give_padding_token(tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)


def load_processor(model: ModelConfig) -> Any:
    """Return the model's processor, which reads images beside texts. Raises ModelError, MissingExtraError."""
    from transformers import AutoProcessor

    with _explained(model, "processor"):
        name = resolve(model.name_or_path)
        check_special_tokens(Path(name))
        try:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=model.trust_remote_code)
        except ImportError as error:
            raise MissingExtraError(
                f"the processor of model.name_or_path '{model.name_or_path}' needs another package "
                f"({first_line(error)}): pip install 'plop-dist[vision]'"
            ) from error
    if not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"model.name_or_path '{model.name_or_path}' has no processor for images and texts (AutoProcessor gives a "
            f"{type(processor).__name__}); leave data.images_field out, or put the model's processor beside it."
        )
    _give_padding_token(processor.tokenizer)
    return processor


def load_model(model: ModelConfig, drop: Callable[[Any], None] | None = None, **options: Any) -> torch.nn.Module:
    """Return the model with its weights, in eval mode. Extra options go to from_pretrained.

    drop: takes out of the model, which is on the meta device then, what this rank does not need; it is never read.
    With model.checkpoint its weights are read parameter by parameter from there, and model.name_or_path gives the
    configuration alone. Raises ModelError when the directory is missing, a file is corrupt, or weights are missing
    from the checkpoint (which transformers would fill with random numbers).
    """
    dtype = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    options |= {"dtype": dtype, "output_loading_info": True}
    with _explained(model, "model"), freed_at_once():
        hf_config = load_hf_config(model)
        check_quantization_patterns(
            hf_config,
            lambda: [name for name, _ in meta_model(model, hf_config).named_modules()],
            f"model.name_or_path '{model.name_or_path}'",
        )
        check_loadable(model, hf_config)
        options |= {**loading_options(model, hf_config), **placing_options(model)}
        if is_placed(model):
            plan_placing(model, meta_model(model, hf_config), weights_dtype(model, hf_config))
        if model.checkpoint is None and drop is None:
            name = resolve(model.name_or_path)
            options["trust_remote_code"] = model.trust_remote_code
            loaded, info = own_class(model, hf_config).from_pretrained(name, **options)
        else:
            loaded, info = _load_by_class(model, drop, options)
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ModelError(
            f"model.name_or_path '{model.name_or_path}' has no weights for {len(missing)} parameters, e.g. "
            f"'{missing[0]}'; they would be random. Point it at a complete checkpoint."
        )
    check_placed(model, loaded, quantization_of(loaded))
    keep_order_of_rows(loaded)
    if is_mxfp4(hf_config):
        loaded.to(
            weights_dtype(model, hf_config)
        )  # transformers 5.12 dequantises to bfloat16, whatever it was asked for
    return loaded.eval()


def meta_model(model: ModelConfig, hf_config: Any = None) -> torch.nn.Module:
    """Return the model built on the meta device from its configuration alone: shapes and names, no weights.

    It is whole at ZeRO-3 too, where transformers partitions every other model that it builds.
    """
    hf_config = hf_config or load_hf_config(model)
    with _explained(model, "architecture"), unpartitioned(), torch.device("meta"):
        return build(model, hf_config).eval()


def _load_by_class(
    model: ModelConfig, drop: Callable[[Any], None] | None, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the model, whole or a part, and transformers' report on loading it; see load_model."""
    from transformers import GenerationConfig

    hf_config = load_hf_config(model)
    twin: Any = meta_model(model, hf_config)
    model_class = type(twin) if drop is None else _class_without(drop, type(twin))
    name = resolve(model.name_or_path)
    if model.checkpoint is None:
        return model_class.from_pretrained(name, config=hf_config, **options)
    with suppress(OSError):  # few models have one; transformers then makes it from the configuration
        options["generation_config"] = GenerationConfig.from_pretrained(name)
    # From here on transformers does what it does with its own files: dtype, tying, sharding, partitioning.
    fused = {linear.path for linear in find_linears(twin) if len(linear.blocks) > 1}
    weights = find_weights(model.checkpoint, twin, fused)
    loaded, info = model_class.from_pretrained(None, config=hf_config, state_dict=weights, **options)
    loaded.name_or_path = loaded.config.name_or_path = hf_config.name_or_path
    return loaded, info


def _class_without(drop: Callable[[Any], None], model_class: Any) -> Any:
    """Return the class whose models lack what `drop` takes out, before transformers looks for their weights."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        drop(self)

    fields: dict[str, Any] = {"__init__": build, "__module__": model_class.__module__}
    # transformers would report every weight that is left out.
    fields["_keys_to_ignore_on_load_unexpected"] = [".*"]
    return type(model_class.__name__, (model_class,), fields)


def needs_head(exclude: list[str]) -> bool:
    """Tell whether the LM head is scored, so that logits must be computed: unless placement.exclude names it."""
    from plop_dist.values.names import path_matches

    return not any(path_matches("lm_head", pattern) for pattern in exclude)


@contextmanager
def _explained(model: ModelConfig, what: str) -> Iterator[None]:
    name = model.name_or_path
    looks_local = name.startswith((".", "/", "~")) or Path(name).exists()
    if looks_local and not Path(name).is_dir():
        raise ModelError(
            f"model.name_or_path '{name}' is not a directory; pass a Hugging Face id or a directory with config.json "
            "and safetensors files."
        )
    if looks_local and not (Path(name) / "config.json").is_file():
        raise ModelError(f"model.name_or_path '{name}' has no config.json; it is not a Hugging Face model directory.")
    try:
        yield
    except PlopError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors and the hub client raise a dozen unrelated kinds
        raise ModelError(
            f"model.name_or_path '{name}': the {what} cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            f"{_remedy(error)}."
        ) from as_cause(error)


def _remedy(error: Exception) -> str:
    """Return what to do about what transformers raised, by its kind: few of them speak of the files."""
    said, kinds = str(error), {cls.__name__ for cls in type(error).__mro__}
    if "trust_remote_code" in said:
        return "it needs Python code that comes with it; read it, and set model.trust_remote_code=true if you trust it"
    if "Couldn't instantiate the backend tokenizer" in said:
        return "there are no tokenizer files, e.g. tokenizer.json; save the tokenizer beside the model"
    if "ImportError" in kinds:
        return "install what it names"
    if kinds & {"OSError", "EOFError", "UnpicklingError", "SafetensorError", "HfHubHTTPError", "HFValidationError"}:
        return "check that the directory or id exists and its files are complete"
    if "PytorchStreamReader" in said or "JSONDecodeError" in kinds:
        return "a file is damaged; fetch it again"
    if "size mismatch" in said or "mismatched" in said:
        return "the weights are those of another configuration; check config.json"
    if "StrictDataclass" in type(error).__name__:
        return "mend config.json"
    return "its files are there, but this version of transformers does not make this model of its config.json"
