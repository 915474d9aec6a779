"""The Audio Spectrogram Transformer (AST, arXiv 2104.01778): the whole forward pass, top to bottom.

    log-mel spectrogram     (B, T, F)       T frames of 10 ms, F mel bins, normalised
    patches, projected      (B, N, D)       16 x 16, overlapping; N = rows * columns
    + class, distillation   (B, 2 + N, D)   DeiT's two tokens, positions added to all
    encoder                 (B, 2 + N, D)   pre-norm transformer layers, final LayerNorm
    pooler_output           (B, D)          mean of the two special tokens
    logits                  (B, labels)     LayerNorm and one linear layer

Attributes have the names that AST checkpoints on the Hub use, so nothing is renamed on load or
save, and `transformers`' own AST reads what this one writes.

T and F are free at run time: the position table is cut or stretched to fit the spectrogram. A frame
mask (B, T) excludes padding from attention, so a clip's logits do not depend on its padding.

AST's descendants (PaSST, SSAST, AudioMAE, CED, Dasheng) are the same encoder with other numbers:
one special token or none, the mean over patches, the last LayerNorm elsewhere, patches that are not
square. `ASTConfig` has these numbers; shapes given here are for its defaults.

To save work, patchout drops some of the N patches in training, and token merging joins similar ones
between attention and MLP of each layer at inference. Both are off by default.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_ast import ASTConfig
from .patch_grid_ast import count_valid_columns, patch_mask, run_time_positions
from .patchout_ast import drop_patches
from .pretrained_ast import ASTPreTrainedModel, ConvertibleMixin
from .token_merging_ast import merge_tokens, size_bias, start_merging


class ASTPatchEmbeddings(nn.Module):
    """Cuts the spectrogram into overlapping patches and projects each to a vector."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.projection = nn.Conv2d(
            in_channels=1,
            out_channels=config.hidden_size,
            kernel_size=config.patch_shape,
            stride=(config.frequency_stride, config.time_stride),
        )

    def forward(self, input_values: Tensor) -> Tensor:
        input_values = input_values.to(self.projection.weight.dtype)
        image = input_values.transpose(1, 2).unsqueeze(1)  # (B, 1, F, T): frequency is the height
        return self.projection(image).flatten(2).transpose(1, 2)  # (B, rows * columns, D)


class ASTEmbeddings(nn.Module):
    """Patches plus the special tokens, with positions added."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        rows, columns = config.trained_grid
        self.special_tokens = ("cls_token", "distillation_token")[: config.num_special_tokens]
        for name in self.special_tokens:
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, config.hidden_size)))
        self.patch_embeddings = ASTPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(
            torch.zeros(1, config.num_special_tokens + rows * columns, config.hidden_size)
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, F), frame mask (B, T) -> tokens (B, 2 + N, D), token mask (B, 2 + N)."""
        config = self.config
        batch_size, frames, mel_bins = input_values.shape
        grid = config.grid_shape(frames, mel_bins)
        valid_columns = is_valid = None
        if attention_mask is not None:
            if attention_mask.shape != (batch_size, frames):
                raise ValueError(
                    f"attention_mask must have one value per frame, shape {(batch_size, frames)}, "
                    f"got {tuple(attention_mask.shape)}. Labels are passed by name: labels=…"
                )
            valid_columns = count_valid_columns(
                attention_mask, config.patch_shape[1], config.time_stride
            )
            is_valid = patch_mask(valid_columns, *grid)
            # A clip shorter than one patch has padding inside its only patch.
            input_values = input_values.masked_fill(attention_mask[:, :, None] == 0, 0.0)

        patches = self.patch_embeddings(input_values)
        patches = patches + run_time_positions(
            self.position_embeddings,
            config.trained_grid,
            grid,
            valid_columns,
            config.num_special_tokens,
        )
        patchout = (config.frequency_patchout, config.time_patchout, config.unstructured_patchout)
        if self.training and any(patchout):
            patches, is_valid = drop_patches(patches, is_valid, grid, *patchout)
        tokens = patches
        count = config.num_special_tokens
        if count:
            special = torch.cat([getattr(self, name) for name in self.special_tokens], dim=1)
            special = special + self.position_embeddings[:, :count]
            tokens = torch.cat([special.expand(batch_size, -1, -1), patches], dim=1)
            if is_valid is not None:
                is_valid = nn.functional.pad(is_valid, (count, 0), value=True)
        return self.dropout(tokens), is_valid


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: the one that can return its weights (B, heads, S, S)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class ASTSelfAttention(nn.Module):
    """Query, key and value projections and the attention between all tokens."""

    is_causal = False

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(B, S, D) -> context (B, S, D), weights (B, heads, S, S) or None, keys."""
        heads = (self.config.num_attention_heads, self.head_size)
        query, key, value = (
            projection(hidden_states).unflatten(-1, heads).transpose(1, 2)  # (B, heads, S, size)
            for projection in (self.query, self.key, self.value)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.head_size**-0.5,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return context.flatten(2), weights, key  # (B, S, D)


class ASTOutput(nn.Module):
    """The linear layer at the end of an attention or MLP block."""

    def __init__(self, in_features: int, config: ASTConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class ASTAttention(nn.Module):
    """Multi-head self-attention: `attention` mixes the tokens, `output` projects back."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.attention = ASTSelfAttention(config)
        self.output = ASTOutput(config.hidden_size, config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        context, weights, keys = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(context), weights, keys


class ASTIntermediate(nn.Module):
    """First half of the MLP block; the activation opens the second, see `ASTLayer`."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense(hidden_states)


class ASTLayer(GradientCheckpointingLayer):
    """One pre-norm transformer layer: attention, then MLP, each added to its input."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ASTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = ASTIntermediate(config)
        self.output = ASTOutput(config.intermediate_size, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        sizes: Tensor | None = None,
        merged: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`sizes` (B, S), patches per token, replaces the mask while tokens are merged."""
        if sizes is not None:
            attention_mask = size_bias(sizes, hidden_states.dtype)
        attended, weights, keys = self.attention(
            self.layernorm_before(hidden_states), attention_mask, **kwargs
        )
        hidden_states = hidden_states + attended
        if sizes is not None and merged:
            hidden_states, sizes = merge_tokens(
                hidden_states, keys, sizes, merged, self.config.num_special_tokens
            )
        # The outputs of LayerNorm and activation, 5 of the 16 values that training would keep, are
        # recomputed (arXiv 2205.05198); the matrix products are not: `checkpoint` stops at their
        # inputs.
        recomputes = self.training and torch.is_grad_enabled()
        update = hidden_states
        for half in (
            lambda tokens: self.intermediate(self.layernorm_after(tokens)),
            lambda tokens: self.output(self.intermediate.activation(tokens)),
        ):
            update = checkpoint(half, update, use_reentrant=False) if recomputes else half(update)
        return hidden_states + update, weights, sizes


class ASTEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.layer = nn.ModuleList(ASTLayer(config) for _ in range(config.num_hidden_layers))


class ASTModel(ASTPreTrainedModel):
    """The encoder: spectrograms in, one vector per token and one per clip out."""

    def __init__(self, config: ASTConfig):
        super().__init__(config)
        self.embeddings = ASTEmbeddings(self.config)
        self.encoder = ASTEncoder(self.config)
        self.layernorm: nn.Module = nn.Identity()
        if config.final_norm != "none":
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_values: (B, T, F) normalised log-mel spectrograms, any T and F of at least one
                patch.
            attention_mask: (B, T), 1 for frames of sound, 0 for padding, which must come last.
                None: every frame counts, as in `transformers`' AST.
            output_attentions: also return the weights (B, heads, 2 + N, 2 + N) of every layer;
                needs `attn_implementation="eager"`.
            output_hidden_states: also return the embeddings and every layer's output,
                (B, 2 + N, D) each.

        Returns:
            last_hidden_state (B, 2 + N, D), pooler_output (B, D), hidden_states, attentions.
            N is smaller under patchout or token merging, and the order of tokens may differ.

        Raises:
            ValueError: for a spectrogram smaller than one patch, a mask of the wrong shape, or
                attentions or token merging with an attention implementation that lacks them.
        """
        config = self.config
        output_attentions = (
            config.output_attentions if output_attentions is None else output_attentions
        )
        output_hidden_states = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} does not compute attention "
                'weights; load the model with attn_implementation="eager".'
            )
        merging = any(config.merged_tokens) and not self.training
        if merging and config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"merged_tokens_per_layer={config.merged_tokens_per_layer} adds token sizes to the "
                f"attention logits, which attn_implementation={config._attn_implementation!r} "
                'cannot do; load the model with "sdpa" or "eager".'
            )
        if input_values.dim() != 3:
            raise ValueError(
                "input_values must be (batch, frames, mel bins), "
                f"got shape {tuple(input_values.shape)}."
            )

        hidden_states, token_mask = self.embeddings(input_values, attention_mask)
        mask = sizes = None
        if merging:
            hidden_states, sizes = start_merging(hidden_states, token_mask)
        else:
            mask = create_bidirectional_mask(config, hidden_states, token_mask)
        all_hidden_states: tuple[Tensor, ...] = (hidden_states,)
        all_attentions: tuple[Tensor, ...] = ()
        merged = config.merged_tokens if merging else [0] * len(self.encoder.layer)
        for layer, here in zip(self.encoder.layer, merged, strict=True):
            hidden_states, weights, sizes = layer(hidden_states, mask, sizes, here, **kwargs)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if output_attentions:
                all_attentions += (weights,)
        norm_comes_last = config.final_norm == "after_pooling"
        last_hidden_state = hidden_states if norm_comes_last else self.layernorm(hidden_states)
        pooled = self.pool(last_hidden_state, token_mask if sizes is None else sizes)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self.layernorm(pooled) if norm_comes_last else pooled,
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )

    def pool(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """One vector per clip, as `config.pooling` says.

        Args:
            tokens: (B, S, …), special tokens first.
            weights: (B, S) of the tokens in a mean over patches: 0 for padding, the number of
                patches for a merged token. None: equal weights.

        Returns:
            (B, …).
        """
        special = self.config.num_special_tokens
        if self.config.pooling == "special_tokens":
            return tokens[:, :special].mean(dim=1)
        patches = tokens[:, special:]
        if weights is None:
            return patches.mean(dim=1)
        share = weights[:, special:].to(tokens.dtype)
        share = share / share.sum(dim=1, keepdim=True)
        return (patches * share.unflatten(1, (-1, *[1] * (tokens.dim() - 2)))).sum(dim=1)

    def patch_grid(self, tokens: Tensor, frames: int, mel_bins: int) -> Tensor:
        """Tokens (B, S, …) of spectrograms (B, frames, mel_bins) -> patches (B, rows, columns, …).

        Only for tokens in their original places: no patchout, no token merging.
        """
        grid = self.config.grid_shape(frames, mel_bins)
        return tokens[:, self.config.num_special_tokens :].unflatten(1, grid)


class ASTMLPHead(nn.Module):
    """The classification head: LayerNorm, unless the encoder ends in one, and a linear layer."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.layernorm: nn.Module = nn.Identity()
        if config.final_norm != "after_pooling":
            eps = config.layer_norm_eps if config.head_norm_eps is None else config.head_norm_eps
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=eps)
        size = (config.hidden_size, config.num_labels)
        self.dense = nn.Linear(*size) if config.num_labels else nn.Identity()

    def forward(self, pooled: Tensor) -> Tensor:
        return self.dense(self.layernorm(pooled))


class ASTForAudioClassification(ConvertibleMixin, ASTPreTrainedModel):
    """The encoder with a classification head on `pooler_output`."""

    def __init__(self, config: ASTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.audio_spectrogram_transformer = ASTModel(self.config)
        self.classifier = ASTMLPHead(self.config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_values, attention_mask, **kwargs: see `ASTModel.forward`.
            labels: what `config.problem_type` requires, see `classification_loss`; smoothed by
                `config.label_smoothing` in training. With `model.loss_function` set: what it takes.
            num_items_in_batch: labels in the whole batch, if `input_values` is one of several
                accumulated parts of it; `Trainer` passes it.

        Returns:
            loss (if labels are given), logits (B, labels), hidden_states, attentions.
        """
        encoded = self.audio_spectrogram_transformer(input_values, attention_mask, **kwargs)
        logits = self.classifier(encoded.pooler_output)
        loss = None
        if labels is not None:
            options = (
                {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            )
            loss = self.loss_function(labels, logits, self.config, **options)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


ASTModel.register_for_auto_class("AutoModel")
ASTForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
