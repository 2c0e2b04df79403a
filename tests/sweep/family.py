"""One architecture: a tiny checkpoint of it is scored as commands and hosts do, and compared, or refused."""

from __future__ import annotations

import copy
import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

import plop_dist
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.backends.hf.whole import whole_sites
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ExportError, PlacementError, UserError
from plop_dist.exporters.holders import hugging_face_targets
from plop_dist.launch import pipeline
from plop_dist.values.names import expert_index
from plop_dist.values.scores import Scores
from tests.models import padded_batches, spoil_all, tiny_tokenizer
from tests.sweep.products import Product, products_of
from tests.sweep.tiny_configs import FIRST_TOKEN, tiny_config

TEXTS = ("ONE 9 + 4", "XYZ", "7 * 6 - 1 = 41 !", "(Q", "0123456789 ABC")
# Of a gain or baseline in float32 against float64. Megatron's order of sums differs from transformers' everywhere.
TOLERANCES = {"transformers": 1e-5, "megatron": 1e-4}
MAX_PARAMETERS = 10_000_000

Verdict = Literal["exact", "refused", "wrong", "crashed", "not built"]


@dataclass(frozen=True)
class Outcome:
    """What came of one way to score one architecture; said: why not, in its message. worst_gain: largest rel. error."""

    verdict: Verdict
    said: str = ""
    worst_gain: float | None = None


@dataclass(frozen=True)
class Family:
    """A row of the table. ways: the outcome of each way that was tried."""

    model_type: str
    class_name: str
    ways: dict[str, Outcome]


def sweep_family(model_type: str, class_name: str, folder: Path) -> Family:
    """Return how an architecture fares in transformers: built tiny, saved, scored from there and in a host.

    What does not run on text alone must be refused.
    """
    model = build_and_run(model_type, class_name)
    if isinstance(model, Outcome):
        return Family(model_type, class_name, {"": model})
    save(model, folder)
    ways = {"command": tried(lambda: by_command(model, folder, "transformers")), "host": tried(lambda: by_host(model))}
    return Family(model_type, class_name, ways)


def build_and_run(model_type: str, class_name: str) -> Any:
    """Return a tiny model of the architecture that runs on text, or the Outcome "not built"."""
    try:
        model = build(model_type, class_name)
        _run_alone(model)
    except Exception as error:
        return Outcome("not built", _said(error))
    return model


@torch.no_grad()
def _run_alone(model: Any) -> None:
    """Raise what the model itself raises on text, for reasons other than that it needs more than text."""
    for batch in (*batches("right"), {"input_ids": torch.tensor(tokens()[:1])}):
        try:
            model(**batch)
        except (ValueError, TypeError):  # it says what it needs; so must we
            return


def by_command(model: Any, folder: Path, backend: str, **layout: Any) -> Outcome:
    """Return what comes of a saved checkpoint. layout: further keys of `parallel`."""
    scores = Scores.from_file(score_saved(folder, backend, **layout))
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder / "model")))  # some families have one of their own
    return compare(model, [tokenizer(text)["input_ids"] for text in TEXTS], scores, TOLERANCES[backend])


def by_host(model: Any) -> Outcome:
    """Return what comes of a host's model, scored in batches padded on the left; its adapters reach what is chosen."""
    scores = plop_dist.score(model, batches("left"), baseline="closed_form", exclude=())
    outcome = compare(model, tokens(), scores)
    return adapted(model, scores) if outcome.verdict == "exact" else outcome


def compare(
    model: Any, samples: list[list[int]], scores: Scores, tolerance: float = TOLERANCES["transformers"]
) -> Outcome:
    """Return whether scores are those of the reference."""
    return Reference(model, [torch.tensor(ids) for ids in samples]).compare(scores, tolerance)


def adapted(model: Any, scores: Scores) -> Outcome:
    """Return whether PEFT adapts all that policy all chooses, less what it refuses, and nothing else."""
    exclude = ["lm_head"]
    while True:
        try:
            placement = plop_dist.place(scores, policy="all", exclude=exclude)
            fields = placement.to_peft(task_type=None)
        except PlacementError:
            return Outcome("exact", "nothing to adapt")
        except ExportError as error:
            exclude += error.types
            continue
        break
    inner = inject_adapter_in_model(fields, copy.deepcopy(model))
    names = (name for name, _ in inner.named_parameters() if ".lora_A" in name)
    found = {name.partition(".lora_A")[0].replace(".base_layer", "") for name in names}
    holders = hugging_face_targets(placement, "peft", False).holders
    wanted = {one.peft_path.rpartition(".")[0] if one.is_parameter else one.path for one in holders}
    odd = sorted(found ^ wanted)
    return Outcome("wrong", f"PEFT adapts other modules: {odd[:3]}") if odd else Outcome("exact")


def build(model_type: str, class_name: str, **fields: Any) -> Any:
    """Return a tiny float32 model with uneven weights. fields: over those of its tiny configuration."""
    import transformers

    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(tiny_config(model_type, **fields)).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"its smallest configuration here still has {size:,} parameters")
        model = model_class(tiny_config(model_type, **fields)).float().eval()
    spoil_all(model)
    for name, table in model.named_buffers():
        if name.endswith(
            "tid2eid"
        ):  # DeepSeek-V4's table of experts by token, all of them the same one before training
            table.copy_((torch.arange(len(table))[:, None] + torch.arange(table.shape[1])) % 4)
    return model


def tokens() -> list[list[int]]:
    """Return the samples: plain characters, so that no special token and no pair is among them."""
    ids = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert all(one >= FIRST_TOKEN for sample in ids for one in sample)
    return ids


def save(model: Any, folder: Path, published_as: str | None = None) -> None:
    """Write the checkpoint, and the rows to score it with. published_as: the class that it names, if not its own."""
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    config_file = folder / "model" / "config.json"
    if published_as is not None:
        config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "architectures": [published_as]}))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))


def score_saved(folder: Path, backend: str, **layout: Any) -> Path:
    """Score the checkpoint in a folder as `plop-dist score` does; as one rank of several where a launcher is seen.

    Returns where rank 0 writes the scores.
    """
    parallel = {"backend": backend, **layout}
    config = parse_config({
        "run_dir": str(folder / "-".join(["run", *map(str, parallel.values())])),
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "data": {"path": str(folder / "rows.jsonl"), "text_field": "text", "batch_size": 2},
        "estimator": {"baseline": "closed_form"},
        "parallel": parallel,
        "placement": {"exclude": []},
    })  # fmt: skip
    return pipeline.score(config, "plop-dist score").scores


def batches(side: str) -> list[dict[str, Tensor]]:
    """Return the samples two a batch, padded on this side."""
    return padded_batches([torch.tensor(ids) for ids in tokens()], side)


class Reference:
    """What scores of a model must be: from products with its parameters in a float64 copy."""

    def __init__(self, model: Any, samples: list[Tensor]) -> None:
        # Some families fill masks with a number of float64 and see nothing but it, or make float32 of some tensors.
        try:
            self._products = self._run(copy.deepcopy(model).double(), samples)
            inputs = [z for product in self._products.values() for z in product.inputs if z is not None]
            is_exact = all(z.isfinite().all() for z in inputs)
        except (RuntimeError, ValueError):
            is_exact = False
        if not is_exact:
            self._products = self._run(copy.deepcopy(model), samples)
        self._model, self._num_tokens = model, sum(map(len, samples))

    @staticmethod
    def _run(exact: Any, samples: list[Tensor]) -> dict[tuple[str, int], Product]:
        exact.config.use_cache = False  # xLSTM's has another shape
        if hasattr(exact, "set_experts_implementation") and any(hasattr(m, "is_concatenated") for m in exact.modules()):
            exact.set_experts_implementation("eager")
        return products_of(exact, samples)

    def compare(self, scores: Scores, tolerance: float) -> Outcome:
        """Return whether every product is scored exactly, or at least said to have no score."""
        wrong, worst_gain = [], 0.0
        if scores.data.num_tokens != self._num_tokens:
            wrong.append(f"data.num_tokens is {scores.data.num_tokens}, not {self._num_tokens}")
        blocks = {block.projection.fqn: block for site in whole_sites(self._model, True) for block in site.blocks}  # type: ignore[attr-defined]
        seen = {_bare(entry.holder) for entry in scores.left_out}
        for module in scores.modules:
            seen.add(_bare(module.holder))
            product = self._product(module)
            if product is None or None in [None if z is None else 0 for z in product.inputs]:
                wrong.append(f"{module.fqn} is scored, but torch was asked for no such product")
                continue
            rows_O = blocks[module.fqn].take_rows(torch.arange(len(product.weight_OI))[:, None]).flatten()
            gain, num_tokens = product.mean_gain(rows_O)
            frobenius = float(product.weight_OI[rows_O].double().norm()) / module.in_features**0.5
            if module.num_tokens != num_tokens:
                wrong.append(f"{module.fqn}: {module.num_tokens} tokens, not {num_tokens}")
            worst_gain = max(worst_gain, abs(module.gain / gain - 1))
            for name, found, expected in (("gain", module.gain, gain), ("baseline", module.baseline, frobenius)):
                if not abs(found - expected) <= tolerance * expected:
                    wrong.append(f"{module.fqn}: {name} {found:.7g}, not {expected:.7g}")
        mentioned = {id(self._parameter(holder)) for holder in seen}
        missing = sorted({name for name, _ in self._products if id(self._model.get_parameter(name)) not in mentioned})
        wrong += [f"{name} multiplies activations and is not mentioned" for name in missing]
        return Outcome("wrong", f"{len(wrong)}: {'; '.join(wrong[:3])}") if wrong else Outcome("exact", "", worst_gain)

    def _product(self, module: Any) -> Product | None:
        expert = expert_index(module.fqn)
        if expert is not None and module.storage == "expert_parameter":
            size = self._model.get_parameter(module.holder)[0].numel()
            return self._products.get((module.holder, expert * size))
        first_name = {id(parameter): key for key, parameter in self._model.named_parameters()}  # of tied ones
        return self._products.get((first_name.get(id(self._parameter(_bare(module.holder))), ""), 0))

    def _parameter(self, holder: str) -> Any:
        """Return the parameter, or the weight of the module, at a path without `.weight`."""
        owner_path, _, name = holder.rpartition(".")
        found = getattr(self._model.get_submodule(owner_path), name, None)
        return getattr(found, "weight", None) if isinstance(found, nn.Module) else found


def _bare(holder: str) -> str:
    return holder.removesuffix(".weight")


def tried(way: Any) -> Outcome:
    """Return a way's outcome, whatever it raises."""
    try:
        return way()
    except UserError as error:
        return Outcome("refused", _said(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("crashed", f"{_said(error)} [{Path(where.filename).name}:{where.lineno}]")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
