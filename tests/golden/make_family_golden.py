"""Run the authors' own code with small random weights and keep what comes out.

    python tests/golden/make_family_golden.py FAMILY CLONE OUTPUT [--timm FOLDER] [--width 24]

FAMILY is passt, ced, dasheng, ssast or audiomae, CLONE a clone of its repository (README.md names
the commits). It runs in an environment of its own with torch, torchaudio, einops and loguru; SSAST
and AudioMAE want their old timm, `pip install --target FOLDER timm==0.4.5` or `0.3.2`. Nothing of
the clone is changed: what is missing today is put in its place here, before it is imported.
"""

import argparse
import functools
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch

warnings.filterwarnings("ignore")


def sound(rate: int, seconds: float, seed: int) -> np.ndarray:
    """Tones that start, sweep and end over noise that comes and goes, 16 bits, (samples,)."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(rate * seconds)) / rate
    waveform = generator.normal(0, 0.02, len(time)) * np.abs(np.sin(2 * np.pi * 0.7 * time))
    for pitch in (110, 470, 1900, 6100):
        start = generator.uniform(0, seconds / 2)
        envelope = np.where(time > start, np.exp(-3 * (time - start)), 0)
        waveform += 0.15 * envelope * np.sin(2 * np.pi * pitch * time * (1 + 0.1 * time))
    waveform[int(0.6 * len(time)) : int(0.65 * len(time))] = 0
    return np.clip(waveform * 32768, -32768, 32767).astype(np.int16)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights far from their initial values, so that every one of them counts."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "front_end" in name or "p_input" in name or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_mean"):
            tensor.copy_(-30 + 10 * noise)
        elif name.endswith("running_var"):
            tensor.copy_(200 + 100 * noise.abs())
        elif tensor.dim() <= 1 and name.endswith("weight"):
            tensor.copy_(1 + 0.3 * noise)
        elif tensor.dim() == 2:
            tensor.copy_(noise * 1.5 / tensor.shape[1] ** 0.5)
        else:
            tensor.copy_(0.2 * noise)
    return model.eval()


class Keeper:
    """One golden file pair: NAME.pth as the authors save weights, NAME.npz with what comes out."""

    def __init__(self, folder: Path, name: str, state: dict):
        self.folder, self.name, self.kept = folder, name, {}
        torch.save(state, folder / f"{name}.pth")

    def keep(self, **arrays) -> None:
        for name, array in arrays.items():
            array = array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
            self.kept[name] = array

    def write(self) -> None:
        np.savez_compressed(self.folder / f"{self.name}.npz", **self.kept)
        print(self.name, {name: array.shape for name, array in self.kept.items()})


def stand_in(name: str, **content) -> None:
    """A module that is not installed, or no longer part of torch."""
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(content)
    sys.modules[name] = module


def passt(folder: Path, width: int) -> None:
    class Ingredient:  # of their experiment framework
        def __init__(self, *_):
            pass

        def add_config(self, **_):
            pass

        def command(self, thing):
            return thing

    stand_in("ba3l")
    stand_in("ba3l.ingredients")
    stand_in("ba3l.ingredients.ingredient", Ingredient=Ingredient)
    complex_stft = torch.stft

    def stft(*args, return_complex=False, **kwargs):  # False is gone from torch
        spectrum = complex_stft(*args, return_complex=True, **kwargs)
        return spectrum if return_complex else torch.view_as_real(spectrum)

    stand_in("timm")
    stand_in("timm.models")
    stand_in("timm.models._hub", download_cached_file=None)
    from models import passt as code
    from models.preprocess import AugmentMelSTFT

    code.first_RUN = False
    front_end = AugmentMelSTFT(fmin_aug_range=10, fmax_aug_range=2000).eval()  # as they train
    waveform = sound(32000, 1.3, seed=1)
    for name, stride, frames, distilled, labels in (
        ("passt_s10", (10, 10), 98, True, 7),
        ("passt_s16_t12", (16, 12), 200, True, 527),
        ("passt_one_token", (14, 14), 150, False, 5),
    ):
        model = code.PaSST(
            img_size=(128, frames),
            stride=stride,
            num_classes=labels,
            embed_dim=width,
            depth=2,
            num_heads=3,
            mlp_ratio=2,
            distilled=distilled,
        )
        keeper = Keeper(folder, name, randomise(model, seed=len(name)).state_dict())
        keeper.keep(waveform=waveform, sampling_rate=32000, stride=stride)
        for samples in (len(waveform), 24321, 9000):
            clip = torch.from_numpy(waveform[:samples] / np.float32(32768))[None]
            with mock.patch.object(torch, "stft", stft):
                features = front_end(clip)
            logits, embedding = model(features[:, None])
            keeper.keep(**{f"logits_{samples}": logits, f"embedding_{samples}": embedding})
            if name == "passt_s10":
                keeper.keep(**{f"features_{samples}": features[0].T})
        keeper.write()


def ced(folder: Path, width: int) -> None:
    from models.audiotransformer import AudioTransformer

    waveform = sound(16000, 1.3, seed=2)
    for name, pooling, frames in (("ced", "mean", 200), ("ced_token", "token", 260)):
        model = AudioTransformer(
            outputdim=9,
            embed_dim=width,
            depth=2,
            num_heads=3,
            mlp_ratio=2,
            target_length=frames,
            pooling=pooling,
        )
        keeper = Keeper(folder, name, randomise(model, seed=len(name)).state_dict())
        keeper.keep(waveform=waveform, sampling_rate=16000)
        for samples in (20000, 16000, 2700):
            clip = torch.from_numpy(waveform[:samples] / np.float32(32768))[None]
            decibels = model.front_end(clip)
            features = model.init_bn(decibels[:, None])
            tokens = model.forward_features(features)
            keeper.keep(
                **{
                    f"features_{samples}": features[0, 0].T,
                    f"tokens_{samples}": tokens[0, :40],
                    f"probabilities_{samples}": model(clip),
                }
            )
        keeper.write()


def dasheng(folder: Path, width: int) -> None:
    stand_in("dasheng")
    sys.modules["dasheng"].__path__ = [str(Path(sys.path[0]) / "dasheng")]
    from dasheng.pretrained.pretrained import Dasheng

    waveform = sound(16000, 1.3, seed=3)
    config = {"embed_dim": width, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "target_length": 200}
    model = Dasheng(**config, patch_size=[64, 4], patch_stride=[64, 4])
    randomise(model, seed=3)
    keeper = Keeper(folder, "dasheng", {"model": model.state_dict(), "config": config})
    keeper.keep(waveform=waveform, sampling_rate=16000)
    for samples in (20000, 16000, 2700):
        clip = torch.from_numpy(waveform[:samples] / np.float32(32768))[None]
        keeper.keep(
            **{
                f"features_{samples}": model.forward_to_spec(clip)[0, 0].T,
                f"tokens_{samples}": model(clip)[0],
            }
        )
    keeper.write()


def kaldi_features(waveform: np.ndarray, frames: int) -> torch.Tensor:
    """As the dataloaders of SSAST and AudioMAE have it, AudioSet's statistics: (frames, 128)."""
    from torchaudio.compliance.kaldi import fbank

    clip = torch.from_numpy(waveform / np.float32(32768))[None]
    clip = clip - clip.mean()
    log_mel = fbank(
        clip,
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )[:frames]
    log_mel = torch.nn.functional.pad(log_mel, (0, 0, 0, frames - len(log_mel)))
    return (log_mel + 4.2677393) / (4.5689974 * 2)


def ssast(folder: Path, width: int) -> None:
    import timm
    from timm.models.vision_transformer import DistilledVisionTransformer, VisionTransformer

    def small(name, **_):
        model_class = DistilledVisionTransformer if "distilled" in name else VisionTransformer
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        return model_class(
            img_size=64,
            num_classes=3,
            embed_dim=width,
            depth=2,
            num_heads=3,
            mlp_ratio=2,
            norm_layer=norm,
        )

    timm.create_model = small
    from ast_models import ASTModel

    waveform = sound(16000, 1.3, seed=4)
    for name, patch, stride, frames, size in (
        ("ssast_patch", (16, 16), (10, 10), 128, "base"),
        ("ssast_frame", (128, 2), (128, 1), 100, "tiny"),
        ("ssast_one_token", (16, 16), (16, 16), 208, "base_nokd"),
    ):
        pretrained = ASTModel(
            fshape=patch[0],
            tshape=patch[1],
            fstride=patch[0],
            tstride=patch[1],
            input_tdim=160,
            model_size=size,
        )
        randomise(pretrained, seed=len(name))
        wrapped = torch.nn.DataParallel(pretrained).state_dict()
        keeper = Keeper(folder, f"{name}_pretrained", wrapped)
        path = folder / f"{name}_pretrained.pth"
        model = ASTModel(
            label_dim=6,
            fshape=patch[0],
            tshape=patch[1],
            fstride=stride[0],
            tstride=stride[1],
            input_tdim=frames,
            model_size=size,
            pretrain_stage=False,
            load_pretrained_mdl_path=str(path),
        )
        randomise(model.mlp_head, seed=1)
        model.eval()
        with torch.no_grad():
            features = kaldi_features(waveform, 160)
            image = features[None, None].transpose(2, 3)
            tokens = encode(pretrained.v, image, pretrained.cls_token_num)
            keeper.keep(waveform=waveform, features=features, tokens=tokens[0])
            keeper.write()
            keeper = Keeper(folder, name, torch.nn.DataParallel(model).state_dict())
            features = kaldi_features(waveform, frames)
            keeper.keep(
                waveform=waveform,
                features=features,
                logits=model(features[None], task="ft_avgtok"),
                logits_of_tokens=model(features[None], task="ft_cls"),
                stride=stride,
                frames=frames,
            )
            keeper.write()


def encode(v: torch.nn.Module, image: torch.Tensor, special: int) -> torch.Tensor:
    """What SSAST's tasks share: all tokens after the last norm."""
    x = v.patch_embed(image)
    tokens = (v.cls_token, v.dist_token)[:special] if special == 2 else (v.cls_token,)
    x = torch.cat([*tokens, x], dim=1) + v.pos_embed
    for block in v.blocks:
        x = block(x)
    return v.norm(x)


def audiomae(folder: Path, width: int) -> None:
    np.float = float  # gone from numpy
    import timm.models.vision_transformer

    class NoDecoder(torch.nn.Module):  # of Swin blocks, whose timm is patched: not run here
        def __init__(self, dim: int, **_):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(dim))

    stand_in("timm.models.swin_transformer", SwinTransformerBlock=NoDecoder)
    timm.models.layers = sys.modules["timm.models.layers"]
    stand_in("util.misc", concat_all_gather=None)
    sys.modules["util"] = types.ModuleType("util")
    sys.modules["util"].__path__ = [str(Path(sys.path[0]) / "util")]
    import models_mae
    import models_vit
    from util.patch_embed import PatchEmbed_new

    waveform = sound(16000, 1.3, seed=5)
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    for name, frames, stride, labels in (
        ("audiomae", 128, 16, 8),
        ("audiomae_s10", 100, 10, 527),
    ):
        model = models_vit.VisionTransformer(
            global_pool=True,
            patch_size=16,
            embed_dim=width,
            depth=2,
            num_heads=3,
            mlp_ratio=2,
            qkv_bias=True,
            norm_layer=norm,
            num_classes=labels,
        )
        model.patch_embed = PatchEmbed_new((frames, 128), (16, 16), 1, width, stride)
        positions = torch.zeros(1, model.patch_embed.num_patches + 1, width)
        model.pos_embed = torch.nn.Parameter(positions, requires_grad=False)
        randomise(model, seed=len(name))
        state = {
            "model": model.state_dict(),
            "epoch": 99,
            "args": argparse.Namespace(output_dir=Path("run"), lr=2e-4),
        }
        keeper = Keeper(folder, name, state)
        features = kaldi_features(waveform, frames)
        with torch.no_grad():
            image = features[None, None]
            keeper.keep(
                waveform=waveform,
                features=features,
                logits=model(image),
                embedding=model.forward_features(image),
            )
        keeper.write()
    model = models_mae.MaskedAutoencoderViT(
        img_size=(128, 128),
        in_chans=1,
        embed_dim=width,
        depth=2,
        num_heads=3,
        mlp_ratio=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        norm_layer=norm,
        audio_exp=True,
        decoder_mode=1,
    )
    positions = model.pos_embed.clone()
    randomise(model, seed=11)
    model.pos_embed.data.copy_(positions)  # their sinusoids
    keeper = Keeper(folder, "audiomae_pretrained", {"model": model.state_dict()})
    features = kaldi_features(waveform, 128)
    with torch.no_grad():
        tokens, _, restore, _ = model.forward_encoder(features[None, None], mask_ratio=0.0)
    patches = tokens[0, 1:][restore[0]]
    keeper.keep(waveform=waveform, features=features, cls=tokens[0, 0], patches=patches)
    keeper.write()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=["passt", "ced", "dasheng", "ssast", "audiomae"])
    parser.add_argument("clone", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--timm", type=Path)
    parser.add_argument("--width", type=int, default=24)
    options = parser.parse_args()
    inside = {"ssast": "src/models"}.get(options.family, "")
    sys.path[0] = str(options.clone / inside)
    if options.timm:
        sys.path.insert(1, str(options.timm))
    options.output.mkdir(parents=True, exist_ok=True)
    from collections import abc

    stand_in("torch._six", container_abcs=abc, inf=float("inf"))
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = mock.MagicMock()  # of timm's data loaders
    with torch.no_grad():
        globals()[options.family](options.output, options.width)
