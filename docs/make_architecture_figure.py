"""The figure of docs/how_it_works.md: a sound's way through AST, with the shapes of AST-base.

    python -m docs.make_architecture_figure

Every number is the code's: of `ASTConfig()`, its patch grid, and the filterbank. The sound is made
up. Writes one figure for light pages and one for dark ones.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch, Rectangle

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig

IMAGES = Path(__file__).parent / "images"
RATE = 16000
COLOURS = {
    "light": {"ink": "#222222", "quiet": "#6b6b76", "box": "#f1ecf6", "edge": "#8c2981"},
    "dark": {"ink": "#ececf2", "quiet": "#a9a9b8", "box": "#33264a", "edge": "#e58fc5"},
}
SPECIAL, PATCH = "#f98e52", "#7b2382"


def bird_song() -> np.ndarray:
    """(samples,) at 16 kHz: ten seconds of notes that glide upwards, in weak noise."""
    random = np.random.default_rng(4)
    t = np.arange(int(10.25 * RATE)) / RATE
    sound = 0.004 * np.cumsum(random.standard_normal(len(t))) / 8
    sound -= np.convolve(sound, np.ones(400) / 400, mode="same")  # wind, without its rumble
    for start in np.arange(0.4, 9.6, 0.55):
        note = np.arange(int(random.uniform(0.12, 0.4) * RATE)) / RATE
        pitch = random.uniform(700, 3000) * (1 + random.uniform(0.3, 2.5) * note)
        begin = int(start * RATE)
        wave = 0.3 * np.hanning(len(note)) * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
        for harmonic in (1, 2):
            sound[begin : begin + len(note)] += wave**harmonic / harmonic
    return sound.astype(np.float32)


def box(axes: Any, x: float, y: float, width: float, text: str, colours: dict[str, str]) -> None:
    shape = FancyBboxPatch(
        (x, y - 0.26), width, 0.52, boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=colours["box"], edgecolor=colours["edge"], linewidth=0.9,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=9, color=colours["ink"])


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def tokens(axes: Any, y: float, count: int) -> None:
    """A row of two special tokens and `count` patches, with a gap for those not drawn."""
    for index in range(count + 2):
        x = 0.6 + 0.5 * index + (0.5 if index == count + 1 else 0)
        colour = SPECIAL if index < 2 else PATCH
        axes.add_patch(Rectangle((x, y - 0.17), 0.36, 0.34, facecolor=colour, edgecolor="none"))


def draw(mode: str) -> None:
    config = ASTConfig()
    rows, columns = config.grid_shape(config.max_length, config.num_mel_bins)
    count = rows * columns
    features = ASTFeatureExtractor()(bird_song(), sampling_rate=RATE, return_tensors="pt")
    spectrogram = features["input_values"][0]  # (T, F)
    assert spectrogram.shape == (config.max_length, config.num_mel_bins)
    colours = COLOURS[mode]
    ink, quiet = colours["ink"], colours["quiet"]

    figure, axes = pyplot.subplots(figsize=(7.6, 9.3))
    axes.set(xlim=(0, 10), ylim=(0, 12.25))
    axes.axis("off")

    def note(y: float, shape: str, where: str) -> None:
        axes.text(9.95, y + 0.13, shape, ha="right", fontsize=9, color=ink, family="monospace")
        axes.text(9.95, y - 0.22, where, ha="right", fontsize=8, color=quiet)

    # The sound, and its spectrogram with the patches' grid.
    waveform = axes.inset_axes((0.6, 11.35, 6.4, 0.8), transform=axes.transData)
    waveform.plot(bird_song()[::100], color=colours["edge"], linewidth=0.3)
    waveform.axis("off")
    note(11.7, f"{len(bird_song()):,} samples", "load_audio: mono, 16 kHz")
    arrow(axes, (3.8, 11.3), (3.8, 11.0), quiet)
    image = axes.inset_axes((0.6, 9.05, 6.4, 1.9), transform=axes.transData)
    colour_map = pyplot.get_cmap("magma", 16)  # few colours: a third of the bytes
    image.imshow(spectrogram.T, origin="lower", aspect="auto", vmin=-0.9, cmap=colour_map)
    size, step = config.patch_size, config.time_stride
    for column in range(3):
        for row in range(2):
            corner = (200 + column * step, 50 + row * config.frequency_stride)
            image.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="w", linewidth=0.8))
    image.axis("off")
    note(10.3, f"({config.max_length}, {config.num_mel_bins})", "kaldi_fbank: log-mel,")
    axes.text(9.95, 9.8, "a frame every 10 ms;", ha="right", fontsize=8, color=quiet)
    axes.text(9.95, 9.52, "ASTFeatureExtractor: normalised", ha="right", fontsize=8, color=quiet)

    # Patches to tokens.
    arrow(axes, (3.8, 9.0), (3.8, 8.65), quiet)
    box(axes, 0.6, 8.35, 6.4, f"{size} × {size} patches, {size - step} shared with the next; "
        "each becomes a vector", colours)  # fmt: skip
    note(8.35, f"({count}, {config.hidden_size})", f"{rows} rows × {columns} columns")
    arrow(axes, (3.8, 8.07), (3.8, 7.72), quiet)
    tokens(axes, 7.5, 9)
    axes.text(5.85, 7.5, "…", fontsize=12, ha="center", va="center", color=ink)
    axes.text(0.6, 7.08, "class, distillation", fontsize=8, color=quiet)
    axes.text(2.6, 7.08, "a token for each patch; + its position", fontsize=8, color=quiet)
    note(7.5, f"({count + 2}, {config.hidden_size})", "ASTEmbeddings")

    # The encoder's layer.
    arrow(axes, (3.8, 6.98), (3.8, 6.62), quiet)
    frame = FancyBboxPatch(
        (0.3, 3.2), 7.0, 3.4, boxstyle="round,pad=0,rounding_size=0.15",
        facecolor="none", edgecolor=quiet, linewidth=0.9, linestyle=(0, (4, 3)),
    )  # fmt: skip
    axes.add_patch(frame)
    attention = f"attention, {config.num_attention_heads} heads"
    mlp = f"MLP, {config.intermediate_size:,} wide, GELU"
    for y, name in ((6.15, "LayerNorm"), (5.4, attention), (4.4, "LayerNorm"), (3.65, mlp)):
        box(axes, 2.0, y, 3.6, name, colours)
    for y in (5.87, 4.12):
        arrow(axes, (3.8, y), (3.8, y - 0.19), quiet)
    for top, bottom in ((6.55, 4.93), (4.85, 3.28)):  # what each half is added to
        axes.plot([3.8, 6.3, 6.3], [top, top, bottom], color=quiet, linewidth=0.9)
        arrow(axes, (6.3, bottom), (3.82, bottom), quiet)
        axes.text(6.45, (top + bottom) / 2, "+", fontsize=13, va="center", color=ink)
        axes.plot([3.8, 3.8], [top, top - 0.13], color=quiet, linewidth=0.9)
    axes.plot([3.8, 3.8], [5.13, 4.68], color=quiet, linewidth=0.9)
    note(5.1, f"× {config.num_hidden_layers}", "ASTLayer, in ASTEncoder")

    # The head.
    axes.plot([3.8, 3.8], [3.38, 3.2], color=quiet, linewidth=0.9)
    arrow(axes, (3.8, 3.2), (3.8, 2.86), quiet)
    box(axes, 0.6, 2.58, 6.4, "LayerNorm; the mean of the two special tokens", colours)
    note(2.58, f"({config.hidden_size},)", "ASTModel: pooler_output")
    arrow(axes, (3.8, 2.3), (3.8, 1.96), quiet)
    box(axes, 0.6, 1.68, 6.4, "LayerNorm, one matrix", colours)
    note(1.68, "(labels,)", "ASTForAudioClassification: logits")
    arrow(axes, (3.8, 1.4), (3.8, 1.06), quiet)
    for index, (name, score) in enumerate((("bird", 0.92), ("wind", 0.35), ("speech", 0.06))):
        y = 0.82 - 0.36 * index
        axes.text(1.9, y, name, ha="right", va="center", fontsize=9, color=ink)
        axes.add_patch(Rectangle((2.1, y - 0.1), 4.6 * score, 0.2, facecolor=SPECIAL))
    note(0.55, "scores", "the pipeline: sigmoid or softmax")

    figure.subplots_adjust(0, 0, 1, 1)
    matplotlib.rcParams["svg.hashsalt"] = "ast"  # the same file each time
    path = IMAGES / f"architecture_{mode}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {path}, {path.stat().st_size // 1000} kB")


def main() -> None:
    torch.set_num_threads(1)
    for mode in COLOURS:
        draw(mode)


if __name__ == "__main__":
    main()
