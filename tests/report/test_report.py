"""report.html is one inert, self-contained page that shows the run, and holds no secret."""

from __future__ import annotations

import builtins
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import plop_dist
from plop_dist.errors import MissingExtraError, ScoresError
from plop_dist.report import write_report
from plop_dist.report.closing import print_outdated
from plop_dist.report.figures import training_figure
from plop_dist.report.redact import redact
from plop_dist.report.terminal import print_training
from plop_dist.rundir.layout import RunDir
from plop_dist.values.files import content_hash
from plop_dist.values.scores import Scores
from tests.choose.cases import make_scores, scores_of

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>/*plotly*/"


class Page(HTMLParser):
    """Collects tags, text outside scripts, scripts and everything that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            if name in ("src", "href"):
                self.fetched.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def make_run(directory: Path, name: str = "made/by-hand", placed: bool = True) -> Path:
    """Fill a run directory as a whole run leaves it."""
    scores = make_scores(name=name)
    scores.to_file(directory / "scores.json")
    if placed:
        plop_dist.place(scores).to_file(directory / "placement.json")
    (directory / "train").mkdir()
    log = [{"step": i, "loss": 2.0 - i / 10, "nfn": {"o_proj": 0.9 + i / 100}} for i in range(5)]
    text = "\n".join(json.dumps(entry) for entry in log)
    (directory / "train" / "log.jsonl").write_text(text + '\n{"step": 6, "lo')
    summary = {"method": "sft", "held_out_before": 2.0, "held_out_after": 1.4, "num_steps": 5, "adapter": name}
    (directory / "train" / "summary.json").write_text(json.dumps(summary))
    (directory / "config.yaml").write_text("data:\n  max_length: 128\nhub_token: verysecret1\nnum_tokens: 77\n")
    (directory / "command.txt").write_text(f"HF_TOKEN=verysecret2 plop-dist run {name} # hf_verysecret3abcdefgh\n")
    return directory


def test_page_shows_the_run_and_fetches_nothing(tmp_path: Path) -> None:
    path = write_report(RunDir(make_run(tmp_path)))
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    assert page.fetched == []
    assert page.tags.count("script") == 3
    assert {"chart-types", "chart-heatmap", "chart-samples", "chart-loss", "chart-nfn"} <= page.ids
    assert "chart-reward" not in page.ids
    for shown in ("made/by-hand", "294,912", "2.000 → 1.400", "Next best: up_proj", "2.13.0", "plop-dist run", "77"):
        assert shown in page.text
    assert "1 lines of the training log are unreadable" in page.text
    charts = json.loads(page.scripts[1])
    assert f"chart-{min(charts)}" in page.ids
    held_out = next(line for line in charts["loss"]["data"] if line["name"] == "held-out loss")
    assert (held_out["x"], held_out["y"]) == ([0, 5], [2.0, 1.4])
    heat = charts["heatmap"]["data"][0]
    assert len(heat["z"]) == 7
    assert heat["text"][0][2].startswith("model.layers.2.self_attn.o_proj<br>NFN 0.")


def test_names_are_inert_and_secrets_absent(tmp_path: Path) -> None:
    page = Page(write_report(RunDir(make_run(tmp_path, name=ATTACK))).read_text())
    assert ATTACK in page.text
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert page.handlers == []
    for text in [page.text, *page.scripts[1:]]:
        assert "verysecret" not in text


def test_a_training_of_an_earlier_placement_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(make_run(tmp_path))
    path = run.training_summary
    path.write_text(json.dumps({**json.loads(path.read_text()), "placement": content_hash(run.placement)}))
    print_training(run)
    assert "held-out loss 2.0000 -> 1.4000" in capsys.readouterr().out
    assert "held-out loss" in write_report(RunDir(tmp_path)).read_text()
    plop_dist.place(Scores.from_file(run.scores), k=1).to_file(run.placement)
    print_training(run)
    print_outdated(run)
    said = capsys.readouterr().out
    assert "Trained" not in said
    assert "made from an older placement: train, report.html" in said
    page = write_report(RunDir(tmp_path)).read_text()
    assert "Not shown: train/ holds the training of an earlier placement" in page
    assert "held-out loss" not in page


def test_scores_alone_make_a_page(tmp_path: Path) -> None:
    make_scores(with_samples=False).to_file(tmp_path / "scores.json")
    page = Page(write_report(RunDir(tmp_path)).read_text())
    assert "nothing is chosen yet" in page.text
    assert "chart-samples" not in page.ids


def test_many_experts_are_folded_and_the_page_stays_small(tmp_path: Path) -> None:
    sizes = []
    for num_experts in (8, 256):
        directory = tmp_path / str(num_experts)
        directory.mkdir()
        scores_with_experts(num_experts).to_file(directory / "scores.json")
        page = Page(write_report(RunDir(directory)).read_text())
        sizes.append(sum(map(len, page.scripts[1:])) + len(page.text))
        charts = json.loads(page.scripts[1])
        assert [note["text"] for note in charts["folded"]["layout"]["annotations"]] == ["<b>experts.up_proj</b>"]
        median = charts["folded"]["data"][-1]
        assert median["x"] == [0, 1]
        assert median["y"] == pytest.approx([1 + (num_experts - 1) / 2000, 1 + (num_experts - 1) / 2000 + 1])
        low, high = (f"model.layers.{n}.mlp.experts.{e}.up_proj" for n, e in ((0, 0), (1, num_experts - 1)))
        assert f"lowest 1.0000: {low}" in median["text"][0]
        for shown in (f"{2 * num_experts}", low, high, "1.0000", f"{2 + (num_experts - 1) / 1000:.4f}"):
            assert shown in page.text
        heat = charts["heatmap"]["data"][0]
        assert f"{num_experts} modules, on average:" in heat["text"][heat["y"].index("experts.up_proj")][1]
    assert sizes[1] < 1.05 * sizes[0], "the page grows with the number of experts"


def test_a_dense_model_has_no_folded_part(tmp_path: Path) -> None:
    page = write_report(RunDir(make_run(tmp_path))).read_text()
    assert "routed experts" not in page


def scores_with_experts(num_experts: int) -> Scores:
    """Return scores of two layers whose experts' NFNs rise by 0.001, from 1 in the first layer and 2 in the second."""
    dense = make_scores(num_layers=2, with_samples=False)
    experts = []
    for layer in range(2):
        for expert in range(num_experts):
            nfn = 1 + layer + expert / 1000
            fqn = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            update = {"fqn": fqn, "type": "experts.up_proj", "layer": layer, "gain": nfn, "baseline": 1.0, "nfn": nfn}
            experts.append(dense.modules[0].model_copy(update=update))
    return scores_of([*dense.modules, *experts])


def test_a_long_training_is_drawn_with_as_many_points_as_a_screen_shows() -> None:
    log = [{"step": step, "loss": 2.0 - step / 10**5} for step in range(1, 25_001)]
    figure = training_figure(log, "loss", "loss")
    assert figure is not None
    (line,) = figure["data"]
    assert 500 <= len(line["x"]) <= 1000
    assert line["x"][-1] == 25_000
    assert dict(zip(line["x"], line["y"], strict=True))[25_000] == 1.75


def test_missing_scores_and_missing_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScoresError, match=r"scores\.json does not exist"):
        write_report(RunDir(tmp_path))
    real = builtins.__import__

    def without_plotly(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("plotly"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    with pytest.raises(MissingExtraError, match=r"pip install 'plop-dist\[report\]'"):
        write_report(RunDir(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "--hf-token hiddenvalue",
        "WANDB_API_KEY=hiddenvalue",
        "password: hiddenvalue",
        "https://me:hiddenvalue@host/x",
        "Authorization: Bearer hiddenvalue",
        "sk-hiddenvalue123",
        '{"secret": "hiddenvalue"}',
    ],
)
def test_redact_text(text: str) -> None:
    assert "hiddenvalue" not in redact(text)


def test_redact_keeps_counts() -> None:
    kept = {"num_tokens": 5, "text": "num_tokens: 5, tokens_per_second=3, eos_token: null"}
    assert redact(kept) == kept
    assert redact({"a": [{"hub_token": "x"}]}) == {"a": [{"hub_token": "[redacted]"}]}
