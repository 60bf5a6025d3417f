"""Train the denoiser of a DLDM pipeline in the latent space of a trained autoencoder, and write the whole pipeline.

    accelerate launch training/train_ldm.py                    # simulated subjects, small preset, bundled autoencoder
    accelerate launch training/train_ldm.py --dataset DATA --autoencoder outputs/autoencoder --output_dir OUT
    accelerate launch training/train_ldm.py --config ldm_paper --dataset DATA --autoencoder outputs/autoencoder-256

DATA is a folder written by prepare_dataset.py. Every training slice and its mirror image are encoded once, kept in memory
and in --cache_dir, and read from there by the next run. OUT then holds the pipeline, to be loaded by
`DLDMPipeline.from_pretrained(OUT)`, its model card, samples.png (generated beside real slices) and the last checkpoints,
from which `--resume_from_checkpoint latest` goes on. Without a graphics card set --max_train_minutes: 8 minutes show that
all works, hours give whole brains.
"""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dldm_pipeline import BUNDLED_CHECKPOINT, DisentangledAutoencoder, DLDMPipeline
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.hub import write_model_card
from dldm_pipeline.muon import make_optimizers
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
    transfer_rows,
    write_pretrained,
)

PRESETS = Path(__file__).parent / "configs"
VALIDATION_SUBJECTS = 128  # for the validation loss
SHEET_SUBJECTS = 4  # generated in a validation picture


def build_parser() -> TrainingParser:
    """All arguments of this script."""
    parser = TrainingParser(description=__doc__, presets=PRESETS, default_config="ldm_small")
    add_training_arguments(parser)
    parser.set_defaults(output_dir="outputs/ldm", resolution=None, phantom_subjects=1500, train_batch_size=32)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--autoencoder", help="folder of a trained autoencoder, or of a pipeline that holds one; by default the bundled"
    )
    model.add_argument(
        "--init_from",
        help="pipeline folder whose denoiser to start from, of whatever modalities; without --autoencoder, its "
        "autoencoder too",
    )
    model.add_argument("--block_out_channels", type=int, nargs="+", default=[96, 128, 128], help="width of each grid")
    model.add_argument("--layers_per_block", type=int, default=1, help="residual blocks on each grid")
    model.add_argument(
        "--attention_sizes", type=int, nargs="*", default=[8, 4], help="grids with attention; the coarsest has one more"
    )
    model.add_argument("--attention_head_dim", type=int, default=32, help="channels of one attention head")
    model.add_argument("--dropout", type=float, default=0.0, help="in residual blocks; for small data sets 0.1")
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--conditional_share", type=float, default=0.25, help="of the batch: noised style beside clean structure"
    )
    loss.add_argument("--label_dropout", type=float, default=0.1, help="labels turned to null, for guidance")
    loss.add_argument("--style_weight", type=float, default=0.25, help="of the style's error against the structure's")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Latents
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Latents:
    """Latents of N slices in the denoiser's normalised space, V = 2 views (as it is, mirrored) or 1.

    Attributes:
        structure: (N, V, c_s, h, w), from all modalities present.
        style: (N, V, n, c_t) or (N, V, n, c_t, h, w); of a missing modality it means nothing.
        present: (N, n) bool.
    """

    structure: torch.Tensor
    style: torch.Tensor
    present: torch.Tensor

    def to(self, device: torch.device) -> "Latents":
        """The same on a device, float32."""
        return Latents(self.structure.to(device).float(), self.style.to(device).float(), self.present.to(device))


def load_autoencoder(args: argparse.Namespace) -> tuple[DisentangledAutoencoder, Path]:
    """The autoencoder the arguments name, frozen, and its folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was not trained to the end.
    """
    name, folder = "--autoencoder", args.autoencoder
    if folder is None:
        name, folder = (
            ("--init_from", args.init_from) if args.init_from else ("the bundled pipeline", BUNDLED_CHECKPOINT)
        )
    folder = Path(folder)
    if (folder / "autoencoder" / "config.json").is_file():
        folder = folder / "autoencoder"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} {folder}: no autoencoder there; train one with training/train_autoencoder.py")
    try:
        autoencoder = DisentangledAutoencoder.from_pretrained(folder)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} {folder}: cannot be loaded: {error}") from error
    if autoencoder.config.structure_scale is None or autoencoder.config.style_scale is None:
        raise ValueError(f"{name} {folder}: its config has no latent scales; let train_autoencoder.py run to its end")
    return autoencoder.eval().requires_grad_(False), folder


def open_split(data: str | Path, split: str, autoencoder: DisentangledAutoencoder) -> SliceDataset:
    """A split of the data, with the autoencoder's modalities in its order.

    Raises:
        ValueError: modalities or image size are not the autoencoder's.
    """
    names, size = list(autoencoder.config.modalities), autoencoder.config.sample_size
    try:
        dataset = SliceDataset(data, split, names)
    except ValueError as error:
        raise ValueError(f"the autoencoder knows {', '.join(names)}; {error}") from error
    if dataset.image_size != size:
        raise ValueError(
            f"--dataset {data}: its slices are {dataset.image_size} pixels and the autoencoder takes {size}; prepare "
            f"them again with --image_size {size}, or train an autoencoder on them"
        )
    return dataset


def latents_key(dataset: SliceDataset, data: str | Path, split: str, autoencoder_folder: Path) -> str:
    """A hash that changes when the data or the autoencoder do."""
    digest = hashlib.sha256(f"1 {data} {split} {len(dataset)} {dataset.modalities}".encode())
    for path in sorted(Path(data).rglob("*.parquet")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for index in np.linspace(0, len(dataset) - 1, 8).astype(int):
        digest.update(dataset[index]["images"].numpy().tobytes())
    for path in sorted(autoencoder_folder.glob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_dataset(
    dataset: SliceDataset, autoencoder: DisentangledAutoencoder, mirror: bool, num_workers: int, show_progress: bool
) -> Latents:
    """Posterior modes of every slice, and of its left-right mirror image if wanted, as float16.

    The structure comes from all modalities present.
    """
    loader = DataLoader(dataset, batch_size=16, num_workers=num_workers)
    structure, style, present = [], [], []
    for batch in tqdm(loader, desc="encoding slices", unit="batch", disable=not show_progress):
        there = batch["present"].to(autoencoder.device)
        views = [batch["images"], batch["images"].flip(-1)] if mirror else [batch["images"]]
        posteriors = [autoencoder.encode(view.to(autoencoder.device), there) for view in views]
        z_struct = [autoencoder.normalize_structure(p.structure_dist.mode()) for p in posteriors]
        z_style = [autoencoder.normalize_style(p.style_dist.mode()) for p in posteriors]
        structure.append(torch.stack(z_struct, dim=1).half().cpu())
        style.append(torch.stack(z_style, dim=1).half().cpu())
        present.append(there.cpu())
    return Latents(torch.cat(structure), torch.cat(style), torch.cat(present))


def cached_latents(path: Path, encode: Callable[[], Latents]) -> Latents:
    """Read latents from `path`; if it is not there, call `encode` and write its result there, complete or not at all."""
    if path.is_file():
        return Latents(**load_file(path))
    latents = encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        save_file(vars(latents), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return latents


# ---------------------------------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------------------------------


def build_unet(args: argparse.Namespace, autoencoder: DisentangledAutoencoder) -> UNet2DModel:
    """The denoiser for an autoencoder's latents: input and output are the c_s + c_t channels of a pair.

    Raises:
        ValueError: widths, groups and heads do not divide, or the grid cannot be halved often enough.
    """
    channels = autoencoder.config.structure_channels + autoencoder.config.style_channels
    grid, widths, head = autoencoder.latent_size, args.block_out_channels, args.attention_head_dim
    if grid % 2 ** (len(widths) - 1):
        raise ValueError(
            f"--block_out_channels: {len(widths)} grids, but the latents' {grid} cannot be halved that often"
        )
    groups = max(g for g in (8, 16, 32) if g == 8 or all(width % g == 0 for width in widths))
    for width in widths:
        if width < 1 or width % groups:
            raise ValueError(f"--block_out_channels {width}: must divide by {groups}")
    sizes = [grid // 2**level for level in range(len(widths))]
    attention = [size in args.attention_sizes for size in sizes]
    for width, attends in zip(widths, [*attention[:-1], True], strict=True):
        if attends and width % head:
            raise ValueError(f"--attention_head_dim {head}: does not divide a width of {width}; choose one that does")
    return UNet2DModel(
        sample_size=grid,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=args.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        attention_head_dim=head,
        norm_num_groups=groups,
        dropout=args.dropout,
        num_class_embeds=2 * (autoencoder.num_modalities + 1),
    )


def load_unet(args: argparse.Namespace, autoencoder: DisentangledAutoencoder) -> UNet2DModel:
    """A new denoiser, or the one of `--init_from` with its labels turned to this autoencoder's modalities.

    Raises:
        FileNotFoundError: `--init_from` holds none.
        ValueError: it is of another shape than this autoencoder's latents.
    """
    if args.init_from is None:
        return build_unet(args, autoencoder)
    source = Path(args.init_from)
    if not (source / "unet" / "config.json").is_file():
        raise FileNotFoundError(f"--init_from {args.init_from}: no pipeline there (no unet/config.json)")
    unet = UNet2DModel.from_pretrained(source / "unet")
    known = list(DisentangledAutoencoder.load_config(source / "autoencoder")["modalities"])
    names = list(autoencoder.config.modalities)
    if known != names:
        rows = unet.class_embedding.weight.data.chunk(2)  # joint, conditional; the last row of each is its null
        rows = [transfer_rows(half, [*known, None], [*names, None]) for half in rows]
        unet.class_embedding = torch.nn.Embedding.from_pretrained(torch.cat(rows), freeze=False)
        unet.register_to_config(num_class_embeds=2 * (len(names) + 1))
    unet.register_to_config(sample_size=autoencoder.latent_size)
    try:
        DLDMPipeline(autoencoder, unet, make_scheduler())
    except ValueError as error:
        raise ValueError(f"--init_from {args.init_from}: {error}") from error
    return unet


def make_scheduler() -> DDIMScheduler:
    """Noise schedule of training and default sampler: v-prediction, and no signal left at the last step.

    The cosine schedule (Nichol & Dhariwal 2021) spends its time where these latents need it: edges are decided at a
    signal-to-noise ratio of 10 to 500, which Stable Diffusion's schedule passes in a tenth of its steps.
    """
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def draw_batch(
    latents: Latents,
    size: int,
    scheduler: DDIMScheduler,
    args: argparse.Namespace,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Draw subjects, modalities, times, noise and labels of one batch of pairs.

    A missing modality is never drawn. Times are stratified over the batch, which lowers the variance of the loss.

    Returns:
        `structure` (B, c_s, h, w), `style` (B, c_t) or (B, c_t, h, w), their noise `structure_noise` and `style_noise`,
        `timesteps` (B,), `conditional` (B,) bool, and `labels` (B,): m joint, n its null, n + 1 + m conditional,
        2 n + 1 its null.
    """
    device, n = latents.structure.device, latents.present.shape[1]

    def uniform() -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device)

    subject = (uniform() * len(latents.present)).long()
    view = (uniform() * latents.structure.shape[1]).long()
    modality = torch.multinomial(latents.present[subject].float(), 1, generator=generator)[:, 0]
    conditional = uniform() < args.conditional_share
    null = uniform() < args.label_dropout
    steps = scheduler.config.num_train_timesteps
    strata = torch.randperm(size, generator=generator, device=device)
    structure, style = latents.structure[subject, view], latents.style[subject, view, modality]
    return {
        "structure": structure,
        "style": style,
        "structure_noise": torch.randn(structure.shape, generator=generator, device=device),
        "style_noise": torch.randn(style.shape, generator=generator, device=device),
        "timesteps": ((strata + uniform()) / size * steps).long().clamp(max=steps - 1),
        "conditional": conditional,
        "labels": torch.where(null, n, modality) + conditional * (n + 1),
    }


def pair_errors(
    unet: torch.nn.Module, scheduler: DDIMScheduler, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared errors of the predicted velocity, (B,) for the structure and (B,) for the style.

    A conditional pair shows its structure clean, and its structure's error is no target. A style vector is noised as a
    vector, shown as a flat map, and read back as the mean over the map, as in the pipeline.
    """
    structure, style, t = batch["structure"], batch["style"], batch["timesteps"]
    noisy_structure = scheduler.add_noise(structure, batch["structure_noise"], t)
    noisy_structure = torch.where(batch["conditional"][:, None, None, None], structure, noisy_structure)
    noisy_style = scheduler.add_noise(style, batch["style_noise"], t)
    is_vector = style.ndim == 2
    if is_vector:
        noisy_style = noisy_style[:, :, None, None].expand(-1, -1, *structure.shape[2:])
    sample = torch.cat([noisy_structure, noisy_style], dim=1).contiguous(memory_format=torch.channels_last)
    velocity = unet(sample, t, class_labels=batch["labels"]).sample.float()
    structure_velocity, style_velocity = velocity.split([structure.shape[1], style.shape[1]], dim=1)
    if is_vector:
        style_velocity = style_velocity.mean(dim=(2, 3))
    structure_target = scheduler.get_velocity(structure, batch["structure_noise"], t)
    style_target = scheduler.get_velocity(style, batch["style_noise"], t)
    structure_error = F.mse_loss(structure_velocity, structure_target, reduction="none").flatten(1).mean(dim=1)
    style_error = F.mse_loss(style_velocity, style_target, reduction="none").flatten(1).mean(dim=1)
    return structure_error, style_error


def training_loss(
    unet: torch.nn.Module, scheduler: DDIMScheduler, batch: dict[str, torch.Tensor], args: argparse.Namespace
) -> torch.Tensor:
    """The loss of a batch, a scalar: velocities' errors, all times weighted alike."""
    structure_error, style_error = pair_errors(unet, scheduler, batch)
    error = torch.where(batch["conditional"], 0.0, structure_error) + args.style_weight * style_error
    return error.mean()


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_figures(
    unet: torch.nn.Module, scheduler: DDIMScheduler, batch: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Unweighted v-losses of held-out subjects, always the same ones at the same times and with the same noise."""
    unet.eval()
    errors = []
    for part in zip(*(value.split(32) for value in batch.values()), strict=True):
        part = dict(zip(batch, part, strict=True))
        for conditional in (False, True):
            modality = part["labels"]
            labels = modality + conditional * (unet.config.num_class_embeds // 2)
            flags = torch.full_like(part["conditional"], conditional)
            errors.append(pair_errors(unet, scheduler, {**part, "labels": labels, "conditional": flags}))
    unet.train()
    return {
        "structure v-loss": torch.cat([structure for structure, _ in errors[::2]]).mean().item(),
        "style v-loss": torch.cat([style for _, style in errors[1::2]]).mean().item(),
    }


def draw_sheet(
    pipeline: DLDMPipeline, num_subjects: int, seed: int, path: Path, real: SliceDataset | None = None
) -> None:
    """Generate subjects (seeds `seed`, `seed` + 1, ...) and save them as a contact sheet, above as many real ones."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_subjects)]
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(num_subjects, generator=generators, output_type="np")
    images, masks = [*output.images], [*output.masks]
    names = [f"generated {i + 1}" for i in range(num_subjects)]
    if real is not None:
        for i in np.linspace(0, len(real) - 1, min(num_subjects, len(real))).astype(int):
            item = real[i]
            # The sheet leaves NaN empty.
            images.append(np.where(item["present"][:, None, None], item["images"], np.nan))
            masks.append(item["mask"].numpy())
            names.append(f"real {len(names) - num_subjects + 1}")
    contact_sheet(np.stack(images), np.stack(masks).astype(np.float32), output.modalities, names, path)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(build_parser(), argv)
    for name in ("conditional_share", "label_dropout", "dropout"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be between 0 and 1")
    autoencoder, autoencoder_folder = load_autoencoder(args)
    size = autoencoder.config.sample_size
    if args.resolution not in (None, size):
        raise ValueError(f"--resolution {args.resolution}: the autoencoder in {autoencoder_folder} takes {size}")
    args.resolution = size
    torch.manual_seed(args.seed)
    unet = load_unet(args, autoencoder)

    accelerator = make_accelerator(args)
    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    data = find_dataset(accelerator, args, autoencoder.config.modalities)
    train_set, validation_set = (open_split(data, split, autoencoder) for split in ("train", "validation"))
    autoencoder.to(accelerator.device)
    all_latents = []
    with accelerator.main_process_first():
        for dataset, split, mirror in ((train_set, "train", True), (validation_set, "validation", False)):
            path = Path(args.cache_dir) / f"latents-{latents_key(dataset, data, split, autoencoder_folder)}.safetensors"
            latents = cached_latents(
                path,
                lambda d=dataset, m=mirror: encode_dataset(d, autoencoder, m, args.dataloader_num_workers, is_main),
            )
            all_latents.append(latents.to(accelerator.device))
    train_latents, validation_latents = all_latents
    accelerator.print(
        f"{len(train_set)} training and {len(validation_set)} validation slices of {', '.join(train_set.modalities)}; "
        f"denoiser: {unet.num_parameters() / 1e6:.2f} M parameters, latents {tuple(train_latents.structure.shape[2:])}"
    )

    scheduler = make_scheduler()
    # The fixed validation batch: every label is a plain modality, and the two halves of the loss both see it.
    plain = argparse.Namespace(conditional_share=0.0, label_dropout=0.0)
    generator = torch.Generator(accelerator.device).manual_seed(0)
    validation_batch = draw_batch(validation_latents, VALIDATION_SUBJECTS, scheduler, plain, generator)

    unet.to(accelerator.device, memory_format=torch.channels_last)
    optimizers = make_optimizers(unet, args.learning_rate)
    ema = make_ema(unet, args)
    clock = TrainingClock(args.max_train_steps, args.max_train_minutes, accelerator)
    for optimizer in optimizers:
        clock.add_schedule(optimizer, args.lr_scheduler, args.lr_warmup_steps)
    model, *optimizers = accelerator.prepare(unet, *optimizers)
    if ema is not None:
        ema.to(accelerator.device)
    start_trackers(accelerator, "dldm-ldm", args)
    # Again, because encoding draws random numbers and reading the cache does not.
    set_seed(args.seed, device_specific=accelerator.num_processes > 1)
    clock.start()
    if args.resume_from_checkpoint:
        load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, clock, ema)
    sheets = output_dir / "validation"
    if is_main:
        sheets.mkdir(exist_ok=True)

    model.train()
    bar = tqdm(
        total=100, bar_format="training {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}", disable=not is_main
    )
    bar.update(100 * clock.progress)
    average_loss = None
    while not clock.done:
        with accelerator.accumulate(model):
            batch = draw_batch(train_latents, args.train_batch_size, scheduler, args)
            loss = training_loss(model, scheduler, batch, args)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if not accelerator.sync_gradients:
            continue
        if ema is not None:
            ema.step(unet.parameters())
        clock.tick()
        bar.update(min(100 * clock.progress, 100) - bar.n)
        if clock.step % 10 == 0:
            average_loss = loss.item() if average_loss is None else 0.95 * average_loss + 0.05 * loss.item()
            rate = optimizers[0].param_groups[0]["lr"]
            bar.set_postfix_str(f"step {clock.step}, loss {average_loss:.4f}, learning rate {rate:.1e}")
            accelerator.log({"train/loss": loss.item(), "train/learning_rate": rate}, step=clock.step)
        if args.validation_steps and clock.step % args.validation_steps == 0 and is_main:
            with averaged_weights(unet, ema):
                figures = validation_figures(unet, scheduler, validation_batch)
                path = sheets / f"step-{clock.step:06d}.png"
                draw_sheet(DLDMPipeline(autoencoder, unet, make_scheduler()), SHEET_SUBJECTS, args.seed, path)
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
            ema.copy_to(unet.parameters())
        figures = validation_figures(unet, scheduler, validation_batch)
        pipeline = DLDMPipeline(autoencoder, unet.eval(), make_scheduler())
        write_pretrained(pipeline.save_pretrained, output_dir)
        draw_sheet(pipeline, 2 * SHEET_SUBJECTS, args.seed, output_dir / "samples.png", validation_set)
        write_card(output_dir, args, clock, unet, train_set, validation_set, figures)
        print(f"{output_dir}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        if args.push_to_hub:
            print(push_folder(output_dir, args))
    accelerator.end_training()


def write_card(
    output_dir: Path,
    args: argparse.Namespace,
    clock: TrainingClock,
    unet: UNet2DModel,
    train_set: SliceDataset,
    validation_set: SliceDataset,
    figures: dict[str, float],
) -> None:
    """Write the pipeline's model card."""
    source = "simulated subjects" if args.dataset is None else f"the data set `{Path(args.dataset).name}`"
    samples = clock.step * args.train_batch_size * args.gradient_accumulation_steps
    hidden = ("hub_token", "hub_model_id", "output_dir", "dataset", "cache_dir", "autoencoder", "init_from", "config")
    write_model_card(
        output_dir,
        "Disentangled latent diffusion of brain MRI",
        f"A `DLDMPipeline` that draws aligned brain slices of one synthetic subject in {', '.join(train_set.modalities)} at "
        f'{args.resolution}x{args.resolution} with the tumour mask, after Na et al., "Generation of Multi-modal Brain Tumor '
        f'MRIs with Disentangled Latent Diffusion Model" (MIDL 2023). Trained on {len(train_set)} slices of {source}.\n\n'
        "```python\nimport torch\nfrom dldm_pipeline import DLDMPipeline\n\n"
        f'pipe = DLDMPipeline.from_pretrained("{output_dir.name}")\n'
        "output = pipe(num_subjects=8, generator=torch.Generator().manual_seed(0))\n```",
        {**figures, "validation slices": len(validation_set)},
        {
            "steps": clock.step,
            "training pairs seen per process": samples,
            "minutes": round(clock.elapsed / 60, 1),
            "denoiser parameters": unet.num_parameters(),
            **{name: value for name, value in vars(args).items() if name not in hidden},
        },
        {"generated subjects above, real ones below": "samples.png"},
        tags=["diffusers", "DLDMPipeline"],
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
