"""Heads beside the adapters: those that PEFT trains whole are given no score, and one left frozen is spoken of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from plop_dist.exporters.task_type import heads_trained_whole, task_type
from plop_dist.measure.protocols import Recorder, ScorableModel, Site
from plop_dist.values.scores import ModelInfo

logger = logging.getLogger(__name__)


def without_heads(model: ScorableModel) -> list[Site]:
    """Return the model's sites, with those unwatched that PEFT trains whole in the task of the model's class.

    They see no token wherever the head is not run, and as little where it is: under fully_shard, in an engine, in a
    forward of the host's own. PEFT could not adapt them.
    """
    heads = {*heads_trained_whole(task_type(ModelInfo(name_or_path="", **model.describe())))}

    def is_head(site: Site) -> bool:
        return any(heads.intersection(projection.fqn.split(".")) for projection in site.projections)

    return [cast(Site, _Unwatched(site)) if is_head(site) else site for site in model.sites]


def task_of(model: nn.Module, task: str | None) -> str | None:
    """Return the task type by which PEFT can wrap the model: none of writing text for a module that writes none.

    A host's own class has a name that says nothing, and PEFT asks it for prepare_inputs_for_generation.
    """
    writes = task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    return None if writes and not hasattr(model, "prepare_inputs_for_generation") else task


def warn_of_frozen_heads(model: Any, adapted: nn.Module) -> None:
    """Say which parts beside the body of a transformers model that writes no text are frozen: often they are new.

    model: what the adapters were put on; adapted: with them, wrapped or not.
    """
    body = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if not isinstance(body, nn.Module) or model.get_output_embeddings() is not None:
        return
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    frozen = [
        name
        for name, part in model.named_children()
        if part is not body
        and any(True for _ in part.parameters())
        and not any(name in one.split(".") for one in trained)
    ]
    if frozen:
        logger.warning(
            "Only adapters are trained: %s of %s stays as it is; where it is new, pass modules_to_save=%r.",
            " and ".join(f"'{name}'" for name in frozen),
            type(model).__name__,
            frozen,
        )


class _Unwatched:
    """A site that is known and sees nothing."""

    def __init__(self, site: Site):
        self._site = site

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        return lambda: None
