"""report.html is one inert, self-contained page that shows the run, and holds no secret."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import plop_dist
from plop_dist.errors import ScoresError
from plop_dist.exporters.write import write_export
from plop_dist.report import write_report
from plop_dist.report.closing import print_outdated
from plop_dist.report.panels import training_panel
from plop_dist.report.redact import redact
from plop_dist.report.terminal import print_training
from plop_dist.report.training import training_of
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.made_from import placement_mark
from plop_dist.values.files import content_hash
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores
from tests.choose.cases import make_scores, scores_of
from tests.made_scores import made_scores

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects tags, text outside scripts, scripts and everything that would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self.text = ""
        self.charts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        given = dict(attrs)
        if tag == "script":
            self.scripts.append("")
        if given.get("role") == "img":
            self.charts.append(given.get("aria-label") or "")
        if given.get("http-equiv"):
            self.policy = given.get("content") or ""
        self.fetched += [given[name] or "" for name in ("src", "href", "action", "data", "poster") if name in given]
        self.handlers += [name for name in given if name.startswith("on") or name == "style"]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def make_run(directory: Path, name: str = "made/by-hand", placed: bool = True) -> Path:
    """Fill a run directory as a whole run leaves it."""
    directory.mkdir(exist_ok=True)
    scores = make_scores(name=name)
    scores.to_file(directory / "scores.json")
    if placed:
        plop_dist.place(scores).to_file(directory / "placement.json")
    (directory / "train").mkdir()
    log = [{"step": i, "loss": 2.0 - i / 10, "nfn": {"o_proj": 0.9 + i / 100}} for i in range(5)]
    text = "\n".join(json.dumps(entry) for entry in log)
    (directory / "train" / "log.jsonl").write_text(text + '\n{"step": 6, "lo')
    summary = {"method": "sft", "held_out_before": 2.0, "held_out_after": 1.4, "num_steps": 5, "adapter": name}
    summary |= {"num_rows": 40, "num_epochs": 0.5, "num_held_out_rows": 8}
    (directory / "train" / "summary.json").write_text(json.dumps(summary))
    (directory / "config.yaml").write_text("data:\n  max_length: 128\nhub_token: verysecret1\nnum_tokens: 77\n")
    (directory / "command.txt").write_text(f"HF_TOKEN=verysecret2 plop-dist run {name} # hf_verysecret3abcdefgh\n")
    return directory


def test_page_shows_the_run_and_fetches_nothing(tmp_path: Path) -> None:
    path = write_report(RunDir(make_run(tmp_path)))
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    assert page.fetched == []
    assert len(page.scripts) == 1
    assert [label.split(":")[0] for label in page.charts] == [
        "NFN per module type", "NFN by layer and module type", "How often so many samples make the final choice",
        "loss (40 rows, 0.5 epochs, 8 held-out rows)", "NFN of the adapted model",
    ]  # fmt: skip
    for shown in ("made/by-hand", "294,912", "2.000 → 1.400", "Next best: up_proj", "2.13.0", "plop-dist run", "77"):
        assert shown in page.text
    assert "1 lines of the training log are unreadable" in page.text
    assert "held-out loss: 1.4\nstep 5" in page.text
    assert "model.layers.2.self_attn.o_proj\nNFN 0." in page.text
    assert len(path.read_bytes()) < 100_000


def test_what_to_paste_comes_first(tmp_path: Path) -> None:
    run = RunDir(make_run(tmp_path / "placed"))
    run.training_summary.unlink()
    page = Page(write_report(run).read_text())
    parts = [
        f"plop-dist export {run.path} --to trl", "target_modules=['down_proj', 'o_proj', 'v_proj']",
        "--lora_target_modules down_proj o_proj v_proj", "NFN per module type",
    ]  # fmt: skip
    places = [page.text.find(part) for part in parts]
    assert places == sorted(places)
    assert places[0] > 0
    scored = RunDir(make_run(tmp_path / "scored", placed=False))
    assert f"plop-dist place {scored.path}" in Page(write_report(scored).read_text()).text


def test_every_table_says_what_its_figures_are(tmp_path: Path) -> None:
    text = write_report(RunDir(make_run(tmp_path))).read_text()
    tables = re.split(r'<table class="sortable', text)[1:]
    assert len(tables) == 5
    for table in tables:
        head, note = re.search(r"<thead>(.*?)</thead>", table, re.DOTALL), re.search(r'<p class="note">', table)
        assert head is not None
        assert note is not None
        below = table[note.start() : note.start() + 900]
        for word in ("NFN", "P(chosen)", "confidence", "P(final choice)"):
            assert word not in head[1] or word.lower() in below.lower(), f"{word} is not explained below its table"
        assert "NFN" not in head[1] or "1.0" in below


def test_numbers_are_rounded(tmp_path: Path) -> None:
    run = RunDir(make_run(tmp_path))
    summary = json.loads(run.training_summary.read_text())
    run.training_summary.write_text(json.dumps({**summary, "held_out_after": 0.28813622214577417}))
    page = Page(write_report(run).read_text())
    assert re.findall(r"(?<!\d)\d{1,3}\.\d{5,}", page.text) == []
    assert "0.2881" in page.text


def test_only_the_page_s_own_script_may_run(tmp_path: Path) -> None:
    page = Page(write_report(RunDir(make_run(tmp_path))).read_text())
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "unsafe" not in page.policy


def test_names_are_inert_and_secrets_absent(tmp_path: Path) -> None:
    text = write_report(RunDir(make_run(tmp_path, name=ATTACK))).read_text()
    page = Page(text)
    assert ATTACK in page.text
    assert len(page.scripts) == 1
    assert "img" not in page.tags
    assert page.handlers == []
    assert "verysecret" not in text


def test_a_log_that_makes_no_sense_is_passed_over(tmp_path: Path) -> None:
    run = RunDir(make_run(tmp_path))
    odd = ['{"step": [1], "loss": 1}', '{"step": {}, "loss": 1}', '{"step": 7, "loss": Infinity}', "1" * 5000,
           '{"step": 8, "loss": 1e308}', '{"step": 1e400, "loss": 1}', '{"step": 9, "nfn": {"a": "b", "c": NaN}}',
           "[" * 20000, '{"step": 3, "loss": true}', '{"step": 10, "loss": -1e99}']  # fmt: skip
    run.training_log.write_text("\n".join(odd))
    page = Page(write_report(run).read_text())
    assert "training loss: -1e+99" in page.text
    assert "7 lines of the training log are unreadable" in page.text


def test_what_an_earlier_placement_made_is_said_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(make_run(tmp_path))
    path, mark = run.training_summary, content_hash(run.placement)
    path.write_text(json.dumps({**json.loads(path.read_text()), "placement": mark}))
    for target in ("peft", "trl"):
        write_export(Placement.from_file(run.placement), target, run.exports, engine=None, widen=False, mark=mark)
    print_training(run)
    assert "held-out loss 2.0000 -> 1.4000" in capsys.readouterr().out
    page = write_report(run).read_text()
    assert "held-out loss" in page
    assert "older placement" not in page
    plop_dist.place(Scores.from_file(run.scores), k=1).to_file(run.placement)
    write_export(
        Placement.from_file(run.placement), "trl", run.exports, engine=None, widen=False, mark=placement_mark(run)
    )
    print_training(run)
    print_outdated(run)
    said = capsys.readouterr().out
    assert "Trained" not in said
    assert "train, report.html" in said
    page = write_report(run).read_text()
    assert "train was made from an older placement, and is not shown" in page
    assert f"exports/peft was made from an older placement. To make it anew: <code>plop-dist export {tmp_path}" in page
    assert "exports/trl" not in page
    assert "report.html was made" not in page
    assert "held-out loss" not in page


def test_scores_alone_make_a_page(tmp_path: Path) -> None:
    make_scores(with_samples=False).to_file(tmp_path / "scores.json")
    page = Page(write_report(RunDir(tmp_path)).read_text())
    assert "nothing is chosen yet" in page.text
    assert page.charts == ["NFN per module type", "NFN by layer and module type"]


def test_many_experts_are_folded_and_the_page_stays_small(tmp_path: Path) -> None:
    sizes = []
    for num_experts in (8, 256):
        directory = tmp_path / str(num_experts)
        directory.mkdir()
        scores_with_experts(num_experts).to_file(directory / "scores.json")
        page = Page(write_report(RunDir(directory)).read_text())
        sizes.append(len(page.text))
        assert "experts.up_proj: NFN by layer" in page.charts
        low, high = (f"model.layers.{n}.mlp.experts.{e}.up_proj" for n, e in ((0, 0), (1, num_experts - 1)))
        assert f"lowest 1.0000: {low}" in page.text
        for shown in (f"{2 * num_experts}", low, high, "1.0000", f"{2 + (num_experts - 1) / 1000:.4f}"):
            assert shown in page.text
        assert f"{num_experts} modules of experts.up_proj, layer 1; on average:" in page.text
        assert f"median {2 + (num_experts - 1) / 2000:.4f}, 5% to 95%" in page.text
    assert sizes[1] < 1.05 * sizes[0], "the page grows with the number of experts"


@pytest.mark.slow
def test_the_page_of_a_very_large_model_can_be_sent_by_mail(tmp_path: Path) -> None:
    made_scores(num_layers=94, num_samples=16).to_file(tmp_path / "scores.json")
    assert len(write_report(RunDir(tmp_path)).read_bytes()) < 1_000_000


@pytest.mark.slow
def test_of_very_many_rows_the_ends_are_shown(tmp_path: Path) -> None:
    make_scores(num_layers=600, num_samples=2).to_file(tmp_path / "scores.json")
    text = write_report(RunDir(tmp_path)).read_text()
    assert "The 200 lines in the" in text
    assert len(text) < 2_000_000


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
    figure = training_panel(log, {"loss": "loss"}, "loss")
    assert figure is not None
    (line,) = figure.lines
    assert 250 <= len(line.places.split()) <= 500
    assert line.dots[-1].lines == ("loss: 1.75", "step 25,000")


def test_a_training_for_reward_shows_how_far_it_strays(tmp_path: Path) -> None:
    make_run(tmp_path)
    numbers = {"reward": 0.5, "entropy": 1.5, "kl": 0.01, "clip_ratio/low_mean": 0.02, "clip_ratio/high_mean": 0.25}
    numbers |= {f"sampling/sampling_logp_difference/{end}": 1e-4 for end in ("mean", "max")}
    numbers |= {f"sampling/importance_sampling_ratio/{end}": 1.0 for end in ("min", "mean", "max")}
    log = [{"step": step, "loss": 0.1, **numbers} for step in range(1, 4)]
    (tmp_path / "train" / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    panels = {panel.title: [line.name for line in panel.lines] for panel in training_of(RunDir(tmp_path)).panels}
    assert list(panels.items())[1:] == [
        ("reward", ["reward"]),
        ("entropy per token of completions", ["entropy"]),
        ("KL to the model without adapters, per token", ["KL"]),
        ("share of tokens whose ratio is clipped", ["too low", "too high"]),
        ("log-probability of a token: sampler against trainer", ["mean difference", "largest difference"]),
        ("importance weights of completions: trainer to sampler", ["lowest", "mean", "highest"]),
    ]


def test_missing_scores_are_named(tmp_path: Path) -> None:
    with pytest.raises(ScoresError, match=r"scores\.json does not exist"):
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
