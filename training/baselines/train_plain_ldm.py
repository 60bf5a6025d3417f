"""Train a plain latent diffusion model, DLDM without disentanglement, on the same data, split and clock as train_ldm.py.

    accelerate launch training/baselines/train_plain_ldm.py                                 # simulated subjects, 64x64
    accelerate launch training/baselines/train_plain_ldm.py --dataset DATA --output_dir OUT # your scans

First the autoencoder, then the denoiser, in one run: --autoencoder_fraction of --max_train_minutes goes to the first. OUT then
holds the model of the step with the lowest validation KID, to be loaded by `PlainLDM.from_pretrained(OUT)`, its card,
samples.png, selection.json, the finished autoencoder in first_stage, and the last checkpoints, from which
`--resume_from_checkpoint latest` goes on.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm
from baseline_utils import Extractor, Selection, Slices, finish, random_images, read_slices, validate
from plain_ldm import PlainLDM, diffusion_loss

from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.denoiser import make_scheduler
from dldm_pipeline.hub import write_pretrained
from dldm_pipeline.losses import edge_loss, spectrum_loss
from dldm_pipeline.metrics.reconstruction import psnr
from dldm_pipeline.optimization import MuonAdamW
from dldm_pipeline.training_args import PlainLDMArgs, parse_args
from dldm_pipeline.training_state import TrainingClock
from dldm_pipeline.training_utils import find_dataset, fit, make_accelerator, open_split, update

PRESETS = Path(__file__).parents[1] / "configs"
VALIDATION_IMAGES = 256  # for the validation loss
# The weights of train_autoencoder.py, so that no system has the sharper loss.
WEIGHTS = {"l1": 1.0, "mse": 30.0, "edge": 0.5, "spectrum": 0.05, "kl": 1e-4}


def build_model(args: PlainLDMArgs, modalities: tuple[str, ...]) -> PlainLDM:
    """The untrained model; a ValueError where sizes and widths do not fit together."""
    names = ("patch_size", "autoencoder_channels", "autoencoder_layers", "latent_channels")
    names += ("block_out_channels", "layers_per_block", "attention_sizes", "attention_head_dim")
    return PlainLDM(modalities, args.resolution, **{name: getattr(args, name) for name in names})


class AutoencoderLoss(torch.nn.Module):
    """The weighted loss of the autoencoder; a module, so that processes share gradients through its forward."""

    def __init__(self, model: PlainLDM):
        super().__init__()
        self.autoencoder = model.autoencoder
        self.functions = model.encode, model.decode

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, H, W) in [0, 1] to a scalar."""
        encode, decode = self.functions
        posterior = encode(images)
        rebuilt = decode(posterior.sample())
        terms = {
            "l1": F.l1_loss(rebuilt, images),
            "mse": F.mse_loss(rebuilt, images),
            "edge": edge_loss(rebuilt, images),
            "spectrum": spectrum_loss(rebuilt, images, rings=images.shape[-1] // 4),
            "kl": posterior.kl().mean() / posterior.mean[0].numel(),
        }
        return sum(WEIGHTS[name] * term for name, term in terms.items())


def train_autoencoder(
    model: PlainLDM, slices: Slices, held_out: Slices, args: PlainLDMArgs, accelerator: Accelerator
) -> None:
    """Train `model.autoencoder`, measure its latents, and write the model to `first_stage` in the output folder."""
    folder = Path(args.output_dir) / "first_stage"
    minutes = args.max_train_minutes and args.max_train_minutes * args.autoencoder_fraction
    resume = args.resume_from_checkpoint and "latest"
    stage = replace(args, output_dir=str(folder), max_train_steps=args.autoencoder_steps, max_train_minutes=minutes)
    stage.resume_from_checkpoint = resume
    optimizer = MuonAdamW(model.autoencoder, args.autoencoder_learning_rate)
    objective, optimizer = accelerator.prepare(AutoencoderLoss(model), optimizer)

    def step(number: int) -> dict[str, torch.Tensor]:
        loss = objective(random_images(slices, args.autoencoder_batch_size))
        update(accelerator, loss, model.autoencoder.parameters(), optimizer)
        return {"loss": loss}

    clock = fit(accelerator, stage, model.autoencoder, objective, [optimizer], step, name="autoencoder")
    measure_latents(model, slices)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_pretrained(model.save_pretrained, folder)
        print(f"autoencoder: {clock.step} steps, PSNR of held-out images {rebuilding_psnr(model, held_out):.2f} dB")
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # checkpoints of the second stage hold the second stage only


@torch.no_grad()
def encode_slices(model: PlainLDM, slices: Slices, mirror: bool) -> torch.Tensor:
    """Posterior modes (N, V, n, c, h, w) float16 of every modality, missing ones too; V = 2 with the mirror image."""
    results = []
    for part in tqdm(slices.images.split(16), desc="encoding slices", unit="batch"):
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
    rebuilt = torch.cat([model.decode(model.encode(part).mode()) for part in images.split(32)])
    return float(psnr(images, rebuilt.clamp(0, 1)).mean())


def random_latents(latents: torch.Tensor, present: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents (B, c, h, w) and labels (B,) from (N, V, n, c, h, w); never of a missing modality."""
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
    scheduler, parts = make_scheduler(), chosen.split(64)
    losses = [diffusion_loss(model, scheduler, latents[part].float(), labels[part], generator) for part in parts]
    return float(torch.stack(losses).mean())


def main(argv: list[str] | None = None, extractor: Extractor | None = None) -> None:
    """Train as the command line says. `extractor` gives the features for KID; by default those of the evaluation."""
    args = parse_args(PlainLDMArgs, __doc__, PRESETS, argv)
    accelerator = make_accelerator(args, "dldm-plain-ldm")
    is_main, device = accelerator.is_main_process, accelerator.device
    data = find_dataset(accelerator, args, args.resolution, args.modalities)
    train_set = open_split(data, "train", args.resolution, args.modalities)
    validation_set = open_split(data, "validation", args.resolution, args.modalities)
    model = build_model(args, train_set.modalities)
    slices, held_out = (
        read_slices(split, num_workers=args.dataloader_num_workers, device=device)
        for split in (train_set, validation_set)
    )
    selection = Selection(args, held_out, train_set.modalities, extractor) if is_main else None
    parameters = [part.num_parameters() for part in (model.autoencoder, model.unet)]
    accelerator.print(
        f"{len(train_set)} training and {len(validation_set)} validation slices of {', '.join(train_set.modalities)}; "
        f"autoencoder {parameters[0] / 1e6:.2f} M, denoiser {parameters[1] / 1e6:.2f} M parameters"
    )

    first_stage = Path(args.output_dir) / "first_stage"
    model.to(device, memory_format=torch.channels_last)
    if args.resume_from_checkpoint and (first_stage / "config.json").is_file():
        done = PlainLDM.from_pretrained(first_stage)
        model.autoencoder.load_state_dict(done.autoencoder.state_dict())
        model.register_to_config(latents_mean=done.config.latents_mean, latents_std=done.config.latents_std)
    else:
        train_autoencoder(model, slices, held_out, args, accelerator)
    model.autoencoder.eval().requires_grad_(False)
    latents = model.normalize(encode_slices(model, slices, mirror=True)).half()
    held_out_latents = model.normalize(encode_slices(model, held_out, mirror=False)).half()

    scheduler = make_scheduler()
    denoiser, optimizer = accelerator.prepare(model, MuonAdamW(model.unet, args.learning_rate))

    def step(number: int) -> dict[str, torch.Tensor]:
        loss = diffusion_loss(denoiser, scheduler, *random_latents(latents, slices.present, args.train_batch_size))
        update(accelerator, loss, model.unet.parameters(), optimizer)
        return {"loss": loss}

    def validate_denoiser(path: Path, clock: TrainingClock) -> dict[str, float]:
        figures = {"v-loss": validation_loss(model, held_out_latents, held_out.present)}
        return figures | validate(selection, model, clock, args.seed, path)

    minutes = args.max_train_minutes and args.max_train_minutes * (1 - args.autoencoder_fraction)
    stage = replace(args, max_train_minutes=minutes)
    clock = fit(accelerator, stage, model.unet, denoiser, [optimizer], step, validate_denoiser, name="denoiser")
    if is_main:
        finish(
            model,
            selection,
            clock,
            args,
            validation_set,
            "Plain latent diffusion of brain MRI",
            "A class-conditional latent diffusion model (Rombach et al. 2022) that generates "
            f"{', '.join(train_set.modalities)} one by one at {args.resolution}x{args.resolution}, without a mask.",
            {
                "autoencoder parameters": parameters[0],
                "denoiser parameters": parameters[1],
                "PSNR of held-out images (dB)": rebuilding_psnr(model, held_out),
            },
            len(train_set),
        )
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
