"""The training loss of audio classification: one mean over clips, however the batch is cut up.

logits (B, labels), labels  ->  loss per clip (B,)  ->  scalar
"""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: str | None = None,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The training loss, a mean over clips.

    Args:
        logits: (B, labels).
        labels: by `problem_type`:
            "single_label_classification": class indices (B,), or probabilities (B, labels) from
                mixup: cross-entropy;
            "multi_label_classification": (B, labels) in 0..1: binary cross-entropy, mean over
                labels;
            "regression": (B,) or (B, labels): squared error, mean over outputs;
            None: the first for whole numbers, the second for others, regression for one output,
                as `transformers` decides.
        num_items_in_batch: elements of `labels` in the whole batch when this is one of several
            accumulated parts: the parts' losses then add up to the whole batch's mean.
        label_smoothing: the part e of a target that is spread evenly (Szegedy et al., arXiv
            1512.00567): over the K labels, y (1 - e) + e / K, or, multi-label, over yes and no,
            y (1 - e) + e / 2. Regression has none.

    Raises:
        ValueError: for an unknown problem type, or labels of a shape that it does not take.
    """
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        elif labels.is_floating_point():
            problem_type = "multi_label_classification"
        else:
            problem_type = "single_label_classification"

    if problem_type == "single_label_classification":
        shapes: tuple[tuple[int, ...], ...] = (logits.shape[:1], logits.shape)
    elif problem_type == "multi_label_classification":
        shapes = (logits.shape,)
    elif problem_type == "regression":
        shapes = (logits.shape[:1], logits.shape) if logits.shape[-1] == 1 else (logits.shape,)
    else:
        raise ValueError(
            f"config.problem_type is {problem_type!r}; it must be 'single_label_classification', "
            "'multi_label_classification' or 'regression'."
        )
    if labels.shape not in shapes:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; for logits of {tuple(logits.shape)} and "
            f"problem_type {problem_type!r} they must be "
            + " or ".join(str(tuple(shape)) for shape in shapes)
            + "."
        )

    if problem_type == "single_label_classification":
        if labels.dim() == 2:
            labels = labels.to(logits)
        per_clip = cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    elif problem_type == "multi_label_classification":
        targets = labels.to(logits) * (1 - label_smoothing) + label_smoothing / 2
        per_label = binary_cross_entropy_with_logits(logits, targets, reduction="none")
        per_clip = per_label.mean(dim=-1)
    else:
        targets = labels.to(logits).reshape(logits.shape)
        per_clip = mse_loss(logits, targets, reduction="none").mean(dim=-1)
    if num_items_in_batch is None:
        return per_clip.mean()
    elements_per_clip = labels.numel() // labels.shape[0]
    return per_clip.sum() * elements_per_clip / num_items_in_batch
