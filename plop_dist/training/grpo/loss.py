"""What GRPO differentiates: each token's loss by loss type, the KL, and the weight with which tokens add up.

As TRL 1.16 computes them (GRPOTrainer._compute_loss); the loss types carry its names.
"""

# b completions, s tokens of the longest row; a (b, s) tensor stands at the token before the one that it is about

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from plop_dist.config.schema import TrainConfig
from plop_dist.training.grpo.metrics import Tally
from plop_dist.training.logits import Batch, Logits, next_tokens

# TRL's defaults, which its papers give
_SAPO_TEMPERATURE = {True: 1.0, False: 1.05}  # by whether the advantage is positive
_VESPO_K = {True: 2.0, False: 3.0}
_VESPO_LAMBDA = {True: 3.0, False: 2.0}
_LOWEST_LOG, _HIGHEST_LOG = math.log(1e-8), 20.0


@dataclass(frozen=True)
class Terms:
    """What a token's loss is made of, (b, s) each; with sequence-level importance `ratio` is (b, 1).

    ratio: pi / pi_old, differentiable. log_ratio: its logarithm per token. log_probabilities: of pi. advantages: of
    each token's completion. mask: 1 at the completions' tokens. importance: pi_old / pi_sampler, where they differ.
    """

    ratio: Tensor
    log_ratio: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    mask: Tensor
    importance: Tensor | None
    epsilon_low: float
    epsilon_high: float


class GRPOObjective:
    """The Objective of a GRPO step, over the micro-batches of a rollout; `tally` has what it saw since it was taken."""

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._type = LOSSES[train.loss_type]
        self.tally = Tally()

    def __call__(self, logits: Logits, batch: Batch) -> Tensor:
        """Return the weighted sum of the completions' token losses."""
        targets, temperature = next_tokens(batch["labels"]), self._train.temperature
        self.tally.add("entropy", logits.entropies(targets, temperature), batch["weights"] > 0)
        log_probabilities = logits.log_probabilities(targets, temperature)
        return self.of(log_probabilities, batch)

    def of(self, log_probabilities: Tensor, batch: Batch) -> Tensor:
        """Return the same of the trained model's log-probabilities, (b, s)."""
        train, mask = self._train, (batch["weights"] > 0).float()
        old = batch.get("old", log_probabilities.detach())
        log_ratio = log_probabilities - old
        exponent = log_ratio
        if train.importance_sampling_level == "sequence":
            exponent = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
        high = train.epsilon if train.epsilon_high is None else train.epsilon_high
        importance = batch.get("importance")
        terms = Terms(
            torch.exp(exponent),
            log_ratio,
            log_probabilities,
            batch["advantages"],
            mask,
            importance,
            train.epsilon,
            high,
        )
        losses = self._type.token_loss(terms)
        if importance is not None and self._type.corrects:
            losses = losses * importance
        if "reference" in batch:
            # Times the ratio, its gradient is that of the reverse KL (TRL's use_bias_correction_kl).
            kl = divergence(batch["reference"] - log_probabilities) * terms.ratio
            self.tally.add("kl", kl, mask)
            losses = losses + train.beta * kl
        for name, values in self._type.metrics(terms).items():
            self.tally.add(name, values, mask if values.shape == mask.shape else mask.any(dim=1, keepdim=True))
        return (losses * batch["weights"]).sum()


def divergence(difference: Tensor) -> Tensor:
    """Return the estimate of KL(pi, pi_ref) per token from log pi_ref - log pi: exp(d) - d - 1."""
    return torch.exp(difference) - difference - 1


def _clipped(terms: Terms) -> Tensor:
    bounded = terms.ratio.clamp(1 - terms.epsilon_low, 1 + terms.epsilon_high)
    return -torch.min(terms.ratio * terms.advantages, bounded * terms.advantages)


def _clip_ratios(terms: Terms) -> dict[str, Tensor]:
    low = (terms.ratio < 1 - terms.epsilon_low) & (terms.advantages < 0)
    high = (terms.ratio > 1 + terms.epsilon_high) & (terms.advantages > 0)
    shares = {"low": _as_ratio(low, terms), "high": _as_ratio(high, terms), "region": _as_ratio(low | high, terms)}
    ends = {"low_min": _of_rows(shares["low"], terms), "high_max": _of_rows(shares["high"], terms)}
    return {f"clip_ratio/{name}": v for name, v in ({f"{key}_mean": v for key, v in shares.items()} | ends).items()}


def _cispo(terms: Terms) -> Tensor:
    return -terms.ratio.clamp(max=terms.epsilon_high).detach() * terms.advantages * terms.log_probabilities


def _cispo_clip_ratio(terms: Terms) -> dict[str, Tensor]:
    clipped = (terms.ratio > terms.epsilon_high) & (terms.advantages > 0)
    return {"cispo_clip_ratio": _as_ratio(clipped, terms)}


def _sapo(terms: Terms) -> Tensor:
    temperature = torch.where(terms.advantages > 0, _SAPO_TEMPERATURE[True], _SAPO_TEMPERATURE[False])
    return -torch.sigmoid(temperature * (terms.ratio - 1)) * 4 / temperature * terms.advantages


def _vespo(terms: Terms) -> Tensor:
    return -_phi(terms) * terms.advantages * terms.log_probabilities


def _phi(terms: Terms) -> Tensor:
    """Return phi(w), where w is the sequence's ratio and log phi(w) = lambda + k log w - lambda w."""
    with torch.no_grad():
        log_w = (terms.log_ratio.clamp(-_HIGHEST_LOG, _HIGHEST_LOG) * terms.mask).sum(-1, keepdim=True)
        if terms.importance is not None:
            log_w = log_w + terms.importance.log().clamp(_LOWEST_LOG, _HIGHEST_LOG).sum(-1, keepdim=True)
        log_w = log_w.clamp(_LOWEST_LOG, _HIGHEST_LOG)
        is_good = terms.advantages >= 0
        k = torch.where(is_good, _VESPO_K[True], _VESPO_K[False])
        decay = torch.where(is_good, _VESPO_LAMBDA[True], _VESPO_LAMBDA[False])
        return torch.exp(decay + k * log_w - decay * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _as_ratio(flags_bs: Tensor, terms: Terms) -> Tensor:
    """Return flags of tokens, (b, s) float, or of completions, (b, 1), where the ratio is theirs."""
    flags_bs = flags_bs & (terms.mask > 0)
    return flags_bs.float() if terms.ratio.shape == flags_bs.shape else flags_bs.any(dim=1, keepdim=True).float()


def _of_rows(values: Tensor, terms: Terms) -> Tensor:
    """Return each completion's mean over its tokens, (b, 1)."""
    if values.shape != terms.mask.shape:
        return values
    return (values * terms.mask).sum(dim=1, keepdim=True) / terms.mask.sum(dim=1, keepdim=True).clamp(min=1.0)


@dataclass(frozen=True)
class LossType:
    """A token's loss, (b, s), and what is logged of it by TRL's names, (b, s) or (b, 1).

    corrects: whether the sampler's importance weights multiply it (VESPO's own weight has them).
    """

    token_loss: Callable[[Terms], Tensor]
    metrics: Callable[[Terms], dict[str, Tensor]]
    corrects: bool = True


_CLIPPED = LossType(_clipped, _clip_ratios)
LOSSES: dict[str, LossType] = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), _CLIPPED),
    "cispo": LossType(_cispo, _cispo_clip_ratio),
    "sapo": LossType(_sapo, lambda terms: {}),
    "vespo": LossType(_vespo, lambda terms: {"vespo/phi_seq_mean": _of_rows(_phi(terms), terms)}, corrects=False),
}


def token_weights(train: TrainConfig, mask_bs: Tensor, num_micro_batches: int, num_tokens: int) -> Tensor:
    """Return by how much each token of a micro-batch counts in a step's loss, (b, s); 0 outside the completions.

    num_micro_batches, num_tokens: of the whole step, over all replicas; tokens of completions. By loss type a mean over
    completions of means over tokens (grpo, sapo) or of sums (luspo), a mean over the tokens of the micro-batch (bnpo)
    or of the step (dapo, cispo, vespo), or a sum over a constant (dr_grpo).
    """
    num_rows = len(mask_bs) * num_micro_batches
    divisor: float | Tensor
    match train.loss_type:
        case "grpo" | "sapo":
            divisor = mask_bs.sum(-1, keepdim=True).clamp(min=1) * num_rows
        case "luspo":
            divisor = num_rows
        case "bnpo":
            divisor = max(float(mask_bs.sum()), 1.0) * num_micro_batches
        case "dr_grpo":
            divisor = num_rows * train.max_completion_length
        case _:
            divisor = max(num_tokens, 1)
    return mask_bs.float() / divisor
