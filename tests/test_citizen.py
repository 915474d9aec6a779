"""What transformers, torch and PEFT expect from a model."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch._dynamo.testing import CompileCounter
from transformers import AutoModel, pipeline
from transformers.models.audio_spectrogram_transformer import (
    modeling_audio_spectrogram_transformer as native,
)

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTForAudioClassification, ASTModel, modeling_ast, naming_ast

from .conftest import tiny_model, tiny_native_config


def masked_batch(frames: int = 128, valid: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, frames, dtype=torch.long)
    mask[1, valid:] = 0
    return torch.randn(2, frames, 64), mask


# A graph each for shorter than trained, for exactly as long, and for longer: the position table is
# cut, taken whole, stretched. Without a mask they are the same, less the mask.
@pytest.mark.parametrize(
    ("masked", "first", "others"),
    [
        (True, (90,), (64, 101, 57)),
        pytest.param(True, (90, 128, 200), (64, 101, 57, 300, 431), marks=pytest.mark.slow),
        pytest.param(False, (90, 128, 200), (64, 101, 57, 300, 431), marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_and_not_for_every_length(masked, first, others):
    torch._dynamo.reset()
    model = tiny_model()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)

    def run(frames: int) -> None:
        spectrogram, mask = masked_batch(frames, valid=frames // 2)
        arguments = (spectrogram, mask) if masked else (spectrogram,)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(*arguments).logits, model(*arguments).logits, atol=1e-5, rtol=0
            )

    for frames in first:
        run(frames)
    graphs = counter.frame_count
    assert graphs <= len(first)
    for frames in (*others, *first):
        run(frames)
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_merging_compiles_whole():
    torch._dynamo.reset()
    model = tiny_model(merged_tokens_per_layer=12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    spectrogram, mask = masked_batch()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(spectrogram, mask).logits, model(spectrogram, mask).logits
        )


@pytest.mark.slow
def test_a_compiled_training_step_drops_patches():
    torch._dynamo.reset()
    model = tiny_model(time_patchout=4, frequency_patchout=1).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    spectrogram, mask = masked_batch()
    compiled(spectrogram, mask, labels=torch.tensor([0, 1])).loss.backward()
    assert model.classifier.dense.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for frames in (128, 90, 64):
        spectrogram, mask = masked_batch(frames, valid=60)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(spectrogram, mask).logits,
                model(spectrogram, mask).logits,
                atol=1e-5,
                rtol=0,
            )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merged", [0, 12])
def test_half_precision_has_no_nan(attention, dtype, merged):
    model = tiny_model(merged_tokens_per_layer=merged)
    model.set_attn_implementation(attention)
    spectrogram, mask = masked_batch(200, valid=3)
    with torch.no_grad():
        exact = model(spectrogram, mask).logits
        with torch.autocast("cpu", dtype):
            mixed = model(spectrogram, mask).logits
        half = copy.deepcopy(model).to(dtype)(spectrogram, mask).logits
    for logits in (mixed, half):
        assert logits.isfinite().all()
        if not merged:  # rounding may change which tokens are merged
            torch.testing.assert_close(logits.float(), exact, atol=0.15, rtol=0.05)
    model.train()
    with torch.autocast("cpu", dtype):
        model(spectrogram, mask, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_eager_and_sdpa_agree():
    model = tiny_model()
    spectrogram, mask = masked_batch()
    logits = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(spectrogram, mask).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)


def test_attentions_and_hidden_states_are_native_s(native_folder):
    ours = ASTForAudioClassification.from_pretrained(native_folder, attn_implementation="eager")
    theirs = native.ASTForAudioClassification.from_pretrained(
        native_folder, attn_implementation="eager"
    )
    spectrogram = torch.randn(2, 128, 64)
    with torch.no_grad():
        a = ours(spectrogram, output_attentions=True, output_hidden_states=True)
        b = theirs(spectrogram, output_attentions=True, output_hidden_states=True)
    for name in ("hidden_states", "attentions"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    ours.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="'sdpa' does not compute attention weights"):
        ours(spectrogram, output_attentions=True)
    logits, *_ = ours(spectrogram, return_dict=False)
    torch.testing.assert_close(logits, a.logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    spectrogram, mask = masked_batch()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(spectrogram, mask, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def kept_for_gradients(model, spectrogram) -> int:
    """Bytes kept by autograd, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(spectrogram)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputing_keeps_less_and_gives_the_same_gradients(dropout, monkeypatch):
    model = tiny_model(hidden_dropout_prob=dropout).train()
    spectrogram = torch.randn(2, 128, 64)
    gradients, sizes = [], []
    for recomputing in (True, False):
        if not recomputing:
            monkeypatch.setattr(modeling_ast, "checkpoint", lambda half, x, use_reentrant: half(x))
        model.zero_grad()
        torch.manual_seed(0)
        model(spectrogram, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        sizes.append(kept_for_gradients(model, spectrogram))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    if not dropout:
        # Per layer and token: a LayerNorm's mean, deviation and result, and the activation's.
        config = model.config
        values = 2 + config.hidden_size + config.intermediate_size
        tokens = model.audio_spectrogram_transformer(spectrogram).last_hidden_state.shape[:2]
        assert sizes[1] - sizes[0] == 4 * config.num_hidden_layers * tokens.numel() * values


def test_lora_on_query_and_value_trains_and_reloads(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        ASTForAudioClassification.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]),
    )
    spectrogram, mask = masked_batch()
    labels = torch.tensor([0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        loss = model(input_values=spectrogram, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(
        ASTForAudioClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(
            reloaded(input_values=spectrogram, attention_mask=mask).logits,
            model.eval()(input_values=spectrogram, attention_mask=mask).logits,
        )
        # transformers' own way: the adapter's folder is enough.
        direct = ASTForAudioClassification.from_pretrained(tmp_path / "adapter")
        assert direct(spectrogram, mask).logits.shape == (2, 5)


# Both namings of the layers


def native_model(**overrides):
    torch.manual_seed(3)
    model = native.ASTForAudioClassification(tiny_native_config(initializer_range=0.2, **overrides))
    with torch.no_grad():
        model.audio_spectrogram_transformer.embeddings.position_embeddings.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("geometry", [{}, {"max_length": 256}])
def test_native_s_names_are_read_from_a_folder(tmp_path, geometry):
    theirs = native_model()
    theirs.save_pretrained(tmp_path / "native", save_original_format=False)
    names = load_file(tmp_path / "native" / "model.safetensors")
    assert any(".attention.q_proj." in name for name in names)  # else this tests nothing
    ours = ASTForAudioClassification.from_pretrained(tmp_path / "native", **geometry)
    spectrogram = torch.randn(2, 128, 64)
    if not geometry:
        with torch.no_grad():
            torch.testing.assert_close(ours(spectrogram).logits, theirs(spectrogram).logits)
    # What we write has the checkpoints' names, whatever was read.
    ours.save_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(tiny_model().state_dict())
    encoder, info = ASTModel.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(spectrogram).pooler_output,
            theirs.audio_spectrogram_transformer(spectrogram).pooler_output,
        )


def test_native_s_state_dict_is_read(tmp_path):
    theirs, ours = native_model(), tiny_model()
    state = theirs.state_dict()
    before = set(state)
    ours.load_state_dict(state)
    assert set(state) == before  # the caller's dict is left alone
    spectrogram = torch.randn(2, 128, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(spectrogram).logits, theirs(spectrogram).logits)
    ours.load_state_dict(copy.deepcopy(ours).state_dict())
    encoder = ASTModel(ours.config)
    encoder.load_state_dict(theirs.audio_spectrogram_transformer.state_dict())
    wrapped = torch.nn.Sequential(tiny_model())
    wrapped.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({name: t for name, t in state.items() if "q_proj" not in name})


def test_names_go_there_and_back():
    for name in native_model().state_dict():
        ours = naming_ast.our_name(name)
        assert naming_ast.native_name(ours) == name
        assert naming_ast.our_name(ours) == ours
        assert naming_ast.native_name(name) == name
    assert {naming_ast.our_name(n) for n in native_model().state_dict()} == set(
        tiny_model().state_dict()
    )


def test_a_checkpoint_without_its_encoder_is_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # As many numbers, of which the encoder's have other names.
    damaged = {name.replace("intermediate", "intermediary"): t for name, t in weights.items()}
    save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for cls in (ASTForAudioClassification, ASTModel):
        with pytest.raises(ValueError, match=r"lacks 4 weights of the encoder, .*intermediate.* …"):
            cls.from_pretrained(tmp_path)
    # Without a head, a new one is made.
    model.audio_spectrogram_transformer.save_pretrained(tmp_path / "encoder")
    headed, info = ASTForAudioClassification.from_pretrained(
        tmp_path / "encoder", num_labels=7, output_loading_info=True
    )
    assert headed.classifier.dense.weight.shape == (7, 48)
    assert all(name.startswith("classifier.") for name in info["missing_keys"])


NATIVE_TARGETS = {
    "names": ["q_proj", "v_proj"],
    "the MLP's end": ["fc2"],
    "attention's output": ["o_proj"],
    "one layer's": ["layers.1.mlp.fc1"],
    "a regular expression": r".*layers\.\d+\.attention\.[qk]_proj",
    "also a name of both": ["projection", "q_proj"],
}


def trained_adapter(model, targets, folder, **options):
    """LoRA adapters with weights that make a difference, saved."""
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"], **options)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("targets", NATIVE_TARGETS.values(), ids=NATIVE_TARGETS)
def test_native_s_adapters_are_read(tmp_path, targets):
    native_model().save_pretrained(tmp_path / "base")
    base = native.ASTForAudioClassification.from_pretrained(tmp_path / "base")
    options = {"rank_pattern": {r"layers\.0\.attention\.q_proj": 2}}
    theirs = trained_adapter(base, targets, tmp_path / "adapter", **options)
    spectrogram = torch.randn(2, 128, 64)
    with torch.no_grad():
        expected = theirs(spectrogram).logits
        plain = ASTForAudioClassification.from_pretrained(tmp_path / "base")
        assert not torch.allclose(plain(spectrogram).logits, expected, atol=0.01)
        plain.load_adapter(str(tmp_path / "adapter"))
        torch.testing.assert_close(plain(spectrogram).logits, expected)
        direct = ASTForAudioClassification.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(direct(spectrogram).logits, expected)
        # PEFT's own door takes our names.
        naming_ast.rename_adapter(tmp_path / "adapter", tmp_path / "ours", native=False)
        base = ASTForAudioClassification.from_pretrained(tmp_path / "base")
        reloaded = PeftModel.from_pretrained(base, tmp_path / "ours")
        torch.testing.assert_close(reloaded(spectrogram).logits, expected)


@pytest.mark.parametrize(
    "targets", [["query", "value"], ["dense"], r".*\.layer\.1\.output\.dense"], ids=str
)
def test_our_adapters_go_to_native(tmp_path, targets):
    native_model().save_pretrained(tmp_path / "base")
    base = ASTForAudioClassification.from_pretrained(tmp_path / "base")
    ours = trained_adapter(base, targets, tmp_path / "adapter")
    naming_ast.rename_adapter(tmp_path / "adapter", tmp_path / "native")
    spectrogram = torch.randn(2, 128, 64)
    with torch.no_grad():
        expected = ours(spectrogram).logits
        base = native.ASTForAudioClassification.from_pretrained(tmp_path / "base")
        reloaded = PeftModel.from_pretrained(base, tmp_path / "native")
        torch.testing.assert_close(reloaded(spectrogram).logits, expected)
        theirs = native.ASTForAudioClassification.from_pretrained(tmp_path / "base")
        theirs.load_adapter(str(tmp_path / "native"))
        torch.testing.assert_close(theirs(spectrogram).logits, expected)
        again = ASTForAudioClassification.from_pretrained(tmp_path / "native")
        torch.testing.assert_close(again(spectrogram).logits, expected)


def test_a_folder_without_an_adapter_is_no_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"is not a PEFT adapter: expected adapter_config\.json"):
        naming_ast.rename_adapter(tmp_path, tmp_path / "out")


def test_a_refused_checkpoint_is_not_run_by_native_instead(tmp_path):
    """`pipeline` tries transformers' own class when ours raises."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    ASTFeatureExtractor(num_mel_bins=64, max_length=128).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    damaged = {name.replace("intermediate", "intermediary"): t for name, t in weights.items()}
    save_file(damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 4 weights of the encoder"):
        pipeline("audio-classification", model=str(tmp_path))


def test_a_head_of_another_size_is_refused_unless_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"classifier\.dense\.bias has shape \(5,\) in the weights and \(7,\) by the config\. "
        "For another number of labels pass ignore_mismatched_sizes=True",
    ):
        ASTForAudioClassification.from_pretrained(tmp_path, num_labels=7)
    model = ASTForAudioClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert model.classifier.dense.weight.shape == (7, 48)


# Calls as transformers' own takes them


def test_a_mask_that_is_not_right_padded_is_refused():
    model = tiny_model()
    spectrogram, mask = masked_batch()
    for wrong in (mask.flip(1), mask * 2, (1.0 - mask) * -torch.inf, mask.roll(1, dims=1)):
        wrong = torch.nan_to_num(wrong, nan=0.0) if wrong.is_floating_point() else wrong
        with pytest.raises(ValueError, match=r"of clip [01] is not ones followed by zeros: sound"):
            model(spectrogram, wrong)
    expected = model(spectrogram, mask).logits
    for same in (mask.bool(), mask.float(), mask.int()):
        assert torch.equal(model(spectrogram, same).logits, expected)
    nothing = torch.zeros_like(mask)  # a clip without any sound is its padding
    assert model(spectrogram, nothing).logits.isfinite().all()


def test_labels_in_the_mask_s_place_are_named():
    model, spectrogram = tiny_model(), torch.randn(2, 128, 64)
    with pytest.raises(ValueError, match=r"\(2, 128\), got \(2,\)\. Labels are passed by name"):
        model(spectrogram, torch.tensor([0, 1]))


def test_no_labels_are_no_head():
    config = tiny_native_config(num_labels=0)
    theirs = native.ASTForAudioClassification(config).eval()
    ours = ASTForAudioClassification(config).eval()
    ours.load_state_dict(theirs.state_dict())
    spectrogram = torch.randn(2, 128, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(spectrogram).logits, theirs(spectrogram).logits)


def test_classes_named_by_numbers(tmp_path):
    names = {0: 7, 1: 2.5, 2: "c", 3: 3, 4: 4}
    theirs = native.ASTForAudioClassification(tiny_native_config(id2label=names))
    theirs.save_pretrained(tmp_path)
    model = ASTForAudioClassification.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "7", 1: "2.5", 2: "c", 3: "3", 4: "4"}


# Weights elsewhere


def test_offloaded_weights(tmp_path):
    from accelerate import cpu_offload, disk_offload

    spectrogram, mask = masked_batch()
    model = tiny_model()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(spectrogram, mask).logits
        for offload in (cpu_offload, lambda model: disk_offload(model, str(tmp_path))):
            model = tiny_model()
            model.load_state_dict(state)
            torch.testing.assert_close(offload(model)(spectrogram, mask).logits, expected)


def test_auto_model_gives_the_encoder(tmp_path):
    classifier = tiny_model()
    classifier.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is ASTModel
    spectrogram, mask = masked_batch()
    with torch.no_grad():
        embedding = encoder(spectrogram, mask).pooler_output
        assert embedding.shape == (2, 48)
        torch.testing.assert_close(
            classifier.classifier(embedding), classifier(spectrogram, mask).logits
        )


def test_embeddings_feed_a_scikit_learn_classifier(tmp_path):
    """The example of docs/model.md, on made-up sound and an untrained encoder."""
    tiny_model().save_pretrained(tmp_path)
    extractor = ASTFeatureExtractor(num_mel_bins=64, max_length=128)
    encoder = AutoModel.from_pretrained(tmp_path)
    generator = np.random.default_rng(0)

    def embed(labels):
        seconds = np.arange(16000) / 16000
        clips = [
            np.sin(2 * np.pi * (400 if label else 2000) * seconds).astype(np.float32)
            + generator.normal(0, 0.05, 16000).astype(np.float32)
            for label in labels
        ]
        features = extractor(clips, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            return encoder(**features).pooler_output.numpy()

    labels = [0, 1] * 6
    classifier = LogisticRegression(max_iter=1000).fit(embed(labels), labels)
    assert classifier.score(embed(labels), labels) == 1


@pytest.mark.slow
def test_flex_attention_agrees_with_sdpa():
    model = tiny_model()
    spectrogram, mask = masked_batch()
    with torch.no_grad():
        expected = model(spectrogram, mask).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(spectrogram, mask).logits, expected, atol=1e-5, rtol=0)
