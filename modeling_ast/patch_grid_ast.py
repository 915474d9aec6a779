"""The patch grid: how a spectrogram is cut, which patches are sound, and where they are.

A spectrogram of T frames x F mel bins is cut into patches of `patch_shape` (mel bins, frames), one
every `time_stride` frames and every `frequency_stride` bins (paper, section 2.1):

    rows    = (F - mel bins of a patch) // frequency_stride + 1
    columns = (T - frames of a patch) // time_stride + 1

Patches are numbered row by row: patch = row * columns + column. A position table has one vector per
patch, after those of the special tokens (AST has two, class and distillation):

    table (1, special + rows * columns, D)
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.utils.import_utils import is_tracing


def grid_shape(
    frames: int,
    mel_bins: int,
    patch_shape: tuple[int, int],
    frequency_stride: int,
    time_stride: int,
) -> tuple[int, int]:
    """Rows and columns of the patch grid of a spectrogram.

    Raises:
        ValueError: if the spectrogram is smaller than one patch.
    """
    patch_bins, patch_frames = patch_shape
    if frames < patch_frames or mel_bins < patch_bins:
        raise ValueError(
            f"Got a spectrogram of {frames} frames x {mel_bins} mel bins, smaller than one patch "
            f"of {patch_frames} x {patch_bins}. Pad the features to at least {patch_frames} frames "
            "(ASTFeatureExtractor(padding='max_length') does)."
        )
    rows = (mel_bins - patch_bins) // frequency_stride + 1
    columns = (frames - patch_frames) // time_stride + 1
    return rows, columns


def count_valid_columns(attention_mask: Tensor, patch_frames: int, time_stride: int) -> Tensor:
    """Patch columns without padding, per clip: (B, T) of 0/1 -> (B,), at least 1.

    A clip shorter than one patch keeps its first column, so it is classified at all and its logits
    still do not depend on the padding.

    Raises:
        ValueError: if a clip's mask is not ones, then zeros. (Not checked while a graph is traced,
            which cannot depend on values.)
    """
    valid_frames = attention_mask.long().sum(dim=1)
    if not is_tracing(attention_mask):
        frames = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        is_right_padded = (attention_mask == (frames < valid_frames[:, None])).all(dim=1)
        if not is_right_padded.all():
            clip = int(is_right_padded.int().argmin())
            raise ValueError(
                f"The attention_mask of clip {clip} is not ones followed by zeros: sound must come "
                "first, padding last, as ASTFeatureExtractor(padding='longest') does it."
            )
    return ((valid_frames - patch_frames).clamp(min=0) // time_stride) + 1


def patch_mask(valid_columns: Tensor, rows: int, columns: int) -> Tensor:
    """Valid columns per clip (B,) -> validity of every patch (B, rows * columns), bool."""
    is_valid = torch.arange(columns, device=valid_columns.device) < valid_columns[:, None]
    return is_valid[:, None, :].expand(-1, rows, -1).flatten(1)


def resize_position_table(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], num_special_tokens: int = 2
) -> Tensor:
    """Fit a position table to another grid on loading a checkpoint.

    The original code's rule (`ASTModel.__init__`): an axis that shrinks keeps its middle; one that
    grows is interpolated (bilinear, corners not aligned); time first.

    Args:
        table: (1, special + old rows * old columns, D).
        old, new: (rows, columns).

    Returns:
        (1, special + new rows * new columns, D); the special tokens' vectors are copied.
    """
    if old == new:
        return table
    special, patches = table[:, :num_special_tokens], table[:, num_special_tokens:]
    grid = patches.transpose(1, 2).unflatten(2, old)  # (1, D, rows, columns)
    grid = _cut_or_interpolate(grid, axis=3, length=new[1])
    grid = _cut_or_interpolate(grid, axis=2, length=new[0])
    return torch.cat([special, grid.flatten(2).transpose(1, 2)], dim=1)


def _cut_or_interpolate(grid: Tensor, axis: int, length: int) -> Tensor:
    old_length = grid.shape[axis]
    if length <= old_length:
        return grid.narrow(axis, old_length // 2 - length // 2, length)
    size = list(grid.shape[2:])
    size[axis - 2] = length
    return interpolate(grid, size=size, mode="bilinear", align_corners=False)


def run_time_positions(
    table: Tensor,
    trained: tuple[int, int],
    grid: tuple[int, int],
    valid_columns: Tensor | None,
    num_special_tokens: int = 2,
) -> Tensor:
    """Patch positions for these spectrograms, whose grid may differ from the trained one.

    A clip of up to the trained length takes the table's first columns, as if padded to that length.
    A longer one stretches the table over its own columns, excluding padding, so its positions do
    not depend on what it is batched with.

    Args:
        table: (1, special + rows * columns, D) for the `trained` grid (rows, columns).
        grid: (rows, columns) of this batch.
        valid_columns: (B,) columns of sound per clip; None: all of them.

    Returns:
        (1 or B, rows * columns, D) of `grid`, without the special tokens.
    """
    rows, columns = grid
    if rows != trained[0]:
        table = resize_position_table(table, trained, (rows, trained[1]), num_special_tokens)
    positions = table[:, num_special_tokens:].unflatten(1, (rows, trained[1]))
    # While a graph is exported, the number is unknown; the general case below gives the same result
    # for a shorter clip.
    if not isinstance(columns, torch.SymInt) and columns <= trained[1]:
        return positions[:, :, :columns].flatten(1, 2)

    # Linear interpolation along time, sampled like torch's `interpolate` (corners not aligned), in
    # float32: half precision has too few bits to count the columns.
    column = torch.arange(columns, device=table.device, dtype=torch.float32)
    lengths = column.new_full((1,), columns) if valid_columns is None else valid_columns.float()
    stretch = trained[1] / lengths.clamp(min=trained[1])  # (1 or B,)
    source = ((column + 0.5) * stretch[:, None] - 0.5).clamp(0, trained[1] - 1)  # (1 or B, columns)
    left = source.floor().long()
    right = (left + 1).clamp(max=trained[1] - 1)
    weight = (source - left)[:, :, None].to(table.dtype)
    by_time = positions[0].transpose(0, 1)  # (trained columns, rows, D)
    stretched = torch.lerp(by_time[left], by_time[right], weight.unsqueeze(-1))
    return stretched.transpose(1, 2).flatten(1, 2)
