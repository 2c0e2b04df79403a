"""Placement -> Megatron-Bridge's LoRA or CanonicalLoRA: target_modules, dim, alpha.

LoRA adapts the fused linear_qkv and linear_fc1; CanonicalLoRA their parts, as PEFT does. CanonicalLoRA is taken
whenever any part of them is chosen, always from plop_dist.canonical_lora: Bridge's own (0.6.2) fails on a part.
"""

from __future__ import annotations

import json
from typing import Any

from plop_dist.exporters.megatron_targets import MegatronTargets, megatron_targets
from plop_dist.exporters.targets import check_engine, number
from plop_dist.exporters.text import yaml_text
from plop_dist.values.placement import Export, Placement

_ENGINES = {"megatron": "auto", "canonical": "canonical", "lora": "lora", "fused": "lora"}
_PEFT_NAMES = {"r": "dim", "lora_alpha": "alpha", "lora_dropout": "dropout"}


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return a Python file that defines `peft`, its fields as YAML, and the constructor call.

    engine: "megatron" (what fits), "canonical", or "lora" (fused linears only).
    Raises ExportError when fused LoRA is asked for a part of a fused linear and `widen` is false.
    """
    mode = _ENGINES[check_engine(engine, tuple(_ENGINES), "megatron-bridge")]
    targets = megatron_targets(placement, "megatron-bridge's LoRA", engine=mode, widen=widen)
    fields = _fields(targets)
    call = f"{_class(targets)}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"
    home = "plop_dist.canonical_lora" if targets.is_canonical else "megatron.bridge.peft.lora"
    return Export(
        target="megatron-bridge",
        files={
            "peft.py": (
                '"""The adapters of this run: pass `peft` to the recipe\'s ConfigContainer."""\n\n'
                f"from {home} import {_class(targets)}\n\npeft = {_class(targets)}(\n"
                + "".join(f"    {name}={_literal(value)},\n" for name, value in fields.items())
                + ")\n"
            ),
            "peft.yaml": yaml_text({"type": "canonical_lora" if targets.is_canonical else "lora", **fields}),
        },
        flags=(call,),
        notes=(
            *targets.notes,
            *(
                ("peft.yaml is for megatron.bridge.peft.utils.create_peft, after `import plop_dist.canonical_lora`.",)
                if targets.is_canonical
                else ()
            ),
        ),
        widened=targets.widened,
    )


def to_config(placement: Placement, *, engine: str | None = None, widen: bool = False, **options: Any) -> Any:
    """Return the Bridge object itself; `options` override its fields (dim, alpha, ...), by PEFT's names too.

    Imports megatron.bridge. Raises ExportError as `export` does.
    """
    mode = _ENGINES[check_engine(engine, tuple(_ENGINES), "megatron-bridge")]
    options = {_PEFT_NAMES.get(name, name): value for name, value in options.items()}
    targets = megatron_targets(placement, "megatron-bridge's LoRA", engine=mode, widen=widen)
    if targets.is_canonical:
        from plop_dist.canonical_lora import CanonicalLoRA

        return CanonicalLoRA(**{**_fields(targets), **options})
    from megatron.bridge.peft.lora import LoRA

    return LoRA(**{**_fields(targets), **options})


def _fields(targets: MegatronTargets) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "target_modules": list(targets.names),
        "dim": targets.rank,
        "alpha": number(targets.alpha),
    }
    if targets.has_experts:
        # Bridge's default is one adapter for all experts of a rank; the placement has one per expert.
        fields["share_expert_adapters"] = False
    return fields


def _class(targets: MegatronTargets) -> str:
    return "CanonicalLoRA" if targets.is_canonical else "LoRA"


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else repr(value)
