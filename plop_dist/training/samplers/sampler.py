"""What a sampler is: it writes the completions of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Prompt:
    """Tokens that are to be completed. row: its number among the completions of the generation, over all replicas."""

    ids: list[int]
    row: int


@dataclass(frozen=True)
class Completion:
    """The tokens that were sampled, with the one that ends the text if it came.

    log_probabilities: of each token, where another program than the trained model has sampled them.
    """

    ids: list[int]
    log_probabilities: list[float] | None = None


class Sampler(Protocol):
    """What SAMPLERS of the registry name: called with the engine, the configuration and the tokenizer."""

    def sample(self, prompts: Sequence[Prompt], generation: int) -> list[Completion]:
        """Return a completion of each of this replica's prompts, the same on every rank of the replica.

        generation: counts from 0 how often completions were sampled. Collective over all ranks; every replica passes
        the same number of prompts.
        """
        ...

    def close(self) -> None:
        """Give back what the sampler holds outside this process. Each rank by itself; after a failure as well."""
        ...
