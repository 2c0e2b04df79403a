"""Which backend a model is shown to, and what that imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from torch import nn

from plop_dist.backends.record import BackendRecord, Found
from plop_dist.errors import LayoutError, ModelError
from plop_dist.plugin import detect
from tests.models import tiny

PLAIN = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from plop_dist.plugin.detect import find

sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
model = LlamaForCausalLM(LlamaConfig(**sizes))
before = set(sys.modules)
found = find(model)
print(found.backend, found.wrapper, sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["deepspeed", "megatron", "peft", "trl", "ray"])
def test_a_plain_model_is_recognised_without_another_framework(framework: str) -> None:
    assert imported()[:2] == ["transformers", "plain"]
    assert f"'{framework}'" not in imported()[2]


_IMPORTED: list[str] = []


def imported() -> list[str]:
    """Return backend, wrapper and the packages that recognising a plain model has imported, in a process of its own."""
    if not _IMPORTED:
        done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, timeout=120, check=True)
        _IMPORTED.extend(done.stdout.splitlines()[-1].split(" ", 2))
    return _IMPORTED


def test_the_most_special_backend_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Record(BackendRecord):
        def __init__(self, name: str, takes: bool) -> None:
            self.label, self.takes = name, takes

        def find(self, model: Any) -> Found | None:
            asked.append(self.label)
            return Found(self.label, "own", (model,), lambda exclude: model) if self.takes else None

    records = {"general": Record("general", True), "special": Record("special", True), "other": Record("other", False)}
    monkeypatch.setattr(detect, "names", lambda kind: tuple(records))
    monkeypatch.setattr(detect, "load", lambda kind, name: records[name])
    assert detect.find(nn.Linear(2, 2)).backend == "special"
    assert asked == ["other", "special"]


def test_a_list_of_one_module_is_that_module() -> None:
    model = tiny("llama")
    for given in ([model], (model,), nn.ModuleList([model])):
        assert detect.find(given).roots == (model,)


def test_fabrics_shell_is_looked_through() -> None:
    class _FabricModule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._forward_module = self._original_module = module

    model = tiny("llama")
    found = detect.find(_FabricModule(model))
    assert (found.roots, found.wrapper) == ((model,), "plain")


def test_wrappers_of_other_kinds_are_refused_by_name() -> None:
    class FullyShardedDataParallel(nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> None: ...

    with pytest.raises(ModelError, match=r"FSDP1.*shard it with fully_shard"):
        detect.find(nn.Sequential(FullyShardedDataParallel()))
    with pytest.raises(ModelError, match="cannot read a list; pass a transformers model"):
        detect.find([])
    with pytest.raises(LayoutError, match="fully_shard was applied below"):
        _half_sharded()


def _half_sharded() -> None:
    model: Any = tiny("llama")
    layer = model.model.layers[0]
    layer.__class__ = type("FSDPLlamaDecoderLayer", (_fsdp_module(), type(layer)), {})
    detect.find(model)


def _fsdp_module() -> type:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule
