"""Train the decoder of a pipeline once more, on what its denoiser generates: the third and last training.

    accelerate launch training/train_decoder.py --dataset DATA --pipeline outputs/mine --output_dir outputs/mine-sharp

A decoder that has seen encoded structures only draws the denoiser's softer ones softly. Here a quarter of each batch is real
subjects whose structure the denoiser has returned from some noise, and half is new subjects. The true images of new subjects
are unknown; their patches, detail and features must be distributed as those of real subjects are. The encoder stays as it is,
and with it the latents. OUT then holds the whole pipeline.
"""

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.autoencoder_disentangled import DisentangledDecoderOutput
from dldm_pipeline.cli import exit_on_user_error, find_pipeline
from dldm_pipeline.encoding import encode_exchanged, measure_noise, validate_autoencoder
from dldm_pipeline.hub import write_model_card, write_pretrained
from dldm_pipeline.losses import (
    DetailDiscriminator,
    PerceptualDistance,
    foreground_of,
    mask_loss,
    near_tumour,
    nested_regions,
    noise_std,
    patch_artefacts,
    patch_distance,
    reconstruction_terms,
    to_channels,
)
from dldm_pipeline.training_args import DecoderArgs, parse_args
from dldm_pipeline.training_utils import (
    evenly_spaced_subset,
    find_dataset,
    fit_on_slices,
    make_accelerator,
    open_split,
)

PRESETS = Path(__file__).parent / "configs"
DECODER = ("decoder", "style_in", "head", "mask", "foreground")  # first words of the decoder's parameters
GENERATING_STEPS = 25
DENOISING_STEPS = 4  # of structures returned from some noise
DENOISED_FROM = 0.5  # latest time they are denoised from, of the schedule's length: their anatomy stays their own
PATCH_POOL = 24  # subjects, of this step and those before, whose patches are compared
PERCEPTUAL_SUBJECTS = 512  # real ones whose mean features those of new ones are to have
NOISE_SUBJECTS = 1024  # real ones whose noise is measured
WEIGHTS = {"l1": 1.0, "mse": 30.0, "edge": 0.5, "mask": 0.1, "foreground": 0.1, "artefacts": 20.0}


class DecoderLoss(torch.nn.Module):
    """The unweighted terms of the loss; a module, so that processes share gradients through its forward.

    Args:
        pipeline: whose autoencoder is trained.
        args: options of the training.
        generated: (N, c_s, h, w), structures that the pipeline has generated.
        perceptual, discriminator: `None` leaves their terms out.
    """

    def __init__(
        self,
        pipeline: DLDMPipeline,
        args: DecoderArgs,
        generated: torch.Tensor,
        perceptual: PerceptualDistance | None,
        discriminator: DetailDiscriminator | None,
    ):
        super().__init__()
        self.autoencoder = pipeline.autoencoder
        self.pipeline, self.args, self.generated = pipeline, args, generated  # a pipeline is no module
        self.perceptual, self.discriminator = perceptual, discriminator
        self.pools = None  # the last subjects, new and real ones, whose patches are compared

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images, present, has_mask = batch["images"], batch["present"], batch["has_mask"][:, None, None]
        args, n = self.args, batch["present"].shape[1]
        foreground = foreground_of(images, present)
        with torch.no_grad():
            structure, styles, full, *_ = encode_exchanged(self.autoencoder, batch, args.subset_probability)
            paired = (len(images) + 1) // 2  # subjects whose images are known, the first of the batch
            denoised = slice((paired + 1) // 2)
            chosen = torch.randint(len(self.generated), (len(images) - paired,), device=images.device)
            structure = torch.cat(
                [
                    self.denoise(structure[denoised], full.style_dist.mode()[denoised], present[denoised]),
                    structure[denoised.stop : paired],
                    self.generated[chosen],
                ]
            )
        output = self.autoencoder.decode(structure, styles)

        noise = noise_std(images, foreground[:, None]).nan_to_num()[..., None, None]
        noisy = output.sample + noise * output.foreground.sigmoid()[:, None] * torch.randn_like(output.sample)
        noisy = noisy.clamp(0, 1)
        decoded = to_channels(noisy, present, output.mask.masked_fill(~has_mask, -100).sigmoid())
        real = to_channels(images, present, batch["mask"] * has_mask)
        terms = {"artefacts": patch_artefacts(decoded[:, :n], self.autoencoder.config.patch_size)}
        if args.patch_weight:
            terms["patch"] = self.compare_patches(batch, output, decoded[paired:], real)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(noisy, present, images[:paired])
        if self.discriminator is not None:
            terms["adversarial"] = self.discriminator(decoded, real)

        rebuilt = reconstruction_terms(
            output.sample[:paired],
            images[:paired],
            present[:paired],
            noise[:paired],
            output.foreground[:paired],
            foreground[:paired],
        )
        del rebuilt["squared"]
        regions, known = nested_regions(batch, self.autoencoder.config.num_regions)
        mask = mask_loss(output.regions[:paired], regions[:paired], known[:paired])
        return terms | rebuilt | {"mask": mask}

    def denoise(self, structure: torch.Tensor, styles: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Structures (B, c_s, h, w) returned by the denoiser from some noise, each beside one of its styles (B, n, c_t)."""
        labels = torch.multinomial(present.float(), 1)[:, 0]
        style = styles[torch.arange(len(styles), device=styles.device), labels]
        # The last few of so many steps begin at a time that is uniform up to DENOISED_FROM.
        start = DENOISED_FROM * torch.rand(()).clamp(min=0.02).item()
        steps = round(DENOISING_STEPS / start)
        return self.pipeline._draw_structures(
            len(structure), steps, start=(structure, style, labels), strength=DENOISING_STEPS / steps
        )

    def compare_patches(
        self,
        batch: dict[str, torch.Tensor],
        output: DisentangledDecoderOutput,
        new: torch.Tensor,
        real: torch.Tensor,
    ) -> torch.Tensor:
        """Distance between patches of the new subjects, the last rows of the batch, and of the real ones, both as channels.

        The whole brain counts one half, what is near a tumour the other. Subjects of some earlier steps are compared along,
        because a few alone are no distribution.
        """
        first = len(real) - len(new)
        has_mask = batch["has_mask"][:, None, None]
        near_new, near_real = (near_tumour((mask > 0) & has_mask) for mask in (output.mask, batch["mask"]))
        sets = [
            (new, output.foreground[first:] > 0, near_new[first:]),
            (real, foreground_of(batch["images"], batch["present"]), near_real),
        ]
        if self.pools is not None:
            sets = [
                tuple(torch.cat(pair)[:PATCH_POOL] for pair in zip(now, before, strict=True))
                for now, before in zip(sets, self.pools, strict=True)
            ]
        self.pools = [(pool.detach(), *where) for pool, *where in sets]
        (ours, *our_regions), (theirs, *their_regions) = sets
        # Only the new ones have a gradient: it is to be as long as if they were alone.
        return patch_distance(ours, theirs, [*zip(our_regions, their_regions, strict=True)]) * len(ours) / len(new)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(DecoderArgs, __doc__, PRESETS, argv)
    accelerator = make_accelerator(args, "dldm-decoder")
    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    pipeline = DLDMPipeline.from_pretrained(find_pipeline(args.pipeline)).to(accelerator.device)
    pipeline.unet.requires_grad_(False)
    model = pipeline.autoencoder
    size, modalities = model.config.sample_size, list(model.config.modalities)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(DECODER))
    data = find_dataset(accelerator, args, size, modalities)
    train_set, validation_set = (open_split(data, split, size, modalities) for split in ("train", "validation"))
    accelerator.print(
        f"{len(train_set)} training and {len(validation_set)} validation slices of {', '.join(modalities)}; "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M parameters are trained"
    )
    generated = pipeline._draw_structures(args.generated_subjects, GENERATING_STEPS)
    pipeline.set_progress_bar_config(disable=True)
    perceptual = discriminator = None
    if args.perceptual_weight:
        real = DataLoader(evenly_spaced_subset(train_set, PERCEPTUAL_SUBJECTS), 8)
        perceptual = PerceptualDistance(real, accelerator.device, is_main)
    if args.adversarial_weight:
        discriminator = DetailDiscriminator(len(modalities) + 1, accelerator.device)

    weights = WEIGHTS | {
        name: getattr(args, f"{name}_weight") for name in ("spectrum", "patch", "perceptual", "adversarial")
    }
    objective = DecoderLoss(pipeline, args, generated, perceptual, discriminator)
    validation_loader = fit_on_slices(accelerator, args, model, objective, weights, train_set, validation_set)
    if is_main:
        measure_noise(model, DataLoader(evenly_spaced_subset(train_set, NOISE_SUBJECTS), 16))
        figures = validate_autoencoder(model, validation_loader, output_dir / "samples.png")
        write_pretrained(pipeline.save_pretrained, output_dir)
        write_model_card(
            output_dir,
            "Disentangled latent diffusion of brain MRI",
            f"A `DLDMPipeline` for {', '.join(modalities)} at {size}x{size} whose decoder was trained once more.",
            {**figures, "validation slices": len(validation_loader.dataset)},
            args.shown(),
            {"real, rebuilt, and rebuilt with another subject's styles": "samples.png"},
            tags=["diffusers", "DLDMPipeline"],
            training_data=f"{len(train_set)} slices, and {args.generated_subjects} generated structures.",
        )
        print(f"{output_dir}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
