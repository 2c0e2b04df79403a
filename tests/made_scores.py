"""Scores of a mixture-of-experts model that was never run, at any size: what place, export and report are timed on."""

# M scored modules, P projections, S samples

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from plop_dist.values.names import layer_index, module_type
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import (
    SCORES_SCHEMA,
    DataInfo,
    LeftOut,
    ModelInfo,
    ModuleScore,
    Projection,
    Scores,
    TypeScore,
)

# Qwen3-235B-A22B (config.json): 94 layers make 36,566 projections, of which 33,968 are scored here.
NUM_LAYERS = 94
NUM_EXPERTS = 128
_HIDDEN, _QUERY, _KEY, _EXPERT = 4096, 8192, 512, 1536
_ATTENTION = {
    "q_proj": (_HIDDEN, _QUERY),
    "k_proj": (_HIDDEN, _KEY),
    "v_proj": (_HIDDEN, _KEY),
    "o_proj": (_QUERY, _HIDDEN),
}
_EXPERT_PARTS = {
    "gate_proj": (_HIDDEN, _EXPERT, "gate_up_proj"),
    "up_proj": (_HIDDEN, _EXPERT, "gate_up_proj"),
    "down_proj": (_EXPERT, _HIDDEN, "down_proj"),
}
# Typical NFN of each type; single modules scatter around it.
_NFN = {
    "q_proj": 2.4,
    "k_proj": 2.6,
    "v_proj": 0.95,
    "o_proj": 0.9,
    "gate": 1.8,
    "experts.gate_proj": 1.4,
    "experts.up_proj": 1.15,
    "experts.down_proj": 1.05,
}
_SILENT = 0.071  # share of experts that no token is routed to
_ACTIVE = 8  # experts per token


def made_scores(
    num_layers: int = NUM_LAYERS, num_experts: int = NUM_EXPERTS, num_samples: int = 200, seed: int = 0
) -> Scores:
    """Return scores with the modules of Qwen3-235B-A22B in so many layers, and their per-sample sums.

    The experts' weights lie in two 3-D parameters per layer, as in transformers 5; some experts see no token. Values
    are random, the same for the same arguments. 4, 17 and 94 layers have about 1,450, 6,150 and 34,000 scored modules.
    """
    rng = np.random.default_rng(seed)
    projections = list(_projections(num_layers, num_experts))
    experts = num_layers * num_experts
    # One expert's three projections see the same tokens.
    share = rng.lognormal(0.0, 0.5, experts) * (rng.random(experts) >= _SILENT)
    length_S = rng.integers(100, 257, num_samples)
    routed_ES = rng.poisson(share[:, None] * length_S * _ACTIVE / num_experts)
    tokens_PS = np.tile(length_S, (len(projections), 1))
    row = [index for index, projection in enumerate(projections) if projection.storage == "expert_parameter"]
    tokens_PS[row] = np.repeat(routed_ES, len(_EXPERT_PARTS), axis=0)
    nfn_P = np.array([_NFN[projection.type] for projection in projections]) * rng.lognormal(0, 0.08, len(projections))
    baseline_P = rng.uniform(0.5, 2.0, len(projections))
    gain_PS = tokens_PS * (nfn_P * baseline_P)[:, None] * rng.normal(1.0, 0.05, tokens_PS.shape)
    seen = tokens_PS.any(axis=1)
    samples = SampleTotals(
        tuple(projection.fqn for projection, is_seen in zip(projections, seen, strict=True) if is_seen),
        np.arange(num_samples),
        gain_PS[seen],
        tokens_PS[seen],
        np.zeros_like(tokens_PS[seen]),
    )
    scored = [projection for projection, is_seen in zip(projections, seen, strict=True) if is_seen]
    modules = [
        _module(projection, gain, num_tokens, baseline)
        for projection, gain, num_tokens, baseline in zip(
            scored,
            samples.gain_total.sum(axis=1).tolist(),
            samples.num_tokens.sum(axis=1).tolist(),
            baseline_P[seen].tolist(),
            strict=True,
        )
    ]
    left_out = [
        LeftOut(**projection.model_dump(), reason="no_tokens")
        for projection, is_seen in zip(projections, seen, strict=True)
        if not is_seen
    ]
    return _scores(modules, left_out, num_samples, int(length_S.sum())).with_samples(samples)


def _projections(num_layers: int, num_experts: int) -> Iterator[Projection]:
    for layer in range(num_layers):
        path = f"model.layers.{layer}"
        for name, sizes in _ATTENTION.items():
            yield _projection(f"{path}.self_attn.{name}", *sizes)
        yield _projection(f"{path}.mlp.gate", _HIDDEN, num_experts, storage="router")
        for expert in range(num_experts):
            for name, (in_features, out_features, holder) in _EXPERT_PARTS.items():
                fqn = f"{path}.mlp.experts.{expert}.{name}"
                stored_in = f"{path}.mlp.experts.{holder}"
                yield _projection(fqn, in_features, out_features, storage="expert_parameter", stored_in=stored_in)


def _projection(fqn: str, in_features: int, out_features: int, **storage: str) -> Projection:
    return Projection.model_validate(
        {
            "fqn": fqn,
            "type": module_type(fqn),
            "layer": layer_index(fqn),
            "in_features": in_features,
            "out_features": out_features,
            **storage,
        }
    )


def _module(projection: Projection, gain_total: float, num_tokens: int, baseline: float) -> ModuleScore:
    gain = gain_total / num_tokens
    return ModuleScore(
        **projection.model_dump(), num_tokens=num_tokens, gain=gain, baseline=baseline, nfn=gain / baseline
    )


def _scores(modules: list[ModuleScore], left_out: list[LeftOut], num_samples: int, num_tokens: int) -> Scores:
    values: dict[str, list[float]] = {}
    for module in modules:
        values.setdefault(module.type, []).append(module.nfn)
    types = [TypeScore(type=name, num_modules=len(v), nfn=sum(v) / len(v)) for name, v in values.items()]
    return Scores(
        schema=SCORES_SCHEMA,
        model=ModelInfo(name_or_path="made/Qwen3-235B-A22B", architecture="Qwen3MoeForCausalLM"),
        data=DataInfo(source="made", num_samples=num_samples, num_tokens=num_tokens, max_length=256),
        estimator={"baseline": "control_variate", "num_directions": 64, "seed": 0},
        parallel={"backend": "transformers", "tp": 1, "pp": 1, "dp": 1, "cp": 1, "ep": 1},
        modules=tuple(modules),
        types=tuple(sorted(types, key=lambda entry: entry.nfn)),
        left_out=tuple(left_out),
    )
