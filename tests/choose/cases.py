"""Scores made by hand for the tests of placement, bootstrap and report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import DataInfo, ModelInfo, ModuleScore, Scores, TypeScore

LLAMA = {
    "q_proj": 2.579,
    "k_proj": 2.627,
    "v_proj": 0.969,
    "o_proj": 0.9,
    "gate_proj": 1.401,
    "up_proj": 1.112,
    "down_proj": 1.048,
}
_MLP = ("gate_proj", "up_proj", "down_proj")


def make_scores(
    nfn: Mapping[str, float] = LLAMA,
    num_layers: int = 3,
    num_samples: int = 24,
    noise: float = 0.05,
    widths: Mapping[str, tuple[int, int]] | None = None,
    name: str = "made/by-hand",
    with_samples: bool = True,
) -> Scores:
    """Return scores of a model with these types in every layer; each sample's gain is noisy by `noise`."""
    rng = np.random.default_rng(0)
    modules, gains = [], []
    tokens_S = rng.integers(50, 90, num_samples)
    for layer in range(num_layers):
        for kind, value in nfn.items():
            gain_S = tokens_S * value * (1 + noise * rng.standard_normal(num_samples))
            gain = float(gain_S.sum() / tokens_S.sum())
            width_in, width_out = (widths or {}).get(kind, (1024, 1024))
            block = "mlp" if kind in _MLP else "self_attn"
            fqn = kind if kind == "lm_head" else f"model.layers.{layer}.{block}.{kind}"
            if fqn == "lm_head" and layer:
                continue
            modules.append(
                ModuleScore(
                    fqn=fqn,
                    type=kind,
                    layer=None if kind == "lm_head" else layer,
                    in_features=width_in,
                    out_features=width_out,
                    num_tokens=int(tokens_S.sum()),
                    gain=2 * gain,
                    baseline=2.0,
                    nfn=gain,
                )
            )
            gains.append(2 * gain_S)
    samples = SampleTotals(
        tuple(module.fqn for module in modules),
        np.arange(num_samples),
        np.array(gains),
        np.tile(tokens_S, (len(modules), 1)),
        np.zeros((len(modules), num_samples), dtype=np.int64),
    )
    scores = scores_of(modules, name)
    return scores.with_samples(samples) if with_samples else scores


def scores_of(modules: list[ModuleScore], name: str = "made/by-hand") -> Scores:
    """Return scores of exactly these modules, without per-sample sums."""
    values: dict[str, list[float]] = {}
    for module in modules:
        values.setdefault(module.type, []).append(module.nfn)
    types = [TypeScore(type=kind, num_modules=len(v), nfn=sum(v) / len(v)) for kind, v in values.items()]
    return Scores(
        model=ModelInfo(name_or_path=name, architecture="Llama", num_parameters=1000, dtype="float32"),
        data=DataInfo(source="data.jsonl", num_samples=24, num_tokens=1600, max_length=128),
        estimator={"baseline": "exact", "num_directions": 64, "seed": 0},
        parallel={"backend": "transformers", "tp": 1},
        modules=tuple(modules),
        types=tuple(sorted(types, key=lambda entry: entry.nfn)),
        versions={"torch": "2.13.0"},
    )
