"""What noise, fine detail and the denoiser cost: Fréchet distance of rebuilt, of spliced and of generated subjects.

    python benchmarks/noise.py
    python benchmarks/noise.py --latents_only    # the first two tables, in seconds

Printed as Markdown tables, for the bundled pipeline: the noise that `noise_std` reads in simulated images, and the
level that the pipeline adds, over the one that was put in; how well images are rebuilt from structures that are a little
off, as a denoiser's are; and Fréchet distance (EfficientNet-Lite0), precision and recall of sets of subjects, each against the
same other simulated ones. Two sets are spliced: up to half the Nyquist frequency they are rebuilt and above it real, or the
other way round.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dldm_pipeline import BUNDLED_CHECKPOINT, DLDMPipeline
from dldm_pipeline.cli import exit_on_user_error
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.losses import noise_std
from dldm_pipeline.metrics.features import load_extractor
from dldm_pipeline.metrics.fidelity import frechet_distance, neighbour_scores
from dldm_pipeline.metrics.images import to_uint8
from dldm_pipeline.metrics.reconstruction import psnr

STRUCTURE_NOISE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)  # deviation, of that of the structures themselves
REAL_SEED, OTHER_SEED = 977_001, 977_003  # the subjects of examples/evaluate.py, and others


def splice(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Subjects (N, n, H, H) that are `coarse` up to half the Nyquist frequency and `fine` above it, in the brain of `fine`."""
    size = fine.shape[-1]
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    spectrum = np.where(radius < 0.25, np.fft.rfft2(coarse), np.fft.rfft2(fine))
    brain = (fine > 0).any(axis=1, keepdims=True)
    return np.where(brain, np.fft.irfft2(spectrum, s=(size, size)), 0).clip(0, 1).astype(np.float32)


@exit_on_user_error()
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=BUNDLED_CHECKPOINT, help="folder (default: the bundled one)")
    parser.add_argument("--num_subjects", type=int, default=100, help="in each set (default: %(default)s)")
    parser.add_argument("--latents_only", action="store_true", help="leave out the distances, which take minutes")
    args = parser.parse_args(argv)

    pipeline = DLDMPipeline.from_pretrained(args.pipeline)
    autoencoder, names = pipeline.autoencoder, list(pipeline.autoencoder.config.modalities)
    size, count = autoencoder.config.sample_size, args.num_subjects
    others = [simulate_subject((OTHER_SEED, i), size, names) for i in range(count)]
    images = torch.from_numpy(np.stack([subject.images for subject in others]))
    read = noise_std(images, (images > 0).any(dim=1, keepdim=True)).mean(dim=0)
    true = np.mean([subject.factors["noise"] for subject in others])
    print(f"| | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    print(f"| noise read / put in | {' | '.join(f'{value / true:.2f}' for value in read)} |")
    kept = autoencoder.config.noise_level
    print(f"| the pipeline's / put in | {' | '.join(f'{value / true:.2f}' for value in kept)} |\n", flush=True)

    posterior = autoencoder.encode(images)
    latents = {"structure": posterior.structure_dist.mode(), "styles": posterior.style_dist.mode()}
    print(f"| noise on the structure | {' | '.join(map(str, STRUCTURE_NOISE))} |\n|---{'|---' * len(STRUCTURE_NOISE)}|")
    torch.manual_seed(0)
    structure, rebuilt_psnr = autoencoder.normalize_structure(latents["structure"]), []
    for level in STRUCTURE_NOISE:
        noisy = autoencoder.denormalize_structure(structure + level * torch.randn_like(structure))
        rebuilt = autoencoder.decode(noisy, latents["styles"]).sample.clamp(0, 1)
        rebuilt_psnr.append(float(psnr(images, rebuilt).mean()))
    print(f"| PSNR (dB) | {' | '.join(f'{value:.1f}' for value in rebuilt_psnr)} |\n", flush=True)
    if args.latents_only:
        return

    sets = {"other simulated subjects": images.numpy()}
    without_noise = latents | {"noise_scale": 0.0}
    for title, options in (
        ("the same, rebuilt", latents),
        ("the same, rebuilt, without noise", without_noise),
        ("generated", {}),
    ):
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        sets[title] = pipeline(count, generator=generators, output_type="np", **options).images
    real, rebuilt = sets["other simulated subjects"], sets["the same, rebuilt"]
    sets["real above half the Nyquist frequency, rebuilt below"] = splice(rebuilt, real)
    sets["rebuilt above half the Nyquist frequency, real below"] = splice(real, rebuilt)
    known_images = np.stack([simulate_subject((REAL_SEED, i), size, names).images for i in range(count)])
    extractor = load_extractor()
    known = [extractor(to_uint8(known_images[:, m])) for m in range(len(names))]
    print(f"| distance (precision, recall) | {' | '.join(names)} | mean |\n|---{'|---' * (len(names) + 1)}|")
    for title, pictures in sets.items():
        rows = []
        for m in range(len(names)):
            features = extractor(to_uint8(pictures[:, m]))
            scores = neighbour_scores(known[m], features)
            rows.append((frechet_distance(known[m], features), scores["precision"], scores["recall"]))
        rows.append(np.mean(rows, axis=0))
        print(f"| {title} | {' | '.join(f'{d:.0f} ({p:.2f}, {r:.2f})' for d, p, r in rows)} |", flush=True)


if __name__ == "__main__":
    main()
