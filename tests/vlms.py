"""Tiny random vision-language models of the classes that their users load, with weights that are unequal and odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tests.models import VOCAB_SIZE, spoil, tiny_tokenizer

# The image's token, the last but two of the vocabulary, and those around it.
IMAGE, BEGIN, END = VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2
_TEXT = {
    "vocab_size": VOCAB_SIZE + 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
_QWEN_VISION = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2,
                "temporal_patch_size": 2, "in_channels": 3, "out_hidden_size": 32}  # fmt: skip
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VOCAB_SIZE + 3, "vision_start_token_id": BEGIN,
             "vision_end_token_id": END}  # fmt: skip

# Of each the class, and what its configuration says; towers have one layer more than the language model.
VLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 28, "patch_size": 14,
                              "projection_dim": 16},
            "image_token_index": IMAGE, "vision_feature_layer": -1,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8, "image_size": 56, "patch_size": 14},
            "image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "sliding_window": 32},
            "vision_config": {**_VISION, "image_size": 28, "patch_size": 7, "vision_use_head": False},
            "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _AXES, "layer_types": ["full_attention"] * 2},
            "vision_config": {**_QWEN_VISION, "intermediate_size": 24, "fullatt_block_indexes": [1],
                              "window_size": 56},
            **_QWEN_IDS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _AXES},
            "vision_config": {**_QWEN_VISION, "intermediate_size": 24, "num_position_embeddings": 16,
                              "deepstack_visual_indexes": [0, 1]},
            **_QWEN_IDS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": {**_AXES, "partial_rotary_factor": 1.0},
                            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
                            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
            "vision_config": {**_QWEN_VISION, "intermediate_size": 24, "num_position_embeddings": 16,
                              "deepstack_visual_indexes": []},
            **_QWEN_IDS,
        },
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32,
                            "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
                            "vocab_size_per_layer_input": VOCAB_SIZE + 4},
            "vision_config": {**_VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 14},
            "audio_config": None, "image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END,
        },
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {**_VISION, "image_size": 28, "patch_size": 7},
            "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0,
        },
    ),
}  # fmt: skip


def tiny_vlm_config(family: str, *, tied: bool = False) -> PreTrainedConfig:
    """Return the configuration of a tiny vision-language model; tied: its head is the embedding."""
    config: Any = AutoConfig.for_model(family, **VLMS[family][1])
    if tied:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    return config


def tiny_vlm(family: str, *, seed: int = 0, tied: bool = False) -> PreTrainedModel:
    """Return a float32 model of the family's own class in eval mode, the same one on every machine."""
    own: Any = getattr(transformers, VLMS[family][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = own._from_config(tiny_vlm_config(family, tied=tied), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spoil(name, parameter, seed)
    return model.eval()


def save_tiny_vlm(family: str, directory: str | Path, *, seed: int = 0, tied: bool = False) -> Path:
    """Save tiny_vlm(family) as safetensors with a tokenizer beside it, and return the directory."""
    target = Path(directory)
    tiny_vlm(family, seed=seed, tied=tied).save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


# -- processors -------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)


def save_tiny_processor(family: str, directory: str | Path) -> None:
    """Save a processor of the family that makes images of a few patches, beside the model of save_tiny_vlm."""
    tokenizer = _tokenizer(family)
    processor, place = _PROCESSORS[family](tokenizer)
    processor.chat_template = CHAT.replace("PLACE", place)
    processor.save_pretrained(directory)


def _tokenizer(family: str) -> Any:
    tokenizer: Any = tiny_tokenizer()
    image, begin, end, other = _TOKENS.get(family, _TOKENS["qwen"])
    tokenizer.add_special_tokens({"additional_special_tokens": [image, begin, end, other]})
    named = {"image_token": image, "boi_token": begin, "eoi_token": end, "video_token": other}
    if family == "gemma4":  # whose processor asks for them without audio too
        named |= {"audio_token": "<unk>", "boa_token": "<s>", "eoa_token": "</s>"}
    if family == "idefics3":
        named |= {"fake_image_token": begin, "image_boundary_token": begin, "global_image_token": other,
                  "end_of_utterance_token": end}  # fmt: skip
    tokenizer.init_kwargs["extra_special_tokens"] = named
    tokenizer._set_model_specific_special_tokens(named)
    return tokenizer


_TOKENS = {
    "qwen": ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    "llava": ("<image>", "<b>", "<e>", "<v>"),
    "mistral3": ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<v>"),
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<v>"),
    "gemma4": ("<|image|>", "<|image>", "<image|>", "<|video|>"),
    "idefics3": ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
}


def _llava(tokenizer: Any) -> tuple[Any, str]:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, image_token="<image>")  # fmt: skip
    return processor, "<image>"


def _gemma3(tokenizer: Any) -> tuple[Any, str]:
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor

    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(images, tokenizer, image_seq_length=4), "<start_of_image>"


def _qwen(tokenizer: Any) -> tuple[Any, str]:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = Qwen2VLImageProcessor(size=size, patch_size=14)
    videos = Qwen2VLVideoProcessor(size=size, patch_size=14)
    return Qwen2_5_VLProcessor(images, tokenizer, videos), "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen3(tokenizer: Any) -> tuple[Any, str]:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = Qwen2VLImageProcessor(size=size, patch_size=14)
    videos = Qwen3VLVideoProcessor(size=size, patch_size=14)
    return Qwen3VLProcessor(images, tokenizer, videos), "<|vision_start|><|image_pad|><|vision_end|>"


def _mistral3(tokenizer: Any) -> tuple[Any, str]:
    from transformers import PixtralImageProcessor, PixtralProcessor

    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2), "[IMG]"


def _gemma4(tokenizer: Any) -> tuple[Any, str]:
    from transformers import Gemma4AudioFeatureExtractor, Gemma4ImageProcessor, Gemma4Processor, Gemma4VideoProcessor

    images = Gemma4ImageProcessor(patch_size=14, max_soft_tokens=70, pooling_kernel_size=3)
    return Gemma4Processor(Gemma4AudioFeatureExtractor(), images, tokenizer, Gemma4VideoProcessor()), "<|image|>"


def _idefics3(tokenizer: Any) -> tuple[Any, str]:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    images = Idefics3ImageProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
    return Idefics3Processor(images, tokenizer, image_seq_len=4), "<image>"


_PROCESSORS = {
    "llava": _llava, "gemma3": _gemma3, "qwen2_5_vl": _qwen, "qwen3_vl": _qwen3, "qwen3_5": _qwen3,
    "mistral3": _mistral3, "gemma4": _gemma4, "idefics3": _idefics3,
}  # fmt: skip
