"""DLDM: aligned multi-modal brain-tumour MRI from a disentangled latent diffusion model, for diffusers.

The component modules are imported eagerly: `model_index.json` names them by module path, and diffusers finds them in
`sys.modules` only.
"""

from pathlib import Path

from dldm_pipeline.autoencoder_disentangled import (
    DisentangledAutoencoder,
    DisentangledDecoderOutput,
    DisentangledEncoderOutput,
)
from dldm_pipeline.modalities import DEFAULT_MODALITIES, MASK
from dldm_pipeline.pipeline_dldm import DLDMPipeline, DLDMPipelineOutput
from dldm_pipeline.pipeline_dldm_translation import DLDMTranslationPipeline

__version__ = "0.1.0.dev0"

BUNDLED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "phantom-128"
"""Folder of the small pipeline that ships with the package (five simulated contrasts and the mask, 128x128)."""

__all__ = [
    "BUNDLED_CHECKPOINT",
    "DEFAULT_MODALITIES",
    "MASK",
    "DLDMPipeline",
    "DLDMPipelineOutput",
    "DLDMTranslationPipeline",
    "DisentangledAutoencoder",
    "DisentangledDecoderOutput",
    "DisentangledEncoderOutput",
]
