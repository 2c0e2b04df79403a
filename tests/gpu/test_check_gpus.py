"""The script for machines with GPUs, where there are none: a row that passes, and one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import check_gpus


@pytest.mark.slow
def test_rows_are_compared_with_one_process_and_failures_are_named(tmp_path: Path) -> None:
    rows = check_gpus.run_checks(tmp_path, ["transformers dp2", "fp8"])
    dp2, fp8 = rows
    assert dp2.passed, dp2.said
    assert float(dp2.said) < 1e-5
    assert not fp8.passed  # there is no Transformer Engine
    assert "exit status 1: ModuleNotFoundError" in fp8.said
    text = check_gpus.table(rows)
    assert "no CUDA device" in text
    assert f"| transformers dp2 | passed | {dp2.said} |" in text
    assert "| fp8 | FAILED | exit status 1" in text


def test_other_modules_and_gains_are_told(tmp_path: Path) -> None:
    from tests.made_scores import made_scores

    scores = made_scores(2, 2)
    module = scores.modules[0]
    other = scores.model_copy(
        update={"modules": (module.model_copy(update={"gain": 2 * module.gain}), *scores.modules[1:])}
    )
    assert check_gpus._worst(scores, scores) == 0
    assert check_gpus._worst(other, scores) == pytest.approx(1)
    with pytest.raises(ValueError, match="other modules"):
        check_gpus._worst(scores.model_copy(update={"modules": scores.modules[1:]}), scores)
