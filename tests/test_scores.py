"""scores_from_logits: from logits to scores, by problem type."""

import pytest
import torch

from modeling_ast.scores_ast import scores_from_logits


def test_problem_types_and_functions():
    logits = torch.tensor([[2.0, -1.0, 0.0]])
    softmax = torch.tensor([[0.8438, 0.0420, 0.1142]])
    sigmoid = torch.tensor([[0.8808, 0.2689, 0.5000]])
    for problem_type in (None, "single_label_classification"):
        torch.testing.assert_close(
            scores_from_logits(logits, problem_type), softmax, atol=1e-4, rtol=0
        )
    multi_label = scores_from_logits(logits, "multi_label_classification")
    torch.testing.assert_close(multi_label, sigmoid, atol=1e-4, rtol=0)
    assert scores_from_logits(logits, "regression") is logits
    # What is asked for wins.
    assert torch.equal(scores_from_logits(logits, None, "sigmoid"), multi_label)
    assert scores_from_logits(logits, "multi_label_classification", "none") is logits


def test_mistakes():
    with pytest.raises(ValueError, match="Unknown problem_type 'multi_label'; expected one of sin"):
        scores_from_logits(torch.zeros(1, 2), "multi_label")
    with pytest.raises(ValueError, match="must be softmax, sigmoid or none, got 'relu'"):
        scores_from_logits(torch.zeros(1, 2), None, "relu")
