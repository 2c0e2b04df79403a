"""The model being trained writes the completions: transformers' generate, or forward passes of whatever trains."""

# b rows, s tokens of the longest, V entries of the vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plop_dist.backends.hf.load import load_end_tokens
from plop_dist.config.schema import Config
from plop_dist.training.batch import Batch, to_device
from plop_dist.training.engine import RewardedEngine
from plop_dist.training.logits import IGNORED, Logits
from plop_dist.training.samplers.noise import noise_key, perturbed, sampled
from plop_dist.training.samplers.sampler import Completion, Prompt
from plop_dist.training.sums import sum_over


class ModelSampler:
    """A Sampler over a RewardedEngine.

    Where the engine's model generates by itself, it does, with its cache. Elsewhere (stages of a pipeline, Megatron)
    each token takes a forward pass over all tokens before it: the engine's own, exact in every layout, without a second
    way to run the model; the cost grows with the square of the completion's length.
    """

    def __init__(self, engine: RewardedEngine, config: Config, tokenizer: Any) -> None:
        self._engine, self._train = engine, config.train
        self._pad_id: int = tokenizer.pad_token_id
        self._end_ids = load_end_tokens(config.model, tokenizer)

    def sample(self, prompts: Sequence[Prompt], generation: int) -> list[Completion]:
        """Return the completions. See Sampler."""
        model = self._engine.generating()
        rows = self._by_passes(prompts, generation) if model is None else self._by_length(model, prompts, generation)
        return [Completion(self._ended(ids)) for ids in rows]

    def close(self) -> None:
        """Do nothing: all belongs to the engine. See Sampler."""

    def _by_length(self, model: Any, prompts: Sequence[Prompt], generation: int) -> list[list[int]]:
        """Return what the model generates of prompts of one length at a time.

        Beside longer ones a prompt is padded on the left, which some models take for text (recurrent layers, places
        that count): the tokens would be of another policy than the one that training sees.
        """
        rows: list[list[int]] = [[] for _ in prompts]
        for length in sorted({len(prompt.ids) for prompt in prompts}):
            places = [place for place, prompt in enumerate(prompts) if len(prompt.ids) == length]
            made = self._generated(model, [prompts[place] for place in places], generation)
            for place, ids in zip(places, made, strict=True):
                rows[place] = ids
        return rows

    def _generated(self, model: Any, prompts: Sequence[Prompt], generation: int) -> list[list[int]]:
        from transformers import GenerationConfig, LogitsProcessorList

        length, ids_bs = len(prompts[0].ids), torch.tensor([prompt.ids for prompt in prompts])

        def add_noise(tokens_bs: Tensor, logits_bV: Tensor) -> Tensor:
            keys = self._keys(prompts, generation, tokens_bs.shape[1] - length)
            return perturbed(logits_bV, self._train.temperature, keys)

        base = getattr(model, "get_base_model", lambda: model)()
        # What a checkpoint's own configuration adds (penalties, the likeliest tokens alone) is not the policy.
        own, base.generation_config = base.generation_config, GenerationConfig()
        try:
            out_bs = model.generate(
                input_ids=ids_bs.to(self._engine.device),
                attention_mask=torch.ones_like(ids_bs, device=self._engine.device),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=self._train.max_completion_length, use_cache=True,
                    eos_token_id=self._end_ids or None, pad_token_id=self._pad_id,
                ),
                logits_processor=LogitsProcessorList([add_noise]),  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
        finally:
            base.generation_config = own
        return out_bs[:, length:].tolist()

    def _by_passes(self, prompts: Sequence[Prompt], generation: int) -> list[list[int]]:
        engine, size = self._engine, self._train.micro_batch_size
        rows: list[list[int]] = [[] for _ in prompts]
        for position in range(self._train.max_completion_length):
            is_open = any(not self._has_ended(ids) for ids in rows)
            # All replicas go on as long as one has to: experts are spread over them.
            if not sum_over(engine.dp_group, float(is_open), device=engine.device)[0]:
                break
            whole = [prompt.ids + ids for prompt, ids in zip(prompts, rows, strict=True)]
            batches = [
                to_device(_last_places(whole[start : start + size], self._pad_id), engine.device)
                for start in range(0, len(whole), size)
            ]
            logits_bV = torch.cat(engine.read_logits(batches, _at_last_places))
            tokens = sampled(logits_bV, self._train.temperature, self._keys(prompts, generation, position))
            for ids, token in zip(rows, tokens.tolist(), strict=True):
                ids.append(token)
        return rows

    def _keys(self, prompts: Sequence[Prompt], generation: int, position: int) -> list[str]:
        return [noise_key(self._train.seed, generation, prompt.row, position) for prompt in prompts]

    def _has_ended(self, ids: list[int]) -> bool:
        return any(token in self._end_ids for token in ids)

    def _ended(self, ids: list[int]) -> list[int]:
        """Return the tokens up to the first one that ends a text."""
        return ids[: next((place + 1 for place, token in enumerate(ids) if token in self._end_ids), len(ids))]


def _last_places(rows: Sequence[list[int]], pad_id: int) -> Batch:
    """Return rows as a micro-batch whose weights mark each row's last token."""
    longest = max(map(len, rows))
    ids_bs = torch.full((len(rows), longest), pad_id)
    mask_bs, weights_bs = torch.zeros_like(ids_bs), torch.zeros(len(rows), longest)
    for row, ids in enumerate(rows):
        ids_bs[row, : len(ids)], mask_bs[row, : len(ids)], weights_bs[row, len(ids) - 1] = torch.tensor(ids), 1, 1.0
    positions_bs = torch.arange(longest).expand_as(ids_bs).contiguous()
    return {"input_ids": ids_bs, "attention_mask": mask_bs, "labels": torch.full_like(ids_bs, IGNORED),
            "position_ids": positions_bs, "weights": weights_bs}  # fmt: skip


def _at_last_places(logits: Logits, batch: Batch) -> Tensor:
    return logits.at(batch["weights"].argmax(dim=1))
