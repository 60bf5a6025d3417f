"""Small models with fixed random weights, shared by all test files."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.pipeline_dldm import DLDMPipeline

# Tests run in several processes; tiny models gain nothing from more threads.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts that tests start


def make_autoencoder(modalities: tuple[str, ...] = ("T1", "T2", "WB"), seed: int = 0) -> DisentangledAutoencoder:
    """A 32x32 autoencoder (latent grid 4x4) whose latents are shifted and scaled, so that forgetting to do so shows."""
    torch.manual_seed(seed)
    autoencoder = DisentangledAutoencoder(
        modalities=list(modalities),
        sample_size=32,
        structure_channels=4,
        style_channels=3,
        encoder_channels=(8, 16),
        decoder_channels=(16, 8),
        decoder_blocks=1,
        head_channels=8,
        structure_shift=[0.1, -0.2, 0.3, 0.0],
        structure_scale=[1.5, 0.7, 1.1, 1.3],
        style_shift=[0.2, 0.0, -0.1],
        style_scale=[0.9, 1.2, 1.4],
        noise_level=[0.02, 0.03, 0.05],
    ).eval()
    for parameter in autoencoder.parameters():  # residual blocks start at zero, and a test should see them work
        torch.nn.init.normal_(parameter, std=0.3)
    return autoencoder


def make_pipeline(autoencoder: DisentangledAutoencoder) -> DLDMPipeline:
    """A pipeline around `autoencoder` with an untrained denoiser, silent."""
    torch.manual_seed(1)
    config = autoencoder.config
    channels = config.structure_channels + config.style_channels
    unet = UNet2DModel(
        sample_size=autoencoder.latent_size,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=2 * (len(config.modalities) + 1),
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipeline = DLDMPipeline(autoencoder, unet, scheduler, style_grid=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny_autoencoder() -> DisentangledAutoencoder:
    """32x32, three modalities (T1, T2, WB), random weights that are always the same."""
    return make_autoencoder()


@pytest.fixture
def tiny_pipeline(tiny_autoencoder) -> DLDMPipeline:
    """`tiny_autoencoder` with an untrained denoiser and the scheduler of the real pipelines."""
    return make_pipeline(tiny_autoencoder)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory) -> Path:
    """`tiny_pipeline`, saved once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    make_pipeline(make_autoencoder()).save_pretrained(folder)
    return folder


@pytest.fixture
def other_tiny_pipeline() -> DLDMPipeline:
    """`tiny_pipeline` with another autoencoder."""
    return make_pipeline(make_autoencoder(seed=2))


@pytest.fixture(scope="session")
def hub_server():
    """The module `hub_server.py`; no package holds it."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    hub_server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub_server)
    return hub_server


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch):
    """A Hub on localhost that this process talks to, logged in."""
    with hub_server.HubServer() as server:
        server.use_in_this_process(monkeypatch, tmp_path / "home")
        yield server
