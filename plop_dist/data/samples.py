"""Which tokens are scored: the chosen rows, tokenised, and laid out in micro-batches."""

# b rows of a micro-batch, s tokens of its longest row

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from plop_dist.config.schema import RANDOM_TOKENS, DataConfig
from plop_dist.data.builtin import random_tokens
from plop_dist.data.images import refuse_images
from plop_dist.data.texts import Row, render, token_ids
from plop_dist.errors import DataError
from plop_dist.measure.protocols import MicroBatch


def select_rows(rows: Sequence[Row], data: DataConfig) -> list[Row]:
    """Return the first num_samples rows, in file order or after a shuffle seeded with data.seed."""
    chosen = list(rows)
    if data.shuffle:
        random.Random(data.seed).shuffle(chosen)
    return chosen[: data.num_samples]


def tokenize(rows: Sequence[Row], data: DataConfig, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each row: the tokenizer's defaults, truncated to data.max_length.

    Raises DataError when no row yields a token, when all are blank, and naming the row whose text is not Unicode. Rows
    with images are refused: see processed.
    """
    refuse_images(rows, data)
    if data.path == RANDOM_TOKENS:
        return [random_tokens(row["number"], data.seed, tokenizer, data.max_length) for row in rows]
    texts = [render(row, number, data, tokenizer) for number, row in enumerate(rows, start=1)]
    if not any(map(str.strip, texts)):
        raise DataError(
            f"{data.path}: the text of all {len(texts)} rows is empty or only whitespace; check data.text_field, "
            "data.template or data.messages_field."
        )
    samples = token_ids(texts, data, tokenizer, max_length=data.max_length)
    if not any(samples):
        raise DataError(f"{data.path}: none of the {len(samples)} rows yields a token; check data.text_field.")
    return samples


def plan_steps(
    lengths: Sequence[int], batch_size: int, num_replicas: int, per_step: int, *, uniform: bool, in_order: bool
) -> list[list[list[list[int]]]]:
    """Return which samples run when: plan[step][replica] is a list of micro-batches, each a list of sample indices.

    Samples of similar length share a micro-batch (less padding, the same scores), unless `in_order`, which a scoring
    that may stop early needs in order not to stop after the long ones only. With `uniform` each replica
    runs every step with `per_step` micro-batches, empty ones where it has no samples left; without it a replica may
    have fewer. The same on every rank.
    """
    order = [index for index, length in enumerate(lengths) if length]
    if not in_order:
        order.sort(key=lambda index: -lengths[index])  # the longest first: a lack of memory shows at once
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    width = num_replicas * per_step
    plan = []
    for start in range(0, len(batches), width):
        part = batches[start : start + width]
        replicas = [part[replica::num_replicas] for replica in range(num_replicas)]
        if uniform:
            replicas = [micro + [[]] * (per_step - len(micro)) for micro in replicas]
        plan.append(replicas)
    return plan


def collate(
    samples: Sequence[Sequence[int]], indices: Sequence[int], *, num_rows: int, length: int, pad_id: int, side: str
) -> MicroBatch:
    """Return the samples as one padded micro-batch of shape (num_rows, length), int64, on the CPU.

    Rows beyond len(indices) are fillers: they repeat a sample and count for nothing (sample_ids -1), because a row
    that is padding throughout has no defined attention. position_ids count real tokens from 0 whatever the side.
    """
    filler = indices[0] if indices else next(index for index, sample in enumerate(samples) if sample)
    input_ids = torch.full((num_rows, length), pad_id)
    attention_mask = torch.zeros(num_rows, length, dtype=torch.int64)
    sample_ids = torch.full((num_rows, length), -1)
    for row in range(num_rows):
        index = indices[row] if row < len(indices) else filler
        tokens = torch.tensor(samples[index][:length])
        at = slice(length - len(tokens), length) if side == "left" else slice(0, len(tokens))
        input_ids[row, at] = tokens
        attention_mask[row, at] = 1
        if row < len(indices):
            sample_ids[row, at] = index
    return MicroBatch(input_ids, attention_mask, sample_ids, (attention_mask.cumsum(dim=1) - 1).clamp_min(0))


def step_micro_batches(
    samples: Sequence[Sequence[int]], step: list[list[list[int]]], replica: int, *, pad_id: int, side: str
) -> list[MicroBatch]:
    """Return one replica's micro-batches of a planned step, all of one shape, as pipelines and experts want."""
    every = [indices for micro in step for indices in micro]
    num_rows = max(len(indices) for indices in every)
    length = max(len(samples[index]) for indices in every for index in indices)
    return [
        collate(samples, indices, num_rows=num_rows, length=length, pad_id=pad_id, side=side)
        for indices in step[replica]
    ]
