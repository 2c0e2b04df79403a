"""Lightning Fabric's shell is scored and adapted like the model in it, and goes on being what the loop calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIGHTNING = Path(__file__).parents[2] / ".cache" / "hosts" / "lightning"  # apart from .venv: pins in tests/hosts
SCRIPT = """
import copy, sys
import torch
from lightning.fabric import Fabric
from peft import PeftModel
import plop_dist
from tests.models import tiny

model = tiny("llama")
untouched = copy.deepcopy(model)
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(3, 60, (2, 9), generator=generator) for _ in range(3)]
batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
plain = plop_dist.score(untouched, batches)

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
shell = fabric.setup(model)
scores = plop_dist.score(shell, batches)
assert [module.gain for module in scores.modules] == [module.gain for module in plain.modules]
adapted = plop_dist.place(scores, k=2).apply(shell, r=4, lora_alpha=8)
assert adapted is shell
trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
optimizer = fabric.setup_optimizers(torch.optim.SGD(trained, lr=0.1))
for batch in batches:
    fabric.backward(adapted(**batch, labels=batch["input_ids"]).loss)
    optimizer.step()
    optimizer.zero_grad()
plop_dist.save_adapter(adapted, sys.argv[1])
loaded = PeftModel.from_pretrained(untouched, sys.argv[1])
with torch.no_grad():
    trained = adapted(**batches[0]).logits
    assert torch.equal(loaded(**batches[0]).logits, trained)
    with loaded.disable_adapter():
        assert not torch.equal(loaded(**batches[0]).logits, trained)
"""


@pytest.mark.slow
def test_what_fabric_sets_up_is_scored_adapted_trained_and_saved(tmp_path: Path) -> None:
    if not LIGHTNING.is_dir():
        pytest.skip("Lightning is not installed in .cache/hosts/lightning; make test does it")
    path = os.pathsep.join([str(LIGHTNING.parents[2]), str(LIGHTNING)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "adapter")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
