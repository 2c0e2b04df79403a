"""How undecided a model is about each next token: entropies, whether the vocabulary is whole or cut over ranks."""

# b rows, s tokens of the longest, V entries of the vocabulary, T places that are asked for

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_PLACES_AT_A_TIME = 128  # so that what is made beside the logits is small


@torch.no_grad()
def token_entropies(
    logits_bsV: Tensor, wanted_bs: Tensor, temperature: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the entropy of softmax(logits / temperature) at each wanted place, (b, s), float32, in nats; 0 elsewhere.

    logits_bsV: any float dtype, finite or -inf; this rank's part where the vocabulary is cut over `group`. wanted_bs:
    bool, the same on all of its ranks. With e = exp((logit - the largest) / temperature) and Z = sum e it is
    log Z - sum(e log e) / Z. Collective over `group`.
    """
    largest_bs = logits_bsV.amax(-1).float()
    if group is not None:
        dist.all_reduce(largest_bs, dist.ReduceOp.MAX, group=group)
    sums = [torch.zeros(2, 0, device=logits_bsV.device)]
    for places in wanted_bs.nonzero().split(_PLACES_AT_A_TIME):
        at = tuple(places.T)
        exponentials_TV = ((logits_bsV[at].float() - largest_bs[at][:, None]) / temperature).exp()
        sums.append(torch.stack([exponentials_TV.sum(-1), torch.special.entr(exponentials_TV).sum(-1)]))
    sums_2T = torch.cat(sums, dim=1)
    if group is not None:
        dist.all_reduce(sums_2T, group=group)
    entropies_bs = torch.zeros(wanted_bs.shape, device=logits_bsV.device)
    entropies_bs[wanted_bs] = sums_2T[0].log() + sums_2T[1] / sums_2T[0]
    return entropies_bs
