"""Build the paper preset (256x256, five modalities), train one step of each model, sample one subject, print the cost.

    python benchmarks/paper_preset.py --batch_size 2

Prints a Markdown table: parameters, seconds, and peak memory of the process. Each row is measured in a process of its own.
The step is the training scripts' own: the loss and optimizers of training/train_autoencoder.py and training/train_ldm.py
with the presets training/configs/autoencoder_paper.yaml and training/configs/ldm_paper.yaml, on simulated subjects.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from dldm_pipeline import DEFAULT_MODALITIES, DisentangledAutoencoder, DLDMPipeline
from dldm_pipeline.data.phantom import phantom_rows
from dldm_pipeline.denoiser import make_sampler, make_scheduler
from dldm_pipeline.encoding import Latents
from dldm_pipeline.optimization import MuonAdamW
from dldm_pipeline.training_args import Args, AutoencoderArgs, LDMArgs, parse_args

TRAINING = Path(__file__).parents[1] / "training"
sys.path.insert(0, str(TRAINING))
import train_autoencoder  # noqa: E402
import train_ldm  # noqa: E402


def preset(kind: type[Args], name: str) -> Args:
    """The options of a training script under one of its presets."""
    return parse_args(kind, __doc__, TRAINING / "configs", ["--config", name])


def build_autoencoder() -> DisentangledAutoencoder:
    """The preset's autoencoder, untrained, with the latent scales that training would measure."""
    args = preset(AutoencoderArgs, "autoencoder_paper")
    autoencoder = train_autoencoder.build_autoencoder(args, args.modalities or list(DEFAULT_MODALITIES))
    for kind in ("structure", "style"):
        channels = autoencoder.config[f"{kind}_channels"]
        autoencoder.register_to_config(**{f"{kind}_shift": [0.0] * channels, f"{kind}_scale": [1.0] * channels})
    return autoencoder


def seconds_of_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], learning_rate: float) -> float:
    """Seconds of one optimizer step."""
    optimizer = MuonAdamW(model, learning_rate)
    started = time.perf_counter()
    loss().backward()
    optimizer.step()
    return time.perf_counter() - started


def step_of_autoencoder(batch_size: int) -> tuple[int, float]:
    """Parameters, and seconds of a step on a batch as the training loader gives it."""
    args, model = preset(AutoencoderArgs, "autoencoder_paper"), build_autoencoder()
    rows = list(phantom_rows(batch_size, size=args.resolution, seed=1))
    batch = {
        "images": torch.from_numpy(np.stack([[row[name] for name in DEFAULT_MODALITIES] for row in rows])),
        "present": torch.ones(batch_size, len(DEFAULT_MODALITIES), dtype=torch.bool),
        "mask": torch.from_numpy(np.stack([row["mask"] for row in rows])).float(),
        "has_mask": torch.ones(batch_size, dtype=torch.bool),
    }
    objective = train_autoencoder.DisentangledLoss(model, args)
    weights = train_autoencoder.WEIGHTS | {"spectrum": args.spectrum_weight}

    def loss() -> torch.Tensor:
        return sum(weights[name] * term for name, term in objective(batch).items())

    return model.num_parameters(), seconds_of_step(model, loss, args.learning_rate)


def step_of_denoiser(batch_size: int) -> tuple[int, float]:
    """Parameters, and seconds of a step on random latents."""
    args, autoencoder, scheduler = preset(LDMArgs, "ldm_paper"), build_autoencoder(), make_scheduler()
    unet = train_ldm.load_unet(args, autoencoder)
    config, size, n = autoencoder.config, autoencoder.latent_size, autoencoder.num_modalities
    latents = Latents(
        structure=torch.randn(batch_size, 1, config.structure_channels, size, size),
        style=torch.randn(batch_size, 1, n, config.style_channels),
        present=torch.ones(batch_size, n, dtype=torch.bool),
    )
    batch = train_ldm.sample_batch(latents, batch_size, scheduler, args)
    seconds = seconds_of_step(unet, lambda: train_ldm.training_loss(unet, scheduler, batch, args), args.learning_rate)
    return unet.num_parameters(), seconds


def one_subject(batch_size: int) -> tuple[int, float]:
    """Parameters, and seconds of a call."""
    args, autoencoder = preset(LDMArgs, "ldm_paper"), build_autoencoder().eval()
    unet = train_ldm.load_unet(args, autoencoder).eval()
    pipeline = DLDMPipeline(autoencoder, unet, make_sampler(), args.style_grid)
    started = time.perf_counter()
    pipeline(1, generator=torch.Generator().manual_seed(0))
    return autoencoder.num_parameters() + unet.num_parameters(), time.perf_counter() - started


def measure(job: tuple[Callable[[int], tuple[int, float]], int]) -> tuple[int, float, float]:
    """Parameters, seconds and the process's peak memory in GiB."""
    function, batch_size = job
    return *function(batch_size), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2, help="of the training steps (default: %(default)s)")
    args = parser.parse_args()
    jobs = {
        f"autoencoder, one training step, batch {args.batch_size}": step_of_autoencoder,
        f"denoiser, one training step, batch {args.batch_size}": step_of_denoiser,
        "pipeline, one subject": one_subject,
    }
    print(f"{torch.get_num_threads()} threads\n\n| what | parameters | seconds | peak memory |\n|---|---|---|---|")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        results = pool.imap(measure, [(function, args.batch_size) for function in jobs.values()], chunksize=1)
        for what, (parameters, seconds, gib) in zip(jobs, results, strict=True):
            print(f"| {what} | {parameters / 1e6:.1f} M | {seconds:.1f} | {gib:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
