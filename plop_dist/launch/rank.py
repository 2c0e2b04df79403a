"""What one rank does from beginning to end: load, score, place, export, train. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from plop_dist import ranks
from plop_dist.config.schema import Config
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import plan_steps, select_rows, step_micro_batches, tokenize
from plop_dist.errors import PlopError, ScoresError, WorkerError
from plop_dist.measure.aggregate import check_weights
from plop_dist.measure.protocols import ScorableModel
from plop_dist.registry import BACKENDS, TRAINERS, load
from plop_dist.rundir import progress
from plop_dist.rundir.layout import RunDir, stage_inputs
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

Notify = Callable[..., None]


def run_rank(config: Config, stages: Sequence[str], notify: Notify, *, force: bool = False) -> None:
    """Run the stages that are not done yet on this rank; rank 0 writes results. Collective over all ranks.

    notify(kind, **fields) is called on rank 0 only. force: run them also when their results are there.
    Raises UserError for bad input and WorkerError, naming the rank, for anything unforeseen.
    """
    _be_quiet()
    with ranks.joined(config) as rank:
        tell = notify if rank == 0 else _nothing
        for stage in stages:
            try:
                reason = ranks.agree(lambda stage=stage: reason_to_run(config, stage))
                if reason is None and not force:
                    if rank == 0:
                        tell("status", text=f"{stage}: done before, kept{_by_hand(config) if stage == 'place' else ''}")
                    continue
                tell("stage", stage=stage, text=f"{stage}: runs because {reason or 'it was asked for'}")
                _STAGES[stage](config, rank, tell)
            except PlopError:
                raise
            except Exception as error:
                raise WorkerError(f"rank {rank}: {stage} failed: {type(error).__name__}: {error}") from error


def reason_to_run(config: Config, stage: str) -> str | None:
    """Return why a stage must run, or None if its result is there and still fits the configuration."""
    return RunDir(config.run_dir).reason_to_run(stage, stage_inputs(stage, config))


def score(config: Config, rank: int, notify: Notify) -> Scores:
    """Score the configured model on the configured data; rank 0 writes scores.json. Collective over all ranks."""
    from plop_dist.backends.hf.load import check_vocabulary, load_tokenizer
    from plop_dist.measure.run import Pass, score_model

    run_dir = RunDir(config.run_dir)
    # Data before weights: a typo in a column name should not cost the minutes that loading takes.
    tokenizer = load_tokenizer(config.model)
    samples = tokenize(select_rows(load_rows(config.data.path, config.data.split), config.data), config.data, tokenizer)
    check_vocabulary(config.model, max(map(max, filter(None, samples))))
    loading = f"loading {config.model.name_or_path} with {config.parallel.backend}"
    notify("status", text=f"{_samples_text(samples, config.data.num_samples)}; {loading}")
    model: ScorableModel = load(BACKENDS, config.parallel.backend).load(config)
    groups = model.groups
    plan = plan_steps(
        [len(sample) for sample in samples],
        config.data.batch_size,
        groups.num_replicas,
        model.micro_batches_per_step,
        uniform=groups.uniform_steps,
        in_order=config.estimator.stop_when_stable,
    )
    side = tokenizer.padding_side if config.data.padding_side == "auto" else config.data.padding_side
    done_after = _cumulative(plan)
    inputs = stage_inputs("score", config)
    key = progress.fingerprint([inputs, progress.hash_samples(samples)])
    scores = score_model(
        model,
        Pass(
            num_steps=len(plan),
            micro_batches=lambda step: step_micro_batches(
                samples, plan[step], groups.replica, pad_id=tokenizer.pad_token_id, side=side
            ),
            num_samples=len(samples),
            samples_after=lambda step: done_after[step],
            log=progress.ProgressLog(run_dir.path, key, rank),
        ),
        estimator=config.estimator,
        placement=config.placement,
        info={
            "model": {"name_or_path": config.model.name_or_path, **model.describe()},
            "data": {"source": config.data.path, "max_length": config.data.max_length},
            "parallel": config.parallel.model_dump(),
        },
        notify=notify,
    )
    if rank == 0:
        scores.to_file(run_dir.scores)
        progress.clear(run_dir.path)
    model.release()
    check_weights(scores)
    if rank == 0:
        run_dir.finish("score", inputs, [run_dir.scores.name])
    return scores


def place(config: Config, rank: int, notify: Notify) -> Placement:
    """Choose the targets from scores.json; rank 0 writes placement.json."""
    from plop_dist.choose.place import place as choose

    run_dir = RunDir(config.run_dir)
    ranks.barrier()
    placement = choose(Scores.from_file(run_dir.scores), config.placement)
    if rank == 0:
        placement.to_file(run_dir.placement)
        run_dir.finish("place", stage_inputs("place", config), [run_dir.placement.name])
        notify("status", text=f"LoRA targets: {', '.join(placement.module_types)}")
    return placement


def export(config: Config, rank: int, notify: Notify) -> None:
    """Write the placement for every target of export.targets; rank 0 does it."""
    from plop_dist.exporters.write import write_export

    run_dir = RunDir(config.run_dir)
    if rank == 0:
        placement = Placement.from_file(run_dir.placement)
        written = []
        for target in config.export.targets:
            engine = config.export.engine
            export = write_export(placement, target, run_dir.exports, engine=engine, widen=config.export.widen)
            written += [f"exports/{target}/{name}" for name in export.files]
        run_dir.finish("export", stage_inputs("export", config), written)
        notify("status", text=f"exported to {', '.join(written)}")


def train(config: Config, rank: int, notify: Notify) -> None:
    """Go on with train.method and the placement in the same ranks. Collective over all ranks."""
    from plop_dist.training.log import TrainingLog

    run_dir = RunDir(config.run_dir)
    ranks.barrier()
    placement = Placement.from_file(run_dir.placement)
    trainer = load(TRAINERS, config.train.method)
    with TrainingLog(config, run_dir.train, notify if rank == 0 else None) as log:
        summary: dict[str, Any] = trainer(config, placement, log)
        log.finish(summary)
    if rank == 0:
        # A job that the driver starts later has trained once it has left its mark.
        outputs = ["train/summary.json", *(["train/job.json"] if "job" in summary else [])]
        run_dir.finish("train", stage_inputs("train", config), outputs)


_STAGES: dict[str, Callable[[Config, int, Notify], Any]] = {
    "score": score,
    "place": place,
    "export": export,
    "train": train,
}


def _be_quiet() -> None:
    """Keep other packages' bars and deprecation notes out of a log that people read."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _by_hand(config: Config) -> str:
    """Return how the placement that is kept differs from the configuration, if `plop-dist place` has chosen it."""
    run_dir = RunDir(config.run_dir)
    with suppress(ScoresError):  # export and train, which need it, say what is wrong with it
        policy, wanted = Placement.from_file(run_dir.placement).policy, config.placement.model_dump(mode="json")
        changed = [name for name in wanted if policy.get(name) != wanted[name]]
        if changed:
            chosen = ", ".join(f"{name} {policy.get(name)} (here {wanted[name]})" for name in changed)
            return (
                f" as plop-dist place has chosen it, with {chosen}; to place as configured here, delete "
                f"{run_dir.placement}"
            )
    return ""


def _samples_text(samples: Sequence[Sequence[int]], num_wanted: int) -> str:
    num_empty = sum(not sample for sample in samples)
    fewer = f" (all rows: fewer than data.num_samples, {num_wanted})" if len(samples) < num_wanted else ""
    return f"{len(samples)} samples{fewer}" + (f", {num_empty} of them without a token" if num_empty else "")


def _cumulative(plan: list[list[list[list[int]]]]) -> list[int]:
    done, total = [], 0
    for step in plan:
        total += sum(len(micro) for replica in step for micro in replica)
        done.append(total)
    return done


def _nothing(kind: str, **fields: Any) -> None:
    pass
