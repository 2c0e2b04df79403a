"""What is decided and handed on: the placement, and what an exporter makes of it. Immutable, equal to its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, field_validator

from plop_dist.errors import ScoresError
from plop_dist.registry import EXPORTERS, METHODS, load, missing_extra
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.files import write_json
from plop_dist.values.scores import ModuleScore, Projection, Scores, Value, read_value

PLACEMENT_SCHEMA = "plop-dist/placement/1"

_MAX_RANK = 1 << 20  # the configuration's own limit


class Placement(Value):
    """Where the adapters go: what placing returns, and what placement.json holds.

    `modules` are logical paths, in natural order; `module_types` the types they belong to, lowest NFN first;
    `rank_pattern` maps a type or path to a rank other than `rank`. The scores it was drawn from ride along for the
    exporters (what else exists in the model, what is fused into what); `scores_digest` tells them from later ones.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)
    schema_: Literal["plop-dist/placement/1"] = Field("plop-dist/placement/1", alias="schema")
    policy: dict[str, Any]
    module_types: tuple[str, ...] = Field(min_length=1)
    modules: tuple[str, ...] = Field(min_length=1)
    rank: int = Field(ge=1, le=_MAX_RANK)
    alpha: float = Field(gt=0, lt=1e9)
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=_MAX_RANK)]] = Field(default_factory=dict)
    num_trainable_parameters: int = Field(ge=0)
    selection_confidence: float | None = Field(None, ge=0, le=1)
    scores: str = "scores.json"
    scores_digest: str | None = None
    diagnostics: tuple[str, ...] = ()
    _source: Scores | None = PrivateAttr(default=None)

    @field_validator("policy")
    @classmethod
    def _check_names(cls, policy: dict[str, Any]) -> dict[str, Any]:
        # The other keys are shown or compared; these two are put into what exporters advise.
        for key in ("exclude", "include"):
            names = policy.get(key, [])
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{key} must be a list of names")
        return policy

    @property
    def source(self) -> Scores:
        """The scores this placement was drawn from. Raises ScoresError when they are not at hand."""
        if self._source is None:
            raise ScoresError(f"The placement was read without its scores; keep {self.scores} beside placement.json.")
        return self._source

    @property
    def has_source(self) -> bool:
        """Whether the scores it was drawn from are at hand."""
        return self._source is not None

    @property
    def is_of_older_scores(self) -> bool:
        """Whether the scores beside it have become others since; not known of placements that keep no digest."""
        return self.scores_digest not in (None, self.source.digest)

    def with_source(self, scores: Scores) -> Placement:
        """Return the same placement carrying the scores it was drawn from."""
        copy = self.model_copy()
        copy._source = scores
        return copy

    @property
    def chosen(self) -> tuple[ModuleScore, ...]:
        """The scored modules that get an adapter, in natural order."""
        wanted = set(self.modules)
        return tuple(module for module in self.source.modules if module.fqn in wanted)

    def rank_of(self, module: Projection) -> int:
        """Return the LoRA rank of one module: its own path's entry in rank_pattern, its type's, or the common rank."""
        return self.rank_pattern.get(module.fqn, self.rank_pattern.get(module.type, self.rank))

    def __str__(self) -> str:
        return load(METHODS, "Placement.text")(self)

    def __repr__(self) -> str:
        types = ", ".join(self.module_types)
        return f"Placement({types}: {len(self.modules):,} modules, rank {self.rank})"

    def _repr_html_(self) -> str:
        return load(METHODS, "Placement.html")(self)

    def explain(self) -> Any:
        """Return why each type is in or out, to look at: printed in a shell, shown in a notebook.

        Raises ScoresError where the scores that it was drawn from are not at hand.
        """
        return load(METHODS, "Placement.explain")(self)

    def to_file(self, path: str | Path) -> None:
        """Write placement.json atomically."""
        write_json(Path(path), self.model_dump(mode="json", by_alias=True))

    @classmethod
    def from_file(cls, path: str | Path) -> Placement:
        """Return the placement of a file together with the scores it names.

        Raises ScoresError if either file is malformed or they do not belong together.
        """
        target = Path(path)
        placement = read_value(cls, PLACEMENT_SCHEMA, target, what="placement", remedy="run plop-dist place first")
        beside = Path(placement.scores).name
        if not beside:
            raise ScoresError(f"{target}: scores is '{placement.scores}', expected the name of a file beside it.")
        scores = Scores.from_file(target.with_name(beside))
        known = {module.fqn for module in scores.modules}
        if len(set(placement.modules)) < len(placement.modules):
            raise ScoresError(f"{target}: modules are listed twice; the file was edited: run plop-dist place again.")
        foreign = [fqn for fqn in placement.modules if fqn not in known]
        if foreign:
            raise ScoresError(
                f"{target}: module '{foreign[0]}' is not in {placement.scores} of model "
                f"'{scores.model.name_or_path}'; the placement is for another model: run plop-dist place again."
            )
        placement = placement.with_source(scores)
        odd = sorted({module.type for module in placement.chosen} ^ set(placement.module_types))
        if odd:
            raise ScoresError(
                f"{target}: modules and module_types disagree about '{odd[0]}'; the file was edited: run plop-dist "
                "place again."
            )
        names = {*placement.modules, *placement.module_types}
        odd = [name for name in placement.rank_pattern if name not in names]
        if odd:
            raise ScoresError(
                f"{target}: rank_pattern '{odd[0]}' is no chosen type or module; the file was edited: run plop-dist "
                "place again."
            )
        count = num_trainable_parameters(placement.chosen, placement.rank_of, scores.left_out)
        if placement.num_trainable_parameters != count:
            raise ScoresError(
                f"{target}: num_trainable_parameters is {placement.num_trainable_parameters:,}, but its modules and "
                f"ranks have {count:,}; the file was edited: run plop-dist place again."
            )
        return placement

    def to_peft(self, **options: Any) -> Any:
        """Return a peft.LoraConfig. Options (r, lora_alpha, lora_dropout, ...) go to LoraConfig as they are.

        Raises ExportError when PEFT cannot adapt exactly these modules, MissingExtraError when it is not installed; so
        do the other two for their frameworks.
        """
        return _config("peft", self, options)

    def to_megatron(self, **options: Any) -> Any:
        """Return a Megatron-Bridge PEFT object (LoRA, or our CanonicalLoRA where a fused linear is taken in part).

        Options are its fields (dim, alpha, dropout, ...) or PEFT's names of them (r, lora_alpha, lora_dropout).
        Without Transformer Engine Bridge is imported with a stub in its place, as the log says.
        """
        return _config("megatron-bridge", self, options)

    def to_deepspeed(self, **options: Any) -> Any:
        """Return a deepspeed.linear.LoRAConfig; options are its fields, or r.

        Raises ExportError when its substring match would adapt others.
        """
        return _config("deepspeed", self, options)

    def apply(self, model: Any, **options: Any) -> Any:
        """Put the adapters on a host's model and return what is trained from here on. Collective over the world.

        model: as plop_dist.score takes it: plain or in DDP (a PEFT model, in a new DDP), under fully_shard (the same
        module), a DeepSpeed engine of ZeRO 0 to 3, AutoTP or a pipeline (a new engine), under transformers' tensor
        parallelism (a PEFT model), Megatron's chunks (the same, in a new DDP where they were in one), or what Fabric's
        setup returned (the same). Only adapters need gradients in what comes back; give its optimizer those. Replicas
        begin with the same adapters. options go to LoraConfig (r, lora_alpha, lora_dropout, use_rslora, use_dora,
        ...), without them the placement's rank and alpha.

        Raises LayoutError for options that a layout's adapters do not have, by name, and where the ranks' placements
        differ; ModelError for a model that has adapters; ExportError, PlacementError as to_peft.
        """
        return load(METHODS, "Placement.apply")(self, model, **options)


@dataclass(frozen=True)
class Export:
    """What an exporter returns: files (relative path -> text) and the lines to paste; pure, nothing is written.

    flags: the command-line flags or overrides, one per entry; notes: what the user should know (what was widened,
    which ranks could not be expressed); warnings: what servers would lose of the trained adapter.
    """

    target: str
    files: Mapping[str, str]
    flags: tuple[str, ...]
    notes: tuple[str, ...] = ()
    widened: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    @property
    def remarks(self) -> tuple[tuple[str, str], ...]:
        """What is said of the export where it is written: ("note" or "warning", sentence) each."""
        notes = (*self.notes, *(f"widened: {item}" for item in self.widened))
        return (*(("note", note) for note in notes), *(("warning", warning) for warning in self.warnings))


def _config(target: str, placement: Placement, options: Mapping[str, Any]) -> Any:
    try:
        return load(EXPORTERS, target).to_config(placement, **options)
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"a configuration for {target}") from error
