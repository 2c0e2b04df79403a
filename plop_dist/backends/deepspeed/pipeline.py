"""Scores a Llama-like model cut into stages by DeepSpeed's PipelineModule, times data parallelism.

The stages run forward passes only, one micro-batch after the other; DeepSpeed's own schedule cannot evaluate without
a loss, and would compute logits that nothing needs.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.deepspeed.layout import check_pp
from plop_dist.backends.deepspeed.stack import DecoderLayer, Head, StageLayer, pipeline_layers
from plop_dist.backends.hf.load import load_hf_config, load_model, meta_model, needs_head
from plop_dist.backends.hf.model import pick_device
from plop_dist.backends.hf.whole import whole_sites
from plop_dist.config.schema import Config, ModelConfig
from plop_dist.errors import ModelError
from plop_dist.measure.protocols import Groups, MicroBatch, Site
from plop_dist.values.scores import Projection


def load(config: Config) -> PipelineModel:
    """Return this rank's stage of the model. Collective over the world.

    Raises ModelError for a model that is not a plain stack of decoder layers, LayoutError where there are more stages
    than layers.
    """
    from deepspeed.pipe import PipelineModule

    pick_device()
    model, options = load_stage(config)
    with redirect_stdout(io.StringIO()):  # it prints its partition
        pipe = PipelineModule(layers=pipeline_layers(model), **options)
    with_head = needs_head(config.placement.exclude)
    return PipelineModel(list(pipe.forward_funcs), pipe.mpu(), meta_model(config.model), with_head)


def load_stage(config: Config) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model that holds the weights of this rank's stage alone, and how PipelineModule is to cut it.

    Layers of other stages are nn.Identity. Raises ModelError or LayoutError as load does. Collective over the world.
    """
    import deepspeed
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
    from deepspeed.runtime.utils import partition_balanced

    parallel, hf_config = config.parallel, load_hf_config(config.model)
    check_pp(hf_config, parallel.pp)
    num_layers = hf_config.num_hidden_layers
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    topology = PipeDataParallelTopology(num_pp=parallel.pp, num_dp=parallel.dp)
    # What partition_method "type:DecoderLayer" does: the embedding and the head weigh nothing.
    bounds = partition_balanced([0, *[1] * num_layers, 0], parallel.pp)
    stage = topology.get_coord(dist.get_rank()).pipe
    own = range(bounds[stage], bounds[stage + 1])
    model = load_model(config.model, drop=lambda model: _keep_only(model, own))
    return model, {"topology": topology, "partition_method": "type:DecoderLayer"}


def _keep_only(model: Any, own: range) -> None:
    """Replace the modules of pipeline layers outside `own` by nn.Identity."""
    body, last = model.base_model, len(model.base_model.layers) + 1
    for index in range(last - 1):
        if index + 1 not in own:
            body.layers[index] = nn.Identity()
    # A tied head has its weight under the embedding's name.
    if 0 not in own and not (last in own and model.all_tied_weights_keys):
        body.embed_tokens = nn.Identity()
    if last not in own:
        body.norm = model.lm_head = nn.Identity()
        model.all_tied_weights_keys = {}


def wrap(engine: Any, exclude: Sequence[str]) -> PipelineModel:
    """Return a host's PipelineEngine, whose layers come from pipeline_layers, as the collector sees it.

    Raises ModelError for layers of any other kind: what they hand to each other is not known.
    """
    layers = host_layers(engine)
    return PipelineModel(layers, engine.grid, _twin(layers), needs_head(list(exclude)))


def stage_model(engine: Any) -> nn.Module:
    """Return a model on the meta device that has the layers of a host's stage in their places, nothing in the others.

    Raises ModelError as wrap does.
    """
    layers = host_layers(engine)
    return _only_here(_twin(layers), layers)


def host_layers(engine: Any) -> list[StageLayer]:
    """Return the layers of a host's stage. Raises ModelError for any that is not of pipeline_layers."""
    layers = list(engine.module.forward_funcs)
    foreign = [layer for layer in layers if not isinstance(layer, StageLayer)]
    if foreign:
        raise ModelError(
            f"the PipelineModule holds a {type(foreign[0]).__name__}, whose input and path in the model are not known; "
            "build its layers with plop_dist.backends.deepspeed.stack.pipeline_layers(model)."
        )
    return layers


def _twin(layers: Sequence[StageLayer]) -> Any:
    config = layers[0].config
    name = ModelConfig(name_or_path=getattr(config, "_name_or_path", "") or type(config).__name__)
    return meta_model(name, config)


class PipelineModel:
    """ScorableModel over one stage of a pipeline.

    layers: this stage's, in order. grid: DeepSpeed's PipelineParallelGrid. twin: the whole model on the meta device,
    which gives names and global sizes; it stays as it is. Adapters may wrap linears of the layers.
    """

    def __init__(self, layers: Sequence[StageLayer], grid: Any, twin: Any, with_head: bool) -> None:
        self._layers = [layer for layer in layers if with_head or not isinstance(layer, Head)]
        self._config = layers[0].config
        self._architecture = type(twin).__name__
        self._num_parameters = sum(parameter.numel() for parameter in twin.parameters())
        parameter = next(parameter for layer in layers for parameter in layer.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        self.sites: Sequence[Site] = whole_sites(_only_here(copy.deepcopy(twin), layers), with_head, twin=twin)
        stage, self.micro_batches_per_step = grid.get_stage_id(), grid.pipe_parallel_size
        replica, num_replicas = grid.get_data_parallel_rank(), grid.data_parallel_size
        self.groups = Groups(
            copies={"tp": (replica, num_replicas)}, stage=str(stage), replica=replica, num_replicas=num_replicas
        )
        self._pp_group = grid.get_pipe_parallel_group()
        self._previous = grid.stage_to_global(stage - 1) if stage else None
        self._next = grid.stage_to_global(stage + 1) if stage + 1 < grid.pipe_parallel_size else None

    def check(self, micro_batch: MicroBatch) -> None:
        """Take every micro-batch: the layers keep packed samples apart, and padding out of sight."""

    def takes(self, key: str) -> bool | None:
        """Take nothing beside the tokens, their mask and places; what else a host's own loop does cannot be told."""
        return None

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample_ids as they are, (b, s)."""
        return micro_batch.sample_ids.to(self.device)

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample_ids, flat: every token is seen by this stage's routers."""
        return self.token_layout(micro_batch).reshape(-1)

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        """Run the micro-batches through this stage, each as soon as the previous stage has sent it."""
        sent = []
        for index, micro_batch in enumerate(micro_batches):
            input_ids = micro_batch.input_ids.to(self.device)
            positions = micro_batch.position_ids
            if positions is None:
                positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            hidden = input_ids
            if self._previous is not None:
                shape = (*input_ids.shape, self._config.hidden_size)
                hidden = torch.empty(shape, dtype=self._dtype, device=self.device)
                dist.recv(hidden, src=self._previous, group=self._pp_group)
            begin(index)
            state: Any = (hidden, positions.to(self.device), micro_batch.attention_mask.to(self.device))
            for layer in self._layers:
                state = layer(state)
            if self._next is not None:
                hidden = state[0].contiguous()
                sent.append((hidden, dist.isend(hidden, dst=self._next, group=self._pp_group)))
        for _, work in sent:
            work.wait()

    def watching(self) -> AbstractContextManager[Sequence[Projection]]:
        """Find nothing: plain stacks hold linears alone."""
        return nullcontext(())

    def release(self) -> None:
        """Give back nothing: a stage without an engine holds its weights alone."""

    def describe(self) -> dict[str, Any]:
        """Return architecture, model_type, number of parameters of the whole model, and dtype."""
        return {
            "architecture": self._architecture,
            "model_type": self._config.model_type,
            "num_parameters": self._num_parameters,
            "dtype": str(self._dtype).removeprefix("torch."),
        }


def _only_here(twin: Any, layers: Sequence[StageLayer]) -> nn.Module:
    """Return the twin with this stage's layers in their places and nothing in the others."""
    here = {layer.index: layer.layer for layer in layers if isinstance(layer, DecoderLayer)}
    heads = [layer.lm_head for layer in layers if isinstance(layer, Head)]
    body = twin.base_model
    for index in range(len(body.layers)):
        body.layers[index] = here.get(index, nn.Identity())
    twin.lm_head = heads[0] if heads else nn.Identity()
    return twin
