"""What a shell prints and a notebook shows of scores and placements: tables, a chart, the reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

import plop_dist
from plop_dist.errors import ScoresError
from tests.made_scores import made_scores


def test_print_gives_the_table_of_the_command_line() -> None:
    scores = made_scores()
    placement = plop_dist.place(scores, k=2)
    for text in (str(scores), str(placement)):
        assert text.startswith(f"NFN per module type · {scores.model.name_or_path}\n")
        assert all(entry.type in text for entry in scores.types)
        assert "\x1b" not in text
    assert f"Chosen: {' '.join(placement.module_types)}" in str(placement)
    assert len(repr(scores)) < 200
    assert len(repr(placement)) < 200


def test_a_placement_without_its_scores_prints_its_choice() -> None:
    placement = plop_dist.place(made_scores(), k=2)
    alone = type(placement).model_validate(placement.model_dump(by_alias=True))
    assert str(alone).startswith("Chosen: ")
    assert "<table" not in alone._repr_html_()
    with pytest.raises(ScoresError, match="read without its scores"):
        alone.explain()


def test_html_is_a_table_in_which_names_are_text() -> None:
    scores = made_scores()
    evil = scores.model_copy(update={"model": scores.model.model_copy(update={"name_or_path": "<script>x</script>"})})
    for shown in (evil._repr_html_(), plop_dist.place(evil, k=2)._repr_html_(), evil.plot()._repr_html_()):
        assert "<script" not in shown
    html = plop_dist.place(scores, k=2)._repr_html_()
    assert html.count("<tr>") == len(scores.types) + 1
    assert html.count('<td style="text-align: left; font-weight: bold">') == 2


def test_the_chart_stands_alone(tmp_path: Path) -> None:
    scores = made_scores()
    chart = scores.plot(plop_dist.place(scores, k=2))
    assert chart.save(tmp_path / "chart.html").read_text() == chart._repr_html_()
    assert "http" not in chart._repr_html_().replace("http-equiv", "")
    assert all(entry.type in chart._repr_html_() for entry in scores.types)
    assert chart._repr_html_().count("class=&quot;bar in&quot;") == 2


def test_reasons_are_those_of_explain() -> None:
    placement = plop_dist.place(made_scores(), k=2)
    text = repr(placement.explain())
    assert "P(chosen)" in text
    assert all(f"{name}: " in text for name in placement.module_types)
    assert placement.explain()._repr_html_().startswith("<pre>")


def test_pandas_gets_a_row_per_module() -> None:
    scores = made_scores()
    frame = scores.to_pandas()
    assert list(frame["fqn"]) == [module.fqn for module in scores.modules]
    assert frame.groupby("type")["nfn"].mean().to_dict() == pytest.approx({e.type: e.nfn for e in scores.types})


def test_completion_shows_what_is_ours() -> None:
    scores = made_scores()
    names = {name for name in dir(scores) if not name.startswith("_")}
    assert {"modules", "types", "plot", "to_pandas", "from_file", "samples"} <= names
    assert not {name for name in names if name.startswith("model_") or name in ("copy", "dict", "json", "parse_obj")}
