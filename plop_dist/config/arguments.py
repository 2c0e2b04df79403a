"""The arguments and options of the command line: what each says of itself, and what a shell completes it to."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from plop_dist.checkpoints.owner import say_owner
from plop_dist.registry import BACKENDS, EXPORTERS, names

NO_TARGET = "?"


class ListsTargets(TyperCommand):
    """A command whose --to may stand without a value, which asks for the list."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put NO_TARGET behind a --to that ends the line or is followed by another option."""
        whole = []
        for place, word in enumerate(args):
            whole.append(word)
            if word == "--to" and (place + 1 == len(args) or args[place + 1].startswith("-")):
                whole.append(NO_TARGET)
        return super().parse_args(ctx, whole)


def complete_run_dir(incomplete: str) -> list[str]:
    """Return the directories below here that hold scores."""
    base = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = {path.parent for pattern in ("*/scores.json", "*/*/scores.json") for path in base.glob(pattern)}
    return sorted(str(path) for path in found if str(path).startswith(incomplete))


def with_owner_said(context: typer.Context, run_dir: Path | None) -> Path | None:
    """Return the run directory; that it belongs to another user is said. Raises RunDirError for links inside it."""
    if run_dir is not None and not context.resilient_parsing:
        from plop_dist.values.files import LINKED, refuse_links

        say_owner(run_dir)
        refuse_links(run_dir, besides=LINKED)
    return run_dir


def with_owner_of_run_said(context: typer.Context, path: Path) -> Path:
    """Return a path; of a run directory what with_owner_said says."""
    if path.is_dir():
        with_owner_said(context, path)
    return path


def complete_target(incomplete: str) -> list[str]:
    """Return the export targets that begin so."""
    return [name for name in names(EXPORTERS) if name.startswith(incomplete)]


def complete_sample(incomplete: str) -> list[tuple[str, str]]:
    """Return the sample configurations that begin so, each with what it is for."""
    from plop_dist.config.starter import samples

    return [(name, text) for name, text in samples().items() if name.startswith(incomplete)]


def complete_backend(incomplete: str) -> list[str]:
    """Return the backends that begin so."""
    return [name for name in names(BACKENDS) if name.startswith(incomplete)]


def complete_override(incomplete: str) -> Iterable[tuple[str, str]]:
    """Return the keys that begin so, or the values of the key that is there."""
    from plop_dist.config.reference import completions

    return list(completions(incomplete))


def complete_key(incomplete: str) -> Iterable[tuple[str, str]]:
    """Return the keys that begin so, without the sign for a value."""
    from plop_dist.config.reference import completions

    return [(name.rstrip("="), doc) for name, doc in completions(incomplete.rstrip("="))]


def complete_placement(incomplete: str) -> Iterable[tuple[str, str]]:
    """Return the same for the keys of the placement section, whose name may be left out."""
    from plop_dist.config.reference import completions

    return list(completions(incomplete, only="placement"))


ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file that says what to do; `plop-dist init` writes one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Keys laid over the file, as in `data.num_samples=64`; `plop-dist schema --markdown` lists them.",
        autocompletion=complete_override,
    ),
]
PlacementOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Keys of the placement section, as in `k=2` or `policy=budget`.",
        autocompletion=complete_placement,
    ),
]
RunDirectory = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        help="Directory that `score` or `run` has written: `run_dir` of the configuration.",
        autocompletion=complete_run_dir,
        callback=with_owner_said,
    ),
]
OptionalRunDirectory = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN_DIR",
        help="Directory with a placement to be expressed.",
        autocompletion=complete_run_dir,
        callback=with_owner_said,
    ),
]
BackendName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="Only this one.", autocompletion=complete_backend)
]
AdapterConfig = Annotated[
    Path,
    typer.Argument(
        metavar="OTHER",
        help="An adapter_config.json of PEFT's, a file in any target's format, or another run directory.",
        callback=with_owner_of_run_said,
    ),
]
ReadAs = Annotated[
    str | None,
    typer.Option(
        "--as", help="Target whose format FILE is in; default: what it looks like.", autocompletion=complete_target
    ),
]

ModelName = Annotated[str | None, typer.Option("--model", help="Hugging Face id or directory of the model.")]
DataPath = Annotated[
    str | None,
    typer.Option("--data", help="File of rows (jsonl, json, csv, parquet, txt), or id of a dataset on the hub."),
]
Demo = Annotated[bool, typer.Option("--demo", help="Write the quickstart, which brings model and data.")]
Sample = Annotated[
    str | None,
    typer.Option(
        "--sample", help="Write a sample for a usual case instead; see below.", autocompletion=complete_sample
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="File to write.", show_default="config.yaml; quickstart.yaml, SAMPLE.yaml"),
]
AsMarkdown = Annotated[
    bool, typer.Option("--markdown", help="Print tables for people instead: key, default, values, meaning.")
]
Explain = Annotated[bool, typer.Option("--explain", help="Also say why each type is in or out, and how sure that is.")]
Sweep = Annotated[bool, typer.Option("--sweep", help="Also show the choice for every k, and for fewer samples.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the choice; placement.json stays as it was.")]
Target = Annotated[
    str,
    typer.Option(
        "--to",
        help="Framework to write for; without a value: what each can express of this placement.",
        autocompletion=complete_target,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs instead.")]
KeyName = Annotated[
    str | None,
    typer.Argument(metavar="KEY", help="A key, `data.num_samples`, or a section.", autocompletion=complete_key),
]
Version = Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)]
AnyTarget = Annotated[str | None, typer.Option("--to", help="Only this one.", autocompletion=complete_target)]
Engine = Annotated[
    str | None, typer.Option("--engine", help="Engine of the framework, where it has several: `fsdp`, `megatron`, ...")
]
Widen = Annotated[
    bool, typer.Option("--widen", help="Accept the nearest choice where the framework cannot express this one.")
]
Address = Annotated[str, typer.Option("--address", help="Ray's dashboard.")]
JobConfigFile = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="YAML configuration; needed unless --stop.")
]
WorkingDir = Annotated[
    Path | None, typer.Option("--working-dir", help="Send this folder along; relative paths are those in it.")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return once the job is taken, without following its log.")]
Stop = Annotated[str | None, typer.Option("--stop", metavar="JOB", help="Instead: end a job that was submitted.")]
Ranks = Annotated[
    int, typer.Option("--ranks", help="Also measure communication and weak scaling up to this many ranks.", min=1)
]
Repeats = Annotated[int, typer.Option("--repeats", help="Repetitions of every variant; their median counts.", min=1)]
OptionalConfigFile = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="YAML configuration; needed unless --scale.")
]
Scale = Annotated[
    bool,
    typer.Option("--scale", help="Instead: what a module costs in tiny models of 1,600, 6,500 and 24,500 modules."),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Results, warnings and errors alone.")]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="What libraries print goes to stderr, instead of to RUN_DIR/log.txt.")
]
LogFile = Annotated[
    Path | None, typer.Option("--log-file", help="Where what libraries print goes, instead of to RUN_DIR/log.txt.")
]
TALK = {
    "quiet": Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
    "verbose": Parameter("verbose", Parameter.KEYWORD_ONLY, default=False, annotation=Verbose),
    "log_file": Parameter("log_file", Parameter.KEYWORD_ONLY, default=None, annotation=LogFile),
}  # what every command takes
