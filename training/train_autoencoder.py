"""Train the disentangled autoencoder on a folder written by prepare_dataset.py, or on simulated subjects.

    accelerate launch training/train_autoencoder.py                                  # simulated subjects, small preset
    accelerate launch training/train_autoencoder.py --dataset DATA --output_dir OUT  # your scans
    accelerate launch training/train_autoencoder.py --dataset DATA --denoiser PIPELINE   # once more after train_ldm.py

The loss is that of Na et al. (MIDL 2023), with its four strategies, and what this package adds: structure from any subset of
modalities, appearance curves exchanged with the styles, and the tumour mask decoded from the structure. With `--denoiser`,
`--patch_weight` also compares patches of new subjects with those of real ones, `--perceptual_weight` what a network that
knows photographs sees in them, and with `--adversarial_weight` a discriminator learns to tell their detail apart.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from dldm_pipeline import DisentangledAutoencoder, DLDMPipeline
from dldm_pipeline.autoencoder_disentangled import DisentangledDecoderOutput
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.sheet import contact_sheet
from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.discriminator import DetailDiscriminator
from dldm_pipeline.hub import write_model_card
from dldm_pipeline.muon import make_optimizers
from dldm_pipeline.perceptual import PerceptualDistance
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
    noise_deviation,
    parse_args,
    patch_distance,
    patch_grid,
    push_folder,
    radial_power,
    save_checkpoint,
    start_trackers,
    to_channels,
    transfer_rows,
    write_pretrained,
)

PRESETS = Path(__file__).parent / "configs"
DENOISED_FROM = 0.5  # latest time a structure is denoised from, of the schedule's length: its anatomy stays its own
DENOISING_STEPS = 4
GENERATING_STEPS = 25
PATCH_POOL = 24  # subjects, of this step and those before, whose patches are compared
NOISE_SUBJECTS = 1024  # real ones whose noise is measured
PERCEPTUAL_SUBJECTS = 512  # real ones whose mean features those of new ones are to have


def build_parser() -> TrainingParser:
    parser = TrainingParser(description=__doc__, presets=PRESETS, default_config="autoencoder_small")
    add_training_arguments(parser)
    parser.set_defaults(output_dir="outputs/autoencoder")
    model = parser.add_argument_group("model")
    model.add_argument("--modalities", nargs="+", help="names and order; by default those of the data set")
    model.add_argument("--structure_channels", type=int, default=16, help="channels of z_struct")
    model.add_argument("--style_channels", type=int, default=8, help="channels of each z_style")
    model.add_argument("--style_type", choices=["vector", "map"], default="vector", help="a style vector, or a map")
    model.add_argument("--patch_size", type=int, default=4, help="pixels of a patch's side, made channels first of all")
    model.add_argument(
        "--encoder_channels",
        type=int,
        nargs="+",
        default=[32, 96],
        help="widths of the encoder's grids, each half the last",
    )
    model.add_argument("--encoder_blocks", type=int, default=1, help="residual blocks on each grid of the encoder")
    model.add_argument(
        "--decoder_channels", type=int, nargs="+", default=[128, 64], help="widths of the decoder's grids, as many"
    )
    model.add_argument("--decoder_blocks", type=int, default=2, help="residual blocks on each grid of the decoder")
    model.add_argument("--head_channels", type=int, default=64, help="width of the part that runs once an image")
    model.add_argument(
        "--init_from",
        help="autoencoder or pipeline folder to start from, of whatever modalities and size; of the arguments above only "
        "--encoder_blocks and --decoder_blocks count then: further blocks start as the identity",
    )
    model.add_argument(
        "--freeze_encoder",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train the decoder alone: latents stay what they are, and so does a denoiser trained on them",
    )
    model.add_argument(
        "--denoiser",
        help="pipeline folder to sharpen: the decoder learns to draw what its denoiser leaves soft, from structures that the "
        "denoiser draws (half of each batch) or returns from some noise (a quarter). Starts from its autoencoder, freezes "
        "the encoder, and writes the whole pipeline",
    )
    model.add_argument(
        "--generated_subjects",
        type=int,
        default=768,
        help="with --denoiser: new structures to draw before training",
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument("--target_modalities", type=int, default=3, help="modalities decoded each step, drawn at random")
    loss.add_argument("--mix_probability", type=float, default=0.5, help="share of styles taken from another subject")
    loss.add_argument("--subset_probability", type=float, default=0.6, help="share of structures from a random subset")
    loss.add_argument(
        "--structure_noise",
        type=float,
        default=0.0,
        help="largest deviation of noise put on structures, as a share of their own",
    )
    loss.add_argument("--curve_deviation", type=float, default=0.0, help="spread of log gamma of random curves")
    loss.add_argument(
        "--mse_weight", type=float, default=30.0, help="weight of the squared error: thin bright structures"
    )
    loss.add_argument("--edge_weight", type=float, default=0.5, help="weight of the gradient term")
    loss.add_argument("--spectrum_weight", type=float, default=0.05, help="weight of the power spectrum's log ratio")
    loss.add_argument("--mask_weight", type=float, default=0.1, help="weight of cross-entropy plus Dice of the mask")
    loss.add_argument("--agreement_weight", type=float, default=0.3, help="weight of subset structure against full")
    loss.add_argument(
        "--patch_weight",
        type=float,
        default=8.0,
        help="with --denoiser: weight of the distance between patches of new subjects and of real ones; 0 leaves them out",
    )
    loss.add_argument(
        "--perceptual_weight",
        type=float,
        default=0.0,
        help="with --denoiser: weight of the distance between features of new or rebuilt subjects and of real ones, in a "
        'network trained on photographs (needs the "eval" extra); the comparison has 1, and docs/evaluation.md what it gains '
        "and costs",
    )
    loss.add_argument(
        "--adversarial_weight",
        type=float,
        default=0.0,
        help="with --denoiser: weight of a discriminator of fine detail, against texture that comes with the term above; the "
        "comparison has 0.3",
    )
    loss.add_argument("--kl_weight", type=float, default=1e-4, help="weight of the KL term, mean over latent values")
    return parser


def spread(data: SliceDataset, count: int) -> Subset:
    """`count` slices, or all if there are no more, evenly spread over a data set."""
    return Subset(data, torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist())


def draw_subset(present: torch.Tensor) -> torch.Tensor:
    """A random non-empty subset of what is present. (B, n) bool in and out.

    Half of the subsets are one modality alone, the hardest case; in the other half every size is equally likely.
    """
    largest = torch.where(torch.rand(len(present), device=present.device) < 0.5, 1, present.sum(dim=1))
    size = 1 + (torch.rand(len(present), device=present.device) * largest).long()
    order = torch.rand(present.shape, device=present.device).masked_fill(~present, 2.0).argsort(dim=1)
    return (order.argsort(dim=1) < size[:, None]) & present


def foreground_of(images: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """What is not background in at least one of the modalities present: (B, n, H, W) and (B, n) to bool (B, H, W)."""
    return ((images > 0) & present[:, :, None, None]).any(dim=1)


def near_tumour(mask: torch.Tensor) -> torch.Tensor:
    """Pixels no further from the tumour than 8 to 16: mask (B, H, W) to bool (B, H, W)."""
    blocks = F.max_pool2d(F.max_pool2d(mask[:, None].float(), 8), 3, stride=1, padding=1)
    return F.interpolate(blocks, scale_factor=8.0, mode="nearest")[:, 0] > 0


def draw_style_donors(present: torch.Tensor, probability: float) -> torch.Tensor:
    """For each subject and modality, the subject of the batch whose style is used. (B, n) bool in, (B, n) index out.

    Paper, strategy 3: styles are exchanged within one modality only. A donor that lacks the modality is not used.
    """
    own = torch.arange(len(present), device=present.device)[:, None].expand(present.shape)
    donor = torch.rand(present.shape, device=present.device).argsort(dim=0)
    exchanged = torch.rand(present.shape, device=present.device) < probability
    return torch.where(exchanged & present.gather(0, donor), donor, own)


@torch.no_grad()
def denoise_structure(
    pipeline: DLDMPipeline,
    structure: torch.Tensor,
    styles: torch.Tensor,
    present: torch.Tensor,
    start: torch.Tensor,
    num_inference_steps: int,
) -> torch.Tensor:
    """Structures as a pipeline's denoiser returns them: noised to some time, then DDIM steps without noise.

    Args:
        pipeline: of the same latents; its schedule must be a v-prediction one.
        structure: (B, c_s, h, w).
        styles: (B, n, c_t) or (B, n, c_t, h, w).
        present: (B, n) bool; each structure is denoised beside the style of one modality that is there.
        start: (B,) times in [0, 1], of the schedule's length; at 1 nothing is left of the structure given.
        num_inference_steps: DDIM steps from there.

    Returns:
        (B, c_s, h, w), on the scale of `structure`.
    """
    autoencoder, unet = pipeline.autoencoder, pipeline.unet
    c_s, rows = structure.shape[1], torch.arange(len(structure), device=structure.device)
    modality = torch.multinomial(present.float(), 1)[:, 0]
    style = autoencoder.normalize_style(styles)[rows, modality]
    is_vector = style.ndim == 2

    def as_map(values: torch.Tensor) -> torch.Tensor:
        return values[:, :, None, None].expand(-1, -1, *structure.shape[2:]) if is_vector else values

    cumulative = pipeline.scheduler.alphas_cumprod.to(structure)
    z = torch.cat([autoencoder.normalize_structure(structure), as_map(style)], dim=1)
    noise = torch.cat([torch.randn_like(structure), as_map(torch.randn_like(style))], dim=1)
    for step in range(num_inference_steps, 0, -1):
        time = (start * (len(cumulative) - 1) * step / num_inference_steps).long()
        signal = cumulative[time].sqrt()[:, None, None, None]
        deviation = (1 - signal**2).sqrt()
        noisy = (signal * z + deviation * noise).contiguous(memory_format=torch.channels_last)
        velocity = unet(noisy, time, class_labels=modality).sample
        velocity = (
            torch.cat([velocity[:, :c_s], as_map(velocity[:, c_s:].mean(dim=(2, 3)))], 1) if is_vector else velocity
        )
        z, noise = signal * noisy - deviation * velocity, deviation * noisy + signal * velocity
    return autoencoder.denormalize_structure(z[:, :c_s])


@torch.no_grad()
def generate_structures(
    pipeline: DLDMPipeline, num_subjects: int, batch_size: int = 64, show_progress: bool = True
) -> torch.Tensor:
    """New structures (num_subjects, c_s, h, w) that a pipeline's denoiser draws, on the autoencoder's scale."""
    # Not by calling the pipeline, which takes four rows at a time and draws the styles, too.
    config, grid = pipeline.autoencoder.config, (pipeline.autoencoder.latent_size,) * 2
    n, device = pipeline.autoencoder.num_modalities, pipeline.unet.device
    structures = []
    starts = range(0, num_subjects, batch_size)
    for first in tqdm(starts, desc="drawing structures", unit="batch", disable=not show_progress):
        size = min(batch_size, num_subjects - first)
        structure = torch.zeros(size, config.structure_channels, *grid, device=device)
        shape = (config.style_channels, *grid) if config.style_type == "map" else (config.style_channels,)
        styles, present = torch.zeros(size, n, *shape, device=device), torch.ones(size, n, device=device)
        start = torch.ones(size, device=device)
        structures.append(denoise_structure(pipeline, structure, styles, present, start, GENERATING_STEPS))
    return torch.cat(structures)


def add_noise(structure: torch.Tensor, variance: torch.Tensor, largest: float) -> torch.Tensor:
    """Structures (B, c_s, h, w) with noise, of a level that is drawn for each from 0 to `largest`.

    What a denoiser draws is never exact, so nothing that the images need may hang on small differences.

    Source: Yang et al., "Latent Denoising Makes Good Visual Tokenizers" (2025), with additive in place of mixed-in noise.

    Args:
        variance: (1, c_s, 1, 1), of the structures themselves; at level 1 noise has as much.
    """
    level = largest * torch.rand(len(structure), 1, 1, 1, device=structure.device)
    return structure + level * variance.sqrt() * torch.randn_like(structure)


class DisentangledLoss(torch.nn.Module):
    """The unweighted terms of the loss; a module, so that gradients are shared between processes through its forward."""

    def __init__(
        self, autoencoder: DisentangledAutoencoder, args: argparse.Namespace, denoiser: DLDMPipeline | None = None
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.args = args
        self.denoiser = denoiser  # a pipeline is no module: its weights are neither trained nor saved here
        self.generated = None  # (N, c_s, h, w), structures that the denoiser drew
        self.pools = None  # the last subjects, new and real ones, whose patches are compared
        self.perceptual: PerceptualDistance | None = None
        self.discriminator: DetailDiscriminator | None = None
        self.errors = None  # running squared error of each modality

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images, present, args = batch["images"], batch["present"], self.args
        batch_size, n = present.shape
        device = images.device
        foreground = foreground_of(images, present)

        # Two appearances of each anatomy: the donor's intensity curve belongs to the style, so the target follows it.
        gamma = (args.curve_deviation * torch.randn(batch_size, n, 1, 1, device=device)).exp()
        donors = draw_style_donors(present, args.mix_probability)
        rows = torch.arange(n, device=device)
        full, some = self.autoencoder.encode_subsets(images**gamma, [present, draw_subset(present)])
        styles = full.style_dist.sample()[donors, rows]
        targets = images ** gamma[donors, rows]

        from_subset = torch.rand(batch_size, 1, 1, 1, device=device) < args.subset_probability
        structure = torch.where(from_subset, some.structure_dist.sample(), full.structure_dist.sample())
        mode, subset_mode = full.structure_dist.mode().detach(), some.structure_dist.mode()
        variance = mode.var(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
        if args.structure_noise:
            structure = add_noise(structure, variance, args.structure_noise)
        paired = batch_size  # subjects whose images are known, the first of the batch
        if self.generated is not None:
            paired = (batch_size + 1) // 2
            drawn = torch.randint(len(self.generated), (batch_size - paired,), device=device)
            structure = torch.cat([structure[:paired], self.generated[drawn]])
        if self.denoiser is not None:
            part = slice((paired + 1) // 2)
            start = torch.rand(part.stop, device=device) * DENOISED_FROM
            style = full.style_dist.mode()[part]
            denoised = denoise_structure(self.denoiser, structure[part], style, present[part], start, DENOISING_STEPS)
            structure = torch.cat([denoised, structure[part.stop :]])
        # Strategy 4: the loss is averaged over modalities drawn at random, the ones rebuilt worst the most often.
        if self.errors is None:
            self.errors = torch.ones(n, device=device)
        count = n if self.generated is not None else min(args.target_modalities, n)
        chosen = torch.multinomial(self.errors**2, count).sort().values
        output = self.autoencoder.decode(structure, styles[:, chosen])
        # What a decoder cannot foresee is no business of its: what is compared has as much noise as the target.
        noise = noise_deviation(targets, foreground[:, None]).nan_to_num()[..., None, None]
        patch = perceptual = adversarial = grid = torch.zeros((), device=device)
        if self.generated is not None:
            noisy = output.sample + noise * output.foreground.sigmoid()[:, None] * torch.randn_like(output.sample)
            noisy = noisy.clamp(0, 1)
            has_mask = batch["has_mask"][:, None, None]
            decoded = to_channels(noisy, present, output.mask.masked_fill(~has_mask, -100).sigmoid())
            real = to_channels(images, present, batch["mask"] * has_mask)
            if args.patch_weight:
                patch = self.compare_patches(batch, output, decoded[paired:], real)
            grid = patch_grid(decoded[:, :n], self.autoencoder.config.patch_size)
            if self.perceptual is not None:
                perceptual = self.perceptual(noisy, present, images[:paired])
            if self.discriminator is not None:
                adversarial = self.discriminator(decoded, real)

        sample, logits, targets = output.sample[:paired], output.mask[:paired], targets[:paired, chosen]
        foreground, weight = foreground[:paired], present[:paired, chosen, None, None].float()
        weight = weight / weight.mean().clamp(min=1e-6)
        squared = (weight * (sample - targets) ** 2).mean(dim=(0, 2, 3))
        self.errors[chosen] = self.errors[chosen].lerp(squared.detach().float().clamp(min=1e-5), 0.02)

        known, mask = batch["has_mask"][:paired].float()[:, None, None], batch["mask"][:paired]
        probability = logits.sigmoid() * known
        dice = (2 * (probability * mask).sum(dim=(1, 2)) + 1) / ((probability + mask * known).sum(dim=(1, 2)) + 1)
        # Tumour is about 2 % of the pixels: Dice keeps "no tumour" from being an answer, cross-entropy gives it edges.
        cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, weight=known.expand_as(mask))
        # Durall et al. (CVPR 2020): what a squared error leaves out shows as missing power in the outer rings.
        spectrum = torch.zeros((), device=device)
        if args.spectrum_weight:
            noisy = sample + noise[:paired, chosen] * foreground[:, None] * torch.randn_like(targets)
            # To the corners: with the noise in it, a grid that the decoder draws is power too much there.
            ours, theirs = (radial_power(x, rings=round(x.shape[-1] / 2**0.5)) for x in (noisy, targets))
            ratio = (ours + 1e-4).log() - (theirs + 1e-4).log()
            spectrum = (weight[..., 0] * ratio.abs()).mean()
        return {
            "l1": (weight * (sample - targets).abs()).mean(),
            "mse": squared.mean(),
            "edge": sum((weight * (a - b).abs()).mean() for a, b in zip(edges(sample), edges(targets), strict=True)),
            "spectrum": spectrum,
            "patch": patch,
            "perceptual": perceptual,
            "adversarial": adversarial,
            "grid": grid,
            "mask": 10 * cross_entropy + (1 - dice).mean(),
            "foreground": F.binary_cross_entropy_with_logits(output.foreground[:paired], foreground.float()),
            "agreement": ((subset_mode - mode) ** 2 / variance).mean(),
            "kl": full.structure_dist.kl().mean() / mode[0].numel()
            + full.style_dist.kl().mean() / styles[0, 0].numel(),
        }

    def compare_patches(
        self,
        batch: dict[str, torch.Tensor],
        output: DisentangledDecoderOutput,
        new: torch.Tensor,
        real: torch.Tensor,
    ) -> torch.Tensor:
        """Distance between patches of the new subjects, the last rows of the batch, and of the real ones, both as channels.

        All of the brain counts one half, what is near a tumour the other. Subjects of some steps before are compared along,
        for a few alone are no distribution.
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


@torch.no_grad()
def validate(model: DisentangledAutoencoder, loader: DataLoader, path: Path) -> dict[str, float]:
    """PSNR of rebuilt images in dB (range 1), per modality, and a sheet: real, rebuilt, and with exchanged styles."""
    errors, kept = [], []
    for batch in loader:
        images, present = batch["images"], batch["present"]
        posterior = model.encode(images, present)
        structure, styles = posterior.structure_dist.mode(), posterior.style_dist.mode()
        output = model.decode(structure, styles)
        error = ((output.sample.clamp(0, 1) - images) ** 2).mean(dim=(2, 3))
        errors.append(torch.where(present, -10 * error.clamp(min=1e-10).log10(), torch.nan))
        if len(kept) < 1:
            swapped = model.decode(structure, styles.roll(1, dims=0)).sample
            kept.append((images, batch["mask"], output.sample, (output.mask > 0).float(), swapped))
    psnr = torch.cat(errors).nanmean(dim=0)
    images, mask, rebuilt, rebuilt_mask, swapped = (t[:3].float().cpu() for t in kept[0])
    rows = torch.stack([images, rebuilt, swapped], dim=1).flatten(0, 1).clamp(0, 1)
    masks = torch.stack([mask, rebuilt_mask, rebuilt_mask], dim=1).flatten(0, 1)
    names = ["real", "rebuilt", "other style"] * len(images)
    contact_sheet(rows.numpy(), masks.numpy(), list(model.config.modalities), names, path)
    figures = {f"PSNR {name} (dB)": float(v) for name, v in zip(model.config.modalities, psnr, strict=True)}
    return {"PSNR (dB)": float(psnr.mean()), **figures}


@torch.no_grad()
def measure_noise(model: DisentangledAutoencoder, loader: DataLoader) -> None:
    """Measure the deviation of each modality's noise over training slices and keep it in the model's config.

    It is what rebuilt images lack: what is read too much, for fine anatomy looks like noise, is read in them as well.
    """
    total, counts = torch.zeros(model.num_modalities), torch.zeros(model.num_modalities)
    for batch in tqdm(loader, desc="measuring noise", unit="batch"):
        images, present = batch["images"].to(model.device), batch["present"].to(model.device)
        foreground = foreground_of(images, present)[:, None]
        read = noise_deviation(images, foreground).nan_to_num()
        rebuilt = model(images, present).sample
        rebuilt = rebuilt + read[..., None, None] * foreground * torch.randn_like(rebuilt)
        again = noise_deviation(rebuilt.clamp(0, 1), foreground).nan_to_num()
        # Variances add up: by so much as is read too much now, too much was read before.
        total += torch.where(present, 2 * read**2 - again**2, 0).sum(dim=0).cpu()
        counts += present.sum(dim=0).cpu()
    model.register_to_config(noise_level=(total / counts.clamp(min=1)).clamp(min=0).sqrt().tolist())


@torch.no_grad()
def measure_latents(model: DisentangledAutoencoder, loader: DataLoader) -> None:
    """Measure latents over the whole training set and keep the result in the model.

    Mean and deviation of every channel go to the config. How the mean structure of one modality alone differs from that of
    all goes to `structure_offset`, which `encode` takes off: else the structure tells which modality it came from.
    """
    sums = {"structure": [0.0, 0.0, 0], "style": [0.0, 0.0, 0]}
    offset = torch.zeros_like(model.structure_offset, dtype=torch.float64)
    counts = torch.zeros(model.num_modalities, device=model.device)
    model.structure_offset.zero_()
    for batch in tqdm(loader, desc="measuring latents", unit="batch"):
        images, present = batch["images"].to(model.device), batch["present"].to(model.device)
        alone = torch.eye(model.num_modalities, dtype=torch.bool, device=model.device)
        alone = alone[:, None].expand(-1, len(present), -1)
        full, *single = model.encode_subsets(images, [present, *alone])
        structure = full.structure_dist.mode()
        for m, output in enumerate(single):
            offset[m] += (output.structure_dist.mode() - structure)[present[:, m]].double().sum(dim=0)
            counts[m] += present[:, m].sum()
        for kind, z in (("structure", structure), ("style", full.style_dist.mode()[present])):
            z = z.double().transpose(0, 1).flatten(1)
            sums[kind][0] += z.sum(dim=1)
            sums[kind][1] += (z**2).sum(dim=1)
            sums[kind][2] += z.shape[1]
    model.structure_offset.copy_(offset / counts.clamp(min=1)[:, None, None, None])
    for kind, (total, squares, count) in sums.items():
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=1e-12).sqrt()
        model.register_to_config(**{f"{kind}_shift": mean.tolist(), f"{kind}_scale": deviation.tolist()})


def load_autoencoder(args: argparse.Namespace, dataset: SliceDataset) -> DisentangledAutoencoder:
    """The autoencoder of `--init_from`, for the modalities and the image size of the data.

    What it knows of a modality goes over by name; one that it does not know starts from the mean of those that it does.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(args.init_from)
    if (folder / "autoencoder" / "config.json").is_file():
        folder = folder / "autoencoder"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--init_from {args.init_from}: no autoencoder there (no config.json)")
    config = DisentangledAutoencoder.load_config(folder)
    # Not `from_pretrained`, which cannot fill a layer that an older autoencoder was saved without.
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    known, names = list(config["modalities"]), list(dataset.modalities)
    changes = {name: max(getattr(args, name), config[name]) for name in ("encoder_blocks", "decoder_blocks")}
    same_data = (known, config["sample_size"]) == (names, args.resolution)
    if not same_data:
        scales = {f"{kind}_{name}": None for kind in ("structure", "style") for name in ("shift", "scale")}
        changes |= {"modalities": names, "sample_size": args.resolution, "noise_level": None, **scales}
        weights["modality_embedding.weight"] = transfer_rows(weights["modality_embedding.weight"], known, names)
        if "encoder_linear.weight" in weights:
            rows = weights["encoder_linear.weight"].unflatten(1, (len(known), -1)).transpose(0, 1)
            # The map sums over the modalities, and there are now more or fewer of them.
            rows = transfer_rows(rows, known, names) * len(known) / len(names)
            weights["encoder_linear.weight"] = rows.transpose(0, 1).flatten(1, 2).contiguous()
        del weights["structure_offset"]
    model = DisentangledAutoencoder.from_config(config, **changes)
    model.load_state_dict(model.state_dict() | weights)
    return model


def load_denoiser(args: argparse.Namespace, model: DisentangledAutoencoder) -> DLDMPipeline | None:
    """The pipeline of `--denoiser`, or `None` without it.

    Raises:
        ValueError: its latents are not those that the model encodes to.
    """
    if args.denoiser is None:
        return None
    pipeline = DLDMPipeline.from_pretrained(args.denoiser)
    pipeline.unet.to(memory_format=torch.channels_last)
    for name in ("modalities", "sample_size", "structure_shift", "structure_scale", "style_shift", "style_scale"):
        if pipeline.autoencoder.config[name] != model.config[name]:
            raise ValueError(f"--denoiser {args.denoiser}: its autoencoder has another {name} than the one to train")
    return pipeline


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    if args.denoiser is not None:
        # Latents that moved would leave the denoiser behind.
        args.init_from, args.freeze_encoder = args.init_from or args.denoiser, True
    sees_new = args.denoiser is not None and bool(
        args.patch_weight or args.perceptual_weight or args.adversarial_weight
    )
    if sees_new and args.train_batch_size < 2:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size}: give 2 or more, or --patch_weight 0 --perceptual_weight 0 "
            "--adversarial_weight 0"
        )
    accelerator = make_accelerator(args)
    output_dir = Path(args.output_dir)
    data = find_dataset(accelerator, args, args.modalities)
    train_set = SliceDataset(data, "train", args.modalities)
    validation_set = SliceDataset(data, "validation", args.modalities)
    if train_set.image_size != args.resolution:
        raise ValueError(
            f"--resolution {args.resolution}: the slices in {data} are {train_set.image_size} pixels; give that, "
            "or prepare the data set again with --image_size."
        )
    model = (
        load_autoencoder(args, train_set)
        if args.init_from
        else DisentangledAutoencoder(
            modalities=list(train_set.modalities),
            sample_size=args.resolution,
            patch_size=args.patch_size,
            structure_channels=args.structure_channels,
            style_channels=args.style_channels,
            style_type=args.style_type,
            encoder_channels=args.encoder_channels,
            encoder_blocks=args.encoder_blocks,
            decoder_channels=args.decoder_channels,
            decoder_blocks=args.decoder_blocks,
            head_channels=args.head_channels,
        )
    )
    accelerator.print(
        f"{len(train_set)} training and {len(validation_set)} validation slices of {', '.join(train_set.modalities)}; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    )
    loader = DataLoader(
        train_set,
        args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
    )
    validation_subset = spread(validation_set, 64)
    validation_loader = DataLoader(validation_subset, 16)
    if args.freeze_encoder:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("decoder", "style_in", "head", "mask", "foreground")))
    denoiser = load_denoiser(args, model)
    if denoiser is not None:
        denoiser.to(accelerator.device)
    objective, *optimizers, loader, validation_loader = accelerator.prepare(
        DisentangledLoss(model, args, denoiser),
        *make_optimizers(model, args.learning_rate),
        loader,
        validation_loader,
    )
    ema = make_ema(model, args)
    clock = TrainingClock(args.max_train_steps, args.max_train_minutes, accelerator)
    for optimizer in optimizers:
        clock.add_schedule(optimizer, args.lr_scheduler, args.lr_warmup_steps)
    start_trackers(accelerator, "dldm-autoencoder", args)
    clock.start()
    if sees_new:
        accelerator.unwrap_model(objective).generated = generate_structures(
            denoiser, args.generated_subjects, show_progress=accelerator.is_main_process
        )
    if sees_new and args.perceptual_weight:
        real = DataLoader(spread(train_set, PERCEPTUAL_SUBJECTS), 8)
        accelerator.unwrap_model(objective).perceptual = PerceptualDistance(
            real, accelerator.device, show_progress=accelerator.is_main_process
        )
    if sees_new and args.adversarial_weight:
        accelerator.unwrap_model(objective).discriminator = DetailDiscriminator(
            model.num_modalities + 1, accelerator.device
        )
    if args.resume_from_checkpoint:
        load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, clock, ema)

    weights = {
        "l1": 1.0,
        "mse": args.mse_weight,
        "edge": args.edge_weight,
        "spectrum": args.spectrum_weight,
        "patch": args.patch_weight,
        "perceptual": args.perceptual_weight,
        "adversarial": args.adversarial_weight,
        "grid": 20.0,
        "mask": args.mask_weight,
        "foreground": 0.1,
        "agreement": args.agreement_weight,
        "kl": args.kl_weight,
    }
    sheets = output_dir / "validation"
    sheets.mkdir(exist_ok=True)
    bar = tqdm(total=args.max_train_steps, initial=clock.step, unit="step", disable=not accelerator.is_main_process)
    while not clock.done:
        for batch in loader:
            if torch.rand(()) < 0.5:
                batch["images"], batch["mask"] = batch["images"].flip(-1), batch["mask"].flip(-1)
            with accelerator.accumulate(objective):
                terms = objective(batch)
                loss = sum(weights[name] * term for name, term in terms.items())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            if not accelerator.sync_gradients:
                continue
            if ema is not None:
                ema.step(model.parameters())
            clock.tick()
            bar.update()
            if clock.step % 20 == 0:
                values = {name: term.item() for name, term in terms.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                accelerator.log({f"train/{name}": value for name, value in values.items()}, step=clock.step)
            if args.validation_steps and clock.step % args.validation_steps == 0 and accelerator.is_main_process:
                with averaged_weights(model, ema):
                    path = sheets / f"step-{clock.step:06d}.png"
                    figures = validate(model, validation_loader, path)
                bar.write(f"step {clock.step}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))
                accelerator.log({f"validation/{k}": v for k, v in figures.items()}, step=clock.step)
                log_image(accelerator, "validation", Image.open(path), clock.step)
            if args.checkpointing_steps and clock.step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, clock, ema, args.checkpoints_total_limit)
            if clock.done:
                break
    bar.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(model.parameters())
        if not args.freeze_encoder or model.config.structure_scale is None:
            measure_latents(model, DataLoader(train_set, 16, num_workers=args.dataloader_num_workers))
        measure_noise(model, DataLoader(spread(train_set, NOISE_SUBJECTS), 16))
        figures = validate(model, validation_loader, output_dir / "samples.png")
        trained = model if denoiser is None else DLDMPipeline(model, denoiser.unet, denoiser.scheduler)
        write_pretrained(trained.save_pretrained, output_dir)
        write_model_card(
            output_dir,
            "Disentangled autoencoder",
            f"A `DisentangledAutoencoder` for {', '.join(train_set.modalities)} at {args.resolution}x{args.resolution}, "
            f"trained on {len(train_set)} slices.",
            {**figures, "validation slices": len(validation_subset)},
            {name: value for name, value in vars(args).items() if name not in ("hub_token", "output_dir", "dataset")},
            {"real, rebuilt, and rebuilt with another subject's styles": "samples.png"},
        )
        print(f"{output_dir}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))
        if args.push_to_hub:
            print(push_folder(output_dir, args))
    accelerator.end_training()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
