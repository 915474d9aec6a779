"""Token merging (ToMe, Bolya et al., arXiv 2210.09461): fewer tokens from layer to layer.

    tokens (B, S, D), sizes (B, S)  ->  (B, S - r, D), (B, S - r)       S = special + N

A token's size is the number of patches in it; 0 marks padding. In each clip, sound comes first and
padding last. Special tokens are never merged. Which of a clip's tokens are merged depends only on
its own sound, so its logits do not depend on what it is batched with.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_MOST = 3  # one of so many tokens is merged away, at most
_LAST = 2**31 - 1  # place of padding


def start_merging(tokens: Tensor, is_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, S, D), validity (B, S) or None -> tokens with padding moved to the end, sizes (B, S)."""
    if is_valid is None:
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
    order = is_valid.int().argsort(dim=1, descending=True, stable=True)
    return _take(tokens, order), is_valid.gather(1, order).float()


def size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Sizes (B, S) -> bias for the attention logits, (B, 1, 1, S).

    A token of n patches gets as much attention as those patches together (the paper's proportional
    attention, equation 1): softmax(q·k + log n). Padding, of size 0, gets none.
    """
    return sizes.log().to(dtype)[:, None, None, :]


def merge_tokens(
    tokens: Tensor, keys: Tensor, sizes: Tensor, merged: int, num_special_tokens: int = 2
) -> tuple[Tensor, Tensor]:
    """Merge the `merged` most similar pairs of each clip, at most a third of its tokens.

    Bipartite soft matching (the paper's section 3): every second token proposes to the most similar
    of the others, and the best proposals are accepted. A merged token is the mean of its patches
    and keeps its place.

    Args:
        tokens: (B, S, D), special tokens first, padding last.
        keys: (B, heads, S, head size): the layer's attention keys, whose cosine, averaged over
            heads, is the similarity.
        sizes: (B, S), 0 for padding.
        merged: r.

    Returns:
        tokens (B, S - r, D), sizes (B, S - r). A clip with fewer than 3 r tokens of sound merges
        a third of them and drops padding for the rest.
    """
    special, tokens = tokens[:, :num_special_tokens], tokens[:, num_special_tokens:]
    special_sizes, sizes = sizes[:, :num_special_tokens], sizes[:, num_special_tokens:]
    count = tokens.shape[1]
    # A third, not the half that can find a partner: short clips keep what sets them apart.
    merged = torch.sym_min(merged, count // _MOST)
    if isinstance(merged, int) and merged == 0:  # symbolic while it is exported
        return torch.cat([special, tokens], dim=1), torch.cat([special_sizes, sizes], dim=1)

    key = normalize(keys[:, :, num_special_tokens:].float().mean(dim=1), dim=-1)
    similarity = key[:, ::2] @ key[:, 1::2].transpose(1, 2)  # (B, proposers, others)
    both_valid = (sizes[:, ::2, None] > 0) & (sizes[:, None, 1::2] > 0)
    score, partner = similarity.masked_fill(~both_valid, -torch.inf).max(dim=2)
    proposer = score.topk(merged, dim=1).indices  # (B, r), best first
    partner = partner.gather(1, proposer)
    allowed = (sizes > 0).sum(dim=1, keepdim=True) // _MOST
    is_merged = torch.arange(merged, device=tokens.device) < allowed

    # Sums over patches become means again at the end; in float32, because sums can be large.
    gone, stays = sizes[:, ::2], sizes[:, 1::2]
    moved = gone.gather(1, proposer) * is_merged  # patches that change hands
    total = tokens[:, 1::2].float() * stays[:, :, None]
    total = total.scatter_add(
        1,
        partner[:, :, None].expand(-1, -1, tokens.shape[2]),
        _take(tokens[:, ::2], proposer).float() * moved[:, :, None],
    )
    stays = stays.scatter_add(1, partner, moved)
    gone = gone.scatter_add(1, proposer, -moved)
    mean = (total / stays.clamp(min=1)[:, :, None]).to(tokens.dtype)

    # Back to the old order, without merged tokens; padding moves to the end.
    place = torch.arange(count, device=tokens.device)
    place = torch.cat([place[::2], place[1::2]])
    sizes = torch.cat([gone, stays], dim=1)
    order = place.expand_as(sizes).masked_fill(sizes == 0, _LAST)
    order = order.argsort(dim=1)[:, : count - merged]
    tokens = _take(torch.cat([tokens[:, ::2], mean], dim=1), order)
    sizes = sizes.gather(1, order)
    return torch.cat([special, tokens], dim=1), torch.cat([special_sizes, sizes], dim=1)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    # Copies whole rows: on a CPU, four times as fast as `gather`.
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], index]
