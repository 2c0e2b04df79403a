"""Which backends, exporters, policies, training engines and rewards there are, by name, imported only when asked for.

Each entry is `"module:attribute"`, so that naming one framework never imports another. What varies can be added from
outside: a package that is installed beside this one offers its own under an entry point of the kind's group.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from plop_dist.errors import ConfigError, MissingExtraError, suggest


@dataclass(frozen=True)
class Kind:
    """One kind of thing that varies.

    word: what errors call it ("backend"); group: the entry points by which other packages add to it (None: closed);
    own: name -> "module:attribute" of those in this package.
    """

    word: str
    group: str | None
    own: Mapping[str, str]

    def __hash__(self) -> int:
        return hash((self.word, self.group))


# From the most general to the most special; a host's model is shown to the last one first, see plugin/detect.py.
BACKENDS = Kind(
    "backend",
    "plop_dist.backends",
    {
        "transformers": "plop_dist.backends.hf.record:RECORD",
        "torch": "plop_dist.backends.torch.record:RECORD",
        "deepspeed": "plop_dist.backends.deepspeed.record:RECORD",
        "megatron": "plop_dist.backends.megatron.record:RECORD",
    },
)

EXPORTERS = Kind(
    "export target",
    "plop_dist.exporters",
    {
        "peft": "plop_dist.exporters.peft:EXPORTER",
        "trl": "plop_dist.exporters.peft_trainers:TRL",
        "megatron-bridge": "plop_dist.exporters.megatron_bridge:EXPORTER",
        "nemo-rl": "plop_dist.exporters.nemo_rl:EXPORTER",
        "skyrl": "plop_dist.exporters.skyrl:EXPORTER",
        "verl": "plop_dist.exporters.verl:EXPORTER",
        "openrlhf": "plop_dist.exporters.peft_trainers:OPENRLHF",
        "ms-swift": "plop_dist.exporters.peft_trainers:MS_SWIFT",
        "megatron-swift": "plop_dist.exporters.megatron_swift:EXPORTER",
        "llamafactory": "plop_dist.exporters.peft_trainers:LLAMAFACTORY",
        "axolotl": "plop_dist.exporters.peft_trainers:AXOLOTL",
        "torchtune": "plop_dist.exporters.torchtune:EXPORTER",
        "torchtitan": "plop_dist.exporters.torchtitan:EXPORTER",
        "deepspeed": "plop_dist.exporters.deepspeed:EXPORTER",
        "areal": "plop_dist.exporters.areal:EXPORTER",
        "prime-rl": "plop_dist.exporters.prime_rl:EXPORTER",
        "miles": "plop_dist.exporters.miles:EXPORTER",
        "cosmos-rl": "plop_dist.exporters.cosmos_rl:EXPORTER",
        "automodel": "plop_dist.exporters.automodel:EXPORTER",
        "litgpt": "plop_dist.exporters.litgpt:EXPORTER",
        "tinker": "plop_dist.exporters.tinker:EXPORTER",
    },
)

REWARDS = Kind(
    "reward",
    "plop_dist.rewards",
    {
        "builtin:number": "plop_dist.training.rewards:number",
        "builtin:format": "plop_dist.training.rewards:final_form",
    },
)

# Who writes the completions of GRPO where the ranks that scored train, named by train.sampler.
SAMPLERS = Kind(
    "sampler",
    None,
    {
        "model": "plop_dist.training.samplers.model:ModelSampler",
        "vllm": "plop_dist.training.samplers.vllm:VLLMSampler",
    },
)

# What trains in the ranks that scored, named by a backend's record for a layout.
TRAINING_ENGINES = Kind(
    "training engine",
    None,
    {
        "trl": "plop_dist.training.trl.engine:ENGINE",
        "replicas": "plop_dist.training.engines.replicas:ENGINE",
        "autotp": "plop_dist.training.engines.autotp:ENGINE",
        "pipeline": "plop_dist.training.engines.pipeline:ENGINE",
        "tp_plan": "plop_dist.training.engines.tp_plan:ENGINE",
        "megatron": "plop_dist.training.engines.megatron:ENGINE",
    },
)

# In the order in which they are listed, and compared with a placement by --explain.
POLICIES = Kind(
    "policy",
    "plop_dist.policies",
    {
        "lowest_k": "plop_dist.choose.policies.lowest_highest:LOWEST_K",
        "highest_k": "plop_dist.choose.policies.lowest_highest:HIGHEST_K",
        "attention": "plop_dist.choose.policies.blocks:ATTENTION",
        "mlp": "plop_dist.choose.policies.blocks:MLP",
        "all": "plop_dist.choose.policies.blocks:ALL",
        "threshold": "plop_dist.choose.policies.threshold:THRESHOLD",
        "budget": "plop_dist.choose.policies.budget:BUDGET",
    },
)

# What trains in a job of its own, named by train.engine.
EXTERNAL_ENGINES = Kind(
    "engine",
    None,
    {
        "skyrl": "plop_dist.training.external.skyrl:ENGINE",
        "verl": "plop_dist.training.external.verl:ENGINE",
        "nemo-rl": "plop_dist.training.external.nemo_rl:ENGINE",
    },
)

# Methods of the values that floors above theirs carry out, by what they are called.
# By the wrapper that a backend finds around a host's model: how adapters are put on it and saved.
HOST_LAYOUTS = Kind(
    "wrapper",
    None,
    {
        "plain": "plop_dist.training.adapters.on_hosts:PLAIN",
        "ddp": "plop_dist.training.adapters.on_hosts:DDP",
        "fsdp2": "plop_dist.training.adapters.on_hosts:FSDP2",
        "tp_plan": "plop_dist.training.adapters.on_hosts:TP_PLAN",
        "zero_init": "plop_dist.training.adapters.on_hosts:PLAIN",
        "zero": "plop_dist.training.adapters.on_engines:ZERO",
        "autotp": "plop_dist.training.adapters.on_engines:AUTOTP",
        "pipeline": "plop_dist.training.adapters.on_engines:PIPELINE",
        "megatron": "plop_dist.training.adapters.on_megatron:MEGATRON",
    },
)

METHODS = Kind(
    "method",
    None,
    {
        "Placement.apply": "plop_dist.plugin.apply:apply",
        "Placement.explain": "plop_dist.report.notebook:placement_explained",
        "Placement.html": "plop_dist.report.notebook:placement_html",
        "Placement.text": "plop_dist.report.notebook:placement_text",
        "Scores.html": "plop_dist.report.notebook:scores_html",
        "Scores.plot": "plop_dist.report.notebook:scores_plot",
        "Scores.text": "plop_dist.report.notebook:scores_text",
    },
)

# Packages that need more than `import` to be imported here, and what does it.
_IMPORTERS = {"megatron.bridge": "plop_dist.backends.megatron.bridge:import_bridge"}

# The package whose absence means that an extra was not installed, and that extra's name.
_EXTRA_OF = {
    "ray": "ray",
    "deepspeed": "deepspeed",
    "megatron": "megatron",
    "trl": "train",
    "peft": "train",
    "accelerate": "train",
    "datasets": "train",
    "pandas": "train",
    "bitsandbytes": "quantization",
    "torchao": "quantization",
    "compressed_tensors": "quantization",
    "optimum": "quantization",
    "tensorboard": "loggers",
    "wandb": "loggers",
    "mlflow": "loggers",
}


def names(kind: Kind) -> tuple[str, ...]:
    """Return every name of this kind: this package's own, then those that other installed packages add."""
    return (*kind.own, *_foreign(kind))


def load(kind: Kind, name: str) -> Any:
    """Return the object that `name` stands for, importing its module now.

    Raises ConfigError for an unknown name, a name that two packages claim, and one whose package cannot be imported;
    MissingExtraError, with the pip command, when the module needs a package that is not installed.
    """
    if name in kind.own:
        return import_attribute(kind.own[name], f"{kind.word} '{name}'")
    entry = _foreign(kind).get(name)
    if entry is None:
        raise ConfigError(f"Unknown {kind.word} '{name}'. {suggest(name, names(kind))}")
    try:
        return entry.load()
    except Exception as error:  # somebody else's code
        raise ConfigError(
            f"{kind.word} '{name}' of the package '{_package(entry)}' cannot be imported "
            f"({type(error).__name__}: {error}); mend or uninstall that package."
        ) from error


def import_attribute(address: str, needed_by: str) -> Any:
    """Return what `"module:attribute"` names, importing the module. Raises MissingExtraError as `load` does."""
    module_name, attribute = address.split(":")
    with needing_extras(needed_by):
        return getattr(importlib.import_module(module_name), attribute)


@contextmanager
def needing_extras(needed_by: str) -> Iterator[None]:
    """Raise MissingExtraError, with the pip command, where the block imports a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(error, needed_by) from error


def import_package(name: str) -> ModuleType:
    """Return a framework's package, imported as it must be here: Megatron-Bridge with a stub where the GPU has none.

    Raises ModuleNotFoundError.
    """
    importer = _IMPORTERS.get(name)
    return import_attribute(importer, name)() if importer else importlib.import_module(name)


def missing_extra(error: ModuleNotFoundError, needed_by: str) -> Exception:
    """Return the MissingExtraError for an import that failed, or the error itself when no extra provides it."""
    package = (error.name or "").split(".")[0]
    extra = _EXTRA_OF.get(package)
    if extra is None:
        return error
    return MissingExtraError(
        f"{needed_by} needs the package '{package}', which is not installed: pip install 'plop-dist[{extra}]'"
    )


@cache
def _foreign(kind: Kind) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=kind.group) if kind.group else ():
        other = found.get(entry.name)
        if entry.name in kind.own or (other is not None and other.value != entry.value):
            claimed = "plop-dist itself" if other is None else f"'{_package(other)}'"
            raise ConfigError(
                f"{kind.word} '{entry.name}' comes from the package '{_package(entry)}' and from {claimed}; uninstall "
                "one, or have its author choose another name."
            )
        found[entry.name] = entry
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
