"""A Hugging Face model as the collector sees it, whole or sharded by modules that keep its forward signature."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.hf.offload import execution_device
from plop_dist.backends.hf.padding import TIMES_NOISE, sees_neighbours, sees_padding
from plop_dist.backends.hf.unscored import watching
from plop_dist.errors import DataError, ModelError, first_line
from plop_dist.measure.protocols import Groups, MicroBatch, PassingWeights, Site
from plop_dist.ranks import local_device
from plop_dist.values.scores import Projection


class HFModel:
    """ScorableModel over a transformers model (or an engine that is called like one).

    module: the transformers model that owns the sites. call: what runs the forward pass (the module itself, its base
    model without the head, or an engine around it). num_parameters: of the whole model.
    release: ends what loading made. passing: see ScorableModel. knows_padding: padding is taken as it comes, without
    asking whether tokens see it. An encoder-decoder model takes micro-batches of one sample, with `labels`, from which
    it makes what its decoder reads.
    """

    micro_batches_per_step = 1

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[Site],
        *,
        groups: Groups | None = None,
        call: Callable[..., Any] | None = None,
        with_head: bool = False,
        num_parameters: int | None = None,
        release: Callable[[], None] = lambda: None,
        passing: PassingWeights | None = None,
        knows_padding: bool = False,
    ) -> None:
        self.module = module
        self.sites = sites
        self.groups = groups or Groups()
        self.release = release
        self.passing = passing
        self.device = execution_device(module)
        self._call = call or (module if with_head else headless(module))
        self._whole = call or module
        self._with_head = with_head
        # Up to which length of a row it is known that padding, and other samples in the row, are not seen.
        longest_known = sys.maxsize if knows_padding else 0
        self._longest_known = {sees_padding: longest_known, sees_neighbours: longest_known}
        self.reads_pairs = reads_labels(module)
        self._takes_positions = "position_ids" in _parameters_of(self._call)
        self._taken: dict[str, bool | None] = {}  # asked of every batch, and the answer looks at every module
        self._num_parameters = num_parameters or count_parameters(module)

    def check(self, micro_batch: MicroBatch) -> None:
        """Raise DataError for a micro-batch in which transformers would let a sample see more than itself.

        Packed rows with padding, or in a model without position_ids; rows with padding, or packed ones, in a model
        whose tokens see it.
        Raises ModelError for an encoder-decoder model's without both of its texts.
        """
        if self.reads_pairs and (len(micro_batch.input_ids) > 1 or not micro_batch.extra.keys() >= {"labels"}):
            raise ModelError(
                f"{type(self.module).__name__} is an encoder-decoder model, whose two token streams one batch of texts "
                "does not give; score it by score(model, batches, forward=...), or from the command line where "
                "`plop-dist check` takes it."
            )
        justified = _right_padded(micro_batch)
        mask, positions = justified.attention_mask, justified.position_ids
        if (mask.any(-1) & ~mask.bool().all(-1)).any():
            self._check_alone(justified, sees_padding, "padding", "pass one sample per micro-batch (data.batch_size=1)")
        if positions is None or not is_packed(positions, mask):
            return
        packed = "a micro-batch has packed rows (position_ids that start again within a row)"
        if not self._takes_positions:
            raise DataError(f"{packed}, but {type(self.module).__name__} takes no position_ids; pass one sample a row.")
        if not mask.all():
            raise DataError(
                f"{packed} and padding; transformers keeps packed samples apart only without padding: fill the rows, "
                "or pass one sample per row."
            )
        self._check_alone(justified, sees_neighbours, "another sample in a row", "pass one sample a row")

    def _check_alone(self, micro_batch: MicroBatch, sees: Callable[..., float], what: str, remedy: str) -> None:
        """Raise DataError if tokens see what else is in rows as long as these, or that cannot be told."""
        length = micro_batch.input_ids.shape[1]
        if length <= self._longest_known[sees]:
            return
        config: Any = getattr(self.module, "config", None)
        kind = getattr(config, "model_type", None) or type(self.module).__name__
        rounded = 1 << (length - 1).bit_length()  # not anew for every longer batch
        length = rounded if rounded <= getattr(config, "max_position_embeddings", rounded) else length
        tokens = micro_batch.input_ids[micro_batch.attention_mask != 0]
        try:
            found = sees(self.module, tokens, length, self.device, self.alike)
        except Exception as error:  # transformers, and whatever code comes with a model
            raise DataError(
                f"a micro-batch has {what}, and whether it changes {kind}'s activations cannot be found out "
                f"({type(error).__name__}: {first_line(error)}); {remedy}."
            ) from error
        if found > 1:
            raise DataError(
                f"a micro-batch has {what}, beside which transformers computes other activations for {kind} (their "
                f"gains differ by {found * TIMES_NOISE:.0f} times what rounding does); {remedy}."
            )
        self._longest_known[sees] = length

    def alike(self, module: nn.Module, sites: Sequence[Site]) -> HFModel:
        """Return another module as this one is run, whose padding is taken as it comes."""
        wanted = [site for site in sites if self._with_head or site.projections[0].type != "lm_head"]
        return HFModel(module, wanted, with_head=self._with_head, knows_padding=True)

    def takes(self, key: str) -> bool | None:
        """Tell whether the model's forward names the key, or takes any and a module inside it names this one."""
        if key not in self._taken:
            self._taken[key] = self._look_for(key)
        return self._taken[key]

    def _look_for(self, key: str) -> bool | None:
        parameters = _parameters_of(self._whole)
        if key in parameters and parameters[key].kind is not inspect.Parameter.VAR_KEYWORD:
            return True
        if not _takes_any(parameters):
            return False
        return True if any(key in _parameters_of(module) for module in self.module.modules()) else None

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample_ids, (b, s), in the order in which forward() passes the tokens; (1,) where it reads pairs."""
        sample_ids = _as_passed(micro_batch).sample_ids.to(self.device)
        # Of one sample every vector counts: whether encoder or decoder sees it need not be asked.
        return sample_ids.amax(dim=1) if self.reads_pairs else sample_ids

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample_ids, flat: every token is seen by this rank's routers."""
        return self.token_layout(micro_batch).reshape(-1)

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        """Run the micro-batches one after the other, each row's padding behind its tokens. Raises as check() does.

        One with further inputs is passed as it is: nobody can tell which of them go by the places of tokens.
        """
        for index, given in enumerate(micro_batches):
            self.check(given)
            begin(index)
            micro_batch = _as_passed(given)
            extra = self._with_decoder_ids(micro_batch.extra) if self.reads_pairs else micro_batch.extra
            inputs = {
                "input_ids": micro_batch.input_ids,
                "attention_mask": _mask(micro_batch),
                # Only where they say more than the places do, which every family counts in its own way (RoBERTa's
                # begin at 2).
                **({"position_ids": micro_batch.position_ids} if self._needs_positions(micro_batch) else {}),
                **extra,
            }
            call = self._call if _parameters_of(self._call).keys() >= extra.keys() else self._whole
            call(
                **{key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in inputs.items()},
                **self._options(call),
            )

    def _with_decoder_ids(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Return the further inputs with what the decoder reads when it is to write the labels, as in training."""
        model: Any = self.module
        return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=extra["labels"])}

    def _options(self, call: Callable[..., Any]) -> dict[str, Any]:
        parameters = _parameters_of(call)
        options: dict[str, Any] = {}
        if "use_cache" in parameters or _takes_any(parameters):
            options["use_cache"] = False
        if not self._with_head and "logits_to_keep" in parameters:
            options["logits_to_keep"] = 1  # the head has to run: on one token only
        return options

    def _needs_positions(self, micro_batch: MicroBatch) -> bool:
        """Tell whether position_ids, in right-padded rows, are others than 0, 1, 2, ...

        Beside further inputs, and with padding on any side, only those of packed rows are: the rest are the host's to
        give.
        """
        positions = micro_batch.position_ids
        if positions is None or "position_ids" in micro_batch.extra or not self._takes_positions:
            return False
        if micro_batch.extra:
            return is_packed(positions, micro_batch.attention_mask)
        places = torch.arange(positions.shape[1], device=positions.device)
        return bool(((positions != places) & (micro_batch.attention_mask != 0)).any())

    def watching(self) -> AbstractContextManager[list[Projection]]:
        """Give a list that holds, after the block, the weights of no site that forward() multiplied by in it."""
        return watching(self.module, [getattr(site, "holding_module", None) for site in self.sites])

    def describe(self) -> dict[str, Any]:
        """Return architecture, model_type, number of parameters of the whole model, dtype, and what quantised it."""
        dtype = next(parameter.dtype for parameter in self.module.parameters() if parameter.is_floating_point())
        method = quantization_of(self.module)
        return {
            **({"is_encoder_decoder": True} if _is_encoder_decoder(self.module) else {}),
            **({} if method is None else {"quantization": method}),
            "architecture": type(self.module).__name__,
            "model_type": getattr(getattr(self.module, "config", None), "model_type", None),
            "num_parameters": self._num_parameters,
            "dtype": str(dtype).removeprefix("torch."),
        }


def reads_labels(module: nn.Module) -> bool:
    """Tell whether a model, or one inside a host's own module, has an encoder and a decoder, which reads the labels."""
    inner = (one for one in module.modules() if hasattr(one, "prepare_decoder_input_ids_from_labels"))
    return _is_encoder_decoder(module) or any(map(_is_encoder_decoder, inner))


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def quantization_of(module: nn.Module) -> str | None:
    """Return the quant_method of a model whose weights are quantised, None where they are plain."""
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer.quantization_config, "dequantize", False):
        return None
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def count_parameters(module: Any) -> int:
    """Return how many parameters a model has; a quantised one those that it had before, which its bytes do not tell."""
    if quantization_of(module) is not None:
        config = copy.deepcopy(module.config)
        with torch.device("meta"):
            module = type(module)(config)
    return sum(parameter.numel() for parameter in module.parameters())


def _mask(micro_batch: MicroBatch) -> Tensor | None:
    """Return the attention mask, or None for packed rows: transformers then keeps samples apart by position_ids."""
    mask, positions = micro_batch.attention_mask, micro_batch.position_ids
    return None if positions is not None and is_packed(positions, mask) else mask


def _as_passed(micro_batch: MicroBatch) -> MicroBatch:
    return micro_batch if micro_batch.extra else _not_square(_right_padded(micro_batch))


def _not_square(micro_batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch, with its last row once more where it has as many rows as places; that one never counts.

    Modules that see (s, b) instead of (b, s), as XLNet's, are known by the shape alone.
    """
    num_rows, num_places = micro_batch.input_ids.shape
    if num_rows != num_places or num_rows == 1:
        return micro_batch

    def longer(ids: Tensor) -> Tensor:
        return torch.cat([ids, ids[-1:]])

    return replace(
        micro_batch,
        input_ids=longer(micro_batch.input_ids),
        attention_mask=longer(micro_batch.attention_mask),
        sample_ids=torch.cat([micro_batch.sample_ids, torch.full_like(micro_batch.sample_ids[-1:], -1)]),
        position_ids=None if micro_batch.position_ids is None else longer(micro_batch.position_ids),
    )


def _right_padded(micro_batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with every row's padding behind its real tokens.

    There a causal model shows each token what it would see alone, whether or not it heeds the mask (recurrent models)
    or counts places from the first real token (learned positions).
    """
    is_padding = micro_batch.attention_mask == 0
    if not (is_padding[:, :-1] & ~is_padding[:, 1:]).any():
        return micro_batch
    order = torch.argsort(is_padding.to(torch.int8), dim=1, stable=True)
    positions = micro_batch.position_ids
    return replace(
        micro_batch,
        input_ids=micro_batch.input_ids.gather(1, order),
        attention_mask=micro_batch.attention_mask.gather(1, order),
        sample_ids=micro_batch.sample_ids.gather(1, order),
        position_ids=None if positions is None else positions.gather(1, order),
    )


def is_packed(position_ids: Tensor, attention_mask: Tensor) -> bool:
    """Tell whether a row holds several samples: its positions start again. Both (b, s) int64."""
    is_real = attention_mask != 0
    restarts = (position_ids[:, 1:] <= position_ids[:, :-1]) & is_real[:, 1:] & is_real[:, :-1]
    return bool(restarts.any())


def headless(module: nn.Module) -> nn.Module:
    """Return the part of a transformers model that ends before the LM head, or the model if it has no such part."""
    base = getattr(module, getattr(module, "base_model_prefix", ""), None)
    return base if isinstance(base, nn.Module) else module


def pick_device() -> torch.device:
    """Return this rank's device: its local GPU, or the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _parameters_of(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    module = getattr(call, "module", call)  # a DeepSpeed or DDP engine wraps the model it forwards to
    return inspect.signature(module.forward if isinstance(module, nn.Module) else module).parameters


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
