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

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel

from dldm_pipeline import BUNDLED_CHECKPOINT, DisentangledAutoencoder, DLDMPipeline
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.sheet import evenly_spaced_rows, subjects_sheet
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.denoiser import make_sampler, make_scheduler, make_unet, stratified_timesteps
from dldm_pipeline.encoding import Latents, encode_dataset
from dldm_pipeline.hub import write_model_card, write_pretrained
from dldm_pipeline.optimization import MuonAdamW
from dldm_pipeline.training_args import LDMArgs, parse_args
from dldm_pipeline.training_utils import (
    TrainingClock,
    find_dataset,
    fit,
    make_accelerator,
    open_split,
    transfer_rows,
    update,
)

PRESETS = Path(__file__).parent / "configs"
VALIDATION_SUBJECTS = 128  # for the validation loss
SHEET_SUBJECTS = 4  # generated in a validation picture


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def load_autoencoder(args: LDMArgs) -> tuple[DisentangledAutoencoder, Path]:
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


def load_unet(args: LDMArgs, autoencoder: DisentangledAutoencoder) -> UNet2DModel:
    """A new denoiser, or the one of `--init_from` with its labels turned to this autoencoder's modalities.

    Raises:
        FileNotFoundError: `--init_from` holds none.
        ValueError: it does not fit this autoencoder's latents, or widths and heads do not divide.
    """
    if args.init_from is None:
        return make_unet(
            autoencoder.config.structure_channels + autoencoder.config.style_channels,
            autoencoder.latent_size,
            2 * (autoencoder.num_modalities + 1),
            args.block_out_channels,
            args.layers_per_block,
            args.attention_sizes,
            args.attention_head_dim,
            dropout=args.dropout,
        )
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
        DLDMPipeline(autoencoder, unet, make_sampler(), args.style_grid)
    except ValueError as error:
        raise ValueError(f"--init_from {args.init_from}: {error}") from error
    return unet


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def sample_batch(
    latents: Latents,
    size: int,
    scheduler: DDIMScheduler,
    args: LDMArgs,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Random subjects, modalities, times, noise and labels of one batch of pairs.

    A missing modality is never chosen.

    Returns:
        `structure` (B, c_s, h, w), `style` (B, c_t), their noise `structure_noise` and `style_noise`,
        `timesteps` (B,), `conditional` (B,) bool, the first rows, and `labels` (B,): m joint, n its null, n + 1 + m
        conditional, 2 n + 1 its null.
    """
    device, n = latents.structure.device, latents.present.shape[1]

    def uniform() -> torch.Tensor:
        return torch.rand(size, generator=generator, device=device)

    subject = (uniform() * len(latents.present)).long()
    view = (uniform() * latents.structure.shape[1]).long()
    modality = torch.multinomial(latents.present[subject].float(), 1, generator=generator)[:, 0]
    conditional = torch.arange(size, device=device) < round(args.conditional_fraction * size)
    null = uniform() < args.label_dropout
    structure, style = latents.structure[subject, view], latents.style[subject, view, modality]
    return {
        "structure": structure,
        "style": style,
        "structure_noise": torch.randn(structure.shape, generator=generator, device=device),
        "style_noise": torch.randn(style.shape, generator=generator, device=device),
        "timesteps": stratified_timesteps(size, scheduler.config.num_train_timesteps, device, generator),
        "conditional": conditional,
        "labels": torch.where(null, n, modality) + conditional * (n + 1),
    }


def pair_errors(
    unet: torch.nn.Module, scheduler: DDIMScheduler, batch: dict[str, torch.Tensor], style_grid: int | None = None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Mean squared errors of the predicted velocity, (B,) for the structure and (B,) for the style.

    With `style_grid` the pairs are conditional: their structures are shown clean, averaged to this height and width, and
    are no target (`None`). A style vector is noised as a vector, shown as a flat map, and read back as the mean over the
    map, as in the pipeline.
    """
    structure, style, t = batch["structure"], batch["style"], batch["timesteps"]
    if style_grid:
        shown = F.adaptive_avg_pool2d(structure, style_grid)
    else:
        shown = scheduler.add_noise(structure, batch["structure_noise"], t)
    noisy_style = scheduler.add_noise(style, batch["style_noise"], t)
    noisy_style = noisy_style[:, :, None, None].expand(-1, -1, *shown.shape[2:])
    sample = torch.cat([shown, noisy_style], dim=1).contiguous(memory_format=torch.channels_last)
    velocity = unet(sample, t, class_labels=batch["labels"]).sample.float()
    structure_velocity, style_velocity = velocity.split([structure.shape[1], style.shape[1]], dim=1)
    style_target = scheduler.get_velocity(style, batch["style_noise"], t)
    style_error = ((style_velocity.mean(dim=(2, 3)) - style_target) ** 2).mean(dim=1)
    if style_grid:
        return None, style_error
    structure_target = scheduler.get_velocity(structure, batch["structure_noise"], t)
    return ((structure_velocity - structure_target) ** 2).flatten(1).mean(dim=1), style_error


def training_loss(
    unet: torch.nn.Module, scheduler: DDIMScheduler, batch: dict[str, torch.Tensor], args: LDMArgs
) -> torch.Tensor:
    """The loss of a batch, a scalar: velocities' errors, all times weighted alike."""
    errors = []
    for conditional, grid in ((False, None), (True, args.style_grid)):
        rows = batch["conditional"] == conditional
        if rows.any():
            structure_error, style_error = pair_errors(unet, scheduler, {k: v[rows] for k, v in batch.items()}, grid)
            errors.append(args.style_weight * style_error + (0.0 if structure_error is None else structure_error))
    return torch.cat(errors).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_figures(
    unet: torch.nn.Module, scheduler: DDIMScheduler, batch: dict[str, torch.Tensor], style_grid: int
) -> dict[str, float]:
    """Unweighted v-losses of held-out subjects, always the same ones at the same times and with the same noise."""
    unet.eval()
    errors = []
    for part in zip(*(value.split(32) for value in batch.values()), strict=True):
        part = dict(zip(batch, part, strict=True))
        errors.append(pair_errors(unet, scheduler, part))
        labels = part["labels"] + unet.config.num_class_embeds // 2
        errors.append(pair_errors(unet, scheduler, part | {"labels": labels}, style_grid))
    unet.train()
    return {
        "structure v-loss": torch.cat([structure for structure, _ in errors[::2]]).mean().item(),
        "style v-loss": torch.cat([style for _, style in errors[1::2]]).mean().item(),
    }


def generated_sheet(
    pipeline: DLDMPipeline, num_subjects: int, seed: int, path: Path, real: SliceDataset | None = None
) -> None:
    """Generate subjects (seeds `seed`, `seed` + 1, ...) and save them as a contact sheet, above as many real ones."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_subjects)]
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(num_subjects, generator=generators, output_type="np")
    groups = {"generated": (output.images, output.masks)}
    if real is not None:
        groups["real"] = evenly_spaced_rows(real, num_subjects)
    subjects_sheet(path, output.modalities, groups)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    args = parse_args(LDMArgs, __doc__, PRESETS, argv)
    autoencoder, autoencoder_folder = load_autoencoder(args)
    torch.manual_seed(args.seed)
    unet = load_unet(args, autoencoder)

    accelerator = make_accelerator(args, "dldm-ldm")
    output_dir, is_main = Path(args.output_dir), accelerator.is_main_process
    size, modalities = autoencoder.config.sample_size, list(autoencoder.config.modalities)
    data = find_dataset(accelerator, args, size, modalities)
    train_set, validation_set = (open_split(data, split, size, modalities) for split in ("train", "validation"))
    autoencoder.to(accelerator.device)
    with accelerator.main_process_first():
        options = (args.cache_dir, [data, autoencoder_folder], args.dataloader_num_workers, is_main)
        train_latents = encode_dataset(train_set, autoencoder, True, *options).to(accelerator.device)
        validation_latents = encode_dataset(validation_set, autoencoder, False, *options).to(accelerator.device)
    accelerator.print(
        f"{len(train_set)} training and {len(validation_set)} validation slices of {', '.join(modalities)}; "
        f"denoiser: {unet.num_parameters() / 1e6:.2f} M parameters, latents {tuple(train_latents.structure.shape[2:])}"
    )
    scheduler = make_scheduler()
    # The fixed validation batch: every label is a plain modality, and the two halves of the loss both see it.
    plain = replace(args, conditional_fraction=0.0, label_dropout=0.0)
    generator = torch.Generator(accelerator.device).manual_seed(0)
    validation_batch = sample_batch(validation_latents, VALIDATION_SUBJECTS, scheduler, plain, generator)

    unet.to(accelerator.device, memory_format=torch.channels_last).train()
    model, optimizer = accelerator.prepare(unet, MuonAdamW(unet, args.learning_rate))

    def step(number: int) -> dict[str, torch.Tensor]:
        loss = training_loss(
            model, scheduler, sample_batch(train_latents, args.train_batch_size, scheduler, args), args
        )
        update(accelerator, loss, unet.parameters(), optimizer)
        return {"loss": loss}

    def validate(path: Path, clock: TrainingClock) -> dict[str, float]:
        pipeline = DLDMPipeline(autoencoder, unet, make_sampler(), args.style_grid)
        generated_sheet(pipeline, SHEET_SUBJECTS, args.seed, path)
        return validation_figures(unet, scheduler, validation_batch, args.style_grid)

    clock = fit(accelerator, args, unet, model, [optimizer], step, validate)
    if is_main:
        figures = validation_figures(unet, scheduler, validation_batch, args.style_grid)
        pipeline = DLDMPipeline(autoencoder, unet.eval(), make_sampler(), args.style_grid)
        write_pretrained(pipeline.save_pretrained, output_dir)
        generated_sheet(pipeline, 2 * SHEET_SUBJECTS, args.seed, output_dir / "samples.png", validation_set)
        write_card(args, clock, unet, train_set, validation_set, figures)
        print(f"{output_dir}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    accelerator.end_training()


def write_card(
    args: LDMArgs,
    clock: TrainingClock,
    unet: UNet2DModel,
    train_set: SliceDataset,
    validation_set: SliceDataset,
    figures: dict[str, float],
) -> None:
    """Write the pipeline's model card."""
    output_dir, size = Path(args.output_dir), train_set.image_size
    source = "simulated subjects" if args.dataset is None else f"the data set `{Path(args.dataset).name}`"
    write_model_card(
        output_dir,
        "Disentangled latent diffusion of brain MRI",
        f"A `DLDMPipeline` that generates aligned brain slices of one synthetic subject in {', '.join(train_set.modalities)} "
        f'at {size}x{size} with the tumour mask, after Na et al., "Generation of Multi-modal Brain Tumor MRIs with '
        'Disentangled Latent Diffusion Model" (MIDL 2023).\n\n'
        "```python\nimport torch\nfrom dldm_pipeline import DLDMPipeline\n\n"
        f'pipe = DLDMPipeline.from_pretrained("{output_dir.name}")\n'
        "output = pipe(num_subjects=8, generator=torch.Generator().manual_seed(0))\n```",
        {**figures, "validation slices": len(validation_set)},
        {
            "steps": clock.step,
            "training pairs seen per process": clock.step * args.train_batch_size * args.gradient_accumulation_steps,
            "minutes": round(clock.elapsed / 60, 1),
            "denoiser parameters": unet.num_parameters(),
            **args.shown(),
        },
        {"generated subjects above, real ones below": "samples.png"},
        tags=["diffusers", "DLDMPipeline"],
        training_data=f"{len(train_set)} slices of {source}.",
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
