"""How the run continues after the placement: the section train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from plop_dist.config.fields import (
    Count,
    CountOfSeveral,
    CountOrZero,
    Location,
    NameOf,
    NameOrFunction,
    NumpySeed,
    Positive,
    PositiveOrZero,
    Real,
    Seconds,
    Share,
)  # fmt: skip
from plop_dist.config.section import Section
from plop_dist.config.vllm import VLLMConfig
from plop_dist.registry import EXTERNAL_ENGINES, REWARDS, SAMPLERS

_LATER = frozenset(
    {"sampler", "loss_type", "num_iterations", "beta", "epsilon", "epsilon_high", "importance_sampling_level",
     "scale_rewards", "reward_weights", "reward_timeout_s", "vllm", "engine_python"}
)  # fmt: skip
# What trains in the ranks that scored; any other engine runs by itself.
_IN_THESE_RANKS = ("auto", "plop", "trl")


class TrainConfig(Section):
    """How the run continues after the placement."""

    method: Literal["none", "sft", "grpo"] = Field(default="none", description="Training after the placement.")
    max_steps: Count = Field(default=20, description="Optimizer steps.")
    learning_rate: Positive = Field(default=2e-4, description="Peak learning rate.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Decay after the warm-up."
    )
    warmup_steps: CountOrZero = Field(default=0, description="Steps of linear warm-up.")
    weight_decay: PositiveOrZero = Field(default=0.0, description="AdamW weight decay.")
    max_grad_norm: Positive = Field(default=1.0, description="Gradient clipping by global norm.")
    micro_batch_size: Count = Field(default=4, description="Samples per forward pass and data-parallel rank.")
    gradient_accumulation_steps: Count = Field(default=1, description="Micro-batches per optimizer step.")
    max_length: Count = Field(
        default=512,
        description="Longest training sample, in tokens (sft), or prompt (grpo, engines that run by themselves).",
    )
    packing: bool = Field(default=False, description="Pack several samples into one sequence (sft).")
    prompt_template: str | None = Field(
        default=None, description='Prompt part of a row, "{question}"; its tokens are left out of the loss (sft).'
    )
    data_path: Location | None = Field(default=None, description="Training rows; default: data.path.")
    eval_path: Location | None = Field(default=None, description="Held-out rows; default: the last eval_samples rows.")
    eval_samples: Count = Field(default=32, description="Held-out rows, never trained on.")
    lora_dropout: Share = Field(default=0.0, description="Dropout before A.")
    save_steps: Count = Field(default=10, description="Steps between checkpoints.")
    seed: NumpySeed = Field(default=0, description="Seed of adapters, data order and dropout.")
    engine: Annotated[str, NameOf(EXTERNAL_ENGINES, also=_IN_THESE_RANKS)] = Field(
        default="auto",
        description="GRPO engine: plop or trl in these ranks, or one that runs by itself; auto: trl in one process and "
        "with ZeRO, plop elsewhere.",
    )
    sampler: Annotated[str, NameOf(SAMPLERS, also=("auto",))] = Field(
        default="auto",
        description="GRPO, engines plop and trl: who writes the completions; model: the one being trained; auto: vllm "
        "where train.vllm.url is given, else model. vllm without an url: a server is started with train.engine_python.",
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"] = Field(
        default="dapo", description="GRPO: the loss, by TRL's names."
    )
    num_iterations: Count = Field(default=1, description="GRPO: optimizer steps on the same completions.")
    beta: PositiveOrZero = Field(default=0.0, description="GRPO: weight of the KL to the model without adapters.")
    epsilon: Positive = Field(default=0.2, description="GRPO: how far below 1 the ratio to the old policy counts.")
    epsilon_high: Positive | None = Field(
        default=None, description="GRPO: how far above 1 it counts (cispo: the bound itself); null: epsilon."
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        default="token", description="GRPO: the ratio of each token, or of the whole completion (GSPO)."
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="group", description="GRPO: whose standard deviation divides the advantages."
    )
    reward_weights: list[Real] | None = Field(default=None, description="GRPO: a weight for each reward; null: all 1.")
    reward_timeout_s: Seconds | None = Field(
        default=None,
        description="GRPO: longest time for one reward in one step; null: 60, or what cluster.timeout_s leaves.",
    )
    engine_python: Location | None = Field(
        default=None,
        min_length=1,
        description="Python of the environment with that engine, or with a vLLM to be started; null: this one.",
    )
    rewards: list[Annotated[str, NameOrFunction(REWARDS)]] = Field(
        default=["builtin:number"],
        description="GRPO rewards: builtin:number, builtin:format, those of installed packages, or module:function.",
    )
    answer_field: str = Field(default="answer", description="GRPO: column with the reference answer.")
    num_generations: CountOfSeveral = Field(default=4, description="GRPO: completions per prompt.")
    max_completion_length: Count = Field(default=64, description="GRPO: longest completion, in tokens.")
    temperature: Positive = Field(default=1.0, description="GRPO: sampling temperature.")
    vllm: VLLMConfig = Field(default_factory=VLLMConfig, description="GRPO: where vLLM writes the completions.")
    track_nfn_every: Count | None = Field(default=None, description="Score the adapted model every N steps.")
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default=[], description="Besides console and JSONL."
    )

    @property
    def is_in_these_ranks(self) -> bool:
        """Whether the ranks that scored also train."""
        return self.method == "sft" or (self.method == "grpo" and self.engine in _IN_THESE_RANKS)

    @model_serializer(mode="wrap")
    def _leave_out_what_is_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Finished stages and checkpoints from before there were these keys stay as they are.
        tree, fields = handler(self), type(self).model_fields
        defaults = {key: fields[key].get_default(call_default_factory=True) for key in _LATER}
        defaults["vllm"] = defaults["vllm"].model_dump(mode="json")
        return {key: value for key, value in tree.items() if key not in _LATER or value != defaults[key]}
