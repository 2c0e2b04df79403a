"""Whether a configuration leads to a run: what stands in its way, what is doubtful, and what would be done next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plop_dist.checkpoints.folder import find_weights_folder
from plop_dist.choose.policy import policy_of
from plop_dist.config.schema import Config
from plop_dist.costs.possible import Possible, possible_placements
from plop_dist.data.images import has_images
from plop_dist.errors import (
    ConfigError,
    DataError,
    ExportError,
    LayoutError,
    ModelError,
    PlacementError,
    PlopError,
    RankError,
    UserError,
)
from plop_dist.exporters.exporter import find_exporter
from plop_dist.registry import BACKENDS, EXTERNAL_ENGINES, load, names
from plop_dist.rundir.stages import Stages
from plop_dist.training.data import check_prompts, check_readable, encode, ids_of_prompts, prompts_of, split_rows
from plop_dist.training.external.handover import check_rows
from plop_dist.training.grpo.checks import check_fills_a_step
from plop_dist.training.image_data import check_keys
from plop_dist.training.train import check_task, check_trainable, engine_name
from plop_dist.values.adapter_ranks import oversized_ranks
from plop_dist.values.placement import Placement
from plop_dist.values.scores import ModelInfo, Projection


@dataclass(frozen=True)
class DataFacts:
    """The rows to be scored, as far as they are known.

    num_rows: all that there are; lengths: their tokens before anything is cut off (None: not tokenised).
    """

    num_rows: int
    lengths: tuple[int, ...] | None

    def cut(self, most: int) -> tuple[int, float]:
        """Return how many samples are longer than so many tokens, and the share of all tokens that they lose."""
        lengths = self.lengths or ()
        lost = sum(max(0, length - most) for length in lengths)
        return sum(length > most for length in lengths), lost / max(1, sum(lengths))


@dataclass(frozen=True)
class Verdict:
    """What `check` says in the end.

    problems: what `run` would fail at, each with its remedy, none where the configuration is OK; warnings: what it
    would do otherwise than may be meant; choice, exports, stages: what is decided before anything is scored.
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    choice: str | None = None
    parameters: tuple[int, int] | None = None
    exports: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether nothing that can be known now stands in the way of a run."""
        return not self.problems

    @property
    def line(self) -> str:
        """The verdict in one line."""
        if self.is_ok:
            return "OK" if not self.warnings else f"OK, with {_counted(len(self.warnings), 'warning')}"
        return f"not OK: {_counted(len(self.problems), 'thing')} to change"


def judge(
    config: Config,
    projections: Sequence[Projection],
    model: ModelInfo,
    data: DataFacts | None,
    tokenizer: object,
    absent: Sequence[str],
) -> Verdict:
    """Return the verdict on a configuration whose model and data could be read.

    data: None on a hub, where nothing was looked at; tokenizer: None where there is none; absent: what else the model's
    folder lacks, as sentences.
    """
    problems = [*absent, *checkpoint_problem(config)]
    warnings: list[str] = []
    if data is not None:
        if tokenizer is None:
            problems.append("No tokenizer beside config.json: samples were not tokenised; scoring needs one.")
        _judge_rows(config, data, problems, warnings)
        _judge_training_rows(config, tokenizer, model, projections, problems)
    try:
        possible = possible_placements(projections, config.placement, model)
    except (PlacementError, ConfigError) as error:
        problems += _refusals(config, projections, model, error)
        return Verdict(tuple(problems), tuple(warnings), stages=_stages(config))
    _judge_ranks(possible, warnings)
    exports = tuple(_judge_export(name, config, possible, problems, warnings) for name in _targets(config))
    return Verdict(
        problems=tuple(problems),
        warnings=tuple(warnings),
        choice=_choice(config, possible),
        parameters=possible.parameters,
        exports=exports,
        stages=_stages(config),
    )


def _refusals(config: Config, projections: Sequence[Projection], model: ModelInfo, first: PlopError) -> list[str]:
    """Return the first refusal, and what else would be refused if all candidates were chosen."""
    every = config.placement.model_copy(update={"policy": "all", "granularity": "type"})
    try:
        possible_placements(projections, every, model)
    except RankError as error:
        return [str(error)] if isinstance(first, RankError) else [str(first), str(error)]
    except (PlacementError, ConfigError):
        pass
    return [str(first)]


def is_on_hub(path: str) -> bool:
    """Tell whether rows can only be a datasets id: nothing local has the name, and it is not spelt as a file."""
    is_spelt_as_file = path.startswith((".", "/", "~")) or Path(path).suffix[1:].isalpha()
    return not (path.startswith("builtin:") or is_spelt_as_file or Path(path).exists())


def checkpoint_problem(config: Config) -> list[str]:
    """Return what is wrong with the folder of model.checkpoint, as far as its files' names say it."""
    if config.model.checkpoint is None:
        return []
    try:
        _, kind = find_weights_folder(config.model.checkpoint)
    except ModelError as error:
        return [str(error)]
    backend = config.parallel.backend
    if (kind == "megatron") != (backend == "megatron"):
        writer, reader = ("Megatron", "megatron") if kind == "megatron" else ("DeepSpeed", "deepspeed")
        return [
            f"model.checkpoint '{config.model.checkpoint}' is {writer}'s, but parallel.backend is {backend}; set "
            f"parallel.backend={reader}."
        ]
    return []


def _judge_rows(config: Config, data: DataFacts, problems: list[str], warnings: list[str]) -> None:
    wanted, there = config.data.num_samples, data.num_rows
    if there < wanted:
        text = f"data.num_samples is {wanted}, but {config.data.path} has {_counted(there, 'row')}; "
        if "num_samples" in config.data.model_fields_set:
            problems.append(f"{text}set data.num_samples={there}, or give more rows.")
        else:
            warnings.append(f"{text}all of them are scored.")
    num_cut, share = data.cut(config.data.max_length)
    if num_cut:
        warnings.append(
            f"{num_cut} of {len(data.lengths or ())} samples are longer than data.max_length "
            f"({config.data.max_length}) and lose {share:.0%} of all tokens; the longest has "
            f"{max(data.lengths or (0,)):,}."
        )


def _judge_training_rows(
    config: Config, tokenizer: object, model: ModelInfo, projections: Sequence[Projection], problems: list[str]
) -> None:
    others = [path for path in (config.train.data_path, config.train.eval_path) if path is not None]
    if config.train.method == "none":
        return
    try:
        check_trainable(config)
    except UserError as error:
        problems.append(str(error))
    if any(map(is_on_hub, others)):
        return
    try:
        check_task(config, model, projections if config.placement.experts else ())
        rows, held_out = split_rows(config)
        if any(has_images(row_set.rows, row_set.data) for row_set in (rows, held_out)):
            _judge_images(config)
            return
        if tokenizer is None:
            return
        if config.train.method == "sft":
            examples = [example for one in (rows, held_out) for example in encode(one, config.train, tokenizer)]
            check_readable(config, max(len(example.input_ids) for example in examples))
        elif config.train.engine in names(EXTERNAL_ENGINES):
            check_rows(config, rows, held_out, tokenizer)
        else:
            if engine_name(config) == "trl":
                check_fills_a_step(config, rows, "trl")
            prompt_ids = ids_of_prompts(rows, prompts_of(rows, config.train, tokenizer), tokenizer)
            check_prompts(config, rows, prompt_ids)
    except (DataError, ConfigError, LayoutError) as error:
        problems += [str(error)] if str(error) not in problems else []


def _judge_images(config: Config) -> None:
    """Raise ConfigError where rows with images are not trained on."""
    if config.train.method != "sft" or load(BACKENDS, config.parallel.backend).training_engine(config) != "trl":
        raise ConfigError(
            f"the rows have images, which train.method={config.train.method} does not read in this layout; use "
            "train.method=sft with backend transformers or deepspeed (ZeRO)."
        )
    check_keys(config)


def _judge_ranks(possible: Possible, warnings: list[str]) -> None:
    most: dict[str, str] = {}
    for placement in possible.placements:
        for item in oversized_ranks(placement.chosen, placement.rank_of):
            most[item.type] = f"{item.type} (rank {item.rank}, {item.most} at most)"
    if most:
        warnings.append(
            f"If they are chosen, adapters have a higher rank than any update of their weights can have: "
            f"{', '.join(most.values())}; lower placement.rank, or give these types less in placement.rank_pattern."
        )


def _targets(config: Config) -> list[str]:
    # TRL's trainers adapt with PEFT, whatever is exported.
    trains = config.train.method != "none" and load(BACKENDS, config.parallel.backend).training_engine(config) == "trl"
    return list(dict.fromkeys([*config.export.targets, *(["peft"] if trains else [])]))


def _judge_export(target: str, config: Config, possible: Possible, problems: list[str], warnings: list[str]) -> str:
    """Return in a line what a target can express of the possible choices; none of them is a problem."""
    refused: list[str] = []
    only_widened = 0
    for placement in possible.placements:
        try:
            only_widened += bool(_export(target, placement, config))
        except ExportError as error:
            refused.append(str(error))
    num_possible = len(possible.placements)
    if not refused:
        how = f", {only_widened} of {num_possible} by adapting more (export.widen)" if only_widened else ""
        return f"{target}: every choice{how}"
    (text, count), *_ = Counter(refused).most_common(1)
    if len(refused) == num_possible:
        problems.append(f"export target {target} can express none of the possible choices, e.g.: {text}")
        return f"{target}: no choice"
    more = "" if config.export.widen else " without export.widen=true"
    warnings.append(
        f"export target {target} cannot express {len(refused)} of {num_possible} possible choices{more}, e.g. "
        f"({count} of them): {text}"
    )
    return f"{target}: {num_possible - len(refused)} of {num_possible} possible choices"


def _export(target: str, placement: Placement, config: Config) -> tuple[str, ...]:
    wanted = config.export
    engine = wanted.engine if target in wanted.targets else None
    return find_exporter(target).export(placement, engine=engine, widen=wanted.widen).widened


def _choice(config: Config, possible: Possible) -> str:
    placement = config.placement
    names = ", ".join(possible.placements[0].module_types)
    if len(possible.placements) == 1 and possible.is_every:
        return f"{placement.policy}: {names}"
    number = f"{placement.k} of " if "k" in policy_of(placement).parameters else "some of "
    unit = f"{placement.granularity}s"
    return f"{placement.policy}: {number}{possible.num_units} {unit}, known once they are scored"


def _stages(config: Config) -> tuple[str, ...]:
    """Return what `run` would do now, each stage with the reason, and what it would keep."""
    stages = Stages(config)
    wanted = ["score", "place", "export", *(["train"] if config.train.method != "none" else [])]
    lines, runs = [], False
    for stage in wanted:
        reason = stages.reason_to_run(stage)
        if reason is None and runs:
            reason = "what it depends on is made anew"
        runs = runs or reason is not None
        lines.append(f"{stage}: {'kept' if reason is None else reason}")
    return tuple(lines)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
