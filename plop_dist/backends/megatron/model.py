"""A Megatron model list as the collector sees it, at any layout that parallel_state describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.batch import Batching, Prepared
from plop_dist.backends.megatron.checks import check_called, check_experts, check_heads
from plop_dist.backends.megatron.chunk_sites import Logical, find_sites
from plop_dist.backends.megatron.chunks import count_parameters, device_of, unwrap
from plop_dist.backends.megatron.groups import read_groups, read_place
from plop_dist.backends.megatron.language import kinds_of_text, language_model
from plop_dist.backends.megatron.schedule import run_schedule
from plop_dist.measure.collectives import Reducer, attempt
from plop_dist.measure.protocols import MicroBatch, Site
from plop_dist.values.scores import Projection


class MegatronModel:
    """ScorableModel over the model chunks of this rank.

    chunks: the model list, one per virtual pipeline stage, wrapped (DDP, Float16Module) or not. logical: what is known
    of the model besides. Collective over the world. Raises LayoutError and ModelError for what cannot be scored.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        logical: Logical,
        *,
        architecture: str | None = None,
        model_type: str | None = None,
        num_parameters: int | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self._bare = [language_model(chunk) for chunk in chunks]
        self._config = self._bare[0].config
        self._with_head = logical.with_head
        check_experts(self._config)
        self._place = read_place(self._config)
        self.device = device_of(self._bare)
        self._batching = Batching(self._bare, self._place, self.device)
        self.micro_batches_per_step = self._place.pp_size
        self.groups = read_groups(self._config)
        # What one stage alone holds may be refused: every rank hears of it before it waits for the others.
        sites, error = attempt(lambda: self._find_sites(logical))
        Reducer(self.groups).gather_or_raise(None, error, "the search for linears")
        self.sites: Sequence[Site] = sites or ()
        self._description = {
            "architecture": architecture or type(self._bare[0]).__name__,
            "model_type": model_type,
            "num_parameters": num_parameters or count_parameters(self._bare, self._config),
            "dtype": str(self._dtype()).removeprefix("torch."),
        }

    def check(self, micro_batch: MicroBatch) -> None:
        """Raise ModelError for packed rows in a model whose attention takes no mask."""
        self._batching.prepare(micro_batch)

    def takes(self, key: str) -> bool | None:
        """Take nothing beside the tokens, their mask and places; what else a host's own loop does cannot be told."""
        return None

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample ids (s, b) in the order of this rank's hidden states. See Batching."""
        return self._batching.token_layout(micro_batch)

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return (T_local,) sample ids of the tokens this rank's routers see. See Batching."""
        return self._batching.routed_layout(micro_batch)

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        """Run the micro-batches through Megatron's own schedule. Collective over the replica's ranks."""
        prepared = [self._batching.prepare(micro_batch) for micro_batch in micro_batches]
        # An interleaved schedule takes multiples of the pipeline's depth; what fills up is recorded nowhere.
        num_filler = -len(prepared) % self._place.pp_size if len(self._chunks) > 1 else 0
        prepared += [prepared[-1]] * num_filler

        def call(index: int, batch: Prepared, chunk: nn.Module) -> Tensor:
            begin(index)
            positions = batch.position_ids
            if getattr(unwrap(chunk), "position_embedding_type", None) == "mrope":
                positions = positions.expand(3, *positions.shape)  # time, height and width, the same for text
            output: Any = chunk(
                input_ids=batch.input_ids,
                position_ids=positions,
                attention_mask=batch.mask,
                **kinds_of_text(chunk, batch.input_ids),
            )
            return output[0] if isinstance(output, tuple) else output  # a loss mask beside it

        with self._headless(), self._next_token_alone(), self._shapes(prepared), torch.no_grad():
            run_schedule(self._chunks, prepared, call, cp_size=self._place.cp_size, forward_only=True)
        check_called(self.sites)

    def watching(self) -> AbstractContextManager[Sequence[Projection]]:
        """Find nothing: the modules of Megatron-core all have sites."""
        return nullcontext(())

    def describe(self) -> dict[str, Any]:
        """Return architecture, model_type (None without Bridge), number of parameters of the whole model, and dtype."""
        return self._description

    def release(self) -> None:
        """Give back nothing: what Megatron holds besides the model are its process groups, which training reuses."""

    def _find_sites(self, logical: Logical) -> Sequence[Site]:
        check_heads(self._chunks, self._place.tp_size)
        return find_sites(self._bare, self._config, self._place, logical)

    def _dtype(self) -> torch.dtype:
        """Return what the parameters are in; a stage without any goes by its configuration."""
        dtypes = (parameter.dtype for chunk in self._bare for parameter in chunk.parameters())
        return next(dtypes, self._config.params_dtype)

    @contextmanager
    def _headless(self) -> Iterator[None]:
        """Let the output layer hand the hidden states through, unless it is scored; undone on leaving."""
        last = self._bare[-1]
        layer = getattr(last, "output_layer", None)
        if layer is None or self._with_head or "forward" in vars(layer):
            yield
            return
        layer.forward = lambda hidden, *_, **__: (hidden, None)
        try:
            yield
        finally:
            del layer.forward

    @contextmanager
    def _next_token_alone(self) -> Iterator[None]:
        """Leave out multi-token prediction, whose layers no score is of and which calls the head again; undone."""
        kept = [(one, name, getattr(one, name, None)) for chunk in self._bare
                for one, name in ((chunk, "mtp_process"), (chunk.config, "mtp_num_layers"))]  # fmt: skip
        predicts = [(one, name, value) for one, name, value in kept if value]
        for one, name, value in predicts:
            setattr(one, name, False if value is True else None)
        try:
            yield
        finally:
            for one, name, value in predicts:
                setattr(one, name, value)

    @contextmanager
    def _shapes(self, prepared: Sequence[Prepared]) -> Iterator[None]:
        """Let pipeline stages tell each other the shape of micro-batches that differ; undone on leaving."""
        before = self._config.variable_seq_lengths
        if self._place.pp_size > 1 and len({batch.input_ids.shape for batch in prepared}) > 1:
            self._config.variable_seq_lengths = True
        try:
            yield
        finally:
            self._config.variable_seq_lengths = before
