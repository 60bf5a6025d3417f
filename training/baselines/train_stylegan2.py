"""Train StyleGAN2, the system that the paper compares DLDM with, on the same data, split and clock as train_ldm.py.

    accelerate launch training/baselines/train_stylegan2.py                                 # simulated subjects, 64x64
    accelerate launch training/baselines/train_stylegan2.py --dataset DATA --output_dir OUT # your scans
    accelerate launch training/baselines/train_stylegan2.py --conditional                   # one modality an image

The joint form, which is the default, draws all modalities of a subject and its mask as channels of one image, so that they
share one anatomy by construction. OUT then holds the generator of the step with the lowest validation KID, to be loaded by
`StyleGAN2.from_pretrained(OUT)`, its card, samples.png, selection.json and the last checkpoints, from which
`--resume_from_checkpoint latest` goes on.
"""

import argparse
from pathlib import Path

import torch
from accelerate.utils import set_seed
from baseline_utils import (
    SHEET_SUBJECTS,
    Extractor,
    Selection,
    Slices,
    add_selection_arguments,
    check_arguments,
    draw_sheet,
    finish,
    open_split,
    read_slices,
)
from PIL import Image
from stylegan2 import Discriminator, StyleGAN2, translate
from tqdm.auto import tqdm

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.discriminator import discriminator_loss, generator_loss, r1_penalty
from dldm_pipeline.training_utils import (
    TrainingClock,
    TrainingParser,
    add_training_arguments,
    averaged_weights,
    find_dataset,
    load_checkpoint,
    log_image,
    make_accelerator,
    make_ema,
    parse_args,
    push_folder,
    save_checkpoint,
    start_trackers,
    to_channels,
)

PRESETS = Path(__file__).parents[1] / "configs"


def build_parser() -> TrainingParser:
    """All arguments of this script."""
    parser = TrainingParser(description=__doc__, presets=PRESETS, default_config="stylegan2_small")
    add_training_arguments(parser)
    add_selection_arguments(parser)
    parser.set_defaults(output_dir="outputs/stylegan2", resolution=64, lr_scheduler="constant", max_grad_norm=100.0)
    model = parser.add_argument_group("model")
    model.add_argument("--modalities", nargs="+", help="names and order; by default those of the data set")
    model.add_argument(
        "--conditional",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="one modality an image, named by a label, in place of all as channels of one",
    )
    model.add_argument(
        "--mask",
        action=argparse.BooleanOptionalAction,
        help="the tumour mask as one more channel, so that subjects come with their label; by default if not --conditional",
    )
    model.add_argument(
        "--channels", type=int, nargs="+", default=[256, 128, 64, 32, 16], help="width on the grid of 4x4, 8x8, ..."
    )
    model.add_argument(
        "--discriminator_channels", type=int, nargs="+", help="the same for the discriminator; by default --channels"
    )
    model.add_argument("--latent_dim", type=int, default=256, help="length of z and w")
    model.add_argument("--mapping_layers", type=int, default=4, help="layers of the mapping network")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--r1_gamma", type=float, default=0.1, help="weight of the gradient penalty")
    loss.add_argument(
        "--r1_interval", type=int, default=16, help="steps between penalties, each as many times as heavy"
    )
    loss.add_argument("--translation", type=float, default=0.125, help="largest shift of what the discriminator sees")
    return parser


def build_networks(args: argparse.Namespace, modalities: tuple[str, ...]) -> tuple[StyleGAN2, Discriminator]:
    """Generator and discriminator, untrained.

    Raises:
        ValueError: the widths do not fit the resolution.
    """
    try:
        generator = StyleGAN2(
            modalities,
            args.resolution,
            args.channels,
            args.latent_dim,
            args.mapping_layers,
            args.conditional,
            args.mask,
        )
        discriminator = Discriminator(
            generator.image_channels,
            args.resolution,
            args.discriminator_channels or args.channels,
            len(modalities) if args.conditional else 0,
        )
    except ValueError as error:
        raise ValueError(f"--resolution, --channels, --discriminator_channels: {error}") from error
    return generator, discriminator


def draw_batch(slices: Slices, size: int, conditional: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw real images, half of them mirrored.

    Returns:
        (B, C, H, W) float32 in [-1, 1]: all modalities and, if `slices` has masks, the mask; or, conditional, the one
        modality of the label. And labels (B,) or `None`.
    """
    device = slices.images.device
    rows = torch.randint(len(slices), (size,), device=device)
    labels, masks = None, None
    if conditional:
        labels = torch.multinomial(slices.present[rows].float(), 1)[:, 0]
        images, present = slices.images[rows, labels][:, None], torch.ones(size, 1, dtype=torch.bool, device=device)
    else:
        images, present = slices.images[rows], slices.present[rows]
        masks = None if slices.masks is None else slices.masks[rows].float()
    images = to_channels(images.float(), present, masks)
    mirrored = torch.rand(size, 1, 1, 1, device=device) < 0.5
    return torch.where(mirrored, images.flip(-1), images), labels


def make_adam(model: torch.nn.Module, args: argparse.Namespace, interval: int = 0) -> torch.optim.Adam:
    """The paper's Adam; a network with a lazy penalty takes one more step in `interval`, and its rates make up for it."""
    share = interval / (interval + 1) if interval else 1.0
    return torch.optim.Adam(model.parameters(), lr=args.learning_rate * share, betas=(0.0, 0.99**share), eps=1e-8)


def main(argv: list[str] | None = None, extractor: Extractor | None = None) -> None:
    """Train as the command line says. `extractor` gives the features for KID; by default those of the evaluation."""
    args = parse_args(build_parser(), argv)
    check_arguments(args)
    if args.conditional and args.mask:
        raise ValueError("--mask: a --conditional image has no mask that its siblings share; leave one of the two out")
    args.mask = not args.conditional if args.mask is None else args.mask
    if not 0 <= args.translation < 0.5:
        raise ValueError(f"--translation {args.translation}: must be at least 0 and below 0.5 of the image")
    if args.r1_gamma < 0 or args.r1_interval < 1:
        raise ValueError(
            f"--r1_gamma {args.r1_gamma} --r1_interval {args.r1_interval}: must be at least 0 and 1, respectively"
        )
    accelerator = make_accelerator(args)
    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    data = find_dataset(accelerator, args, args.modalities)
    train_set, validation_set = (open_split(data, split, args) for split in ("train", "validation"))
    generator, discriminator = build_networks(args, train_set.modalities)
    joint, workers = not args.conditional, args.dataloader_num_workers
    slices = read_slices(train_set, joint, args.mask, workers, is_main).to(accelerator.device)
    selection = None
    if is_main:
        real = read_slices(validation_set, num_workers=workers).to(accelerator.device)
        resume = bool(args.resume_from_checkpoint)
        selection = Selection(output_dir, real, train_set.modalities, args.selection_subjects, extractor, resume)
    parameters = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (generator, discriminator)]
    accelerator.print(
        f"{len(slices)} of {len(train_set)} training and {len(validation_set)} validation slices of "
        f"{', '.join(train_set.modalities)}; generator {parameters[0]:.2f} M, discriminator {parameters[1]:.2f} M parameters"
    )

    for model in (generator, discriminator):
        model.to(accelerator.device, memory_format=torch.channels_last)
    optimizers = [make_adam(generator, args), make_adam(discriminator, args, args.r1_interval)]
    ema = make_ema(generator, args)
    clock = TrainingClock(args.max_train_steps, args.max_train_minutes, accelerator)
    for optimizer in optimizers:
        clock.add_schedule(optimizer, args.lr_scheduler, args.lr_warmup_steps)
    draw, judge, *optimizers = accelerator.prepare(generator, discriminator, *optimizers)
    if ema is not None:
        ema.to(accelerator.device)
    start_trackers(accelerator, "dldm-stylegan2", args)
    # Again, because simulating and measuring draw random numbers and finding them done does not.
    set_seed(args.seed, device_specific=accelerator.num_processes > 1)
    clock.start()
    if args.resume_from_checkpoint:
        load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, clock, ema)
    sheets = output_dir / "validation"
    if is_main:
        sheets.mkdir(exist_ok=True)

    bar = tqdm(
        total=100, bar_format="training {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}", disable=not is_main
    )
    bar.update(100 * clock.progress)
    averages: dict[str, float] = {}
    while not clock.done:
        real, labels = draw_batch(slices, args.train_batch_size, args.conditional)
        z = torch.randn(len(real), args.latent_dim, device=accelerator.device)
        fake = draw(z, labels)

        real = translate(real, args.translation)
        penalised = args.r1_gamma > 0 and clock.step % args.r1_interval == 0
        real_logits = judge(real.requires_grad_(penalised), labels)
        # The same images serve the generator's step below, which saves drawing them twice.
        fake_logits = judge(translate(fake.detach(), args.translation), labels)
        d_loss = discriminator_loss(real_logits, fake_logits)
        terms = {"d_loss": d_loss, "real": real_logits.mean(), "fake": fake_logits.mean()}
        if penalised:
            terms["r1"] = r1_penalty(real_logits, real)
            d_loss = d_loss + 0.5 * args.r1_gamma * args.r1_interval * terms["r1"]
        accelerator.backward(d_loss)
        accelerator.clip_grad_norm_(discriminator.parameters(), args.max_grad_norm)
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)

        discriminator.requires_grad_(False)
        terms["g_loss"] = generator_loss(discriminator(translate(fake, args.translation), labels))
        accelerator.backward(terms["g_loss"])
        discriminator.requires_grad_(True)
        accelerator.clip_grad_norm_(generator.parameters(), args.max_grad_norm)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

        if ema is not None:
            ema.step(generator.parameters())
        clock.tick()
        bar.update(min(100 * clock.progress, 100) - bar.n)
        if clock.step % 10 == 0 or penalised:
            values = {name: term.item() for name, term in terms.items()}
            averages |= {name: 0.9 * averages.get(name, value) + 0.1 * value for name, value in values.items()}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in averages.items())
            bar.set_postfix_str(f"step {clock.step}, {shown}")
            accelerator.log({f"train/{name}": value for name, value in values.items()}, step=clock.step)
        if args.validation_steps and clock.step % args.validation_steps == 0 and is_main:
            with averaged_weights(generator, ema):
                figures = selection.offer(generator, clock)
                path = sheets / f"step-{clock.step:06d}.png"
                draw_sheet(generator, SHEET_SUBJECTS, args.seed, path)
            bar.write(f"step {clock.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
            accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=clock.step)
            log_image(accelerator, "validation", Image.open(path), clock.step)
        if args.checkpointing_steps and clock.step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, clock, ema, args.checkpoints_total_limit)
    bar.close()

    if args.checkpointing_steps and clock.step % args.checkpointing_steps:
        save_checkpoint(accelerator, output_dir, clock, ema, args.checkpoints_total_limit)
    accelerator.wait_for_everyone()
    if is_main:
        if ema is not None:
            ema.copy_to(generator.parameters())
        form = "class-conditional, one modality an image" if args.conditional else "all modalities as joint channels"
        finish(
            generator,
            selection,
            clock,
            args,
            accelerator,
            validation_set,
            "StyleGAN2 of brain MRI",
            f"A StyleGAN2 generator (Karras et al. 2020), {form}, that draws {', '.join(train_set.modalities)} at "
            f"{args.resolution}x{args.resolution}" + (" with the tumour mask." if args.mask else "."),
            {
                "generator parameters": round(parameters[0] * 1e6),
                "discriminator parameters": round(parameters[1] * 1e6),
            },
        )
        if args.push_to_hub:
            print(push_folder(output_dir, args))
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
