"""A run directory of another user's is said to be one, whatever is done with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.cases import plop_dist
from tests.exporters.cases import llama_projections, place, scores_of


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_commands_say_whose_a_run_directory_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = scores_of(llama_projections(2))
    scores.to_file(tmp_path / "scores.json")
    place(scores, ["q_proj"]).to_file(tmp_path / "placement.json")
    adapter = tmp_path / "exports" / "peft" / "adapter_config.json"
    commands = (["place", tmp_path, "k=1"], ["export", tmp_path, "--to", "peft"], ["report", tmp_path],
                ["targets", tmp_path], ["diff", tmp_path, adapter])  # fmt: skip
    for owner in (0, 65534):
        os.chown(tmp_path, owner, owner)
        for command in commands:
            caplog.clear()
            assert plop_dist(*command).status == 0
            said = f"{tmp_path} belongs to 'nobody', and this process runs as another user" in caplog.text
            assert said == (owner != 0), command
