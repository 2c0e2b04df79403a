"""Which class of transformers a checkpoint is loaded as: the one that its users load, or the one that was asked for."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError, suggest

# The Auto mappings whose classes have a head that reads or writes text; what AutoModel alone knows has none.
_HEADS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION",
          "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MASKED_LM", "MULTIPLE_CHOICE", "PRETRAINING")  # fmt: skip
_DEFAULT = "AutoModelForCausalLM"

logger = logging.getLogger(__name__)


def architecture(hf_config: Any) -> str:
    """Return the name of the class that the checkpoint was saved from."""
    return (getattr(hf_config, "architectures", None) or [type(hf_config).__name__])[0]


def own_class(model: ModelConfig, hf_config: Any) -> Any:
    """Return the class to load: a model class of transformers, or an Auto class, which finds the one that fits.

    model.auto_class, or by default the class that the checkpoint names, which TRL, verl and vLLM load too; where it
    names none that is known, AutoModelForCausalLM's, and the log says so. Raises ModelError for an Auto class that does
    not exist or has nothing for this model, for a class without a head, and for one that reads no text.
    """
    if model.auto_class is not None:
        found = _auto_class(model, model.auto_class, hf_config)
    else:
        found = _named_class(model, hf_config)
    _check_reads_text(model, _concrete(found, hf_config))
    return found


def reads_pairs(model: ModelConfig, hf_config: Any) -> bool:
    """Tell whether what is loaded has an encoder beside its decoder: the checkpoint, and not its decoder alone.

    Raises ModelError for one whose decoder does not read the labels: a classifier's reads the encoder's text again.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not hf_config.is_encoder_decoder:
        return False
    concrete = _concrete(own_class(model, hf_config), hf_config)
    name = getattr(concrete, "__name__", "")
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return False
    if not hasattr(concrete, "prepare_decoder_input_ids_from_labels"):
        raise ModelError(
            f"model.name_or_path '{model.name_or_path}' is a {name}, an encoder-decoder model that does not say what "
            "its decoder reads of a text; score it in your own job, by plop_dist.score(model, batches, forward=...)."
        )
    return True


def build(model: ModelConfig, hf_config: Any) -> Any:
    """Return a model of the own class, from its configuration alone: on the device, and of the dtype, that hold now."""
    found = own_class(model, hf_config)
    if hasattr(found, "from_config"):
        return found.from_config(hf_config, trust_remote_code=model.trust_remote_code)
    return found._from_config(hf_config)


def _named_class(model: ModelConfig, hf_config: Any) -> Any:
    import transformers
    from transformers import PreTrainedModel

    name = (getattr(hf_config, "architectures", None) or [None])[0]
    if model.trust_remote_code:
        for auto, address in (getattr(hf_config, "auto_map", None) or {}).items():
            if auto.startswith("AutoModel") and hasattr(transformers, auto) and address.rpartition(".")[2] == name:
                return getattr(transformers, auto)
        if _DEFAULT in (getattr(hf_config, "auto_map", None) or {}):  # the code that is trusted, by whatever name
            return transformers.AutoModelForCausalLM
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        default = transformers.AutoModelForCausalLM
        if getattr(_concrete(default, hf_config), "__name__", None) != name:
            _say_default(model.name_or_path, name)
        return default
    if name in _headless():
        raise ModelError(
            f"model.name_or_path '{model.name_or_path}' was saved from {name}, a class without a head, which nobody "
            f"trains; name the class that you train by model.auto_class, e.g. model.auto_class={_DEFAULT}."
        )
    return found


@cache  # once for a model, however often it is built
def _say_default(name_or_path: str, architecture: str | None) -> None:
    said = f"names {architecture}, which transformers does not have" if architecture else "names no architecture"
    logger.warning("%s %s: it is loaded by %s (model.auto_class says otherwise).", name_or_path, said, _DEFAULT)


def _headless() -> set[str]:
    """Return the names of classes that only AutoModel knows."""
    from transformers.models.auto import modeling_auto

    def names(mapping: str) -> set[str]:
        listed = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").values()
        return {name for entry in listed for name in ([entry] if isinstance(entry, str) else entry)}

    return names("MODEL") - {name for head in _HEADS for name in names(f"MODEL_FOR_{head}")}


def _auto_class(model: ModelConfig, name: str, hf_config: Any) -> Any:
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = getattr(transformers, name, None) if name.startswith("AutoModel") else None
    if not (isinstance(found, type) and issubclass(found, _BaseAutoModelClass)):
        known = [entry for entry in dir(transformers) if entry.startswith("AutoModelFor")]
        raise ModelError(f"model.auto_class '{name}' is no Auto class of transformers. {suggest(name, known)}")
    has_own_code = model.trust_remote_code and name in (getattr(hf_config, "auto_map", None) or {})
    if not has_own_code and _concrete(found, hf_config) is None:
        raise ModelError(
            f"model.auto_class {name} has no class for model type '{hf_config.model_type}' of model.name_or_path "
            f"'{model.name_or_path}'; leave it out to load what the checkpoint names ({architecture(hf_config)})."
        )
    return found


def _concrete(found: Any, hf_config: Any) -> Any:
    """Return the class that an Auto class of transformers takes for this configuration, None where it has none."""
    mapping = getattr(found, "_model_mapping", None)
    if mapping is None:
        return found
    if type(hf_config) not in mapping:
        return None
    classes = mapping[type(hf_config)]
    return classes[0] if isinstance(classes, list | tuple) else classes


def _check_reads_text(model: ModelConfig, concrete: Any) -> None:
    first = getattr(concrete, "main_input_name", "input_ids")
    if first != "input_ids":
        raise ModelError(
            f"model.name_or_path '{model.name_or_path}' is a {concrete.__name__}, whose main input is {first}, which "
            "texts do not give; score it in your own job, by plop_dist.score(model, batches, forward=...)."
        )
