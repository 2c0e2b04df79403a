"""What a configuration would do, without weights: ranks, layout, modules, parameters, bytes, communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plop_dist.backends.record import check_singly
from plop_dist.config.schema import Config
from plop_dist.costs.footprint import Shape, Stage, build_stages, on_one_rank
from plop_dist.costs.training_memory import TrainingMemory, training_memory
from plop_dist.costs.verdict import DataFacts, Verdict, is_on_hub, judge
from plop_dist.data.images import has_images, images_of
from plop_dist.data.pairs import PairSamples
from plop_dist.data.processed import ImageRows, ImageSamples
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import select_rows, tokenize
from plop_dist.data.texts import Row, render
from plop_dist.errors import ModelError
from plop_dist.registry import BACKENDS, load
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.names import natural_key
from plop_dist.values.scores import ModelInfo, Projection

if TYPE_CHECKING:
    from plop_dist.backends.hf.placing import Placing

_NUM_RENDERED = 8
_UNCUT = 2**31 - 1


@dataclass(frozen=True)
class TypePlan:
    """One module type: how many modules, at most how many on one rank, LoRA parameters at placement.rank."""

    type: str
    num_modules: int
    num_on_one_rank: int
    lora_parameters: int


@dataclass(frozen=True)
class DataPlan:
    """What is known of the data: rows (None: on a hub, not looked at), tokens and longest sample (None: unknown)."""

    source: str
    num_samples: int | None
    num_tokens: int | None
    longest: int | None
    first: str | None


@dataclass(frozen=True)
class Plan:
    """What `plop-dist check` shows."""

    model: str
    architecture: str
    num_parameters: int
    dtype: str
    layout: str
    world_size: int
    tokens_per_micro_batch: int
    types: tuple[TypePlan, ...]
    stages: tuple[Stage, ...]
    data: DataPlan
    notes: tuple[str, ...]
    verdict: Verdict
    training: TrainingMemory | None = None


def build_plan(config: Config) -> Plan:
    """Return the plan of a configuration. Reads config.json and local data; no weights, no hub for a local model.

    Raises ModelError, DataError, and LayoutError naming the nearest sizes that divide the model.
    """
    from plop_dist.backends.hf.dtype import weights_dtype
    from plop_dist.backends.hf.layout import num_experts
    from plop_dist.backends.hf.load import load_hf_config, meta_model, needs_head
    from plop_dist.backends.hf.own_class import reads_pairs
    from plop_dist.backends.hf.placing import is_placed, plan_placing
    from plop_dist.backends.hf.quantized.loadable import check_quantized
    from plop_dist.backends.hf.stored_weights import check_stored_weights
    from plop_dist.backends.hf.whole import whole_sites

    hf_config = load_hf_config(config.model)
    text = hf_config.get_text_config()
    load(BACKENDS, config.parallel.backend).check_model(hf_config, config)
    check_quantized(config, hf_config)
    notes: list[str] = []
    has_pairs = reads_pairs(config.model, hf_config)
    data, facts, tokenizer = _look_at_data(config, hf_config, has_pairs)
    model = meta_model(config.model, hf_config)
    stored = check_stored_weights(config.model, model)
    absent = [note for note in stored if note.startswith("No weights")]
    notes += [note for note in stored if note not in absent]
    sites = whole_sites(model, needs_head(config.placement.exclude))
    projections = [projection for site in sites for projection in site.projections]
    length = data.longest or config.data.max_length
    dtype = weights_dtype(config.model, hf_config)
    shape = Shape(
        num_layers=_num_layers(text, projections),
        hidden_size=getattr(text, "hidden_size", None) or max((one.in_features for one in projections), default=0),
        num_tokens=config.data.batch_size * length,
        element_size=dtype.itemsize,
        num_routed=getattr(text, "num_experts_per_tok", 0) or 0,
        num_experts=num_experts(hf_config),
    )
    if config.model.quantization is not None or getattr(hf_config, "quantization_config", None) is not None:
        notes.append(f"Weights are counted in {str(dtype).removeprefix('torch.')}: quantised they take less.")
    if config.parallel.cp > 1:
        notes.append("Context parallelism needs Transformer Engine on every rank.")
    if config.parallel.zero_stage == 3:
        notes.append(
            "ZeRO-3 gathers: at most one all-gather per module that holds parameters; prefetching merges some."
        )
    info = ModelInfo(
        name_or_path=config.model.name_or_path, architecture=type(model).__name__, **_kind(hf_config, has_pairs)
    )
    verdict = judge(config, projections, info, facts, tokenizer, absent)
    stages = build_stages(model, projections, config.parallel, shape)
    if is_placed(config.model):
        num_samples = data.num_samples or config.data.num_samples
        placing = plan_placing(config.model, model, dtype)
        notes.append(_reading(placing, num_samples, config.data.batch_size, stages[0].activation_bytes))
    return Plan(
        model=config.model.name_or_path,
        architecture=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        layout=_layout_text(config),
        world_size=config.parallel.world_size,
        tokens_per_micro_batch=shape.num_tokens,
        types=_types(projections, config, shape),
        stages=tuple(stages),
        data=data,
        notes=tuple(notes),
        verdict=verdict,
        training=training_memory(config, stages, shape, text.vocab_size, verdict.parameters),
    )


def _num_layers(text: Any, projections: Sequence[Projection]) -> int:
    """Return what the configuration says, or, where it counts in other words (byte-latent models), what there is."""
    known = getattr(text, "num_hidden_layers", None)
    return known or 1 + max((one.layer for one in projections if one.layer is not None), default=0)


def _reading(placing: Placing, num_samples: int, batch_size: int, activation_bytes: int) -> str:
    """Return what is read from disk, and the most that is in memory at once, as a sentence."""
    num_passes = -(-num_samples // batch_size)
    times = "once" if num_passes == 1 else f"{num_passes} times"
    kept = " and ".join(f"{_gigabytes(size)} on {device}" for device, size in sorted(placing.by_device.items()))
    peak = _gigabytes(placing.resident + activation_bytes)
    read = f"{_gigabytes(placing.disk)} of weights lie on disk and are read {times} (data.num_samples / "
    total = f"data.batch_size), {_gigabytes(num_passes * placing.disk)} in all" if placing.disk else ""
    where = f"{read}{total}; {kept} stay" if placing.disk else f"All weights fit: {kept}; nothing is read from disk"
    return f"{where}. At most {peak} of weights and activations are in memory at once, beside the program's own."


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _kind(hf_config: Any, has_pairs: bool) -> dict[str, Any]:
    return {"model_type": hf_config.model_type, **({"is_encoder_decoder": True} if has_pairs else {})}


def _layout_text(config: Config) -> str:
    parallel = config.parallel
    sizes = [
        f"{axis} {getattr(parallel, axis)}" for axis in ("tp", "pp", "dp", "cp", "ep") if getattr(parallel, axis) > 1
    ]
    if parallel.sequence_parallel:
        sizes.append("sequence parallel")
    if parallel.zero_stage:
        sizes.append(f"ZeRO-{parallel.zero_stage}")
    return f"{parallel.backend}, {', '.join(sizes) or 'one process'}"


def _types(projections: list[Projection], config: Config, shape: Shape) -> tuple[TypePlan, ...]:
    by_type: dict[str, list[Projection]] = {}
    for item in projections:
        by_type.setdefault(item.type, []).append(item)
    on_rank = on_one_rank(projections, config.parallel, shape)
    ranks = config.placement.rank_pattern

    def cost(name: str) -> int:
        rank = ranks.get(name, config.placement.rank)
        return num_trainable_parameters(by_type[name], lambda _: rank)

    return tuple(
        TypePlan(name, len(by_type[name]), on_rank[name], cost(name)) for name in sorted(by_type, key=natural_key)
    )


def _look_at_data(config: Config, hf_config: Any, has_pairs: bool) -> tuple[DataPlan, DataFacts | None, Any]:
    """Return what is known of the data, and the tokenizer, None where there is none or nothing to tokenise.

    Raises DataError or ModelError for tokens that the model cannot read.
    """
    data = config.data
    if is_on_hub(data.path):
        return DataPlan(data.path, None, None, None, None), None, None
    from plop_dist.backends.hf.load import load_tokenizer, meta_model
    from plop_dist.backends.hf.tokens import check_tokens

    build = lambda: meta_model(config.model, hf_config)  # noqa: E731

    every = load_rows(data.path, data.split)
    rows = select_rows(every, data)
    try:
        tokenizer = load_tokenizer(config.model)
        # For some families transformers 5 makes a tokenizer without words from a directory that has no tokenizer.
        is_absent = len(tokenizer) <= len(tokenizer.all_special_tokens)
    except ModelError:
        tokenizer, is_absent = None, True
    if is_absent:
        facts = DataFacts(len(every), None)
        if data.messages_field is not None:
            return DataPlan(data.path, len(rows), None, None, None), facts, None
        texts = [render(row, number, data) for number, row in enumerate(rows[:_NUM_RENDERED], start=1)]
        return DataPlan(data.path, len(rows), None, None, _short(texts[0])), facts, None
    if has_pairs:
        check_singly(config, "two texts, the encoder's and the decoder's")
        pairs = PairSamples(rows, data, config.train.prompt_template, tokenizer)
        plan = DataPlan(data.path, len(rows), sum(map(len, pairs)), max(map(len, pairs)), render(rows[0], 1, data))
        check_tokens(config, hf_config, pairs, pairs.longest, build)
        return plan, DataFacts(len(every), None), tokenizer
    if has_images(rows, data):
        plan, samples, processor = _look_at_images(config, rows)
        check_tokens(config, hf_config, samples, samples.longest, build, has_images=True)
        return plan, DataFacts(len(every), tuple(map(len, samples))), processor
    uncut = tokenize(rows, data.model_copy(update={"max_length": _UNCUT}), tokenizer)
    whole = [len(sample) for sample in uncut]
    lengths = [min(length, data.max_length) for length in whole]
    check_tokens(config, hf_config, uncut, max(lengths), build)
    first = render(rows[0], 1, data, tokenizer)
    plan = DataPlan(data.path, len(rows), sum(lengths), max(lengths), _short(first))
    return plan, DataFacts(len(every), tuple(whole)), tokenizer


def _look_at_images(config: Config, rows: Sequence[Row]) -> tuple[DataPlan, ImageSamples, Any]:
    """Return what is known of rows with images, and the processor, which has read them all as scoring will."""
    from plop_dist.backends.hf.load import load_processor

    check_singly(config, "images")
    data, processor = config.data, load_processor(config.model)
    read = ImageRows(rows, data, processor, data.max_length)
    samples = ImageSamples(read)
    first = read.text(0, len(images_of(rows[0], 1, data)))
    plan = DataPlan(data.path, len(rows), sum(map(len, samples)), samples.longest, _short(first))
    return plan, samples, processor


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
