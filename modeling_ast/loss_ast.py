"""The training loss of audio classification: one mean over clips, however the batch is split.

logits (B, labels), labels  ->  loss per clip (B,) or per output (B, labels)  ->  scalar

A label of -100 means unknown, as everywhere in torch and `transformers`; the mean ignores it.
"""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

UNKNOWN = -100


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
            "single_label_classification": class indices (B,) or (B, 1), or probabilities
                (B, labels) from mixup: cross-entropy; a clip with a -100 is ignored;
            "multi_label_classification": (B, labels) in 0..1: binary cross-entropy, mean over
                labels; each -100 is ignored;
            "regression": (B,) or (B, labels): squared error, mean over outputs; -100 is a value
                like any other;
            None: the first for integers, the second for floats, regression for one output, as in
                `transformers`.
        num_items_in_batch: elements of `labels` other than -100 in the whole batch, if this is one
            of several accumulated parts: the parts' losses then add up to the whole batch's mean.
        label_smoothing: the share e of a target that is spread evenly (Szegedy et al., arXiv
            1512.00567): over the K labels, y (1 - e) + e / K; or, multi-label, over yes and no,
            y (1 - e) + e / 2. Not used for regression.

    Raises:
        ValueError: for an unknown problem type, or labels of the wrong shape.
    """
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        elif labels.is_floating_point():
            problem_type = "multi_label_classification"
        else:
            problem_type = "single_label_classification"

    if problem_type == "single_label_classification":
        if labels.shape == (len(logits), 1) and not labels.is_floating_point():
            labels = labels[:, 0]
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

    # Loss and validity per clip (B,) or per output (B, labels).
    is_known = labels != UNKNOWN
    if problem_type == "single_label_classification":
        if labels.dim() == 2:
            is_known = is_known.all(dim=-1)
            labels = labels.to(logits)
        loss = cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    elif problem_type == "multi_label_classification":
        targets = labels.to(logits) * (1 - label_smoothing) + label_smoothing / 2
        loss = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    else:
        loss = mse_loss(logits, labels.to(logits).reshape(logits.shape), reduction="none")
        is_known = is_known.new_ones(loss.shape)
    loss = loss.where(is_known, 0.0)
    if num_items_in_batch is None:
        return loss.sum() / is_known.sum().clamp(min=1)
    elements = labels.numel() // loss.numel()  # elements of `labels` per loss
    return loss.sum() * elements / num_items_in_batch
