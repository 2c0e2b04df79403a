"""Loads a Hugging Face checkpoint into Megatron at any layout through Megatron-Bridge, or wraps a host's model list."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plop_dist.backends.hf.dtype import weights_dtype
from plop_dist.backends.hf.load import load_hf_config, meta_model, needs_head
from plop_dist.backends.hf.memory import freed_at_once
from plop_dist.backends.hf.own_class import architecture
from plop_dist.backends.hf.whole import whole_sites
from plop_dist.backends.megatron.bridge import import_auto_bridge
from plop_dist.backends.megatron.checkpoint import load_checkpoint
from plop_dist.backends.megatron.checks import (
    check_attention,
    check_projections,
)
from plop_dist.backends.megatron.chunk_sites import Logical
from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.backends.megatron.families import check_family
from plop_dist.backends.megatron.fusions import switch_off
from plop_dist.backends.megatron.language import NAME, language_model, of_language
from plop_dist.backends.megatron.layout import check_layout
from plop_dist.backends.megatron.local_layers import use_local_layers
from plop_dist.backends.megatron.model import MegatronModel
from plop_dist.backends.megatron.names import below, bridge_names, conventional_names
from plop_dist.backends.megatron.renamed import as_modules
from plop_dist.backends.megatron.rotary import complete_rotary
from plop_dist.backends.megatron.stored import check_weights
from plop_dist.backends.megatron.stored_names import offer_known_names
from plop_dist.backends.megatron.transformer_engine import has_transformer_engine
from plop_dist.backends.megatron.uncalled import uncalled_routers
from plop_dist.backends.megatron.wide_norms import share_wide_norms
from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError, MissingExtraError, ModelError, PlopError, first_line
from plop_dist.measure.protocols import ScorableModel
from plop_dist.ranks import local_device


def load(config: Config) -> ScorableModel:
    """Return the configured model, loaded at its layout. Collective over the world.

    model.checkpoint: a torch_dist checkpoint of any layout, whose weights replace the Hugging Face ones. Raises
    MissingExtraError, LayoutError and ModelError.
    """
    chunks, bridge = load_chunks(config)
    return describe_chunks(chunks, bridge, config, needs_head(config.placement.exclude))


def describe_chunks(chunks: Sequence[nn.Module], bridge: Any, config: Config, with_head: bool) -> MegatronModel:
    """Return what load_chunks loaded as the collector sees it; adapters may wrap its linears. Collective."""
    hf_config = load_hf_config(config.model)
    whole = meta_model(config.model, hf_config)
    known = {item.fqn: item for site in whole_sites(whole, with_head) for item in site.projections}
    names = bridge_names(bridge._model_bridge.mapping_registry())
    if language_model(chunks[0]) is not unwrap(chunks[0]):
        names, known = below(NAME, names), of_language(whole, known)
    names = as_modules(names, whole, known)
    model = MegatronModel(
        chunks,
        Logical(names, known, hf_config.get_text_config().vocab_size, with_head, uncalled_routers(whole, known)),
        architecture=type(whole).__name__,
        model_type=hf_config.model_type,
        num_parameters=sum(parameter.numel() for parameter in whole.parameters()),
    )
    found = (item.fqn for site in model.sites for item in site.projections)
    check_projections(found, known, config, model.device)
    return model


def wrap(chunks: Sequence[nn.Module], exclude: Sequence[str] = ("lm_head",)) -> ScorableModel:
    """Return a host's own Megatron model list as a ScorableModel; Megatron-Bridge is not needed. Collective.

    Mode, hooks, random state and gradients are left alone. exclude: with lm_head in it the logits are not computed.
    Raises ModelError for a model that carries adapters: their weights are not in those that are scored.
    """
    if any(hasattr(module, "to_wrap") for chunk in chunks for module in chunk.modules()):
        raise ModelError("the model already carries Megatron-Bridge's adapters; score it before they are added.")
    # Bridge's configurations say how many rows are no padding, Megatron's own do not.
    vocab_size = getattr(language_model(chunks[0]).config, "vocab_size", None)
    return MegatronModel(
        chunks, Logical(conventional_names, vocab_size=vocab_size, with_head=needs_head(list(exclude)))
    )


def load_chunks(config: Config, *, experts_apart: bool = False) -> tuple[list[nn.Module], Any]:
    """Return this rank's model chunks in eval mode, with weights, and the AutoBridge that made them. Collective.

    experts_apart: build each routed expert as a module of its own, which takes adapters of its own, also where grouped
    ones would be faster.
    """
    auto_bridge = import_auto_bridge()
    hf_config = load_hf_config(config.model)
    check_layout(hf_config, config.parallel)
    if config.parallel.cp > 1 and not has_transformer_engine():
        raise LayoutError(
            f"parallel.cp is {config.parallel.cp}: Megatron's context parallelism needs Transformer Engine, which is "
            "not installed; set parallel.cp=1 or install transformer-engine (CUDA only)."
        )
    dtype = weights_dtype(config.model, hf_config)
    if dtype is torch.float32:
        # Transformer Engine multiplies float32 in TF32, 10 bits of it. cuBLAS reads this when it is first used.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    initialize(config)
    whole = meta_model(config.model, hf_config)
    with _explained(hf_config, config), redirect_stdout(io.StringIO()):  # Bridge prints sizes and a bar of its own
        bridge = auto_bridge.from_hf_pretrained(
            resolve(config.model.name_or_path), trust_remote_code=config.model.trust_remote_code
        )
        provider = bridge.to_megatron_provider(load_weights=False)
        check_family(hf_config, config)
        complete_rotary(provider, hf_config)
        configure(provider, config, dtype)
        if experts_apart:
            provider.moe_grouped_gemm = False
        if config.model.checkpoint is None:
            provider.register_pre_wrap_hook(lambda chunks: _load_weights(bridge, chunks, whole, config))
        chunks = provider.provide_distributed_model(
            wrap_with_ddp=False,
            use_cpu_initialization=not torch.cuda.is_available(),
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
        )
    if config.model.checkpoint is not None:
        load_checkpoint(chunks, Path(config.model.checkpoint), hf_config.get_text_config().vocab_size)
    for chunk in chunks:
        share_wide_norms(chunk)
    check_attention(hf_config, whole, [language_model(chunk) for chunk in chunks], config)
    return [chunk.eval() for chunk in chunks], bridge


def _load_weights(bridge: Any, chunks: list[nn.Module], whole: nn.Module, config: Config) -> list[nn.Module]:
    offer_known_names(bridge, whole)
    check_weights(bridge, chunks, whole, config)
    with freed_at_once():  # whole tensors come by, of which a rank keeps its shard
        return bridge.load_hf_weights(chunks)


def initialize(config: Config) -> None:
    """Create Megatron's process groups for the layout, unless the host has done so. Collective over the world.

    Raises LayoutError if existing groups have another layout.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel = config.parallel
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented, but not in its __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    if parallel_state.model_parallel_is_initialized():
        have = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if have != (parallel.tp, parallel.pp):
            raise LayoutError(
                f"parallel.tp is {parallel.tp} and parallel.pp {parallel.pp}, but this process already runs Megatron "
                f"at tp {have[0]} and pp {have[1]}; use those."
            )
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,  # an expert's own output must be whole to be measured
        distributed_timeout_minutes=math.ceil(config.cluster.timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def configure(provider: Any, config: Config, dtype: torch.dtype) -> None:
    """Set layout, dtype and, without Transformer Engine, the local layers on a Bridge provider; finalize it."""
    from megatron.core.transformer.enums import AttnBackend

    parallel = config.parallel
    provider.tensor_model_parallel_size = parallel.tp
    provider.pipeline_model_parallel_size = parallel.pp
    provider.context_parallel_size = parallel.cp
    provider.expert_model_parallel_size = parallel.ep
    provider.expert_tensor_parallel_size = 1
    provider.sequence_parallel = parallel.sequence_parallel
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = dtype
    provider.bf16, provider.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    provider.moe_token_dispatcher_type = "alltoall"
    provider.moe_shared_expert_overlap = False
    # Balancing losses would reach the adapters through the frozen router; plain PEFT training has none.
    provider.moe_router_load_balancing_type, provider.moe_aux_loss_coeff = "none", 0.0
    provider.moe_z_loss_coeff = None
    provider.gradient_accumulation_fusion = False
    # Bridge asks for one kernel in some families, which has no float32 or is not installed.
    provider.attention_backend = AttnBackend.auto
    provider.mtp_num_layers = None
    provider.moe_input_jitter_eps = None  # noise that only training wants
    provider.should_pad_vocab = True
    provider.make_vocab_size_divisible_by = 1
    if not has_transformer_engine():
        use_local_layers(provider)
    if not torch.cuda.is_available() or not has_transformer_engine():
        switch_off(provider, "No CUDA" if has_transformer_engine() else "No Transformer Engine")
    provider.perform_initialization = False  # every weight is loaded
    provider.finalize()


@contextmanager
def _explained(hf_config: Any, config: Config) -> Iterator[None]:
    """Turn what Bridge raises about a model that it cannot build into one ModelError."""
    name = config.model.name_or_path
    try:
        yield
    except PlopError:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"model.name_or_path '{name}': Megatron cannot build its layers without a package ({first_line(error)}); "
            "install it, or use parallel.backend=deepspeed or transformers for it."
        ) from error
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError,
    ) as error:  # fmt: skip
        if "not yet supported" in str(error):  # Bridge 0.6: supports() answers by the class name's ending alone
            raise ModelError(
                f"model.name_or_path '{name}' is a {architecture(hf_config)}, which Megatron-Bridge "
                f"{version('megatron-bridge')} does not know; use parallel.backend=deepspeed or transformers for it."
            ) from None
        lines = " ".join(str(error).split())[:500]
        raise ModelError(
            f"model.name_or_path '{name}': Megatron-Bridge cannot build it ({type(error).__name__}: {lines}); use "
            "parallel.backend=deepspeed or transformers for it."
        ) from error
