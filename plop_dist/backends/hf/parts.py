"""Which part of a model a module belongs to: its language model, a tower for images or sounds, or what joins them.

And to which stream of an encoder-decoder model. Transformers builds each part from a section of the configuration
(`vision_config`), which its modules keep: so it is the name of that section that says it, and names of modules only
where no section does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from plop_dist.values.scores import ModelPart

# Of a section's name and model type.
_KINDS: tuple[tuple[ModelPart, re.Pattern[str]], ...] = (
    ("projector", re.compile(r"projector|qformer|perceiver|connector|resampler")),
    ("vision", re.compile(r"vision|image|video|vq_|vqgan")),
    ("audio", re.compile(r"audio|speech|acoustic|semantic_tokenizer|talker|2wav|codec")),
)
# Of a path: what a tower ends in (Qwen-VL's visual.merger), and what no section tells (Fuyu's vision_embed_tokens).
_JOINS = re.compile(r"(?:^|[._])(?:merger|projector|aligner|connector|resampler)(?:[._]|$)")
_SENSES = re.compile(r"(?:^|[._])(?:vision|visual|image|img|video|audio|speech)(?:[._]|$)")


def part_finder(model: nn.Module) -> Callable[[str], ModelPart]:
    """Return the function that tells the part of a module of this model by its path: "language" in models of text.

    Heads are language, whatever the configuration says: what stands outside the base model, and the output embedding.
    """
    sections: dict[type[Any], ModelPart] = dict(_sections(getattr(model, "config", None)))
    if not sections:
        return lambda path: "language"
    parts: dict[str, ModelPart] = {
        path: part for path, module in model.named_modules() if (part := _of_section(module, sections))
    }
    is_head = _head_finder(model)
    has_between = len(set(sections.values()) | {"language"}) > 1 and "language" in sections.values()

    def part_of(path: str) -> ModelPart:
        if is_head(path):
            return "language"
        found: ModelPart | None = next((parts[above] for above in _upwards(path) if above in parts), None)
        if found is None:  # built from the configuration as a whole
            found = "projector" if has_between else "language"
        if found == "language" and _SENSES.search(path):  # Kosmos-2 builds image_to_text_projection as text attention
            found = "projector"
        return "projector" if found != "language" and _JOINS.search(path) else found

    return part_of


# Of paths in a decoder, in lower case: attention to what an encoder has read.
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn|encoder_attention")


def stream_finder(model: Any) -> Callable[[str], str | None]:
    """Return the function that tells the stream of an encoder-decoder model's module by its path.

    "encoder", "decoder" or "cross" (its k and v see the encoder's tokens, its q and o the decoder's); None for heads,
    and in all other models.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return lambda path: None
    sides = {id(model.get_encoder()): "encoder", id(model.get_decoder()): "decoder"}
    found = {path: sides[id(module)] for path, module in model.named_modules() if id(module) in sides and path}

    def stream_of(path: str) -> str | None:
        above = next((above for above in _upwards(path) if above in found), None)
        if above is None:
            return None
        is_cross = found[above] == "decoder" and _CROSS.search(path.removeprefix(above).lower())
        return "cross" if is_cross else found[above]

    return stream_of


def _sections(config: Any) -> Iterator[tuple[type[Any], ModelPart]]:
    """Yield the class of every section of a configuration, those inside sections too, with its part."""
    for name in getattr(config, "sub_configs", None) or ():
        section: Any = getattr(config, name, None)
        if not hasattr(section, "model_type"):
            continue
        said = f"{name} {section.model_type}"
        own: ModelPart | None = next((part for part, pattern in _KINDS if pattern.search(said)), None)
        inner: list[tuple[type[Any], ModelPart]] = list(_sections(section))
        yield type(section), own or "language"
        for kind, part in inner:
            yield kind, own or part


def _of_section(module: nn.Module, sections: dict[type, ModelPart]) -> ModelPart | None:
    return sections.get(type(getattr(module, "config", None)))


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _head_finder(model: Any) -> Callable[[str], bool]:
    base = getattr(model, "base_model_prefix", "")
    has_base = isinstance(getattr(model, base, None) if base else None, nn.Module)
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_output_embeddings() if get_output_embeddings else None
    heads = {path for path, module in model.named_modules() if output is not None and module is output}
    return lambda path: path in heads or (has_base and not path.startswith(f"{base}."))
