"""The command line: one function per command, thin; every decision is made below."""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import typer

from plop_dist.config import arguments as given
from plop_dist.config.command_help import COMMANDS, LOOK_UP, PREPARE, PROGRAM, STEPS, WHOLE
from plop_dist.errors import ConfigError, PlopError
from plop_dist.values.secret_texts import secret_part, without_secrets
from plop_dist.values.visible import make_messages_visible, say, visible

_Command = TypeVar("_Command", bound=Callable[..., None])

app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, pretty_exceptions_enable=False, help=PROGRAM)


def command(group: str) -> Callable[[_Command], _Command]:
    """Return a decorator that registers a command, whose help begins with the function's docstring."""

    def register(function: _Command) -> _Command:
        name = function.__name__
        return app.command(name, help=f"{function.__doc__}\n\n{COMMANDS[name]}", rich_help_panel=group)(function)

    return register


@command(PREPARE)
def init(
    model: given.ModelName = None, data: given.DataPath = None, demo: given.Demo = False, output: given.Output = None
) -> None:
    """Write a configuration to start from, with every key explained."""
    from plop_dist.config.starter import quickstart, starter, write_new
    from plop_dist.data.columns import guess_text

    path, note = output or Path("quickstart.yaml" if demo else "config.yaml"), None
    if demo and (model or data):
        raise ConfigError("--demo brings its own model and data; leave out --model and --data.")
    if demo:
        write_new(path, quickstart())
    elif model and data:
        keys, note = guess_text(data)
        run_dir = str(Path("runs", path.stem))
        write_new(path, starter({"run_dir": run_dir, "model.name_or_path": model, "data.path": data, **keys}))
    else:
        raise ConfigError("init needs --model and --data, e.g. --model Qwen/Qwen2.5-0.5B --data rows.jsonl, or --demo.")
    say(path)
    say(*([f"note: {note}"] if note else []), f"Next: plop-dist check {path}", to_stderr=True)


@command(PREPARE)
def check(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Validate a configuration and show what it would do, without loading weights."""
    from plop_dist.rundir.events import spinner

    with spinner("building the model without weights"):
        from plop_dist.costs.plan import build_plan
        from plop_dist.report.cost_tables import print_plan

        plan = build_plan(_config(config, overrides))
    print_plan(plan)


@command(PREPARE)
def schema(markdown: given.AsMarkdown = False) -> None:
    """Print the JSON schema of configurations, with which editors complete and check them."""
    import json

    from plop_dist.config import json_schema, reference

    say(reference.markdown() if markdown else json.dumps(json_schema.json_schema(), indent=2, ensure_ascii=False))


@command(STEPS)
def score(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Measure the NFN of every linear module; writes RUN_DIR/scores.json."""
    from plop_dist.launch import pipeline
    from plop_dist.report import terminal
    from plop_dist.values.scores import Scores

    loaded = _config(config, overrides)
    run_dir = pipeline.score(loaded, pipeline.command_line())
    if _speaks():
        terminal.print_types(Scores.from_file(run_dir.scores))


@command(STEPS)
def place(
    run_dir: given.RunDirectory,
    overrides: given.PlacementOverrides = None,
    explain: given.Explain = False,
    sweep: given.Sweep = False,
) -> None:
    """Choose the modules that get adapters, from the scores; writes RUN_DIR/placement.json."""
    from plop_dist.choose.decision import decide
    from plop_dist.choose.diagnostics import diagnose
    from plop_dist.choose.explain import explain as build_explanation
    from plop_dist.choose.place import placement_of
    from plop_dist.choose.sweep import sweep_of
    from plop_dist.report import terminal
    from plop_dist.rundir.layout import RunDir
    from plop_dist.rundir.stored_config import placement_config
    from plop_dist.values.scores import Scores

    paths = RunDir(run_dir)
    scores = Scores.from_file(paths.scores)
    decision = decide(scores, placement_config(paths, overrides or []))
    placement = placement_of(decision)
    placement.to_file(paths.placement)
    terminal.print_types(scores, placement)
    if explain:
        terminal.print_explanation(build_explanation(scores, placement, decision))
    if sweep:
        terminal.print_sweep(sweep_of(decision))
    terminal.print_diagnostics(diagnose(scores, placement, decision))
    say(paths.placement)


@command(STEPS)
def export(
    run_dir: given.RunDirectory, to: given.Target, engine: given.Engine = None, widen: given.Widen = False
) -> None:
    """Write the placement in your training framework's own format; prints the flags to paste."""
    from plop_dist.exporters.text import one_line
    from plop_dist.exporters.write import write_export
    from plop_dist.rundir.layout import RunDir
    from plop_dist.values.placement import Placement

    paths = RunDir(run_dir)
    written = write_export(Placement.from_file(paths.placement), to, paths.exports, engine=engine, widen=widen)
    for note in (*written.notes, *(f"widened: {item}" for item in written.widened)):
        say(f"note: {note}", to_stderr=True)
    for name in written.files:
        say(f"# {one_line(paths.exports / to / name)}")
    for flag in written.flags:
        say(flag)


@command(STEPS)
def report(run_dir: given.RunDirectory) -> None:
    """Write RUN_DIR/report.html: scores, choice, exports and training on one page."""
    from plop_dist.report import write_report
    from plop_dist.rundir.layout import RunDir

    say(write_report(RunDir(run_dir)))


@command(WHOLE)
def run(config: given.ConfigFile, overrides: given.Overrides = None) -> None:
    """Score, place, export, train (where `train.method` says so) and report."""
    from plop_dist.launch import pipeline
    from plop_dist.report import terminal
    from plop_dist.values.placement import Placement

    loaded = _config(config, overrides)
    run_dir = pipeline.run(loaded, pipeline.command_line())
    if _speaks():
        placement = Placement.from_file(run_dir.placement)
        terminal.print_types(placement.source, placement)
        terminal.print_training(run_dir)
        say(run_dir.report)


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
def diff(run_dir: given.RunDirectory, adapter_config: given.AdapterConfig) -> None:
    """Compare the placement with adapters that you have already."""
    from plop_dist.exporters.adapter_config import read_adapter_config
    from plop_dist.exporters.diff import diff as compare
    from plop_dist.rundir.events import spinner
    from plop_dist.values.placement import Placement

    placement = Placement.from_file(run_dir / "placement.json")
    with spinner("asking PEFT what the configuration adapts"):
        difference = compare(placement, read_adapter_config(adapter_config), str(adapter_config))
    for line in difference.lines():
        say(line)


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

    if scale:
        from plop_dist.costs.scale import measure_scale

        cost_tables.print_scale(measure_scale([sys.executable, "-m", "plop_dist.cli"]))
        return
    from plop_dist.costs.bench import run_bench

    if config is None:
        raise typer.BadParameter("Missing argument 'CONFIG'; only --scale needs none.")
    cost_tables.print_bench(run_bench(_config(config, overrides), ranks=ranks, repeats=repeats))


def _config(path: Path, overrides: list[str] | None) -> Any:
    from plop_dist.config.loading import load_config

    return load_config(path, overrides or [])


def _speaks() -> bool:
    """Tell whether this process prints results: under a launcher only rank 0 does."""
    return int(os.environ.get("RANK", 0)) == 0


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("plop_dist").setLevel(logging.INFO)
    make_messages_visible()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names from files are shown whatever the terminal can write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _check_arguments()
        app(
            prog_name="plop-dist"
        )  # ends in SystemExit: 0, typer's own 2 for wrong usage, 130 and 143 after SIGINT and SIGTERM
    except PlopError as error:
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


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            if stream is not None:  # it is None where the caller has closed it
                stream.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # After a failure peers may still wait in a collective with this rank; the launcher ends them once it sees this
        # exit. After success gloo's threads, which outlive its groups, may abort the interpreter's own end.
        if not status:
            atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
