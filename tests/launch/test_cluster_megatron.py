"""Ray with Megatron at tp 2, pp 2: a rank that raises ends the run with its name, a killed one comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.installed import needs_bridge
from tests.launch.cluster_case import BIN, Case, environment, events, make_case, session
from tests.launch.ray_head import kill_rank_1_in_the_middle

pytestmark = [pytest.mark.slow, needs_bridge]
PARALLEL = {"backend": "megatron", "tp": 2, "pp": 2, "dp": 1, "zero_stage": 0}

# Python runs sitecustomize.py at its start: here it lets one rank raise in its fifth step.
FAILING_RANK = """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "plop_dist.measure.collector":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            step, calls = module.Collector.step, []

            def failing(self, micro_batches):
                from torch import distributed
                calls.append(1)
                if len(calls) == 5 and distributed.is_initialized() and distributed.get_rank() == 3:
                    raise RuntimeError("its memory is gone")
                return step(self, micro_batches)

            module.Collector.step = failing

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("megatron"))


def test_a_rank_that_raises_ends_the_run_with_its_name_and_its_cause(case: Case, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING_RANK)
    config = case.write("raised", parallel=PARALLEL, cluster={"max_failures": 0, "timeout_s": 120})
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with session([str(BIN / "plop-dist"), "score", str(config)], environment(PYTHONPATH=path)) as process:
        out, err = process.communicate(timeout=330)
    assert process.returncode == 1, out + err
    assert err.splitlines()[-1].startswith("error: rank 3: ")
    assert "its memory is gone" in err.splitlines()[-1]
    assert "Traceback" not in err
    seen = events(case.directory / "raised")
    assert [event["attempt"] for event in seen if event["event"] == "worker"] == [1] * 4
    assert any(event["event"] == "scoring" for event in seen), "it did not fail in the middle"


def test_a_killed_rank_comes_back_and_the_scores_are_those_of_one_process(case: Case) -> None:
    config = case.write("killed", parallel=PARALLEL, cluster={"max_failures": 1, "timeout_s": 120})
    run_dir = case.directory / "killed"
    with session([str(BIN / "plop-dist"), "score", str(config)], environment()) as process:
        kill_rank_1_in_the_middle(run_dir, "scoring", 24, process)
        out, err = process.communicate(timeout=330)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err
    case.assert_same_scores("killed")
    seen = events(run_dir)
    assert [event["attempt"] for event in seen if event["event"] == "worker" and event["rank"] == 1] == [1, 2]
    assert any(event["event"] == "resumed" and event["done"] > 0 for event in seen)
