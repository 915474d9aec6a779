"""What a student learns from a teacher's answers: the losses, and the parts that only they need.

    logits              (B, labels)             for the student's labels: hard labels, and the
                                                teacher's targets if its labels are the same
    teacher_logits      (B, teacher's labels)   from a separate head if they are not
    embedding           (B, D of the teacher)   projected from the student's pooler_output

    loss = (1 - share) * hard + share * T^2 * soft + weight * embedding

Soft targets at a temperature T (Hinton, Vinyals and Dean, arXiv 1503.02531): cross-entropy, or for
independent labels binary cross-entropy, whose sum over labels is as much as cross-entropy is over
classes. Independent hard labels have a mean as their loss; beside them, the sum is divided by their
number, too. T^2 preserves the size of the gradients.
Embeddings: squared error, mean over dimensions, of the teacher's standardised embeddings.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers.modeling_outputs import ModelOutput

from modeling_ast.loss_ast import classification_loss
from modeling_ast.modeling_ast import ASTMLPHead
from modeling_ast.pooling_ast import pool_logits

from .options import FinetuneOptions
from .teachers import Teacher

_SHARE = 0.5
# Beside hard labels, the sum over hundreds of independent labels outweighs cross-entropy over a few
# classes: with a teacher and equal shares, DeiT-Tiny lost 4.5 points on ESC-10 (seed 0).
_SHARE_OF_OTHER_LABELS = 0.1
_RARE = 0.01  # the first score of each label that does not exclude the others

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """The recipe of a student's loss.

    Args:
        share: weight of the teacher's targets; the rest is for hard labels.
        temperature: of the targets.
        embedding_weight: of the embeddings' loss.
        order: the position of each of the student's labels among the teacher's, if they are the
            same; None: the teacher's have a separate head.
        activation: "sigmoid" or "softmax", of the head that learns the targets.
    """

    share: float
    temperature: float
    embedding_weight: float
    order: tuple[int, ...] | None
    activation: str


@dataclass
class StudentOutput(ModelOutput):
    """See the module."""

    logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    embedding: Tensor | None = None


class Student(nn.Module):
    """An AST with the parts that only its teacher needs.

    Args:
        ast: an `ASTForAudioClassification`, or one with adapters (PEFT).
        teacher: whose answers it learns.
        options: of the run.
        embeddings: mean and deviation (D,) of the teacher's; None: they are not learned.
    """

    embedding_mean: Tensor
    embedding_deviation: Tensor

    def __init__(
        self,
        ast: Any,
        teacher: Teacher,
        options: FinetuneOptions,
        embeddings: tuple[Tensor, Tensor] | None,
    ):
        super().__init__()
        self.ast = ast
        config = self.config
        names = [config.id2label[index] for index in range(config.num_labels)]
        order: tuple[int, ...] | None = None
        own = "sigmoid" if config.problem_type == "multi_label_classification" else "softmax"
        self.teacher_head: nn.Module | None = None
        if set(names) == set(teacher.label_names) and teacher.are_names_known:
            order = tuple(teacher.label_names.index(name) for name in names)
        elif teacher.label_names:
            own = teacher.activation
            head = copy.deepcopy(config)
            head.id2label = dict(enumerate(teacher.label_names))
            head.label2id = {name: index for index, name in head.id2label.items()}
            head.problem_type = f"{'multi' if own == 'sigmoid' else 'single'}_label_classification"
            self.teacher_head = ASTMLPHead(head)
            if own == "sigmoid":
                # At scores of a half, hundreds of labels that are hardly ever given would pull the
                # encoder away from what it knows (cf. RetinaNet's prior, arXiv 1708.02002).
                nn.init.constant_(
                    self.teacher_head.get_parameter("dense.bias"), math.log(_RARE / (1 - _RARE))
                )
            self._teacher_config = head
        share = options.teacher_share
        if share is None:
            share = _SHARE_OF_OTHER_LABELS if order is None and own == "sigmoid" else _SHARE
        self.lesson = Lesson(
            share if teacher.label_names else 0.0,
            options.teacher_temperature,
            options.embedding_weight,
            order,
            own,
        )
        self.projection: nn.Module | None = None
        if embeddings is not None:
            mean, deviation = embeddings
            self.projection = nn.Linear(config.hidden_size, len(mean))
            self.register_buffer("embedding_mean", mean.clone())
            self.register_buffer("embedding_deviation", deviation.clone())
        self.keeps_teacher_head = options.keep_teacher_head
        self.teacher_label_names = teacher.label_names if teacher.are_names_known else []

    @property
    def config(self) -> Any:
        return self._base.config

    @property
    def _base(self) -> Any:
        """The AST without adapters around it; those inside it still work."""
        return self.ast.get_base_model() if hasattr(self.ast, "get_base_model") else self.ast

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> StudentOutput:
        base = self._base
        pooled = base.audio_spectrogram_transformer(input_values, attention_mask).pooler_output
        return StudentOutput(
            logits=base.classifier(pooled),
            teacher_logits=None if self.teacher_head is None else self.teacher_head(pooled),
            embedding=None if self.projection is None else self.projection(pooled),
        )

    def checkpoint(self) -> Any:
        """The AST alone, with the chosen head; a copy if that is the teacher's."""
        if self.teacher_head is None or not self.keeps_teacher_head:
            return self.ast
        ast = copy.deepcopy(self.ast)
        if hasattr(ast, "merge_and_unload"):
            ast = ast.merge_and_unload()
        ast.classifier = copy.deepcopy(self.teacher_head)
        ast.config = copy.deepcopy(self._teacher_config)
        ast.num_labels = ast.config.num_labels
        return ast

    def loss(
        self, output: StudentOutput, batch: Batch, num_items_in_batch: Any, pooling: str
    ) -> Tensor:
        """The loss of a part of a step's batch; those of all parts add up to the batch's mean.

        Args:
            output: of this student's `forward`, for the batch's clips or, for bags, its windows.
            batch: with "labels", "teacher_targets", "teacher_embeddings".
            num_items_in_batch: elements of "labels" in the whole batch.
            pooling: for bags.
        """
        lesson, labels = self.lesson, batch["labels"]
        config = self.config
        clips = len(labels) if num_items_in_batch is None else (
            num_items_in_batch * len(labels) / labels.numel()
        )  # fmt: skip
        weights = batch.get("window_weights")
        is_multi_label = config.problem_type == "multi_label_classification"
        logits = _of_clips(output.logits, weights, config.problem_type, pooling)
        smoothing = config.label_smoothing if self.training else 0.0
        hard = classification_loss(
            logits, labels, config.problem_type, num_items_in_batch, smoothing
        )
        loss = (1 - lesson.share) * hard
        if lesson.share:
            targets = batch["teacher_targets"]
            if lesson.order is not None:
                targets = targets[:, list(lesson.order)]
            elif output.teacher_logits is not None:
                kind = self._teacher_config.problem_type
                logits = _of_clips(output.teacher_logits, weights, kind, pooling)
            soft = soft_loss(logits, targets, lesson.activation, lesson.temperature)
            if lesson.activation == "sigmoid" and is_multi_label:
                soft = soft / config.num_labels
            loss = loss + lesson.share * lesson.temperature**2 * soft.sum() / clips
        if output.embedding is not None:
            found = _of_clips(output.embedding, weights, "regression", "mean")
            wanted = (batch["teacher_embeddings"] - self.embedding_mean) / self.embedding_deviation
            error = (found - wanted).square().mean(dim=-1)
            loss = loss + lesson.embedding_weight * error.sum() / clips
        return loss


def soft_loss(logits: Tensor, targets: Tensor, activation: str, temperature: float) -> Tensor:
    """Cross-entropy with a teacher's probabilities (B, labels), at a temperature -> (B,); of
    independent labels the sum."""
    logits = logits.float() / temperature
    if activation == "softmax":
        return cross_entropy(logits, targets, reduction="none")
    return binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)


def _of_clips(
    values: Tensor | None, weights: Tensor | None, problem_type: str | None, pooling: str
) -> Tensor:
    """One row per clip (B, n); for bags, the values of the existing windows are pooled."""
    assert values is not None
    if weights is None:
        return values
    bags = values.new_zeros(*weights.shape, values.shape[-1])
    bags[weights > 0] = values
    return pool_logits(bags, problem_type, pooling, weights)


def make_student(
    ast: Any,
    teacher: Teacher,
    options: FinetuneOptions,
    embeddings: tuple[Tensor, Tensor] | None,
) -> Student:
    """A student, with new parts that have small random weights.

    Raises:
        ValueError: if there is nothing to learn from the teacher, or no separate head to keep.
    """
    student = Student(ast, teacher, options, embeddings)
    if options.keep_teacher_head and not teacher.are_names_known:
        raise ValueError("--keep_teacher_head: name the teacher's labels (--teacher_labels).")
    if options.keep_teacher_head and student.teacher_head is None:
        raise ValueError(
            "--keep_teacher_head: the teacher has the data's labels, or none, and therefore no "
            "separate head."
        )
    return student
