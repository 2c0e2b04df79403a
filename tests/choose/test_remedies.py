"""Whatever a refusal of an export target offers is accepted when it is done as it says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import plop_dist
from plop_dist.choose.remedies import explained
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.registry import EXPORTERS, names
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.stored_config import placement_config
from plop_dist.values.placement import Placement
from tests.cli.cases import assert_one_message
from tests.cli.cases import plop_dist as command
from tests.exporters.cases import llama_projections, model_of, projection, projections_of, scores_of

HEAD = projection("lm_head", 32, 96)
LLAMA = scores_of([*llama_projections(), HEAD])
CASES = [
    (LLAMA, {"include": ["down_proj"], "k": 1}),
    (LLAMA, {"k": 1, "exclude": ["lm_head", "q_proj", "k_proj", "o_proj"]}),
    (LLAMA, {"k": 3, "exclude": ["lm_head", "q_proj"]}),
    (LLAMA, {"k": 3, "granularity": "module"}),
    (LLAMA, {"k": 2, "rank_pattern": {"k_proj": 8}, "alpha": 2.5}),
    (scores_of(projections_of(model_of("phi3"))), {"k": 1, "include": ["v_proj", "up_proj"]}),
    (scores_of(projections_of(model_of("gpt2"))), {"k": 2}),
    (scores_of(projections_of(model_of("qwen3_moe"))), {"k": 2, "experts": True, "include": ["experts.*", "o_proj"]}),
    (scores_of(projections_of(model_of("qwen3_moe"))), {"k": 1, "include": ["gate", "v_proj"]}),
]  # fmt: skip


def refusals(placement: Placement) -> Iterator[tuple[str, str, ExportError]]:
    for name in names(EXPORTERS):
        exporter = find_exporter(name)
        for engine in exporter.engines:
            try:
                exporter.export(placement, engine=engine)
            except ExportError as error:
                yield name, engine, explained(error, placement, name, engine, PlacementConfig.model_validate({}), "RUN")


def offered(text: str) -> list[str]:
    """Return the remedies of a message, without what each says of itself in parentheses."""
    found = text.partition("Nearest choice: ")[2].rstrip(".").split("; or ")
    return [re.sub(r" \(.*\)$", "", item, flags=re.DOTALL) for item in found]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_remedy_that_is_offered_is_accepted(number: int, tmp_path: Path) -> None:
    scores, options = CASES[number]
    scores.to_file(tmp_path / "scores.json")
    placement = plop_dist.place(scores, rank=4, **options)
    num_walked = 0
    for target, engine, error in refusals(placement):
        for remedy in offered(str(error)):
            words = shlex.split(remedy)
            chosen, to, own_engine, widen = placement, target, engine, False
            if words[0] == "--widen":
                widen = True
            elif words[0] == "--engine":
                own_engine = words[1]
            elif words[0] == "--to":
                to, own_engine = words[1], None
            else:
                assert words[:3] == ["plop-dist", "place", "RUN"], remedy
                chosen = plop_dist.place(scores, placement_config(RunDir(tmp_path), words[3:]))
            find_exporter(to).export(chosen, engine=own_engine, widen=widen)
            num_walked += 1
    assert num_walked >= 3


def test_torchtune_leads_nobody_in_a_circle(tmp_path: Path) -> None:
    """Typed as they stand, from the message of the command line; the default exclusion of the LM head stays."""
    run_dir = tmp_path / "run"
    scores_of([HEAD, *reversed(llama_projections())]).to_file(run_dir / "scores.json")  # the MLP has the lowest NFN
    assert command("place", run_dir, "k=2", "rank=4").status == 0
    refused = command("export", run_dir, "--to", "torchtune")
    assert_one_message(refused, "torchtune", "Nearest choice: ")
    again = [item for item in offered(refused.err) if item.startswith("plop-dist place")]
    assert again
    for item in again:
        assert "exclude=[lm_head," in item or "exclude" not in item
        assert command(*shlex.split(item)[1:]).status == 0, item
        assert Placement.from_file(run_dir / "placement.json").rank == 4, "the rank that was given is lost"
        assert command("export", run_dir, "--to", "torchtune").status == 0, item
