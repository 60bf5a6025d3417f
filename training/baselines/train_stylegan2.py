"""Train StyleGAN2, the system that the paper compares DLDM with, on the same data, split and clock as train_ldm.py.

    accelerate launch training/baselines/train_stylegan2.py                                 # simulated subjects, 64x64
    accelerate launch training/baselines/train_stylegan2.py --dataset DATA --output_dir OUT # your scans

All modalities of a subject and its mask are drawn as channels of one image, so that they share one anatomy. OUT then holds
the generator of the step with the lowest validation KID, to be loaded by `StyleGAN2.from_pretrained(OUT)`, its card,
samples.png, selection.json and the last checkpoints, from which `--resume_from_checkpoint latest` goes on.
"""

from pathlib import Path

import torch
from baseline_utils import Extractor, Selection, Slices, finish, mirror_half, read_slices, validate
from stylegan2 import Discriminator, StyleGAN2, translate

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.losses import discriminator_loss, generator_loss, r1_penalty, to_channels
from dldm_pipeline.training_args import StyleGAN2Args, parse_args
from dldm_pipeline.training_state import TrainingClock
from dldm_pipeline.training_utils import find_dataset, fit, make_accelerator, open_split, update

PRESETS = Path(__file__).parents[1] / "configs"
MAX_GRAD_NORM = 100.0


def build_networks(args: StyleGAN2Args, modalities: tuple[str, ...]) -> tuple[StyleGAN2, Discriminator]:
    """Generator and discriminator, untrained; a ValueError where the widths do not fit the resolution."""
    size, widths = args.resolution, args.discriminator_channels or args.channels
    try:
        generator = StyleGAN2(modalities, size, args.channels, args.latent_dim, args.mapping_layers)
        discriminator = Discriminator(generator.image_channels, size, widths)
    except ValueError as error:
        raise ValueError(f"--resolution, --channels, --discriminator_channels: {error}") from error
    return generator, discriminator


def random_batch(slices: Slices, size: int) -> torch.Tensor:
    """Random real images (B, n + 1, H, W) in [-1, 1], half of them mirrored: all modalities and the mask."""
    rows = torch.randint(len(slices), (size,), device=slices.images.device)
    images = to_channels(slices.images[rows].float(), slices.present[rows], slices.masks[rows].float())
    return mirror_half(images)


def make_adam(model: torch.nn.Module, args: StyleGAN2Args, interval: int = 0) -> torch.optim.Adam:
    """The paper's Adam; a network with a lazy penalty takes one more step in `interval`, and its rates make up for it."""
    ratio = interval / (interval + 1) if interval else 1.0
    return torch.optim.Adam(model.parameters(), lr=args.learning_rate * ratio, betas=(0.0, 0.99**ratio), eps=1e-8)


def main(argv: list[str] | None = None, extractor: Extractor | None = None) -> None:
    """Train as the command line says. `extractor` gives the features for KID; by default those of the evaluation."""
    args = parse_args(StyleGAN2Args, __doc__, PRESETS, argv)
    accelerator = make_accelerator(args, "dldm-stylegan2")
    is_main, workers, device = accelerator.is_main_process, args.dataloader_num_workers, accelerator.device
    data = find_dataset(accelerator, args, args.resolution, args.modalities)
    train_set = open_split(data, "train", args.resolution, args.modalities)
    validation_set = open_split(data, "validation", args.resolution, args.modalities)
    generator, discriminator = build_networks(args, train_set.modalities)
    slices = read_slices(train_set, True, workers, device)
    selection = None
    if is_main:
        real = read_slices(validation_set, num_workers=workers, device=device)
        selection = Selection(args, real, train_set.modalities, extractor)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (generator, discriminator)]
    accelerator.print(
        f"{len(slices)} of {len(train_set)} training and {len(validation_set)} validation slices of "
        f"{', '.join(train_set.modalities)}; generator {parameters[0] / 1e6:.2f} M, "
        f"discriminator {parameters[1] / 1e6:.2f} M parameters"
    )
    for model in (generator, discriminator):
        model.to(device, memory_format=torch.channels_last)
    generate, judge, *optimizers = accelerator.prepare(
        generator, discriminator, make_adam(generator, args), make_adam(discriminator, args, args.r1_interval)
    )

    def step(number: int) -> dict[str, torch.Tensor]:
        real = random_batch(slices, args.train_batch_size)
        fake = generate(torch.randn(len(real), args.latent_dim, device=device))

        real = translate(real, args.translation)
        is_penalised = args.r1_gamma > 0 and number % args.r1_interval == 0
        real_logits = judge(real.requires_grad_(is_penalised))
        # The same images serve the generator's step below, which saves generating them twice.
        fake_logits = judge(translate(fake.detach(), args.translation))
        d_loss = discriminator_loss(real_logits, fake_logits)
        terms = {"d_loss": d_loss, "real": real_logits.mean(), "fake": fake_logits.mean()}
        if is_penalised:
            terms["r1"] = r1_penalty(real_logits, real)
            d_loss = d_loss + 0.5 * args.r1_gamma * args.r1_interval * terms["r1"]
        update(accelerator, d_loss, discriminator.parameters(), optimizers[1], MAX_GRAD_NORM)

        discriminator.requires_grad_(False)
        terms["g_loss"] = generator_loss(discriminator(translate(fake, args.translation)))
        update(accelerator, terms["g_loss"], generator.parameters(), optimizers[0], MAX_GRAD_NORM)
        discriminator.requires_grad_(True)
        return terms

    def validate_generator(path: Path, clock: TrainingClock) -> dict[str, float]:
        return validate(selection, generator, clock, args.seed, path)

    clock = fit(
        accelerator, args, generator, [generate, judge], optimizers, step, validate_generator, lr_scheduler="constant"
    )
    if is_main:
        finish(
            generator,
            selection,
            clock,
            args,
            validation_set,
            "StyleGAN2 of brain MRI",
            "A StyleGAN2 generator (Karras et al. 2020), all modalities as joint channels, of "
            f"{', '.join(train_set.modalities)} at {args.resolution}x{args.resolution} with the tumour mask.",
            {"generator parameters": parameters[0], "discriminator parameters": parameters[1]},
            len(slices),
        )
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
