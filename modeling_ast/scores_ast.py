"""Logits to scores: the one place that knows what a checkpoint's `problem_type` makes of them.

logits  (..., labels)
scores  (..., labels)   softmax: sum 1 over the labels; sigmoid: each label by itself; or the logits
"""

from torch import Tensor

_FUNCTIONS = {
    None: "softmax",  # as in `transformers`
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


def scores_from_logits(
    logits: Tensor, problem_type: str | None, function_to_apply: str | None = None
) -> Tensor:
    """What a checkpoint says of each label.

    Args:
        logits: (..., labels).
        problem_type: the config's; None, as published AudioSet checkpoints have it, means softmax.
        function_to_apply: "softmax", "sigmoid" or "none", instead of the problem type's.

    Raises:
        ValueError: for an unknown problem type or function.
    """
    if function_to_apply is None:
        if problem_type not in _FUNCTIONS:
            raise ValueError(
                f"Unknown problem_type {problem_type!r}; expected one of "
                f"{', '.join(name for name in _FUNCTIONS if name)}."
            )
        function_to_apply = _FUNCTIONS[problem_type]
    if function_to_apply == "softmax":
        return logits.softmax(dim=-1)
    if function_to_apply == "sigmoid":
        return logits.sigmoid()
    if function_to_apply == "none":
        return logits
    raise ValueError(
        f"function_to_apply must be softmax, sigmoid or none, got {function_to_apply!r}."
    )
