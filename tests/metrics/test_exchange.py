from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dldm_pipeline.data.acquisition import sample_acquisition
from dldm_pipeline.data.simulation import simulate_subject
from dldm_pipeline.metrics import exchange

NAMES = ("T1", "FLAIR")


class Renderer:
    """Styles are mean and deviation of an image. Structures are the images, standardised unless they `leak`."""

    device, config = torch.device("cpu"), SimpleNamespace(modalities=NAMES, sample_size=48)

    def __init__(self, leak=False):
        self.leak = leak

    def encode(self, images):
        inside = images > 0
        count = inside.sum(dim=(2, 3)).clamp(min=1)
        mean = images.sum(dim=(2, 3)) / count
        std = (((images - mean[..., None, None]) * inside) ** 2).sum(dim=(2, 3)).div(count).sqrt()
        structure = images if self.leak else (images - mean[..., None, None]) / std[..., None, None]
        structure = structure * inside
        modes = structure, torch.stack([mean, std], dim=2)
        return SimpleNamespace(
            **{
                f"{kind}_dist": SimpleNamespace(mode=lambda mode=mode: mode)
                for kind, mode in zip(("structure", "style"), modes, strict=True)
            }
        )

    def decode(self, structure, styles):
        image = structure if self.leak else structure * styles[..., 1, None, None] + styles[..., 0, None, None]
        return SimpleNamespace(sample=torch.where(structure != 0, image + 0.003, 0))


def test_tissue_means_are_those_of_pure_pixels():
    subject = simulate_subject(3, 4, size=64, height=0.6, modalities=NAMES)
    means = exchange.tissue_means(subject)
    assert means.shape == (2, 3) and np.isfinite(means[:, :2]).all()
    expected = [sample_acquisition(4).tissue_means(name)["white"] for name in NAMES]
    np.testing.assert_allclose(means[:, 0], expected, atol=0.06)


def test_an_exchange_counts_what_the_style_brings():
    leaking, clean = (exchange.exchange_against_truth(Renderer(leak), num_families=4) for leak in (True, False))
    for name in NAMES:
        assert leaking["own"][name] > 45 and clean["own"][name] > 45
        assert leaking["exchanged"][name] == pytest.approx(leaking["copied"][name], abs=0.5)
    assert leaking["gap_closed"] == pytest.approx(0, abs=1e-6)
    assert clean["gap_closed"] > 0.1 and clean["exchanged_mean"] > leaking["exchanged_mean"] + 1
    assert clean["exchange_cost"] == clean["own_mean"] - clean["exchanged_mean"]
    assert clean["white_dice"]["own"] > 0.8 and 0.8 < clean["white_dice_kept"] < 1.02


def test_probes_find_the_appearance_where_it_is():
    leaking, clean = (exchange.appearance_probes(Renderer(leak), 60, 30) for leak in (True, False))
    assert min(clean["style"]["white"].values()) > 0.4
    assert min(leaking["structure"]["white"].values()) > 0.4
    assert max(clean["structure"]["white"].values()) < min(leaking["structure"]["white"].values()) - 0.2
    assert max(clean["structure"]["top"].values()) < min(leaking["structure"]["top"].values())
    both = [clean["style"][tissue][name] for tissue in ("white", "grey") for name in NAMES]
    assert clean["style_white_grey_min"] == min(both) and clean["style_csf_min"] == min(clean["style"]["csf"].values())


def test_white_matter_follows_the_donor_of_a_style_or_the_structure():
    subjects = [simulate_subject(i, size=48, height=0.6, modalities=NAMES) for i in range(8)]
    items = [
        {
            "images": torch.from_numpy(s.images),
            "present": torch.ones(2, dtype=torch.bool),
            "mask": torch.from_numpy(s.mask).float(),
            "subject": f"s{i}",
        }
        for i, s in enumerate(subjects)
    ]
    lacking = items[0] | {"present": torch.tensor([True, False])}
    black = items[0] | {"images": torch.zeros(2, 48, 48)}
    leaking, clean = (
        exchange.exchange_of_curves(Renderer(leak), [*items, lacking, black], num_pairs=40) for leak in (True, False)
    )
    assert clean["num_slices"] == 8
    for name in NAMES:
        assert clean["donor"][name] > 0.7 and abs(clean["own"][name]) < 0.6
        assert leaking["own"][name] > 0.9 > 0.6 > abs(leaking["donor"][name])
    with pytest.raises(ValueError, match="4 subjects with all modalities"):
        exchange.exchange_of_curves(Renderer(), [items[0], items[0], lacking])


def test_drawn_styles_are_compared_with_encoded_ones():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4000, 1, 3))  # one scanner for both modalities
    encoded = np.array([2.0, 5.0, 1.0]) * (shared + 0.5 * rng.normal(size=(4000, 2, 3)))
    same = exchange.compare_styles(encoded[::2], encoded[1::2], NAMES)
    alone = np.stack([encoded[:, 0], np.roll(encoded[:, 1], 1, axis=0)], axis=1)  # another subject's
    fewer = 0.5 * alone + encoded.std(axis=0)
    unrelated, narrow = (exchange.compare_styles(drawn, encoded, NAMES) for drawn in (alone, fewer))
    for name in NAMES:
        assert same["shift"][name] < 0.1 and same["covariance"][name] < 0.1
        assert same["spread"][name] == pytest.approx(1, abs=0.05) == same["relation"][name]
        assert unrelated["spread"][name] == pytest.approx(1) and abs(unrelated["relation"][name]) < 0.1
        assert narrow["spread"][name] == pytest.approx(0.5) and narrow["covariance"][name] == pytest.approx(0.75)
        assert narrow["shift"][name] == pytest.approx(1, abs=0.05)


def test_a_sheet_shows_anatomies_in_each_others_appearances(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(exchange, "appearances_sheet", lambda images, *_: drawn.update(images=images))
    subjects = [simulate_subject(i, size=48, height=0.6, modalities=NAMES) for i in range(3)]
    present = torch.ones(2, dtype=torch.bool)
    items = [{"images": torch.from_numpy(s.images), "present": present, "subject": str(s.seeds)} for s in subjects]
    assert not exchange.exchange_sheet(Renderer(), items, tmp_path / "sheet.png", count=4) and not drawn
    assert exchange.exchange_sheet(Renderer(), items, tmp_path / "sheet.png", count=3)
    assert drawn["images"].shape == (3, 3, 2, 48, 48)
    for i, subject in enumerate(subjects):  # on the diagonal, each anatomy in its own appearance
        np.testing.assert_allclose(drawn["images"][i, i], subject.images, atol=0.01)
    means = drawn["images"].sum(axis=(3, 4)) / (drawn["images"] > 0).sum(axis=(3, 4))
    assert means.std(axis=0).max() < means.std(axis=1).min()
