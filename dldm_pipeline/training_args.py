"""Options of the training scripts: one dataclass each, in which name, type, default and help stand once.

`parse_args` reads them from a preset (a YAML file) and the command line, by `transformers.HfArgumentParser`.
"""

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers import HfArgumentParser

Args = TypeVar("Args", bound="TrainingArgs")
CONFIG_HELP = "preset of training/configs, or a YAML file of options; the command line overrides it"


def option(default: Any, help: str) -> Any:
    """A field of an options class, with its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(args: Any, low: float, high: float, *names: str) -> None:
    """Raise a `ValueError` that names the first option outside [low, high]; `None` and lists' entries are checked, too."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not low <= value <= high:
                bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise ValueError(f"--{name} {value}: must be {bounds}")


@dataclass
class TrainingArgs:
    """What every training has, under the names of diffusers' training examples."""

    config: str | None = option(None, CONFIG_HELP)
    dataset: str | None = option(
        None,
        "folder written by training/prepare_dataset.py, or such a data set on the Hub; by default simulated subjects",
    )
    phantom_subjects: int = option(2000, "simulated subjects, made once, without --dataset")
    cache_dir: str = option("data", "simulated subjects and encoded latents are kept here")
    dataloader_num_workers: int = option(0, "processes that load data; 0 loads in the training's own")
    output_dir: str = option("outputs/model", "the trained model and its checkpoints go here")
    seed: int = option(0, "of weights, data order and noise")
    num_threads: int | None = option(
        None,
        "PyTorch threads per process; by default all cores where `accelerate launch` allows only one, as it does on "
        "machines without a graphics card, and otherwise as OMP_NUM_THREADS says",
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "tracker for losses and pictures")
    validation_steps: int = option(1000, "pictures and figures every N steps; 0: at the end only")
    checkpointing_steps: int = option(1000, "checkpoint every N steps and at the end, the last two are kept; 0: none")
    resume_from_checkpoint: str | None = option(None, "'latest', or a checkpoint folder")
    train_batch_size: int = option(32, "per process")
    gradient_accumulation_steps: int = option(1, "batches per step")
    learning_rate: float = option(3e-4, "after warm-up; it falls along a cosine until the training ends")
    lr_warmup_steps: int = option(200, "steps from 0 to the full learning rate")
    max_train_steps: int = option(20000, "stop after N steps")
    max_train_minutes: float | None = option(None, "stop by the clock, if that comes first; validation does not count")
    ema_decay: float = option(
        0.9995, "the trained model has weights averaged over steps; the decay of that average, at most"
    )

    def __post_init__(self) -> None:
        tiny = sys.float_info.min
        require(self, 1, math.inf, "phantom_subjects", "num_threads", "train_batch_size", "gradient_accumulation_steps")
        require(self, 1, math.inf, "max_train_steps")
        require(
            self, 0, math.inf, "dataloader_num_workers", "validation_steps", "checkpointing_steps", "lr_warmup_steps"
        )
        require(self, tiny, sys.float_info.max, "learning_rate", "max_train_minutes")
        require(self, 0, 1, "ema_decay")

    def shown(self) -> dict[str, Any]:
        """The options for a model card and a tracker, without paths of this machine."""
        hidden = ("config", "dataset", "cache_dir", "output_dir", "resume_from_checkpoint")
        hidden += ("autoencoder", "init_from", "pipeline")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}


@dataclass
class AutoencoderArgs(TrainingArgs):
    """Options of training/train_autoencoder.py."""

    config: str | None = option("autoencoder_small", CONFIG_HELP)
    output_dir: str = option("outputs/autoencoder", "the trained autoencoder and its checkpoints go here")
    resolution: int = option(128, "image height and width, pixels")
    modalities: list[str] | None = option(None, "names and order; by default those of the data set")
    init_from: str | None = option(
        None,
        "autoencoder or pipeline folder to start from, of whatever modalities and size; of the options below up to "
        "--head_channels only --encoder_blocks and --decoder_blocks count then: further blocks start as the identity",
    )
    patch_size: int = option(4, "side in pixels of the patches that become channels")
    structure_channels: int = option(16, "channels of z_struct")
    style_channels: int = option(8, "length of each z_style")
    encoder_channels: list[int] = option([32, 96], "widths of the encoder's levels, each of half the size")
    encoder_blocks: int = option(1, "residual blocks on each level of the encoder")
    decoder_channels: list[int] = option([128, 64], "widths of the decoder's levels, as many")
    decoder_blocks: int = option(2, "residual blocks on each level of the decoder")
    head_channels: int = option(64, "width of the part that runs once an image")
    target_modalities: int = option(3, "modalities decoded each step, at random")
    subset_probability: float = option(0.6, "fraction of structures from a random subset of the modalities")
    structure_noise: float = option(0.0, "largest standard deviation of noise put on structures, relative to their own")
    spectrum_weight: float = option(0.05, "weight of the power spectrum's log ratio")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, math.inf, "resolution", "patch_size", "structure_channels", "style_channels", "head_channels")
        require(self, 1, math.inf, "encoder_channels", "decoder_channels", "target_modalities")
        require(self, 0, math.inf, "encoder_blocks", "decoder_blocks", "structure_noise", "spectrum_weight")
        require(self, 0, 1, "subset_probability")


@dataclass
class LDMArgs(TrainingArgs):
    """Options of training/train_ldm.py."""

    config: str | None = option("ldm_small", CONFIG_HELP)
    output_dir: str = option("outputs/ldm", "the pipeline and its checkpoints go here")
    phantom_subjects: int = option(1500, "simulated subjects, made once, without --dataset")
    autoencoder: str | None = option(
        None, "folder of a trained autoencoder, or of a pipeline that holds one; by default the bundled one"
    )
    init_from: str | None = option(
        None,
        "pipeline folder whose denoiser to start from, of whatever modalities; without --autoencoder, its autoencoder too",
    )
    block_out_channels: list[int] = option([96, 128, 128], "widths of the denoiser's levels, each of half the size")
    layers_per_block: int = option(1, "residual blocks on each level")
    attention_sizes: list[int] = option(
        [8, 4], "sizes of the levels with attention, 0 for none; the last has one always"
    )
    attention_head_dim: int = option(32, "channels of one attention head")
    dropout: float = option(0.0, "in residual blocks; for small data sets 0.1")
    conditional_fraction: float = option(0.25, "of the batch: noised style beside the clean structure")
    style_grid: int = option(4, "height and width to which that structure is averaged: styles need no detail")
    label_dropout: float = option(0.1, "fraction of labels turned to null, for guidance")
    style_weight: float = option(0.25, "weight of the style's error against the structure's")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, math.inf, "block_out_channels", "layers_per_block", "attention_head_dim", "style_grid")
        require(self, 0, math.inf, "attention_sizes", "style_weight")
        require(self, 0, 1, "dropout", "conditional_fraction", "label_dropout")


@dataclass
class DecoderArgs(TrainingArgs):
    """Options of training/train_decoder.py."""

    config: str | None = option("decoder_small", CONFIG_HELP)
    output_dir: str = option("outputs/sharp", "the pipeline and its checkpoints go here")
    pipeline: str | None = option(
        None, "pipeline folder to sharpen, or its name on the Hub; by default the bundled one"
    )
    generated_subjects: int = option(768, "new structures to generate before training")
    subset_probability: float = option(0.6, "fraction of structures from a random subset of the modalities")
    spectrum_weight: float = option(1.0, "weight of the power spectrum's log ratio")
    patch_weight: float = option(
        8.0, "weight of the distance between patches of new subjects and of real ones; 0: none"
    )
    perceptual_weight: float = option(
        1.0, 'weight of the distance between features of decoded and of real subjects (needs the "eval" extra); 0: none'
    )
    adversarial_weight: float = option(0.3, "weight of the discriminator of fine detail; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 2, math.inf, "train_batch_size")  # one half of a batch is real, the other one new
        require(self, 1, math.inf, "generated_subjects")
        require(self, 0, math.inf, "spectrum_weight", "patch_weight", "perceptual_weight", "adversarial_weight")
        require(self, 0, 1, "subset_probability")


@dataclass
class BaselineArgs(TrainingArgs):
    """What the compared systems in training/baselines have in common."""

    resolution: int = option(64, "image height and width, pixels")
    modalities: list[str] | None = option(None, "names and order; by default those of the data set")
    selection_subjects: int = option(
        128,
        "generated at each validation and compared with as many held-out slices by KID; the best model is kept. 0: the last",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, math.inf, "resolution")
        require(self, 1, 1, "gradient_accumulation_steps")
        if self.selection_subjects != 0:
            require(self, 2, math.inf, "selection_subjects")


@dataclass
class PlainLDMArgs(BaselineArgs):
    """Options of training/baselines/train_plain_ldm.py."""

    config: str | None = option("plain_ldm_small", CONFIG_HELP)
    output_dir: str = option("outputs/plain_ldm", "the trained model and its checkpoints go here")
    patch_size: int = option(2, "side in pixels of the patches that become channels")
    autoencoder_channels: list[int] = option([32, 64, 96], "widths of the autoencoder's levels, each of half the size")
    autoencoder_layers: int = option(1, "residual blocks on each level of the encoder")
    latent_channels: int = option(8, "channels of the latent")
    block_out_channels: list[int] = option([96, 128, 128], "widths of the denoiser's levels")
    layers_per_block: int = option(1, "residual blocks on each level of the denoiser")
    attention_sizes: list[int] = option(
        [8, 4], "sizes of the levels with attention, 0 for none; the last has one always"
    )
    attention_head_dim: int = option(32, "channels of one attention head")
    autoencoder_fraction: float = option(0.4, "of --max_train_minutes, for the autoencoder")
    autoencoder_steps: int = option(20000, "stop the autoencoder after N steps")
    autoencoder_batch_size: int = option(32, "images of one step")
    autoencoder_learning_rate: float = option(2e-3, "after warm-up")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, math.inf, "patch_size", "latent_channels", "autoencoder_steps", "autoencoder_batch_size")
        require(self, 0.01, 0.99, "autoencoder_fraction")


@dataclass
class StyleGAN2Args(BaselineArgs):
    """Options of training/baselines/train_stylegan2.py."""

    config: str | None = option("stylegan2_small", CONFIG_HELP)
    output_dir: str = option("outputs/stylegan2", "the trained model and its checkpoints go here")
    channels: list[int] = option([256, 128, 64, 32, 16], "widths of the generator's levels of 4x4, 8x8, ... pixels")
    discriminator_channels: list[int] | None = option(None, "the same for the discriminator; by default --channels")
    latent_dim: int = option(256, "length of z and w")
    mapping_layers: int = option(4, "layers of the mapping network")
    r1_gamma: float = option(0.1, "weight of the gradient penalty")
    r1_interval: int = option(16, "steps between penalties, each as many times as heavy")
    translation: float = option(0.125, "largest shift of what the discriminator sees, as a fraction of the image")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, math.inf, "r1_interval", "latent_dim", "mapping_layers")
        require(self, 0, math.inf, "r1_gamma")
        require(self, 0, 0.49, "translation")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        """Print one line, without the usage block, and exit with status 2."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def parse_args(kind: type[Args], description: str, presets: Path, argv: Sequence[str] | None = None) -> Args:
    """Read the options of a training script from its preset and the command line, which overrides the preset.

    Errors of the command line are printed in one line and exit with status 2.

    Args:
        kind: options class, whose `config` names the preset used without `--config`.
        description: text of `--help`.
        presets: folder with the YAML presets, so that `--config ldm_tiny` is enough.
        argv: words of the command line; by default `sys.argv[1:]`.

    Raises:
        ValueError: an option is out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(kind, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=parser.get_default("config"))
    config = finder.parse_known_args(argv)[0].config
    # The preset becomes words in front of the user's, so that its values are checked in the same way.
    preset = [] if config is None else _preset_words(parser, presets, config)
    if "-h" in argv or "--help" in argv:
        parser.set_defaults(**vars(parser.parse_args(preset)))
    (args,) = parser.parse_args_into_dataclasses(preset + argv, look_for_args_file=False)
    return args


def _preset_words(parser: _Parser, presets: Path, config: str) -> list[str]:
    """Read a preset and return it as words of a command line."""
    path = Path(config)
    if not path.suffix and not path.exists():
        path = presets / f"{config}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
        parser.error(f"argument --config: no such file: {config}; presets are {names}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"argument --config: {path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"argument --config: {path} must hold `name: value` lines, not a {type(values).__name__}")
    known = {f.name for f in fields(parser.dataclass_types[0])} - {"config"}
    words = []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            parser.error(f"argument --config: unknown key '{key}' in {path}{hint}")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={value}")
    return words
