"""Commands before a run: what is checked, written and explained without loading weights."""

from __future__ import annotations

from pathlib import Path

import typer

from plop_dist.cli.program import checked_config, command, way_on
from plop_dist.config import arguments as given
from plop_dist.config.command_help import PREPARE
from plop_dist.errors import ConfigError
from plop_dist.values.visible import say


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

    if (demo or sample) and (model or data):
        asked = "--demo" if demo else "--sample"
        raise ConfigError(f"{asked} brings its own model and data; leave out --model and --data.")
    own, note = "config.yaml", None
    if demo or sample:
        own, text = starter.sample(sample) if sample else ("quickstart.yaml", starter.quickstart())
        path = output or Path(own)
        starter.write_new(path, text)
    elif model and data:
        keys, note = guess_text(data)
        path = output or Path(own)
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
    if own.endswith(".py"):
        way_on(path, program="python")
    else:
        way_on("check", path)


@command(PREPARE)
def check(config: given.ConfigFile, overrides: given.Overrides = None, as_json: given.AsJson = False) -> None:
    """Validate a configuration and show what it would do, without loading weights."""
    from plop_dist.rundir.events import working

    with working("building the model without weights"):
        from plop_dist.costs.plan import build_plan
        from plop_dist.report import machine
        from plop_dist.report.cost_tables import print_plan

        plan = build_plan(checked_config(config, overrides))
    if as_json:
        machine.tell("check", **machine.checked(plan, config, overrides or []))
        raise typer.Exit(0 if plan.verdict.is_ok else ConfigError.exit_status)
    print_plan(plan)
    if not plan.verdict.is_ok:
        raise ConfigError(f"{config}: {' '.join(plan.verdict.problems)}")
    way_on("run", config, *(overrides or []))


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
