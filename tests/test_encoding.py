import numpy as np
import pytest
import torch
from PIL import Image

from dldm_pipeline import BUNDLED_CHECKPOINT, DisentangledAutoencoder, encoding
from dldm_pipeline.data.phantom import simulate_subject
from dldm_pipeline.data.slices import SliceDataset, write_slices
from dldm_pipeline.encoding import (
    encode_dataset,
    measure_latents,
    measure_noise,
    random_subset,
    style_relation,
    validate_autoencoder,
)

NAMES = ("T1", "T2", "WB")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch(size=4, complete=True):
    present = torch.ones(size, 3, dtype=torch.bool)
    if not complete:
        present[0, 0] = False
    return {"images": torch.rand(size, 3, 32, 32), "present": present, "mask": torch.zeros(size, 32, 32)}


# One batch


def test_subsets_are_non_empty_and_of_what_is_present():
    present = torch.rand(500, 5) < 0.5
    present[~present.any(dim=1), 0] = True
    subset = random_subset(present)
    assert subset.any(dim=1).all() and not (subset & ~present).any()
    complete = random_subset(torch.ones(2000, 5, dtype=torch.bool))
    counts = torch.bincount(complete.sum(dim=1), minlength=6)[1:]
    assert (counts[1:] > 140).all() and counts[0] > 1100  # one alone in six of ten, the other sizes equally likely


def test_structures_are_of_the_anatomy_and_styles_of_the_acquisition(tiny_autoencoder, monkeypatch):
    for model_part in (tiny_autoencoder.structure_out, tiny_autoencoder.style_out):  # no noise: samples are modes
        half = model_part[-1].bias.shape[0] // 2
        model_part[-1].weight.data[half:], model_part[-1].bias.data[half:] = 0, -30
    subjects, order = batch(16), torch.arange(16)
    subjects["present"][:, 1] = order % 4 > 0  # T2 is missing in one row of each acquisition
    groups = {"anatomy": order // 2, "acquisition": order % 8 // 4}
    for probability, subset in ((0.0, 0.0), (1.0, 1.0)):
        monkeypatch.setattr(encoding, "TWIN_PROBABILITY", probability)
        monkeypatch.setattr(encoding, "DONOR_PROBABILITY", probability)
        with torch.no_grad():
            structure, styles, full, some, twin = encoding.encode_exchanged(tiny_autoencoder, subjects | groups, subset)
        assert torch.equal(twin, order ^ 1)  # the other row of the anatomy
        source = (some if subset else full).structure_dist.mode()[twin if probability else order]
        torch.testing.assert_close(structure, source, rtol=0, atol=1e-3)
        own = full.style_dist.mode()
        same = (styles[:, None] - own[None]).abs().amax(dim=-1) < 1e-3  # row, donor, modality
        assert same.any(dim=1).all()
        row, donor, modality = same.nonzero().T
        assert torch.equal(groups["acquisition"][row], groups["acquisition"][donor])
        assert subjects["present"][donor, modality][row != donor].all()
        if probability:
            assert (same[order, order].float().mean(dim=0) < 0.6).all()  # T2 often has no donor
        else:
            assert same[order, order].all()
    # Without groups every row is its own.
    with torch.no_grad():
        structure, styles, full, _, twin = encoding.encode_exchanged(tiny_autoencoder, subjects, 0.0)
    assert torch.equal(twin, order)
    torch.testing.assert_close(structure, full.structure_dist.mode(), rtol=0, atol=1e-3)
    torch.testing.assert_close(styles, full.style_dist.mode(), rtol=0, atol=1e-3)


# A whole data set


@torch.no_grad()
def test_offsets_make_the_mean_structure_of_one_modality_that_of_all(tiny_autoencoder):
    batches = [batch(), batch(complete=False), batch()]
    measure_latents(tiny_autoencoder, batches)
    difference = 0
    for subjects in batches:  # every slice that has T1 is complete, so the mean is exactly that of all
        alone = torch.zeros(4, 3, dtype=torch.bool)
        alone[:, 0] = True
        full, single = (
            output.structure_dist.mode()
            for output in tiny_autoencoder.encode_subsets(subjects["images"], [subjects["present"], alone])
        )
        difference = difference + (single - full)[subjects["present"].all(dim=1)].sum(dim=0)
    assert difference.abs().max() < 1e-3 < tiny_autoencoder.structure_offset.abs().max()


@torch.no_grad()
def test_normalised_latents_have_zero_mean_and_unit_deviation(tiny_autoencoder):
    batches = [batch(), batch()]
    measure_latents(tiny_autoencoder, batches)
    outputs = [tiny_autoencoder.encode(subjects["images"]) for subjects in batches]
    structure = torch.cat([tiny_autoencoder.normalize_structure(o.structure_dist.mode()) for o in outputs])
    style = torch.cat([tiny_autoencoder.normalize_style(o.style_dist.mode()) for o in outputs]).flatten(0, 1)
    for z in (structure.transpose(0, 1).flatten(1), style.T):
        torch.testing.assert_close(z.mean(dim=1), torch.zeros(len(z)), rtol=0, atol=1e-3)
        torch.testing.assert_close(z.std(dim=1, unbiased=False), torch.ones(len(z)), rtol=1e-2, atol=0)


def test_the_relation_of_styles_is_that_between_modalities():
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(5000, n, 4, generator=generator, dtype=torch.float64) for n in (1, 3))
    mixing = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    styles = torch.einsum("snc,ncd->snd", 0.8 * shared + 0.6 * own, mixing)
    relation = torch.tensor(style_relation(styles), dtype=torch.float64)
    torch.testing.assert_close(relation, relation.T)
    assert torch.linalg.eigvalsh(relation).min() > 0
    # Noise with this relation, made as wide as the styles of each modality, has the styles' covariance.
    values, vectors = torch.linalg.eigh(torch.einsum("sni,snj->nij", styles, styles) / 5000)
    roots = torch.block_diag(*(vectors * values.sqrt()[:, None] @ vectors.mT))
    covariance = torch.cov(styles.flatten(1).T)
    made = roots @ relation @ roots.T
    assert (made - covariance).norm() < 0.02 * covariance.norm()
    assert style_relation(styles[:20]) is None  # too few to tell
    assert style_relation(torch.zeros(5000, 3, 4)) is None


@torch.no_grad()
def test_styles_are_related_on_the_scale_of_the_sampler(tiny_autoencoder):
    subjects = [batch() for _ in range(2)] * 3
    measure_latents(tiny_autoencoder, subjects)
    styles = torch.cat([tiny_autoencoder.encode(s["images"]).style_dist.mode().double() for s in subjects])
    expected = style_relation(tiny_autoencoder.normalize_style(styles))
    np.testing.assert_allclose(tiny_autoencoder.config.style_relation, expected, atol=2e-3)


def test_measured_noise_is_that_of_the_images():
    model = DisentangledAutoencoder.from_pretrained(BUNDLED_CHECKPOINT / "autoencoder")
    subjects = [simulate_subject((3, i), 128, model.config.modalities) for i in range(16)]
    images, present = torch.from_numpy(np.stack([s.images for s in subjects])), torch.ones(16, 5, dtype=torch.bool)
    present[:8, 1] = False
    images[:8, 1] = torch.rand(8, 128, 128)  # what stands in place of a missing modality does not matter
    measure_noise(model, [{"images": images[rows], "present": present[rows]} for rows in torch.arange(16).split(8)])
    true = np.array([s.factors["noise"] for s in subjects])
    expected = [true.mean(), true[8:].mean(), true.mean(), true.mean(), true.mean()]
    np.testing.assert_allclose(model.config.noise_level, expected, rtol=0.07)


def test_validation_gives_the_psnr_and_a_picture(tiny_autoencoder, tmp_path):
    subjects = batch(complete=False)
    with torch.no_grad():
        rebuilt = tiny_autoencoder(subjects["images"], subjects["present"]).sample.clamp(0, 1)
    figures = validate_autoencoder(tiny_autoencoder, [subjects], tmp_path / "sheet.png")
    errors = (rebuilt - subjects["images"]).square().mean(dim=(2, 3))
    assert figures["PSNR T2 (dB)"] == pytest.approx(-10 * errors[:, 1].log10().mean().item(), rel=1e-4)
    assert figures["PSNR T1 (dB)"] == pytest.approx(-10 * errors[1:, 0].log10().mean().item(), rel=1e-4)
    assert figures["PSNR (dB)"] == pytest.approx(np.mean([figures[f"PSNR {name} (dB)"] for name in NAMES]))
    assert Image.open(tmp_path / "sheet.png").size[1] > 9 * 32


def test_latents_are_encoded_once_and_are_those_of_the_autoencoder(tiny_autoencoder, tmp_path):
    images = np.random.default_rng(0).random((5, 3, 32, 32)).astype(np.float32)
    rows = [{"subject": f"s{i}", "slice_index": i, **dict(zip(NAMES, images[i], strict=True))} for i in range(5)]
    write_slices(rows, tmp_path / "data", NAMES)
    dataset = SliceDataset(tmp_path / "data", "train")
    tiny_autoencoder.save_pretrained(tmp_path / "autoencoder")
    sources = [tmp_path / "data", tmp_path / "autoencoder"]

    def encode(mirror=True):
        return encode_dataset(dataset, tiny_autoencoder, mirror, tmp_path / "cache", sources, show_progress=False)

    latents = encode()
    assert latents.structure.shape == (4, 2, 4, 4, 4) and latents.style.shape == (4, 2, 3, 3)
    item = dataset[2]
    for view, images in enumerate((item["images"], item["images"].flip(-1))):
        posterior = tiny_autoencoder.encode(images[None], item["present"][None])
        expected = tiny_autoencoder.normalize_structure(posterior.structure_dist.mode())[0]
        torch.testing.assert_close(latents.structure[2, view].float(), expected, rtol=1e-2, atol=1e-2)
        expected = tiny_autoencoder.normalize_style(posterior.style_dist.mode())[0]
        torch.testing.assert_close(latents.style[2, view].float(), expected, rtol=1e-2, atol=1e-2)

    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".safetensors"
    tiny_autoencoder.encoder_in.weight.data.zero_()  # not asked again
    assert torch.equal(encode().structure, latents.structure)
    tiny_autoencoder.save_pretrained(tmp_path / "autoencoder")  # another autoencoder, other latents
    assert not torch.equal(encode().structure, latents.structure) and encode(mirror=False).structure.shape[1] == 1
