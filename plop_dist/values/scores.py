"""What scoring finds: projections, modules, sums per sample, scores. Immutable, equal to their files."""

# M modules, S samples

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from plop_dist.errors import ScoresError
from plop_dist.values.files import array_bytes, json_bytes, read_arrays, read_json, write_bytes, write_together

SCORES_SCHEMA = "plop-dist/scores/1"
SAMPLES_FILE = "samples.safetensors"

Storage = Literal["linear", "conv1d", "fused", "expert_parameter", "router"]


_T = TypeVar("_T", bound=BaseModel)


class Value(BaseModel):
    """What all values have in common: immutable, and fields that this version does not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class Projection(Value):
    """One logical linear map of the model under its Hugging Face name, whatever the backend fuses or renames.

    in_features and out_features are global. `storage` says how the Hugging Face model holds the weight: `linear` (its
    own nn.Linear at `fqn`), `conv1d` (its own module, weight transposed), `fused` (rows of the larger linear at
    `stored_in`), `expert_parameter` (one slice of the 3-D parameter at `stored_in`),
    `router` (the weight of a module at `fqn` that does or keeps more than W z, so that no adapter fits it).
    """

    fqn: str
    type: str
    layer: int | None = None
    in_features: int = Field(gt=0)
    out_features: int = Field(gt=0)
    storage: Storage = "linear"
    stored_in: str | None = None

    @property
    def holder(self) -> str:
        """The Hugging Face module or parameter that a PEFT configuration must name to adapt this projection."""
        return self.stored_in or self.fqn


class ModuleScore(Projection):
    """The NFN of one projection: nfn = gain / baseline.

    gain: mean over num_tokens of ||W z_t|| / ||z_t||. num_skipped_tokens: real tokens left out because ||z_t|| is 0 or
    a value is not finite. baseline: b(W) = E||Wu||; baseline_stderr: its standard error, 0 for exact and closed_form.
    """

    num_tokens: int = Field(ge=1)
    num_skipped_tokens: int = Field(0, ge=0)
    gain: float = Field(ge=0, allow_inf_nan=False)
    baseline: float = Field(gt=0, allow_inf_nan=False)
    baseline_stderr: float = Field(0.0, ge=0, allow_inf_nan=False)
    nfn: float = Field(ge=0, allow_inf_nan=False)


class LeftOut(Projection):
    """A projection without a score and the reason.

    No token, only non-finite tokens, non-finite or zero weights, or a module that does not do W z on each token (it
    pools, sees other things than the text's tokens, or applies parts of W).
    """

    reason: Literal["no_tokens", "non_finite_activations", "non_finite_weights", "zero_weights", "not_per_token"]
    num_skipped_tokens: int = 0


class TypeScore(Value):
    """Mean NFN over the modules of one type, with the 95% bootstrap interval over calibration samples (or null)."""

    type: str
    num_modules: int = Field(ge=1)
    nfn: float = Field(ge=0, allow_inf_nan=False)
    nfn_ci95: tuple[float, float] | None = None


class ModelInfo(Value):
    """Which model was scored."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    name_or_path: str
    architecture: str | None = None
    num_parameters: int | None = None
    dtype: str | None = None


class DataInfo(Value):
    """Which tokens it was scored on."""

    model_config = ConfigDict(frozen=True, extra="allow")
    source: str | None = None
    num_samples: int | None = None
    num_tokens: int | None = None
    max_length: int | None = None


@dataclass(frozen=True, eq=False)
class SampleTotals:
    """Sums per module and sample, from which every mean and every bootstrap resample follows exactly.

    fqns: M paths; sample_ids: (S,) int64; gain_total: (M, S) float64, sum of gain over the sample's tokens;
    num_tokens and num_skipped: (M, S) int64.
    """

    fqns: tuple[str, ...]
    sample_ids: np.ndarray
    gain_total: np.ndarray
    num_tokens: np.ndarray
    num_skipped: np.ndarray

    # The generated comparison would ask arrays for one truth value.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleTotals):
            return NotImplemented
        return self.fqns == other.fqns and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("sample_ids", "gain_total", "num_tokens", "num_skipped")
        )

    __hash__ = None  # type: ignore[assignment]

    def write(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write atomically as safetensors. Raises RunDirError."""
        write_bytes(path, self.to_bytes(metadata))

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Return the content of a safetensors file; the paths are kept in its metadata."""
        arrays = {
            "sample_ids": self.sample_ids,
            "gain_total": self.gain_total,
            "num_tokens": self.num_tokens,
            "num_skipped": self.num_skipped,
        }
        return array_bytes(arrays, {**(metadata or {}), "fqns": json.dumps(self.fqns)})

    @classmethod
    def read(cls, path: Path) -> SampleTotals:
        """Return the totals of a file. Raises ScoresError if it is missing or malformed."""
        arrays, metadata = read_arrays(path)
        try:
            totals = cls(fqns=tuple(json.loads(metadata["fqns"])), **arrays)
            shape = (len(totals.fqns), len(totals.sample_ids))
            if any(array.shape != shape for array in (totals.gain_total, totals.num_tokens, totals.num_skipped)):
                raise ValueError(f"expected sums of shape {shape}")
            return totals
        except (KeyError, TypeError, ValueError) as error:
            raise ScoresError(f"{path} does not hold sample totals ({error}); score again.") from error

    def observed(self) -> SampleTotals:
        """Return the totals of the samples that any module has seen a token of (scoring may have stopped early)."""
        seen = (self.num_tokens + self.num_skipped).any(axis=0)
        return SampleTotals(
            self.fqns,
            self.sample_ids[seen],
            self.gain_total[:, seen],
            self.num_tokens[:, seen],
            self.num_skipped[:, seen],
        )

    def select(self, fqns: Iterable[str]) -> SampleTotals:
        """Return the totals of these modules, in this order. Raises ScoresError naming one that is absent."""
        row = {fqn: index for index, fqn in enumerate(self.fqns)}
        wanted = tuple(fqns)
        absent = [fqn for fqn in wanted if fqn not in row]
        if absent:
            raise ScoresError(f"{SAMPLES_FILE} has no module '{absent[0]}' that scores.json lists; score again.")
        index = np.array([row[fqn] for fqn in wanted], dtype=np.int64)
        return SampleTotals(
            wanted, self.sample_ids, self.gain_total[index], self.num_tokens[index], self.num_skipped[index]
        )


class Scores(Value):
    """What scoring returns; equal to scores.json (design: file contract), plus the per-sample sums beside it."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), populate_by_name=True)
    schema_: Literal["plop-dist/scores/1"] = Field("plop-dist/scores/1", alias="schema")
    model: ModelInfo
    data: DataInfo
    estimator: dict[str, Any]
    parallel: dict[str, Any]
    modules: tuple[ModuleScore, ...] = Field(min_length=1)
    types: tuple[TypeScore, ...] = Field(min_length=1)
    left_out: tuple[LeftOut, ...] = ()
    versions: dict[str, Any] = {}
    timing: dict[str, Any] = {}
    _samples: SampleTotals | None = PrivateAttr(default=None)

    @property
    def samples(self) -> SampleTotals | None:
        """Per-sample sums, or None where only scores.json is at hand (then nothing can be bootstrapped)."""
        return self._samples

    def with_samples(self, samples: SampleTotals | None) -> Scores:
        """Return the same scores carrying these per-sample sums."""
        copy = self.model_copy()
        copy._samples = samples
        return copy

    def to_file(self, path: str | Path) -> None:
        """Write scores.json and the per-sample sums in samples.safetensors beside it: both, or neither."""
        target = Path(path)
        contents = {} if self._samples is None else {target.with_name(SAMPLES_FILE): self._samples.to_bytes()}
        write_together({**contents, target: json_bytes(self.model_dump(mode="json", by_alias=True))})

    @classmethod
    def from_file(cls, path: str | Path) -> Scores:
        """Return the scores of a file, checked against themselves.

        Raises ScoresError saying what is wrong and where: missing, truncated, another schema, a field of the wrong
        type, a type without modules, an nfn that is not gain / baseline, modules that are not those of the per-sample
        sums beside it.
        """
        target = Path(path)
        scores = parse_value(
            cls, SCORES_SCHEMA, read_json(target, what="scores", remedy="run plop-dist score first"), target
        )
        _check_scores(scores, target)
        samples_file = target.with_name(SAMPLES_FILE)
        if not samples_file.is_file():
            return scores
        samples = SampleTotals.read(samples_file)
        _check_samples(scores, samples, target)
        return scores.with_samples(samples)


def parse_value(cls: type[_T], schema: str, tree: Any, path: Path) -> _T:
    """Return the value that a file holds; `tree` is its JSON. Raises ScoresError naming path, field and value."""
    if not isinstance(tree, dict):
        raise ScoresError(f"{path} holds a {type(tree).__name__}, expected an object with schema '{schema}'.")
    if tree.get("schema") != schema:
        raise ScoresError(f"{path}: schema is {tree.get('schema')!r}, but this version reads '{schema}'.")
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ScoresError(f"{path}: {where}: {first['msg']}, found {str(first['input'])[:80]!r}{more}.") from error


def _check_scores(scores: Scores, path: Path) -> None:
    seen: set[str] = set()
    by_type: dict[str, list[float]] = {}
    for index, module in enumerate(scores.modules):
        if module.fqn in seen:
            raise ScoresError(f"{path}: modules.{index}: '{module.fqn}' is listed twice.")
        seen.add(module.fqn)
        by_type.setdefault(module.type, []).append(module.nfn)
        expected = module.gain / module.baseline
        if abs(module.nfn - expected) > 1e-6 * max(expected, 1e-30):
            raise ScoresError(
                f"{path}: modules.{index} ('{module.fqn}'): nfn is {module.nfn}, but gain / baseline is {expected}; "
                "the file was edited: score again."
            )
    listed = [entry.type for entry in scores.types]
    if sorted(listed) != sorted(by_type):
        odd = sorted(set(listed) ^ set(by_type)) or sorted(name for name in listed if listed.count(name) > 1)
        raise ScoresError(f"{path}: types and modules disagree about '{odd[0]}'; the file was edited: score again.")
    for entry in scores.types:
        mean = sum(by_type[entry.type]) / len(by_type[entry.type])
        if entry.num_modules != len(by_type[entry.type]) or abs(entry.nfn - mean) > 1e-6 * max(mean, 1e-30):
            raise ScoresError(
                f"{path}: types: '{entry.type}' says {entry.num_modules} modules with nfn {entry.nfn}, but its modules "
                f"are {len(by_type[entry.type])} with mean {mean}; the file was edited: score again."
            )


def _check_samples(scores: Scores, samples: SampleTotals, path: Path) -> None:
    """Raise ScoresError unless the sums of SAMPLES_FILE give exactly the modules, tokens and gains of the scores."""
    odd = sorted({module.fqn for module in scores.modules} ^ set(samples.fqns))
    if odd:
        raise ScoresError(
            f"{path} and {SAMPLES_FILE} disagree about module '{odd[0]}', which only one of them has; one was edited "
            "or is of another model: score again."
        )
    row = {fqn: index for index, fqn in enumerate(samples.fqns)}
    for index, module in enumerate(scores.modules):
        num_tokens = int(samples.num_tokens[row[module.fqn]].sum())
        gain = float(samples.gain_total[row[module.fqn]].sum()) / max(num_tokens, 1)
        if module.num_tokens != num_tokens or abs(module.gain - gain) > 1e-6 * max(gain, 1e-30):
            raise ScoresError(
                f"{path}: modules.{index} ('{module.fqn}') has num_tokens {module.num_tokens} and gain {module.gain}, "
                f"but {SAMPLES_FILE} gives {num_tokens} and {gain}; the file was edited: score again."
            )
