"""Subjects per second of the bundled pipeline and of latent diffusion models with diffusers and MONAI, in one alternating run.

    pip install -e ".[bench]"                                            # MONAI; without it, its rows are left out
    python benchmarks/speed.py                                           # 380 TFLOP: an hour at 100 GFLOP/s
    python benchmarks/speed.py --systems ours diffusers_f8 --batch_sizes 1 --rounds 3

One subject is five sequences of 128x128. In each round every system draws the same number of subjects, one system after the
other, so that a machine that becomes slower does so for all. The first round is a warm-up and is not counted. The table has
the median of the rounds and, in brackets, lowest to highest; ratios are taken within a round. Nothing else should run.

Our pipeline also draws the mask, and its five sequences show one anatomy. The other models draw five unrelated images and no
mask. They have a denoiser of the same size as ours, a small autoencoder, and random weights, on which time does not depend.

Writes OUTPUT/speed.md and OUTPUT/speed.json.
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.files import write_text
from dldm_pipeline.denoiser import make_sampler, make_scheduler

STYLE_GRID = 4
NOTE = "The other systems draw five unrelated images for a subject and no mask; their weights are random."
OTHER_STEPS = (10, 50)  # of the other systems
LATENT_CHANNELS = 4
AUTOENCODER_CHANNELS = (32, 64, 64, 64)  # factor 8; one level fewer is factor 4
PEAK_SHAPES = ((8, 128, 64), (4, 256, 64), (8, 256, 32), (16, 512, 16))  # images, channels in and out, height and width


@dataclass(frozen=True)
class System:
    """A row of the table.

    Args:
        name: of the models.
        steps: denoising steps, as the table shows them.
        denoiser_parameters, autoencoder_parameters: their numbers.
        sample: draws that many subjects.
    """

    name: str
    steps: str
    denoiser_parameters: int
    autoencoder_parameters: int
    sample: Callable[[int], torch.Tensor]

    @property
    def row(self) -> str:
        """Its name among all rows."""
        return f"{self.name}, {self.steps} steps"


def load_pipeline(checkpoint: Path, style_grid: int | None) -> DLDMPipeline:
    """The pipeline of a folder, rebuilt with a `style_grid`, silent."""
    pipeline = DLDMPipeline(**DLDMPipeline.from_pretrained(checkpoint).components, style_grid=style_grid)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_system(name: str, pipeline: DLDMPipeline, num_steps: tuple[int, int], sample: Callable) -> list[System]:
    """The row of a pipeline."""
    parameters = pipeline.unet.num_parameters(), pipeline.autoencoder.num_parameters()
    return [System(name, "{} + {}".format(*num_steps), *parameters, sample)]


def ours(checkpoint: Path) -> list[System]:
    """The pipeline with its defaults and a coarse grid in the styles' steps.

    The bundled denoiser was trained without `style_grid`. That matters for the quality of the styles and not for the time.
    """
    pipeline = load_pipeline(checkpoint, STYLE_GRID)
    pipeline.scheduler = make_sampler()
    defaults = inspect.signature(pipeline.__call__).parameters
    steps = tuple(defaults[name].default for name in ("num_inference_steps", "num_style_inference_steps"))
    return our_system("ours", pipeline, steps, lambda count: pipeline(count, output_type="pt").images)


def ours_full_grid(checkpoint: Path) -> list[System]:
    """The pipeline with all its steps at the full latent size and all subjects in one batch, DDIM."""
    pipeline = load_pipeline(checkpoint, None)
    pipeline.scheduler = make_scheduler()

    def sample(count: int) -> torch.Tensor:
        steps = {"num_inference_steps": 10, "num_style_inference_steps": 10}
        return pipeline(count, batch_size=count, output_type="pt", **steps).images

    return our_system("ours, full grid, DDIM", pipeline, (10, 10), sample)


def decode_by_subject(decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, n: int) -> torch.Tensor:
    """Decode latents of many subjects, n images at a time: 160 images at once take more than twice the time on a CPU."""
    return torch.cat([decode(part) for part in latents.split(n)])


@torch.no_grad()
def diffusers_ldm(checkpoint: Path) -> list[System]:
    """diffusers' `AutoencoderKL` of factor 8 and a `UNet2DModel` of our denoiser's widths, told the modality by a label."""
    ours = DLDMPipeline.from_pretrained(checkpoint)
    n, size = len(ours.autoencoder.config.modalities), ours.autoencoder.config.sample_size // 8
    latent = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    unet = UNet2DModel.from_config(ours.unet.config, sample_size=size, num_class_embeds=n, **latent).eval()
    autoencoder = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * len(AUTOENCODER_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(AUTOENCODER_CHANNELS),
        block_out_channels=AUTOENCODER_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
    ).eval()
    scheduler = make_scheduler()

    @torch.no_grad()
    def sample(count: int, steps: int) -> torch.Tensor:
        latents, labels = torch.randn(count * n, LATENT_CHANNELS, size, size), torch.arange(n).repeat(count)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            latents = scheduler.step(unet(latents, t, class_labels=labels).sample, t, latents).prev_sample
        images = decode_by_subject(lambda part: autoencoder.decode(part).sample, latents, n)
        return images.view(count, n, *images.shape[2:]).clamp(0, 1)

    parameters = unet.num_parameters(), autoencoder.num_parameters()
    return [System("diffusers f8, DDIM", str(k), *parameters, partial(sample, steps=k)) for k in OTHER_STEPS]


def monai_ldm(checkpoint: Path, factor: int) -> list[System]:
    """MONAI's `AutoencoderKL`, `DiffusionModelUNet` of our denoiser's widths and `LatentDiffusionInferer`.

    Raises:
        ImportError: MONAI is missing.
    """
    try:
        import einops  # noqa: F401  MONAI misses it only when a network is built
        from monai.inferers import LatentDiffusionInferer
        from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL
        from monai.networks.nets import DiffusionModelUNet
        from monai.networks.schedulers import DDIMScheduler
    except ImportError as error:
        raise ImportError(f'monai_f{factor} is left out: {error}; `pip install -e ".[bench]"` brings it.') from error

    ours = DLDMPipeline.from_pretrained(checkpoint)
    config, n = ours.unet.config, len(ours.autoencoder.config.modalities)
    size = ours.autoencoder.config.sample_size // factor
    channels = AUTOENCODER_CHANNELS[: {8: 4, 4: 3}[factor]]
    unet = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_res_blocks=config.layers_per_block,
        channels=config.block_out_channels,
        attention_levels=["Attn" in block for block in config.down_block_types],
        norm_num_groups=config.norm_num_groups,
        num_head_channels=config.attention_head_dim,
        num_class_embeds=n,
    ).eval()
    autoencoder = MonaiAutoencoderKL(
        spatial_dims=2,
        num_res_blocks=1,
        channels=channels,
        attention_levels=(False,) * len(channels),
        latent_channels=LATENT_CHANNELS,
    ).eval()
    # The inferer decodes all images in one call.
    autoencoder.decode_stage_2_outputs = partial(decode_by_subject, autoencoder.decode_stage_2_outputs, n=n)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    inferer = LatentDiffusionInferer(scheduler)

    @torch.no_grad()
    def sample(count: int, steps: int) -> torch.Tensor:
        noise, labels = torch.randn(count * n, LATENT_CHANNELS, size, size), torch.arange(n).repeat(count)
        scheduler.set_timesteps(steps)
        labelled = partial(unet, class_labels=labels)  # the inferer itself passes no labels
        images = inferer.sample(noise, autoencoder, labelled, scheduler, verbose=False)
        return images.view(count, n, *images.shape[2:]).clamp(0, 1)

    parameters = [sum(weight.numel() for weight in model.parameters()) for model in (unet, autoencoder)]
    return [System(f"MONAI f{factor}, DDIM", str(k), *parameters, partial(sample, steps=k)) for k in OTHER_STEPS]


# By the name that --systems takes; each builds the rows of one model.
BUILDERS: dict[str, Callable[[Path], list[System]]] = {
    "ours": ours,
    "ours_full_grid": ours_full_grid,
    "diffusers_f8": diffusers_ldm,
    "monai_f8": partial(monai_ldm, factor=8),
    "monai_f4": partial(monai_ldm, factor=4),
}


def gigaflop(function: Callable[[], object]) -> float:
    """10^9 floating-point operations of the matrix products and convolutions in a call; one multiply-add counts as two."""
    # The counter knows no formula of the fused attention on a CPU; this backend consists of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def convolution_peak(repetitions: int = 5) -> float:
    """GFLOP/s of the fastest of a few large 3x3 convolutions in float32 and channels_last."""
    best = 0.0
    for count, channels, size in PEAK_SHAPES:
        images = torch.randn(count, channels, size, size).contiguous(memory_format=torch.channels_last)
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)
        work = gigaflop(lambda: layer(images))  # noqa: B023  called here only; this is the warm-up, too
        for _ in range(repetitions):
            started = time.perf_counter()
            layer(images)
            best = max(best, work / (time.perf_counter() - started))
    return best


def measure(
    systems: dict[str, Callable[[int], object]], batch_sizes: Sequence[int], rounds: int
) -> dict[str, dict[int, list[float]]]:
    """Subjects per second of each system at each batch size, one number a round.

    Args:
        systems: name to a function that draws the given number of subjects; called in turn in each round.
        batch_sizes: subjects of one call.
        rounds: how often each is measured, after one more that is not counted.

    Raises:
        ValueError: no batch size, or a number below 1.
    """
    if not batch_sizes or min(rounds, *batch_sizes) < 1:
        raise ValueError(f"--rounds is {rounds} and --batch_sizes is {list(batch_sizes)}; give numbers of 1 or more")
    speeds = {name: {batch: [] for batch in batch_sizes} for name in systems}
    for batch in batch_sizes:
        for number in range(rounds + 1):
            print(f"batch {batch}, round {number} of {rounds}", file=sys.stderr, flush=True)
            for name, sample in systems.items():
                started = time.perf_counter()
                sample(batch)
                if number:
                    speeds[name][batch].append(batch / (time.perf_counter() - started))
    return speeds


def top_operators(function: Callable[[], object], count: int = 8) -> list[tuple[str, int, float]]:
    """The operators that take the most self CPU time in a call: name, number of calls, fraction of the whole time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    events = sorted(events, key=lambda event: event.self_cpu_time_total, reverse=True)[:count]
    return [(event.key, event.count, event.self_cpu_time_total / total) for event in events]


def speed_table(
    systems: Sequence[System], work: dict[str, float], speeds: dict[str, dict[int, list[float]]], peak: float
) -> str:
    """The Markdown table, one row a system; `work` in GFLOP a subject, `peak` in GFLOP/s."""
    batch_sizes = list(next(iter(speeds.values())))
    sizes = " / ".join(map(str, batch_sizes))
    columns = ["system", "steps", "parameters of denoiser + autoencoder (M)", "GFLOP a subject"]
    columns += [f"subjects/s, batch {batch}" for batch in batch_sizes]
    columns += [f"ours over it, batch {sizes}", f"% of peak, batch {sizes}"]
    lines = [f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"]
    reference = next((speeds[system.row] for system in systems if system.name == "ours"), None)
    for system in systems:
        own, ratios, peaks = speeds[system.row], [], []
        parameters = f"{system.denoiser_parameters / 1e6:.1f} + {system.autoencoder_parameters / 1e6:.1f}"
        cells = [system.name, system.steps, parameters, f"{work[system.row]:.3g}"]
        for batch, values in own.items():
            cells.append(f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})")
            peaks.append(f"{100 * work[system.row] * median(values) / peak:.0f}")
            if reference is not None:
                ratios.append(f"{median(a / b for a, b in zip(reference[batch], values, strict=True)):.2f}")
        lines.append(f"| {' | '.join([*cells, ' / '.join(ratios) or '–', ' / '.join(peaks)])} |")
    return "\n".join(lines)


@exit_on_user_error()
def main(argv: list[str] | None = None, checkpoint: Path = BUNDLED_CHECKPOINT) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = list(BUILDERS)
    parser.add_argument("--systems", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="subjects (default: 1 8 32)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each system (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, help="of PyTorch (default: one a core)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)

    # 1. Build
    systems, notes = [], [NOTE]
    for name in dict.fromkeys(args.systems):
        try:
            systems += BUILDERS[name](checkpoint)
        except ImportError as error:
            notes.append(str(error))
    if not systems:
        raise ImportError(" ".join(notes[1:]))

    # 2. Measure
    samples = {system.row: system.sample for system in systems}
    work = {row: gigaflop(partial(sample, 1)) for row, sample in samples.items()}
    peak = convolution_peak()
    speeds = measure(samples, args.batch_sizes, args.rounds)
    peak = max(peak, convolution_peak())  # the machine can be slower at one of the two times

    # 3. Write
    threads = torch.get_num_threads()
    version = f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    blocks = [f"{threads} threads, {version}, convolution peak {peak:.0f} GFLOP/s, {args.rounds} rounds.", *notes]
    blocks.append(speed_table(systems, work, speeds, peak))
    batch, operators = max(args.batch_sizes), []
    if "ours" in args.systems:
        sample = next(system.sample for system in systems if system.name == "ours")
        operators = top_operators(partial(sample, batch))
        lines = [f"| operator of ours at batch {batch} | calls | self CPU time |", "|---|---|---|"]
        blocks.append("\n".join(lines + [f"| {key} | {calls} | {part:.0%} |" for key, calls, part in operators]))
    text = "\n\n".join(blocks) + "\n"
    print(text, end="")

    names = ("name", "steps", "denoiser_parameters", "autoencoder_parameters")
    rows = [
        {name: getattr(system, name) for name in names}
        | {"gigaflop_per_subject": work[system.row], "subjects_per_second": speeds[system.row]}
        for system in systems
    ]
    settings = {"num_threads": threads, "version": version, "peak_gigaflop_per_second": peak}
    text_json = json.dumps({**settings, "systems": rows, "top_operators": operators}, indent=2) + "\n"
    write_text(args.output / "speed.md", text)
    write_text(args.output / "speed.json", text_json)


if __name__ == "__main__":
    main()
