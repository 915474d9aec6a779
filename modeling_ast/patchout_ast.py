"""Patchout (PaSST, Koutini et al., arXiv 2110.05069): train on a random part of the patches.

    patches (B, rows * columns, D)  ->  (B, kept, D)
    kept = (rows - frequency_patchout) * (columns - time_patchout) - unstructured_patchout

The encoder's cost falls with the number kept, and the model is regularised. Each clip is drawn
separately; all keep the same number, so the batch stays rectangular.
"""

import torch
from torch import Tensor


def drop_patches(
    patches: Tensor,
    is_valid: Tensor | None,
    grid: tuple[int, int],
    frequency_patchout: int,
    time_patchout: int,
    unstructured_patchout: int,
) -> tuple[Tensor, Tensor | None]:
    """Drop whole rows, then whole columns, then single patches.

    Sound is dropped before padding, but a clip always keeps one valid row, column or patch. On a
    grid smaller than the config's, one row, column or patch is likewise kept.

    Args:
        patches: (B, N, D), positions added.
        is_valid: (B, N), False for padding; None: all are sound.
        grid: rows and columns; N is their product.
        frequency_patchout, time_patchout, unstructured_patchout: rows, columns and patches to drop.

    Returns:
        patches (B, kept, D), is_valid (B, kept) or None.
    """
    valid = (
        is_valid
        if is_valid is not None
        else torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
    )
    by_row = valid.unflatten(1, grid)  # (B, rows, columns)
    kept_rows = _keep(by_row.any(dim=2), frequency_patchout)
    kept_columns = _keep(by_row.any(dim=1), time_patchout)
    kept = (kept_rows[:, :, None] * grid[1] + kept_columns[:, None, :]).flatten(1)
    kept = kept.gather(1, _keep(valid.gather(1, kept), unstructured_patchout))
    # Not `gather`, which would keep all patches in memory for its gradient.
    patches = patches[torch.arange(len(patches), device=patches.device)[:, None], kept]
    return patches, None if is_valid is None else is_valid.gather(1, kept)


def _keep(is_valid: Tensor, dropped: int) -> Tensor:
    """Indices (B, n - dropped), ascending, of what a random draw per clip leaves of n."""
    # The lowest scores are dropped: valid ones first, then padding, never the last valid one.
    score = torch.rand(is_valid.shape, device=is_valid.device) + (~is_valid).float()
    survivor = score.where(is_valid, -1.0).argmax(dim=1, keepdim=True)
    score = score.scatter(1, survivor, 3.0)
    dropped = min(dropped, is_valid.shape[1] - 1)
    return score.argsort(dim=1)[:, dropped:].sort(dim=1).values
