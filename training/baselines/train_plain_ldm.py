"""Train a plain latent diffusion model, DLDM without disentanglement, on the same data, split and clock as train_ldm.py.

    accelerate launch training/baselines/train_plain_ldm.py                                 # simulated subjects, 64x64
    accelerate launch training/baselines/train_plain_ldm.py --dataset DATA --output_dir OUT # your scans

First the autoencoder, then the denoiser, in one run: --autoencoder_share of --max_train_minutes goes to the first. OUT then
holds the model of the step with the lowest validation KID, to be loaded by `PlainLDM.from_pretrained(OUT)`, its card,
samples.png, selection.json, the finished autoencoder in first_stage, and the last checkpoints, from which
`--resume_from_checkpoint latest` goes on.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
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
from plain_ldm import PlainLDM, diffusion_loss, make_scheduler, psnr
from tqdm.auto import tqdm

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.muon import make_optimizers
from dldm_pipeline.training_utils import (
    TrainingClock,
    TrainingParser,
    add_training_arguments,
    averaged_weights,
    edges,
    find_dataset,
    load_checkpoint,
    log_image,
    make_accelerator,
    make_ema,
    parse_args,
    push_folder,
    radial_power,
    save_checkpoint,
    start_trackers,
    write_pretrained,
)

PRESETS = Path(__file__).parents[1] / "configs"
VALIDATION_IMAGES = 256  # for the validation loss
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"


def build_parser() -> TrainingParser:
    """All arguments of this script."""
    parser = TrainingParser(description=__doc__, presets=PRESETS, default_config="plain_ldm_small")
    add_training_arguments(parser)
    add_selection_arguments(parser)
    parser.set_defaults(output_dir="outputs/plain_ldm", resolution=64)
    model = parser.add_argument_group("model")
    model.add_argument("--modalities", nargs="+", help="names and order; by default those of the data set")
    model.add_argument("--patch_size", type=int, default=2, help="pixels of a patch's side, made channels first of all")
    model.add_argument(
        "--autoencoder_channels",
        type=int,
        nargs="+",
        default=[32, 64, 96],
        help="width of each grid of the autoencoder",
    )
    model.add_argument("--autoencoder_layers", type=int, default=1, help="residual blocks on each grid of the encoder")
    model.add_argument("--latent_channels", type=int, default=8, help="channels of the latent")
    model.add_argument(
        "--block_out_channels", type=int, nargs="+", default=[96, 128, 128], help="width of each grid of the denoiser"
    )
    model.add_argument("--layers_per_block", type=int, default=1, help="residual blocks on each grid of the denoiser")
    model.add_argument(
        "--attention_sizes", type=int, nargs="*", default=[8, 4], help="grids with attention; the coarsest has one more"
    )
    model.add_argument("--attention_head_dim", type=int, default=32, help="channels of one attention head")
    stage = parser.add_argument_group("autoencoder")
    stage.add_argument("--autoencoder_share", type=float, default=0.4, help="of --max_train_minutes")
    stage.add_argument("--autoencoder_steps", type=int, default=20000, help="stop the autoencoder after N steps")
    stage.add_argument("--autoencoder_batch_size", type=int, default=32, help="images of one step")
    stage.add_argument("--autoencoder_learning_rate", type=float, default=2e-3, help="after warm-up")
    # The weights of train_autoencoder.py, so that no system has the sharper loss.
    stage.add_argument("--mse_weight", type=float, default=30.0, help="weight of the squared error")
    stage.add_argument("--edge_weight", type=float, default=0.5, help="weight of the gradient term")
    stage.add_argument("--spectrum_weight", type=float, default=0.05, help="weight of the power spectrum's log ratio")
    stage.add_argument("--kl_weight", type=float, default=1e-4, help="weight of the KL term, mean over latent values")
    return parser


def build_model(args: argparse.Namespace, modalities: tuple[str, ...]) -> PlainLDM:
    """The untrained model.

    Raises:
        ValueError: sizes and widths do not fit together.
    """
    names = (
        "patch_size",
        "autoencoder_channels",
        "autoencoder_layers",
        "latent_channels",
        "block_out_channels",
        "layers_per_block",
        "attention_sizes",
        "attention_head_dim",
    )
    return PlainLDM(modalities, args.resolution, **{name: getattr(args, name) for name in names})


# ---------------------------------------------------------------------------------------------------------------------
# First stage
# ---------------------------------------------------------------------------------------------------------------------


def draw_images(slices: Slices, size: int) -> torch.Tensor:
    """Real images (B, 1, H, W) in [0, 1] of modalities that are there, half of them mirrored."""
    rows = torch.randint(len(slices), (size,), device=slices.images.device)
    modality = torch.multinomial(slices.present[rows].float(), 1)[:, 0]
    images = slices.images[rows, modality][:, None].float()
    return torch.where(torch.rand(size, 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images)


class AutoencoderLoss(torch.nn.Module):
    """The weighted loss of the autoencoder; a module, so that processes share gradients through its forward."""

    def __init__(self, model: PlainLDM, args: argparse.Namespace):
        super().__init__()
        self.autoencoder = model.autoencoder
        self.functions, self.args = (model.encode, model.decode), args

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, H, W) in [0, 1] to a scalar."""
        (encode, decode), args = self.functions, self.args
        posterior = encode(images)
        rebuilt = decode(posterior.sample())
        loss = (rebuilt - images).abs().mean() + args.mse_weight * (rebuilt - images).square().mean()
        loss = loss + args.edge_weight * sum(
            (a - b).abs().mean() for a, b in zip(edges(rebuilt), edges(images), strict=True)
        )
        if args.spectrum_weight:
            ours, theirs = (radial_power(x, rings=x.shape[-1] // 4) for x in (rebuilt, images))
            ratio = (ours + 1e-4).log() - (theirs + 1e-4).log()
            loss = loss + args.spectrum_weight * ratio.abs().mean()
        return loss + args.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()


def train_autoencoder(
    model: PlainLDM, slices: Slices, held_out: Slices, args: argparse.Namespace, accelerator: Accelerator
) -> None:
    """Train `model.autoencoder`, measure its latents, and write it to `first_stage` in the output folder."""
    folder = Path(args.output_dir) / "first_stage"
    optimizers = make_optimizers(model.autoencoder, args.autoencoder_learning_rate)
    ema = make_ema(model.autoencoder, args)
    minutes = args.max_train_minutes and args.max_train_minutes * args.autoencoder_share
    clock = TrainingClock(args.autoencoder_steps, minutes, accelerator)
    for optimizer in optimizers:
        clock.add_schedule(optimizer, args.lr_scheduler, args.lr_warmup_steps)
    objective, *optimizers = accelerator.prepare(AutoencoderLoss(model, args), *optimizers)
    if ema is not None:
        ema.to(accelerator.device)
    set_seed(args.seed, device_specific=accelerator.num_processes > 1)
    clock.start()
    if args.resume_from_checkpoint == "latest":
        load_checkpoint(accelerator, folder, "latest", clock, ema)
    bar = tqdm(total=100, desc="autoencoder", bar_format=BAR, disable=not accelerator.is_main_process)
    bar.update(100 * clock.progress)
    average = None
    while not clock.done:
        loss = objective(draw_images(slices, args.autoencoder_batch_size))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.autoencoder.parameters(), args.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(model.autoencoder.parameters())
        clock.tick()
        bar.update(min(100 * clock.progress, 100) - bar.n)
        if clock.step % 10 == 0:
            average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
            bar.set_postfix_str(f"step {clock.step}, loss {average:.4f}")
            accelerator.log({"autoencoder/loss": loss.item()}, step=clock.step)
        if args.checkpointing_steps and clock.step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, folder, clock, ema, 1)
    bar.close()
    if ema is not None:
        ema.copy_to(model.autoencoder.parameters())
    measure_latents(model, slices)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_pretrained(model.save_pretrained, folder)
        print(f"autoencoder: {clock.step} steps, PSNR of held-out images {rebuilding_psnr(model, held_out):.2f} dB")
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # checkpoints of the second stage hold the second stage only


@torch.no_grad()
def encode_slices(model: PlainLDM, slices: Slices, mirror: bool, show_progress: bool = False) -> torch.Tensor:
    """Posterior modes (N, V, n, c, h, w) float16 of every modality of every slice, V = 2 with its mirror image.

    Those of missing modalities mean nothing.
    """
    results = []
    for part in tqdm(slices.images.split(16), "encoding slices", unit="batch", disable=not show_progress):
        part = part.float()
        views = torch.stack([part, part.flip(-1)] if mirror else [part], dim=1)
        modes = model.encode(views.flatten(0, 2)[:, None]).mode()
        results.append(modes.unflatten(0, views.shape[:3]).half())
    return torch.cat(results)


def measure_latents(model: PlainLDM, slices: Slices) -> None:
    """Measure mean and deviation of every latent channel over the training set, and keep them in the config."""
    latents = encode_slices(model, slices, mirror=False)[:, 0][slices.present].double().transpose(0, 1).flatten(1)
    mean, std = latents.mean(dim=1), latents.std(dim=1).clamp(min=1e-6)
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def rebuilding_psnr(model: PlainLDM, slices: Slices) -> float:
    """PSNR of rebuilt images in dB, over up to `VALIDATION_IMAGES` of them."""
    images = slices.images[slices.present][:VALIDATION_IMAGES, None].float()
    return psnr(torch.cat([model.decode(model.encode(part).mode()) for part in images.split(32)]), images)


# ---------------------------------------------------------------------------------------------------------------------
# Second stage
# ---------------------------------------------------------------------------------------------------------------------


def draw_latents(latents: torch.Tensor, present: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw latents (B, c, h, w) and labels (B,) from (N, V, n, c, h, w); never of a missing modality."""
    rows = torch.randint(len(latents), (size,), device=latents.device)
    view = torch.randint(latents.shape[1], (size,), device=latents.device)
    labels = torch.multinomial(present[rows].float(), 1)[:, 0]
    return latents[rows, view, labels].float(), labels


@torch.no_grad()
def validation_loss(model: PlainLDM, latents: torch.Tensor, present: torch.Tensor) -> float:
    """v-loss of held-out images, always the same ones at the same times and with the same noise."""
    labels = present.nonzero()[:, 1]
    chosen = torch.linspace(0, len(labels) - 1, min(VALIDATION_IMAGES, len(labels))).long().to(labels.device)
    latents, generator = latents[:, 0][present], torch.Generator(latents.device).manual_seed(0)
    losses = [
        diffusion_loss(model, make_scheduler(), latents[part].float(), labels[part], generator)
        for part in chosen.split(64)
    ]
    return float(torch.stack(losses).mean())


def main(argv: list[str] | None = None, extractor: Extractor | None = None) -> None:
    """Train as the command line says. `extractor` gives the features for KID; by default those of the evaluation."""
    args = parse_args(build_parser(), argv)
    check_arguments(args)
    if not 0 < args.autoencoder_share < 1:
        raise ValueError(f"--autoencoder_share {args.autoencoder_share}: must be above 0 and below 1")
    for name in ("patch_size", "latent_channels", "autoencoder_steps", "autoencoder_batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be 1 or more")
    accelerator = make_accelerator(args)
    output_dir, is_main, device = Path(args.output_dir), accelerator.is_main_process, accelerator.device
    data = find_dataset(accelerator, args, args.modalities)
    train_set, validation_set = (open_split(data, split, args) for split in ("train", "validation"))
    model = build_model(args, train_set.modalities)
    slices = read_slices(train_set, num_workers=args.dataloader_num_workers, show_progress=is_main).to(device)
    held_out = read_slices(validation_set, num_workers=args.dataloader_num_workers).to(device)
    selection = None
    if is_main:
        resume = bool(args.resume_from_checkpoint)
        selection = Selection(output_dir, held_out, train_set.modalities, args.selection_subjects, extractor, resume)
    parameters = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.autoencoder, model.unet)]
    accelerator.print(
        f"{len(train_set)} training and {len(validation_set)} validation slices of {', '.join(train_set.modalities)}; "
        f"autoencoder {parameters[0]:.2f} M, denoiser {parameters[1]:.2f} M parameters"
    )
    start_trackers(accelerator, "dldm-plain-ldm", args)

    first_stage = output_dir / "first_stage"
    model.to(device, memory_format=torch.channels_last)
    if args.resume_from_checkpoint and (first_stage / "config.json").is_file():
        done = PlainLDM.from_pretrained(first_stage)
        model.autoencoder.load_state_dict(done.autoencoder.state_dict())
        model.register_to_config(latents_mean=done.config.latents_mean, latents_std=done.config.latents_std)
    else:
        train_autoencoder(model, slices, held_out, args, accelerator)
    model.autoencoder.eval().requires_grad_(False)
    latents = model.normalize(encode_slices(model, slices, mirror=True, show_progress=is_main)).half()
    held_out_latents = model.normalize(encode_slices(model, held_out, mirror=False)).half()

    optimizers, scheduler = make_optimizers(model.unet, args.learning_rate), make_scheduler()
    ema = make_ema(model.unet, args)
    minutes = args.max_train_minutes and args.max_train_minutes * (1 - args.autoencoder_share)
    clock = TrainingClock(args.max_train_steps, minutes, accelerator)
    for optimizer in optimizers:
        clock.add_schedule(optimizer, args.lr_scheduler, args.lr_warmup_steps)
    denoiser, *optimizers = accelerator.prepare(model, *optimizers)
    if ema is not None:
        ema.to(device)
    set_seed(args.seed, device_specific=accelerator.num_processes > 1)
    clock.start()
    if args.resume_from_checkpoint:
        load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, clock, ema)
    sheets = output_dir / "validation"
    if is_main:
        sheets.mkdir(exist_ok=True)

    bar = tqdm(total=100, desc="denoiser", bar_format=BAR, disable=not is_main)
    bar.update(100 * clock.progress)
    average = None
    while not clock.done:
        loss = diffusion_loss(denoiser, scheduler, *draw_latents(latents, slices.present, args.train_batch_size))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.unet.parameters(), args.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(model.unet.parameters())
        clock.tick()
        bar.update(min(100 * clock.progress, 100) - bar.n)
        if clock.step % 10 == 0:
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            bar.set_postfix_str(f"step {clock.step}, loss {average:.4f}")
            accelerator.log({"train/loss": loss.item()}, step=clock.step)
        if args.validation_steps and clock.step % args.validation_steps == 0 and is_main:
            with averaged_weights(model.unet, ema):
                figures = {"v-loss": validation_loss(model, held_out_latents, held_out.present)}
                figures |= selection.offer(model, clock)
                path = sheets / f"step-{clock.step:06d}.png"
                draw_sheet(model, SHEET_SUBJECTS, args.seed, path)
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
            ema.copy_to(model.unet.parameters())
        model = finish(
            model,
            selection,
            clock,
            args,
            accelerator,
            validation_set,
            "Plain latent diffusion of brain MRI",
            f"A class-conditional latent diffusion model (Rombach et al. 2022) that draws {', '.join(train_set.modalities)} "
            f"one by one at {args.resolution}x{args.resolution}, without a mask.",
            {
                "autoencoder parameters": round(parameters[0] * 1e6),
                "denoiser parameters": round(parameters[1] * 1e6),
                "PSNR of held-out images (dB)": rebuilding_psnr(model, held_out),
            },
        )
        if args.push_to_hub:
            print(push_folder(output_dir, args))
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
