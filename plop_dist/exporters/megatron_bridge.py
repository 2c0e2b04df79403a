"""Placement -> Megatron-Bridge's LoRA or CanonicalLoRA: target_modules, dim, alpha.

LoRA adapts the fused linear_qkv and linear_fc1; CanonicalLoRA their parts, as PEFT does. CanonicalLoRA is taken
whenever any part of them is chosen, always from plop_dist.canonical_lora: Bridge's own (0.6.2) fails on a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.megatron_read import read_megatron
from plop_dist.exporters.megatron_targets import MegatronTargets, megatron_targets
from plop_dist.exporters.refusals import RANKS, TOWERS, check_engine
from plop_dist.exporters.text import number, python_arguments, python_list, yaml_text
from plop_dist.registry import import_package
from plop_dist.values.placement import Export, Placement

_MODES = {"megatron": "auto", "canonical": "canonical", "lora": "lora", "fused": "lora"}
_PEFT_NAMES = {"r": "dim", "lora_alpha": "alpha", "lora_dropout": "dropout"}


class MegatronBridge:
    """Megatron-Bridge's LoRA and CanonicalLoRA."""

    name = "megatron-bridge"
    summary = "a Python file that defines Megatron-Bridge's PEFT object for a recipe, its fields as YAML, and the call"
    engines = tuple(_MODES)
    keys = ("type", "target_modules", "dim", "alpha", "share_expert_adapters")
    matching = "a linear's own name in Megatron, or with * its path there, whose layers each pipeline stage counts anew"
    limits = (
        RANKS,
        "types that Megatron has no name for: LM head, Mamba mixers",
        TOWERS,
        "single routed experts",
        "single layers under pipeline parallelism",
        "an MLP without a gate beside a part of q, k, v",
        "lora, fused: a part of linear_qkv or linear_fc1 (--widen: the whole)",
    )
    flags_in: Language = "python"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return a Python file that defines `peft`, its fields as YAML, and the constructor call.

        engine: "megatron" (what fits), "canonical", or "lora" (fused linears only).
        Raises ExportError when fused LoRA is asked for a part of a fused linear and `widen` is false.
        """
        targets = self._targets(placement, engine, widen)
        fields = _fields(targets)
        kind = "CanonicalLoRA" if targets.is_canonical else "LoRA"
        tree = {"type": "canonical_lora" if targets.is_canonical else "lora", **fields}
        notes = targets.notes
        if targets.is_canonical:
            notes = (
                *notes,
                "peft.yaml is for megatron.bridge.peft.utils.create_peft, after `import plop_dist.canonical_lora`.",
            )
        return Export(
            target=self.name,
            files={"peft.py": _python_file(kind, fields), "peft.yaml": yaml_text(tree)},
            flags=(f"{kind}({python_arguments(fields)})",),
            notes=notes,
            widened=targets.widened,
        )

    def to_config(self, placement: Placement, *, engine: str | None = None, widen: bool = False, **options: Any) -> Any:
        """Return the Bridge object itself; `options` override its fields (dim, alpha, ...), by PEFT's names too.

        Imports megatron.bridge. Raises ExportError as `export` does.
        """
        import_package("megatron.bridge")
        targets = self._targets(placement, engine, widen)
        given = {_PEFT_NAMES.get(name, name): value for name, value in options.items()}
        if targets.is_canonical:
            from plop_dist.canonical_lora import CanonicalLoRA

            return CanonicalLoRA(**{**_fields(targets), **given})
        from megatron.bridge.peft.lora import LoRA

        return LoRA(**{**_fields(targets), **given})

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what Bridge adapts: peft.yaml says by `type` which class it is, a Python file by what it calls."""
        del where
        is_canonical = "canonical" in str(fields.get("type", fields.get("call"))).lower()
        return read_megatron(
            as_list(fields["target_modules"]), int(fields["dim"]), placement, is_canonical=is_canonical
        )

    def _targets(self, placement: Placement, engine: str | None, widen: bool) -> MegatronTargets:
        mode = _MODES[check_engine(engine, self.engines, self.name)]
        return megatron_targets(placement, "megatron-bridge's LoRA", engine=mode, widen=widen)


EXPORTER = MegatronBridge()


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


def _python_file(kind: str, fields: dict[str, Any]) -> str:
    home = "plop_dist.canonical_lora" if kind == "CanonicalLoRA" else "megatron.bridge.peft.lora"
    written = {name: python_list(value) if isinstance(value, list) else repr(value) for name, value in fields.items()}
    return (
        '"""The adapters of this run: pass `peft` to the recipe\'s ConfigContainer."""\n\n'
        f"from {home} import {kind}\n\npeft = {kind}(\n"
        + "".join(f"    {name}={value},\n" for name, value in written.items())
        + ")\n"
    )
