"""The command line: one function per command, thin; every decision is made below."""

from __future__ import annotations

import atexit
import functools
import inspect
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import typer

from plop_dist.config import arguments as given
from plop_dist.config.command_help import COMMANDS, LOOK_UP, PREPARE, PROGRAM, STEPS, WHOLE
from plop_dist.errors import ConfigError, ExportError, PlopError
from plop_dist.rundir import talk
from plop_dist.values.secret_texts import secret_part, without_secrets
from plop_dist.values.visible import make_messages_visible, say, visible

_Command = TypeVar("_Command", bound=Callable[..., None])

_TAKE_TIME = {"check", "score", "place", "export", "report", "run", "submit", "diff", "bench", "doctor"}
_began = time.monotonic()

app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, pretty_exceptions_enable=False, help=PROGRAM)


@app.callback(invoke_without_command=True)
def program(version: given.Version = False) -> None:
    """Print the version, where only that is asked for; every command comes after."""
    if version:
        from plop_dist import __version__

        say(f"plop-dist {__version__}")
        raise typer.Exit


def command(group: str) -> Callable[[_Command], _Command]:
    """Return a decorator that registers a command, whose help begins with the function's docstring."""

    def register(function: _Command) -> _Command:
        name = function.__name__
        kind = given.ListsTargets if name == "export" else None
        text = f"{function.__doc__}\n\n{COMMANDS[name]}"
        app.command(name, cls=kind, help=text, rich_help_panel=group)(_with_talk(function))
        return function

    return register


def _with_talk(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes -q, -v and --log-file, and says at once what it is about to do."""

    @functools.wraps(function)
    def spoken(*, quiet: bool, verbose: bool, log_file: Path | None, **arguments: Any) -> None:
        talk.options.is_quiet, talk.options.is_verbose, talk.options.log_file = quiet, verbose, log_file
        logging.getLogger("plop_dist").setLevel(logging.DEBUG if verbose else logging.INFO)
        if not quiet and _speaks() and function.__name__ in _TAKE_TIME:
            say(f"plop-dist {function.__name__}: starting", to_stderr=True)
        function(**arguments)

    own = inspect.signature(function, eval_str=True)
    vars(spoken)["__signature__"] = own.replace(parameters=[*own.parameters.values(), *given.TALK.values()])
    spoken.__annotations__ = {**function.__annotations__, **{name: it.annotation for name, it in given.TALK.items()}}
    return spoken


@command(PREPARE)
def init(
    model: given.ModelName = None,
    data: given.DataPath = None,
    demo: given.Demo = False,
    sample: given.Sample = None,
    output: given.Output = None,
) -> None:
    """Write a configuration to start from, with every key explained."""
    from plop_dist.config import starter
    from plop_dist.data.columns import guess_text

    own = "quickstart.yaml" if demo else f"{sample}.yaml" if sample else "config.yaml"
    path, note = output or Path(own), None
    if (demo or sample) and (model or data):
        asked = "--demo" if demo else "--sample"
        raise ConfigError(f"{asked} brings its own model and data; leave out --model and --data.")
    if demo or sample:
        starter.write_new(path, starter.sample(sample) if sample else starter.quickstart())
    elif model and data:
        keys, note = guess_text(data)
        run_dir = str(Path("runs", path.stem))
        values = {"run_dir": run_dir, "model.name_or_path": model, "data.path": data, **keys}
        starter.write_new(path, starter.starter(values))
    else:
        raise ConfigError(
            "init needs --model and --data, e.g. --model Qwen/Qwen2.5-0.5B --data rows.jsonl, or --demo, or --sample "
            f"with one of {', '.join(starter.samples())}."
        )
    say(path)
    if note:
        say(f"note: {note}", to_stderr=True)
    _way_on("check", path)


@command(PREPARE)
def check(config: given.ConfigFile, overrides: given.Overrides = None, as_json: given.AsJson = False) -> None:
    """Validate a configuration and show what it would do, without loading weights."""
    from plop_dist.rundir.events import working

    with working("building the model without weights"):
        from plop_dist.costs.plan import build_plan
        from plop_dist.report import machine
        from plop_dist.report.cost_tables import print_plan

        plan = build_plan(_config(config, overrides))
    if as_json:
        machine.tell("check", **machine.checked(plan, config, overrides or []))
        raise typer.Exit(0 if plan.verdict.is_ok else ConfigError.exit_status)
    print_plan(plan)
    if not plan.verdict.is_ok:
        raise ConfigError(f"{config}: {' '.join(plan.verdict.problems)}")
    _way_on("run", config, *(overrides or []))


@command(PREPARE)
def config(key: given.KeyName = None) -> None:
    """Explain a key of the configuration, or list the keys of a section."""
    from plop_dist.config.reference import explained

    say(*explained(key))


@command(PREPARE)
def schema(markdown: given.AsMarkdown = False) -> None:
    """Print the JSON schema of configurations, with which editors complete and check them."""
    import json

    from plop_dist.config import json_schema, reference

    say(reference.markdown() if markdown else json.dumps(json_schema.json_schema(), indent=2, ensure_ascii=False))


@command(STEPS)
def score(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Measure the NFN of every linear module; writes RUN_DIR/scores.json."""
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.launch import pipeline
    from plop_dist.report import closing, terminal
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.scores import Scores

    loaded = _config(config, overrides)
    before = _scored_modules(RunDir(loaded.run_dir).scores)
    run_dir = pipeline.score(loaded, pipeline.command_line())
    if _speaks():
        scores = Scores.from_file(run_dir.scores)
        terminal.print_types(scores)
        terminal.print_diagnostics(diagnose(scores))
        if before not in (None, scores.modules):
            closing.print_older_than_scores(run_dir)
        closing.print_files(run_dir.scores)
        _way_on("place", run_dir.path)


@command(STEPS)
def place(
    run_dir: given.RunDirectory,
    overrides: given.PlacementOverrides = None,
    explain: given.Explain = False,
    sweep: given.Sweep = False,
    dry_run: given.DryRun = False,
    as_json: given.AsJson = False,
) -> None:
    """Choose the modules that get adapters, from the scores; writes RUN_DIR/placement.json."""
    from plop_dist.choose.decision import decide
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.choose.explain import explain as build_explanation
    from plop_dist.choose.place import placement_of
    from plop_dist.choose.sweep import sweep_of
    from plop_dist.report import closing, machine, terminal
    from plop_dist.rundir.layout import RunDir
    from plop_dist.rundir.stored_config import placement_config
    from plop_dist.values.scores import Scores

    paths = RunDir(run_dir)
    scores = Scores.from_file(paths.scores)
    decision = decide(scores, placement_config(paths, overrides or []))
    placement = placement_of(decision)
    if not dry_run:
        placement.to_file(paths.placement)
    if as_json:
        machine.tell("place", **machine.placed(paths, placement, diagnose(scores, placement, decision), dry_run))
        return
    terminal.print_types(scores, placement)
    if explain:
        terminal.print_explanation(build_explanation(scores, placement, decision))
    if sweep:
        terminal.print_sweep(sweep_of(decision))
    terminal.print_diagnostics(diagnose(scores, placement, decision))
    if dry_run:
        say(f"{paths.placement} stays as it was (--dry-run)")
        _way_on("place", run_dir, *(overrides or []))
        return
    closing.print_outdated(paths)
    closing.print_files(paths.placement)
    _way_on("export", run_dir, "--to", "peft")


@command(STEPS)
def export(
    run_dir: given.RunDirectory,
    to: given.Target,
    engine: given.Engine = None,
    widen: given.Widen = False,
    as_json: given.AsJson = False,
) -> None:
    """Write the placement in your training framework's own format; prints the flags to paste."""
    from plop_dist.choose.remedies import explained
    from plop_dist.exporters.fits import fits
    from plop_dist.exporters.text import one_line
    from plop_dist.exporters.write import write_export
    from plop_dist.report import machine
    from plop_dist.report.catalogue import print_fits
    from plop_dist.report.closing import path_from_here
    from plop_dist.rundir.layout import RunDir
    from plop_dist.rundir.made_from import placement_mark
    from plop_dist.rundir.stored_config import placement_config
    from plop_dist.values.placement import Placement

    paths = RunDir(run_dir)
    placement, mark = Placement.from_file(paths.placement), placement_mark(paths)
    if to == given.NO_TARGET:
        found = fits(placement)
        if as_json:
            machine.tell("targets", **machine.fitted(run_dir, found))
        else:
            print_fits(found, run_dir)
        return
    try:
        written = write_export(placement, to, paths.exports, engine=engine, widen=widen, mark=mark)
    except ExportError as error:
        raise explained(error, placement, to, engine, placement_config(paths, []), str(run_dir)) from error
    if as_json:
        machine.tell("export", **machine.exported(run_dir, paths.exports / to, written))
        return
    for note in (*written.notes, *(f"widened: {item}" for item in written.widened)):
        say(f"note: {note}", to_stderr=True)
    for name in written.files:
        say(f"# {one_line(path_from_here(paths.exports / to / name))}")
    for flag in written.flags:
        say(flag)
    _way_on("report", run_dir)


@command(STEPS)
def report(run_dir: given.RunDirectory) -> None:
    """Write RUN_DIR/report.html: scores, choice, exports and training on one page."""
    from plop_dist.report import closing, write_report
    from plop_dist.rundir.events import working
    from plop_dist.rundir.layout import RunDir

    paths = RunDir(run_dir)
    with working("writing the report"):
        write_report(paths)
    closing.print_outdated(paths)
    closing.print_files(paths.report)
    _way_on("targets", run_dir)


@command(WHOLE)
def run(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Score, place, export, train (where `train.method` says so) and report."""
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.launch import pipeline
    from plop_dist.report import closing, terminal
    from plop_dist.values.placement import Placement

    loaded = _config(config, overrides)
    run_dir = pipeline.run(loaded, pipeline.command_line())
    if _speaks():
        placement = Placement.from_file(run_dir.placement)
        terminal.print_types(placement.source, placement)
        terminal.print_diagnostics(diagnose(placement.source, placement))
        terminal.print_training(run_dir)
        closing.print_outdated(run_dir)
        exports = [run_dir.exports / target for target in loaded.export.targets]
        adapter = [run_dir.train / "adapter"] if loaded.train.method != "none" else []
        closing.print_files(run_dir.scores, run_dir.placement, *exports, *adapter, run_dir.report)
        _way_on("targets", run_dir.path)


@command(WHOLE)
def submit(
    config: given.ConfigFile, overrides: given.Overrides = None, address: given.Address = "http://127.0.0.1:8265"
) -> None:
    """Do what `run` does as a job on a Ray cluster, and follow its log."""
    from plop_dist.registry import missing_extra

    loaded = _config(config, overrides)
    try:
        from plop_dist.launch.jobs import submit_job
    except ModuleNotFoundError as error:
        raise missing_extra(error, "plop-dist submit") from error
    raise typer.Exit(submit_job(loaded, address))


@command(LOOK_UP)
def doctor() -> None:
    """Show what is installed here and whether it works: a table to paste into an issue."""
    from plop_dist.launch.doctor import examine

    failed = 0
    for finding in talk.each_apart(examine()):
        say(f"{finding.what:<22} {finding.status:<7} {finding.text}", at_once=True)
        failed += finding.status == "failed"
    raise typer.Exit(1 if failed else 0)


@command(LOOK_UP)
def targets(run_dir: given.OptionalRunDirectory = None, to: given.AnyTarget = None) -> None:
    """List the frameworks that `export` writes for: what each can and cannot express."""
    from plop_dist.registry import EXPORTERS, names
    from plop_dist.report.catalogue import print_targets
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.placement import Placement

    placement = Placement.from_file(RunDir(run_dir).placement) if run_dir is not None else None
    print_targets(names(EXPORTERS) if to is None else (to,), placement)


@command(LOOK_UP)
def backends(name: given.BackendName = None) -> None:
    """List the frameworks that shard models (`parallel.backend`): the layouts of each, and what it cannot do."""
    from plop_dist.registry import BACKENDS, names
    from plop_dist.report.catalogue import print_backends

    print_backends(names(BACKENDS) if name is None else (name,))


@command(LOOK_UP)
def diff(
    run_dir: given.RunDirectory,
    adapter_config: given.AdapterConfig,
    target: given.ReadAs = None,
    as_json: given.AsJson = False,
) -> None:
    """Compare the placement with adapters that you have already."""
    from plop_dist.exporters.diff import difference
    from plop_dist.exporters.read_back import read_export
    from plop_dist.rundir.events import working
    from plop_dist.values.placement import Placement

    placement = Placement.from_file(run_dir / "placement.json")
    with working("reading what the file adapts"):
        found = difference(placement, read_export(adapter_config, placement, target))
    if as_json:
        from plop_dist.report import machine

        machine.tell("diff", **machine.differing(found, run_dir))
    else:
        say(*found.lines())
        _way_on("export", run_dir, "--to", "peft")


@command(LOOK_UP)
def bench(
    config: given.OptionalConfigFile = None,
    overrides: given.Overrides = None,
    ranks: given.Ranks = 1,
    repeats: given.Repeats = 5,
    scale: given.Scale = False,
) -> None:
    """Measure on this machine what scoring costs."""
    from plop_dist.report import cost_tables
    from plop_dist.rundir.events import working

    if scale:
        from plop_dist.costs.scale import measure_scale

        with working("measuring what a module costs in models of three sizes"):
            measured = measure_scale([sys.executable, "-m", "plop_dist.cli"])
        cost_tables.print_scale(measured)
        return
    from plop_dist.costs.bench import run_bench

    if config is None:
        raise typer.BadParameter("Missing argument 'CONFIG'; only --scale needs none.")
    with working("measuring what scoring costs"):
        measured = run_bench(_config(config, overrides), ranks=ranks, repeats=repeats)
    cost_tables.print_bench(measured)
    _way_on("score", config, *(overrides or []))


def _config(path: Path, overrides: list[str] | None) -> Any:
    from plop_dist.config.loading import load_config

    return load_config(path, overrides or [])


def _scored_modules(path: Path) -> Any:
    """Return the modules of a scores file, None where there is none that can be read."""
    from plop_dist.values.scores import Scores

    with suppress(PlopError):
        return Scores.from_file(path).modules
    return None


def _way_on(*next_command: object) -> None:
    from plop_dist.report.closing import print_way_on

    if not talk.options.is_quiet:
        print_way_on(_began, next_command)


def _speaks() -> bool:
    """Tell whether this process prints results: under a launcher only rank 0 does."""
    return int(os.environ.get("RANK", 0)) == 0


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2, never a traceback."""
    if logging.lastResort is not None:  # what is logged outside of a run, where no other handler takes it
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    make_messages_visible()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names from files are shown whatever the terminal can write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_arguments()
        app(
            prog_name="plop-dist"
        )  # ends in SystemExit: 0, typer's own 2 for wrong usage, 130 and 143 after SIGINT and SIGTERM
    except PlopError as error:
        if _says_errors(str(error)):
            if "--json" in sys.argv[1:]:
                from plop_dist.report import machine

                machine.tell("error", **machine.failed(error, error.exit_status))
            say(f"error: {error}", to_stderr=True)
        _leave(error.exit_status)
    except SystemExit as stop:
        if stop.code in (130, 143):
            say("interrupted; the same command goes on from what is on disk", to_stderr=True)
        _leave(int(stop.code or 0))
    except OSError as error:  # standard output is on a full disk
        say(f"error: {error}", to_stderr=True)
        _leave(1)


def _check_arguments() -> None:
    """Raise ConfigError for an argument that holds a secret, or hides something: it could not be shown as it is."""
    for argument in sys.argv[1:]:
        whole = argument.encode(errors="ignore").decode()  # other messages tell of what is no UTF-8
        if visible(whole) != whole:
            raise ConfigError(
                f"the argument '{visible(argument)}' holds a control character or one that is not seen; leave it out, "
                "and rename a folder or file that has it in its name."
            )
        part = secret_part(argument, is_prose="=" in argument)
        if part is not None:
            raise ConfigError(
                f"the argument '{without_secrets(argument)}' holds {part}, which everyone on this machine can read; "
                "give it through the environment (HF_TOKEN, RAY_AUTH_TOKEN, ~/.netrc) and leave it out."
            )


def _says_errors(message: str) -> bool:
    """Tell whether this process prints an error: of launched ranks that all raise it, the first."""
    if "RANK" not in os.environ:
        return True
    from plop_dist.rundir.once import is_first_to_say

    return is_first_to_say(message)


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            if stream is not None:  # it is None where the caller has closed it
                stream.flush()
    atexit.register(talk.silence_the_end)  # registered last, it comes first
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # After a failure peers may still wait in a collective with this rank; the launcher ends them once it sees this
        # exit. After success gloo's threads, which outlive its groups, may abort the interpreter's own end.
        if not status:
            atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
