"""What one rank does from beginning to end: load, score, place, export, train. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from logging import ERROR, getLogger
from typing import Any

from plop_dist import ranks
from plop_dist.backends.record import check_singly
from plop_dist.config.schema import Config
from plop_dist.data.images import has_images
from plop_dist.data.pairs import PairSamples
from plop_dist.data.processed import ImageRows, ImageSamples
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import plan_steps, select_rows, step_micro_batches, tokenize
from plop_dist.data.singly import ReadSingly
from plop_dist.errors import ExportError, PlopError, ScoresError, WorkerError, as_cause
from plop_dist.launch.builds import bounded_builds
from plop_dist.launch.named import naming_host
from plop_dist.launch.same_files import check_same_files
from plop_dist.measure.aggregate import check_weights
from plop_dist.measure.protocols import MicroBatch, ScorableModel
from plop_dist.registry import BACKENDS, load
from plop_dist.rundir import progress
from plop_dist.rundir.made_from import placement_mark
from plop_dist.rundir.stages import Stages
from plop_dist.rundir.trained import write_trained
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

Notify = Callable[..., None]


def run_rank(stages: Stages, wanted: Sequence[str], notify: Notify, *, force: bool = False) -> None:
    """Run the wanted stages that are not done yet on this rank; rank 0 writes results. Collective over all ranks.

    notify(kind, **fields) is called on rank 0 only. force: run them also when their results are there.
    Raises UserError for bad input and WorkerError, naming the rank, for anything unforeseen.
    """
    _be_quiet()
    with ranks.joined(stages.config) as rank, bounded_builds(stages.config.cluster.start_timeout_s):
        hosts = check_same_files(stages)
        tell = notify if rank == 0 else _nothing
        for stage in wanted:
            with naming_host(hosts, rank):
                try:
                    _run_stage(stage, stages, tell, force)
                except PlopError:
                    raise
                except Exception as error:
                    failed = f"rank {rank}: {stage} failed: {type(error).__name__}: {error}"
                    raise WorkerError(failed) from as_cause(error)


def _run_stage(stage: str, stages: Stages, notify: Notify, force: bool) -> None:
    reason = ranks.agree(lambda: stages.reason_to_run(stage))
    if reason is None and not force:
        by_hand = _by_hand(stages) if stage == "place" and ranks.rank() == 0 else ""
        notify("status", text=f"{stage}: done before, kept{by_hand}")
        return
    notify("stage", stage=stage, text=f"{stage}: runs because {reason or 'it was asked for'}")
    _STAGES[stage](stages, notify)


def score(stages: Stages, notify: Notify) -> Scores:
    """Score the configured model on the configured data; rank 0 writes scores.json. Collective over all ranks."""
    from plop_dist.backends.hf.load import load_hf_config
    from plop_dist.backends.hf.quantized.loadable import check_quantized
    from plop_dist.measure.run import score_model

    config = stages.config
    # Data before weights: a typo in a column name should not cost the minutes that loading takes.
    kept = config.stored()
    notify("phase", text=f"reading {kept['data']['path']}")
    tokenizer, samples = _tokenized(config)
    notify("status", text=_samples_text(samples, config.data.num_samples))
    notify("phase", text=f"loading {kept['model']['name_or_path']} with {config.parallel.backend}")
    check_quantized(config, load_hf_config(config.model))
    model: ScorableModel = load(BACKENDS, config.parallel.backend).load(config)
    scores = score_model(
        model,
        _pass_over(samples, tokenizer, model, stages),
        estimator=config.estimator,
        placement=config.placement,
        info={
            "model": {"name_or_path": kept["model"]["name_or_path"], **model.describe()},
            "data": {"source": kept["data"]["path"], "max_length": config.data.max_length},
            "parallel": config.parallel.model_dump(),
        },
        notify=notify,
    )
    notify("phase", text="writing the scores")
    if ranks.rank() == 0:
        scores.to_file(stages.run_dir.scores)
        progress.clear(stages.run_dir.path)
    model.release()
    check_weights(scores)
    if ranks.rank() == 0:
        stages.finish("score", [stages.run_dir.scores.name])
    return scores


def _tokenized(config: Config) -> tuple[Any, Sequence[list[int]]]:
    from plop_dist.backends.hf.dtype import weights_dtype
    from plop_dist.backends.hf.load import load_hf_config, load_processor, load_tokenizer, meta_model
    from plop_dist.backends.hf.own_class import reads_pairs
    from plop_dist.backends.hf.tokens import check_tokens, placeholders

    data, hf_config = config.data, load_hf_config(config.model)
    tokenizer = load_tokenizer(config.model)
    rows = select_rows(load_rows(data.path, data.split), data)
    samples: Sequence[list[int]]
    if reads_pairs(config.model, hf_config):
        check_singly(config, "two texts, the encoder's and the decoder's")
        samples = PairSamples(rows, data, config.train.prompt_template, tokenizer)
    elif has_images(rows, data):
        check_singly(config, "images")
        of_model = {"dtype": weights_dtype(config.model, hf_config), "places": placeholders(hf_config)["image"]}
        samples = ImageSamples(ImageRows(rows, data, load_processor(config.model), data.max_length, **of_model))
    else:
        samples = tokenize(rows, data, tokenizer)
    longest = samples.longest if isinstance(samples, ReadSingly) else max(map(len, samples))
    build = partial(meta_model, config.model, hf_config)
    check_tokens(config, hf_config, samples, longest, build, has_images=isinstance(samples, ImageSamples))
    return tokenizer, samples


def _pass_over(samples: Sequence[list[int]], tokenizer: Any, model: ScorableModel, stages: Stages) -> Any:
    """Return the pass over these samples: which of them this rank reads in which step, and what is done already."""
    from plop_dist.measure.run import Pass

    data, groups = stages.config.data, model.groups
    singly = samples if isinstance(samples, ReadSingly) else None
    if singly is not None and groups.uniform_steps:
        singly.check_uniform()
    plan = plan_steps(
        [len(sample) for sample in samples],
        data.batch_size if singly is None else 1,
        groups.num_replicas,
        model.micro_batches_per_step,
        uniform=groups.uniform_steps,
        in_order=stages.config.estimator.stop_when_stable,
    )
    side = tokenizer.padding_side if data.padding_side == "auto" else data.padding_side
    done_after = _cumulative(plan)
    marks = [] if singly is None else [singly.digest]
    key = progress.fingerprint([stages.inputs("score"), progress.hash_samples(samples), *marks])

    def micro_batches(step: int) -> list[MicroBatch]:
        if singly is not None:
            return [singly.micro_batch(indices) for indices in plan[step][groups.replica]]
        return step_micro_batches(samples, plan[step], groups.replica, pad_id=tokenizer.pad_token_id, side=side)

    return Pass(
        num_steps=len(plan),
        micro_batches=micro_batches,
        num_samples=len(samples),
        samples_after=lambda step: done_after[step],
        log=progress.ProgressLog(stages.run_dir.path, key, ranks.rank()),
    )


def place(stages: Stages, notify: Notify) -> None:
    """Choose the targets from scores.json and write placement.json; rank 0 does it. Collective over all ranks."""
    from plop_dist.choose.place import place as choose

    def choose_and_write() -> None:
        run_dir = stages.run_dir
        placement = choose(Scores.from_file(run_dir.scores), stages.config.placement)
        placement.to_file(run_dir.placement)
        stages.finish("place", [run_dir.placement.name])
        notify("status", text=f"LoRA targets: {', '.join(placement.module_types)}")

    ranks.agree(choose_and_write)


def export(stages: Stages, notify: Notify) -> None:
    """Write the placement for every target of export.targets; rank 0 does it. Collective over all ranks."""
    from plop_dist.choose.remedies import explained
    from plop_dist.exporters.write import write_export

    def write_all() -> None:
        run_dir, wanted = stages.run_dir, stages.config.export
        placement, mark = Placement.from_file(run_dir.placement), placement_mark(run_dir)
        written = []
        for target in wanted.targets:
            try:
                export = write_export(
                    placement, target, run_dir.exports, engine=wanted.engine, widen=wanted.widen, mark=mark
                )
            except ExportError as error:
                raise explained(error, placement, target, wanted.engine, stages.config.placement) from error
            written += [f"exports/{target}/{name}" for name in export.files]
            for kind, text in export.remarks:
                notify("status", text=f"{kind}: export to {target}: {text}")
        stages.finish("export", written)
        notify("status", text=f"exported to {', '.join(written)}")

    ranks.agree(write_all)


def train(stages: Stages, notify: Notify) -> None:
    """Go on with train.method and the placement in the same ranks. Collective over all ranks."""
    from plop_dist.training.log import TrainingLog
    from plop_dist.training.train import train as continue_run

    config, run_dir = stages.config, stages.run_dir
    placement = Placement.from_file(run_dir.placement)
    notify("phase", text=f"preparing the training: {config.train.method}")
    with TrainingLog(config, run_dir.train, notify if ranks.rank() == 0 else None) as log:
        summary = continue_run(config, placement, log)
    if ranks.rank() == 0:
        if "note" in summary:
            notify("status", text=summary["note"])
        texts = {key: config.hide(value) for key, value in summary.items() if isinstance(value, str)}
        write_trained(run_dir, {"method": config.train.method, **summary, **texts})
        # A job that the driver starts later has trained once it has left its mark.
        outputs = [run_dir.training_summary, *([run_dir.training_job] if "job" in summary else [])]
        stages.finish("train", [str(path.relative_to(run_dir.path)) for path in outputs])


def compare(stages: Stages, notify: Notify) -> None:
    """Train the placements of compare.arms against each other in the same ranks. Collective over all ranks."""
    from plop_dist.compare.comparison import compare as compare_arms

    found = compare_arms(stages.config, notify)
    if ranks.rank() == 0:
        found.to_file(stages.run_dir.comparison)
        stages.finish("compare", [stages.run_dir.comparison.name])


_STAGES: dict[str, Callable[[Stages, Notify], Any]] = {
    "score": score,
    "place": place,
    "export": export,
    "train": train,
    "compare": compare,
}


# What these say as they are imported concerns those who build them.
_TALKATIVE = ("bitsandbytes", "torch.utils._pytree", "torch.utils.cpp_extension")


def _be_quiet() -> None:
    """Keep other packages' bars and deprecation notes out of a log that people read."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for name in _TALKATIVE:
        getLogger(name).setLevel(ERROR)
    # transformers on how compressed-tensors' checkpoints are loaded here.
    warnings.filterwarnings("ignore", message="You passed `quantization_config` or equivalent")


def _by_hand(stages: Stages) -> str:
    """Return how the placement that is kept differs from the configuration, if `plop-dist place` has chosen it."""
    path = stages.run_dir.placement
    with suppress(ScoresError):  # export and train, which need it, say what is wrong with it
        policy, wanted = Placement.from_file(path).policy, stages.config.placement.model_dump(mode="json")
        changed = [name for name in wanted if policy.get(name) != wanted[name]]
        if changed:
            chosen = ", ".join(f"{name} {policy.get(name)} (here {wanted[name]})" for name in changed)
            return f" as plop-dist place has chosen it, with {chosen}; to place as configured here, delete {path}"
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
