"""The loss: every problem type, soft labels, smoothing, and gradients under accumulation."""

import pytest
import torch
from torch.nn.functional import one_hot
from transformers import Trainer, TrainingArguments

from modeling_ast import ASTConfig, ASTForAudioClassification
from modeling_ast.loss_ast import classification_loss

LABELS = {
    "single_label_classification": lambda: torch.randint(0, 3, (8,)),
    "single_label_classification, soft": lambda: torch.rand(8, 3).softmax(-1),
    "multi_label_classification": lambda: torch.randint(0, 2, (8, 3)).float(),
    "multi_label_classification, soft": lambda: torch.rand(8, 3),
    "regression": lambda: torch.randn(8, 3),
    "regression, one output": lambda: torch.randn(8),
}


def tiny_model(kind: str, **overrides) -> ASTForAudioClassification:
    torch.manual_seed(0)
    problem_type, _, detail = kind.partition(", ")
    config = ASTConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=12,
        max_length=32,
        num_mel_bins=16,
        num_labels=1 if detail == "one output" else 3,
        problem_type=problem_type,
        **overrides,
    )
    return ASTForAudioClassification(config)


def gradients(model: ASTForAudioClassification) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_values_are_the_textbook_ones():
    logits = torch.randn(4, 3, dtype=torch.float64)
    classes = torch.tensor([0, 2, 1, 1])
    log_p = logits.log_softmax(-1)
    hard = one_hot(classes, 3).double()
    expected = -(hard * log_p).sum(-1).mean()
    single = "single_label_classification"
    torch.testing.assert_close(classification_loss(logits, classes, single), expected)
    torch.testing.assert_close(classification_loss(logits, hard, single), expected)
    smooth = hard * 0.9 + 0.1 / 3
    expected = -(smooth * log_p).sum(-1).mean()
    for labels in (classes, hard):
        torch.testing.assert_close(
            classification_loss(logits, labels, single, label_smoothing=0.1), expected
        )

    yes, no = logits.sigmoid().log(), (-logits).sigmoid().log()
    smooth = hard * 0.9 + 0.05
    torch.testing.assert_close(
        classification_loss(logits, hard, "multi_label_classification", label_smoothing=0.1),
        -(smooth * yes + (1 - smooth) * no).mean(),
    )
    torch.testing.assert_close(
        classification_loss(logits, hard, "regression", label_smoothing=0.1),
        ((logits - hard) ** 2).mean(),
    )


def test_the_problem_type_is_found_as_transformers_finds_it():
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for labels, problem_type in [
        (classes, "single_label_classification"),
        (torch.rand(4, 3), "multi_label_classification"),
    ]:
        assert classification_loss(logits, labels) == classification_loss(
            logits, labels, problem_type
        )
    assert classification_loss(logits[:, :1], torch.ones(4)) == ((logits[:, 0] - 1) ** 2).mean().to(
        torch.float32
    )


def test_labels_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"labels have shape \(4,\); for logits of \(4, 3\) and problem_type "
    ):
        classification_loss(torch.randn(4, 3), torch.zeros(4), "multi_label_classification")
    with pytest.raises(ValueError, match=r"must be \(4,\) or \(4, 3\)\."):
        classification_loss(torch.randn(4, 3), torch.zeros(4, 1), LABEL_TYPES[0])
    with pytest.raises(ValueError, match="problem_type is 'ranking'"):
        classification_loss(torch.randn(4, 3), torch.zeros(4), "ranking")


LABEL_TYPES = ["single_label_classification", "multi_label_classification", "regression"]


def test_one_column_of_classes_is_one_class_per_clip():
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for problem_type in (None, "single_label_classification"):
        assert classification_loss(
            logits, classes[:, None], problem_type, num_items_in_batch=4
        ) == classification_loss(logits, classes, problem_type, num_items_in_batch=4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_minus_100_are_left_out(smoothing):
    logits = torch.randn(6, 3)
    known = torch.tensor([0, 2, 3, 5])
    hard, soft, multi = torch.randint(0, 3, (6,)), torch.rand(6, 3).softmax(-1), torch.rand(6, 3)
    for labels, problem_type in (
        (hard, "single_label_classification"),
        (soft, "single_label_classification"),
        (multi, "multi_label_classification"),
    ):
        expected = classification_loss(logits[known], labels[known], problem_type, None, smoothing)
        labels = labels.clone()
        labels[[1, 4]] = -100
        got = classification_loss(logits, labels, problem_type, None, smoothing)
        torch.testing.assert_close(got, expected)
    # As torch and transformers have it.
    hard[[1, 4]] = -100
    torch.testing.assert_close(
        classification_loss(logits, hard), torch.nn.functional.cross_entropy(logits, hard)
    )
    # Several labels: what is unknown of a clip takes nothing from the rest of it.
    multi[2, 1] = -100
    mask = torch.ones(6, 3)
    mask[2, 1] = 0
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, multi * (1 - smoothing) + smoothing / 2, reduction="none"
    )
    torch.testing.assert_close(
        classification_loss(logits, multi, label_smoothing=smoothing), (each * mask).sum() / 17
    )
    # In a regression, a value like any other.
    torch.testing.assert_close(
        classification_loss(logits, torch.full((6, 3), -100.0), "regression"),
        (logits + 100).square().mean(),
    )


def test_nothing_known_is_no_loss():
    logits = torch.randn(2, 3, requires_grad=True)
    for labels in (torch.full((2,), -100), torch.full((2, 3), -100.0)):
        loss = classification_loss(logits, labels)
        loss.backward()
        assert loss == 0
        assert not logits.grad.any()


def test_a_loss_function_that_is_set_is_used():
    model = tiny_model("single_label_classification")
    spectrogram, labels = torch.randn(2, 32, 16), torch.tensor([0, 1])
    calls = []

    def f(labels, logits, config, **kwargs):
        calls.append(kwargs)
        return logits.sum() + 7

    model.loss_function = f
    output = model(spectrogram, labels=labels)
    assert output.loss == output.logits.sum() + 7
    model(spectrogram, labels=labels, num_items_in_batch=2)
    assert calls == [{}, {"num_items_in_batch": 2}]

    class Module(torch.nn.Module):
        def forward(self, labels, logits, config):
            return logits.sum() + 8

    other = tiny_model("single_label_classification")
    other.loss_function = Module()
    output = other(spectrogram, labels=labels)
    assert output.loss == output.logits.sum() + 8


UNKNOWN_LABELS = {
    "single_label_classification, some unknown": lambda: torch.tensor(
        [0, -100, 2, 1, 0, -100, 1, 1]
    ),
    "multi_label_classification, some unknown": lambda: torch.rand(8, 3).where(
        torch.arange(24).reshape(8, 3) % 5 > 0, -100.0
    ),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", [*LABELS, *UNKNOWN_LABELS])
def test_accumulated_gradients_are_the_whole_batch_s(kind, smoothing):
    spectrograms = torch.randn(8, 32, 16)
    labels = {**LABELS, **UNKNOWN_LABELS}[kind]()
    model = tiny_model(kind, label_smoothing=smoothing)
    model(spectrograms, labels=labels).loss.backward()
    expected = gradients(model)

    model.zero_grad()
    for part in ([0, 1, 2], [3], [4, 5, 6, 7]):  # uneven on purpose
        loss = model(
            spectrograms[part],
            labels=labels[part],
            num_items_in_batch=(labels != -100).sum(),  # as `Trainer` counts
        ).loss
        loss.backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)


class _KeepsGradients(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.kept = gradients(self.model).clone()
        return loss


@pytest.mark.parametrize("kind", LABELS)
def test_accumulated_gradients_in_the_trainer(kind, tmp_path):
    generator = torch.Generator().manual_seed(1)
    labels = LABELS[kind]()
    clips = [
        {"input_values": torch.randn(32, 16, generator=generator), "labels": label}
        for label in labels
    ]
    kept = []
    for batch_size, steps in ((8, 1), (2, 4)):
        trainer = _KeepsGradients(
            model=tiny_model(kind, label_smoothing=0.1),
            args=TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=steps,
                max_steps=1,
                max_grad_norm=0,
                remove_unused_columns=False,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=clips,
        )
        trainer.train()
        kept.append(trainer.kept)
    torch.testing.assert_close(kept[0], kept[1], atol=1e-6, rtol=1e-4)


def test_smoothing_is_for_training_only():
    model = tiny_model("single_label_classification", label_smoothing=0.2)
    spectrogram, labels = torch.randn(2, 32, 16), torch.tensor([0, 1])
    smoothed = model(spectrogram, labels=labels).loss
    plain = model.eval()(spectrogram, labels=labels).loss
    assert smoothed != plain
    model.config.label_smoothing = 0.0
    assert model.train()(spectrogram, labels=labels).loss == plain
