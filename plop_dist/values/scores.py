"""What scoring finds: projections, modules, scores. Immutable, equal to their files."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from plop_dist.errors import ScoresError
from plop_dist.registry import METHODS, load, needing_extras
from plop_dist.values.expected import expected
from plop_dist.values.files import json_bytes, no_pipe, read_json, write_together
from plop_dist.values.sample_totals import SAMPLES_FILE, SampleTotals
from plop_dist.values.visible import may_hide_something

SCORES_SCHEMA = "plop-dist/scores/1"

Storage = Literal["linear", "conv1d", "fused", "expert_parameter", "router", "other"]
Role = Literal["router", "recurrent", "kernel"]
# What of a model that reads more than text a module belongs to; a model of text alone is all language.
ModelPart = Literal["language", "vision", "audio", "projector"]
# No linear is wider; parameters of 2^15 modules at the highest rank, 2^20, then still are whole numbers of 64 bits.
Features = Annotated[int, Field(gt=0, le=1 << 26)]
# No module's path comes near it; some exporters look at every part of a name.
Name = Annotated[str, Field(max_length=512)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

_T = TypeVar("_T", bound=BaseModel)


class Value(BaseModel):
    """What all values have in common: immutable, and fields that this version does not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)

    def __dir__(self) -> list[str]:
        """Return the fields and what this package's classes define: what pydantic adds stays out of the way."""
        own = (vars(cls) for cls in type(self).__mro__ if cls.__module__.split(".")[0] == "plop_dist")
        names = {name for defined in own for name in defined if name[0] != "_" and not hasattr(BaseModel, name)}
        return sorted({*type(self).model_fields, *names, *object.__dir__(object())})


class Projection(Value):
    """One logical linear map of the model under its Hugging Face name, whatever the backend fuses or renames.

    in_features and out_features are global. `storage` says how the Hugging Face model holds the weight: `linear` (its
    own nn.Linear at `fqn`), `conv1d` (its own module, weight transposed), `fused` (rows of the larger linear at
    `stored_in`), `expert_parameter` (one slice of the 3-D parameter at `stored_in`),
    `router` (the weight of a module at `fqn` that does or keeps more than W z, so that no adapter fits it), `other`
    (the parameter at `stored_in`, of a kind that is not known).

    role: `router` (steers tokens to experts), `recurrent` (in a state-space, linear-attention or short-convolution
    layer), `kernel` (such a one whose weight is read past any adapter, so that PEFT refuses it), None for all others.
    part: what the module belongs to; types of other parts than language begin with it (`vision.q_proj`).
    """

    fqn: Name
    type: Name
    layer: int | None = None
    in_features: Features
    out_features: Features
    storage: Storage = "linear"
    stored_in: Name | None = None
    role: Role | None = None
    part: ModelPart = "language"

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

    No token, only non-finite tokens, non-finite or zero weights, a module that does not do W z on each token (it
    pools, sees other things than the text's tokens, or applies parts of W), or a weight that multiplies activations
    and is stored or used in a manner that is not known.
    """

    reason: Literal[
        "no_tokens", "non_finite_activations", "non_finite_weights", "zero_weights", "not_per_token", "unknown_kind"
    ]
    num_skipped_tokens: int = 0


class TypeScore(Value):
    """Mean NFN over the modules of one type, with the 95% bootstrap interval over calibration samples (or null)."""

    type: str
    num_modules: int = Field(ge=1)
    nfn: float = Field(ge=0, allow_inf_nan=False)
    nfn_ci95: tuple[Finite, Finite] | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of a type that has one."""
        assert self.nfn_ci95 is not None, f"{self.type} has no interval"
        return self.nfn_ci95


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


class Scores(Value):
    """What scoring returns: scores.json, and the per-sample sums beside it.

    `modules` has an entry for each projection that was scored, under its Hugging Face name, `left_out` those without
    a score, with the reason; `types` are their means over the layers, lowest NFN first, which is the order in which
    `place` chooses. `model`, `data`, `estimator` and `parallel` say what was scored and how, `timing` what it took.
    """

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
    def digest(self) -> str:
        """What tells these scores from others: a short hash of every module's path and NFN, not of times or places."""
        found = hashlib.sha256()
        for module in self.modules:
            found.update(f"{module.fqn} {module.nfn!r}\n".encode())
        return found.hexdigest()[:16]

    @property
    def samples(self) -> SampleTotals | None:
        """Per-sample sums, or None where only scores.json is at hand (then nothing can be bootstrapped)."""
        return self._samples

    def with_samples(self, samples: SampleTotals | None) -> Scores:
        """Return the same scores carrying these per-sample sums."""
        copy = self.model_copy()
        copy._samples = samples
        return copy

    def __str__(self) -> str:
        return load(METHODS, "Scores.text")(self)

    def __repr__(self) -> str:
        return f"Scores({self.model.name_or_path}: {len(self.modules):,} modules of {len(self.types)} types)"

    def _repr_html_(self) -> str:
        return load(METHODS, "Scores.html")(self)

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with a row per module: fqn, type, layer, sizes, tokens, gain, baseline, nfn.

        Raises MissingExtraError where pandas is not installed.
        """
        with needing_extras("scores.to_pandas()"):
            import pandas

        return pandas.DataFrame([module.model_dump() for module in self.modules])

    def plot(self, placement: Any = None) -> Any:
        """Return the report's chart of NFN per type, to look at in a notebook or to save(path) as HTML.

        placement: a Placement, whose types are marked.
        """
        return load(METHODS, "Scores.plot")(self, placement)

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
        scores = read_value(cls, SCORES_SCHEMA, target, what="scores", remedy="run plop-dist score first")
        _check_scores(scores, target)
        samples_file = target.with_name(SAMPLES_FILE)
        if not samples_file.is_file():
            return scores
        samples = SampleTotals.read(samples_file)
        _check_samples(scores, samples, target)
        return scores.with_samples(samples)


def read_value(cls: type[_T], schema: str, path: Path, what: str, remedy: str) -> _T:
    """Return the value that a file holds. Raises ScoresError naming path, field and value, and the remedy."""
    try:
        content = no_pipe(path).read_bytes()
        value = cls.model_validate_json(content)
        if "schema_" in value.model_fields_set and not may_hide_something(content.decode()):
            return value
    except (OSError, ValueError):
        pass
    # Read again, slower, to say what is wrong.
    return _parse_value(cls, schema, read_json(path, what, remedy), path)


def _parse_value(cls: type[_T], schema: str, tree: Any, path: Path) -> _T:
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
        raise ScoresError(
            f"{path}: {where}: expected {expected(first)}, found {str(first['input'])[:80]!r}{more}."
        ) from error


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
    listed = Counter(entry.type for entry in scores.types)
    if listed != Counter(dict.fromkeys(by_type, 1)):
        odd = sorted(set(listed) ^ set(by_type)) or sorted(name for name, count in listed.items() if count > 1)
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
    row_M = samples.rows_of(module.fqn for module in scores.modules).tolist()
    tokens, gains = samples.num_tokens.sum(axis=1).tolist(), samples.gain_total.sum(axis=1).tolist()
    for index, (module, row) in enumerate(zip(scores.modules, row_M, strict=True)):
        num_tokens, gain_total = tokens[row], gains[row]
        gain = gain_total / max(num_tokens, 1)
        # a gain that is NaN is not near either
        if module.num_tokens != num_tokens or not abs(module.gain - gain) <= 1e-6 * max(gain, 1e-30):
            raise ScoresError(
                f"{path}: modules.{index} ('{module.fqn}') has num_tokens {module.num_tokens} and gain {module.gain}, "
                f"but {SAMPLES_FILE} gives {num_tokens} and {gain}; the file was edited: score again."
            )
