"""Train the disentangled autoencoder on a folder written by prepare_dataset.py, or on simulated subjects.

    accelerate launch training/train_autoencoder.py                                  # simulated subjects, small preset
    accelerate launch training/train_autoencoder.py --dataset DATA --output_dir OUT  # your scans

The loss is that of Na et al. (MIDL 2023) with its four strategies, and with two additions: structures from random subsets of
the modalities agree with the structure from all, and the tumour mask is decoded from the structure. OUT then holds the
autoencoder, its model card, samples.png and the last checkpoints, from which `--resume_from_checkpoint latest` goes on.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from dldm_pipeline import DisentangledAutoencoder
from dldm_pipeline.appearance import two_appearances
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.encoding import encode_exchanged, measure_latents, measure_noise, validate_autoencoder
from dldm_pipeline.hub import write_model_card, write_pretrained
from dldm_pipeline.losses import foreground_of, mask_loss, nested_regions, noise_std, reconstruction_terms
from dldm_pipeline.training_args import AutoencoderArgs, parse_args
from dldm_pipeline.training_utils import (
    evenly_spaced_subset,
    find_dataset,
    fit_on_slices,
    make_accelerator,
    open_split,
    transfer_rows,
)

PRESETS = Path(__file__).parent / "configs"
QUANTILES = 33  # of an image's intensities, that its style sees
NOISE_SUBJECTS = 1024  # real ones whose noise is measured
WEIGHTS = {
    "l1": 1.0,
    "mse": 30.0,  # thin bright structures
    "edge": 0.5,
    "mask": 0.1,
    "foreground": 0.1,
    "agreement": 0.3,
    "kl": 1e-4,
}


class DisentangledLoss(torch.nn.Module):
    """The unweighted terms of the loss; a module, so that processes share gradients through its forward."""

    def __init__(self, autoencoder: DisentangledAutoencoder, args: AutoencoderArgs):
        super().__init__()
        self.autoencoder, self.args = autoencoder, args
        self.errors: torch.Tensor | None = None  # running squared error of each modality

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "acquisition" not in batch:  # real slices, whose scanners are not known
            batch = two_appearances(batch)
        images, present, args = batch["images"], batch["present"], self.args
        foreground = foreground_of(images, present)
        # Strategies 1 and 3: one structure a subject, and styles exchanged, with a target that follows the style.
        structure, styles, full, some, twin = encode_exchanged(self.autoencoder, batch, args.subset_probability)
        mode, subset_mode = full.structure_dist.mode(), some.structure_dist.mode()
        goal = mode.detach()
        variance = goal.var(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
        if args.structure_noise:
            structure = add_noise(structure, variance, args.structure_noise)

        # Strategy 4: the loss is averaged over modalities drawn at random, the ones rebuilt worst the most often.
        if self.errors is None:
            self.errors = torch.ones(present.shape[1], device=images.device)
        chosen = torch.multinomial(self.errors**2, min(args.target_modalities, present.shape[1])).sort().values
        # Strategy 2: the decoder sees a structure and a style, and no other hint of the modality.
        output = self.autoencoder.decode(structure, styles[:, chosen])
        noise = noise_std(images, foreground[:, None]).nan_to_num()[:, chosen, None, None]
        terms = reconstruction_terms(
            output.sample, images[:, chosen], present[:, chosen], noise, output.foreground, foreground
        )
        squared = terms.pop("squared").detach().float().clamp(min=1e-5)
        self.errors[chosen] = self.errors[chosen].lerp(squared, 0.02)
        return terms | {
            "mask": mask_loss(output.regions, *nested_regions(batch, self.autoencoder.config.num_regions)),
            # A subset's structure is that of all modalities, and two images of one anatomy have one structure.
            "agreement": (((subset_mode - goal) ** 2 + (mode[twin] - goal) ** 2) / variance).mean(),
            "kl": full.structure_dist.kl().mean() / mode[0].numel()
            + full.style_dist.kl().mean() / styles[0, 0].numel(),
        }


def add_noise(structure: torch.Tensor, variance: torch.Tensor, largest: float) -> torch.Tensor:
    """Structures (B, c_s, h, w) with noise, at a level between 0 and `largest` that is random for each subject.

    A denoiser's structures are never exact, so the images must not depend on small differences.

    Source: Yang et al., "Latent Denoising Makes Good Visual Tokenizers" (2025), with additive in place of mixed-in noise.

    Args:
        variance: (1, c_s, 1, 1), of the structures themselves; at level 1 the noise has as much.
    """
    level = largest * torch.rand(len(structure), 1, 1, 1, device=structure.device)
    return structure + level * variance.sqrt() * torch.randn_like(structure)


def load_autoencoder(args: AutoencoderArgs, modalities: Sequence[str]) -> DisentangledAutoencoder:
    """The autoencoder of `--init_from`, for other modalities and another image size if need be.

    Embeddings of a modality are taken over by its name; those of an unknown modality start from the mean.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(args.init_from)
    if (folder / "autoencoder" / "config.json").is_file():
        folder = folder / "autoencoder"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--init_from {args.init_from}: no autoencoder there (no config.json)")
    config = DisentangledAutoencoder.load_config(folder)
    # Not `from_pretrained`, which cannot fill the further blocks.
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    known, names = list(config["modalities"]), list(modalities)
    changes = {name: max(getattr(args, name), config[name]) for name in ("encoder_blocks", "decoder_blocks")}
    if (known, config["sample_size"]) != (names, args.resolution):
        scales = {f"{kind}_{name}": None for kind in ("structure", "style") for name in ("shift", "scale")}
        scales |= {"style_relation": None, "noise_level": None}
        changes |= {"modalities": names, "sample_size": args.resolution, **scales}
        weights["modality_embedding.weight"] = transfer_rows(weights["modality_embedding.weight"], known, names)
        rows = weights["encoder_linear.weight"].unflatten(1, (len(known), -1)).transpose(0, 1)
        # The map sums over the modalities, whose number changes.
        rows = transfer_rows(rows, known, names) * len(known) / len(names)
        weights["encoder_linear.weight"] = rows.transpose(0, 1).flatten(1, 2).contiguous()
        del weights["structure_offset"]
    model = DisentangledAutoencoder.from_config(config, **changes)
    model.load_state_dict(model.state_dict() | weights)
    return model


def build_autoencoder(args: AutoencoderArgs, modalities: Sequence[str]) -> DisentangledAutoencoder:
    """A new autoencoder, or that of `--init_from`, for these modalities."""
    if args.init_from:
        return load_autoencoder(args, modalities)
    widths = ("patch_size", "structure_channels", "style_channels", "encoder_channels", "encoder_blocks")
    widths += ("decoder_channels", "decoder_blocks", "head_channels")
    options = {name: getattr(args, name) for name in widths}
    options |= {"num_regions": 3, "num_quantiles": QUANTILES}
    return DisentangledAutoencoder(modalities=list(modalities), sample_size=args.resolution, **options)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(AutoencoderArgs, __doc__, PRESETS, argv)
    accelerator = make_accelerator(args, "dldm-autoencoder")
    output_dir, workers = Path(args.output_dir), args.dataloader_num_workers
    data = find_dataset(accelerator, args, args.resolution, args.modalities)
    train_set = open_split(data, "train", args.resolution, args.modalities)
    validation_set = open_split(data, "validation", args.resolution, args.modalities)
    model = build_autoencoder(args, train_set.modalities)
    accelerator.print(
        f"{len(train_set)} training and {len(validation_set)} validation slices of {', '.join(train_set.modalities)}; "
        f"{model.num_parameters() / 1e6:.2f} M parameters"
    )
    weights = WEIGHTS | {"spectrum": args.spectrum_weight}
    if not args.subset_probability:
        weights["agreement"] = 0.0
    objective = DisentangledLoss(model, args)
    validation_loader = fit_on_slices(accelerator, args, model, objective, weights, train_set, validation_set)
    if accelerator.is_main_process:
        measure_latents(model, DataLoader(train_set, 16, num_workers=workers))
        measure_noise(model, DataLoader(evenly_spaced_subset(train_set, NOISE_SUBJECTS), 16))
        figures = validate_autoencoder(model, validation_loader, output_dir / "samples.png")
        write_pretrained(model.save_pretrained, output_dir)
        write_model_card(
            output_dir,
            "Disentangled autoencoder",
            f"A `DisentangledAutoencoder` for {', '.join(train_set.modalities)} at {args.resolution}x{args.resolution}.",
            {**figures, "validation slices": len(validation_loader.dataset)},
            args.shown(),
            {"real, rebuilt, and rebuilt with another subject's styles": "samples.png"},
            training_data=f"{len(train_set)} slices.",
        )
        print(f"{output_dir}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
