"""What a comparison has come to: compare.json, read back as what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from plop_dist.values.files import write_json
from plop_dist.values.scores import Value, read_value

COMPARE_SCHEMA = "plop-dist/compare/1"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=4096)]


class ArmRun(Value):
    """One training. value: on the reported half of the held-out rows; choosing: on the other half.

    None where the training diverged or stopped early; choosing also at further seeds, which choose nothing. row_values:
    of each reported row; losses are sums over its tokens in the loss, rewards are themselves.
    """

    learning_rate: Finite
    seed: int
    steps: int
    value: Finite | None
    choosing: Finite | None
    stopped_early: bool = False
    row_values: tuple[Finite, ...] | None = None


class ArmCost(Value):
    """What an arm's training costs besides parameters, measured in the same trainings: tokens of all ranks."""

    tokens_per_second: Finite
    peak_memory_bytes: int


class Arm(Value):
    """One placement with all its trainings. deviation: of its parameters from the budget, as a share of it."""

    arm: Text
    module_types: tuple[Text, ...]
    rank: int
    alpha: Finite
    num_trainable_parameters: int
    deviation: Finite
    learning_rate: Finite
    bracketed: bool
    runs: tuple[ArmRun, ...] = Field(min_length=1)
    value: Finite | None
    cost: ArmCost


class ComparisonOf(Value):
    """The first arm against another one; difference: how much the first is better, in the measure's unit."""

    arm: Text
    against: Text
    difference: Finite | None
    ci95: tuple[Finite, Finite] | None
    p_adjusted: Finite | None
    smallest_detectable: Finite | None
    verdict: Annotated[
        str, Field(max_length=4096, pattern=r"^(better|worse|no difference larger than \S+|undecided, .+)$")
    ]


class CompareCost(Value):
    """All trainings together; seconds: of their steps and of measuring losses on the way, loading left out."""

    runs: int
    steps: int
    seconds: Finite


class RowCounts(Value):
    """How many held-out rows chose the rates, and how many are reported."""

    choosing: int
    reported: int


class Comparison(Value):
    """What compare.json holds. margin: up to this size a difference counts as none.

    row_targets: by how much each reported row counts: its tokens in the loss, or 1 where rows have a reward.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)
    schema_: Literal["plop-dist/compare/1"] = Field(default=COMPARE_SCHEMA, alias="schema")
    method: Text
    measure: Text
    budget: int
    base: Finite
    margin: Finite
    rows: RowCounts
    row_targets: tuple[Finite, ...] = ()
    arms: tuple[Arm, ...] = Field(min_length=1)
    comparisons: tuple[ComparisonOf, ...] = Field(min_length=1)
    cost: CompareCost
    scores_digest: str | None = None
    versions: dict[str, Any] = Field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the measure is in one word: loss or reward."""
        return self.measure.rpartition(" ")[2]

    def to_file(self, path: Path) -> None:
        """Write compare.json atomically."""
        write_json(path, self.model_dump(mode="json", by_alias=True))

    @classmethod
    def from_file(cls, path: Path) -> Comparison:
        """Return what a file holds. Raises ScoresError if it is missing or malformed."""
        remedy = "remove it where it is damaged, and run plop-dist compare, which keeps the trainings that are done"
        return read_value(cls, COMPARE_SCHEMA, path, what="comparison", remedy=remedy)
