"""What one rank holds while it trains adapters, by arithmetic on shapes alone."""

# T tokens of a micro-batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plop_dist.config.schema import Config
from plop_dist.costs.footprint import Shape, Stage
from plop_dist.values.names import expert_index

_FLOAT_BYTES = 4  # adapters are float32 whatever the model is
_LOGIT_BYTES = 2 * 4  # float32, and their gradient


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the rank that holds most, with the largest choice that is possible.

    weights: the frozen model; adapters: with gradients and optimizer; activations: of one micro-batch, kept for the
    backward pass (nothing is recomputed), logits included; num_tokens: T.
    """

    weights: int
    adapters: int
    activations: int
    num_tokens: int

    @property
    def total(self) -> int:
        """The sum; what libraries and the allocator keep comes on top."""
        return self.weights + self.adapters + self.activations


def training_memory(
    config: Config, stages: Sequence[Stage], shape: Shape, vocab_size: int, parameters: tuple[int, int] | None
) -> TrainingMemory | None:
    """Return the estimate, or None where nothing is trained or nothing can be placed.

    parameters: the fewest and the most trainable ones, of the whole model.
    """
    train, parallel = config.train, config.parallel
    if train.method == "none" or parameters is None:
        return None
    length = train.max_length
    if train.method == "grpo":
        length = config.data.max_length + train.max_completion_length
    num_tokens = train.micro_batch_size * length // parallel.cp
    return max(
        (
            TrainingMemory(
                weights=stage.weight_bytes,
                adapters=_adapters(-(-parameters[1] // (parallel.tp * parallel.pp)), config),
                activations=_activations(stage, num_tokens, config, shape, vocab_size, is_last=stage is stages[-1]),
                num_tokens=num_tokens,
            )
            for stage in stages
        ),
        key=lambda memory: memory.total,
    )


def _adapters(num_parameters: int, config: Config) -> int:
    """Return the bytes of weights, gradients and AdamW's two moments; ZeRO shards them from stages 3, 2 and 1 on."""
    stage, dp = config.parallel.zero_stage, config.parallel.dp
    copies = sum(number / (dp if stage >= shards_from else 1) for number, shards_from in ((1, 3), (1, 2), (2, 1)))
    return int(num_parameters * _FLOAT_BYTES * copies)


def _activations(stage: Stage, num_tokens: int, config: Config, shape: Shape, vocab_size: int, *, is_last: bool) -> int:
    """Return what the backward pass needs: each projection's output, and per layer four times the hidden state."""
    tp = config.parallel.tp
    dense = sum(item.out_features for item in stage.modules if expert_index(item.fqn) is None)
    experts = sum(item.out_features for item in stage.modules if expert_index(item.fqn) is not None)
    num_experts = max(1, shape.num_experts // config.parallel.ep)
    per_token = (dense + experts * shape.num_routed // num_experts) // tp + 4 * shape.hidden_size * len(stage.layers)
    in_flight = config.parallel.pp  # a pipeline keeps as many micro-batches as it has stages
    logits = num_tokens * vocab_size * (shape.element_size + _LOGIT_BYTES) if is_last else 0
    return in_flight * num_tokens * per_token * shape.element_size + logits
