import numpy as np
import pytest
import torch

from dldm_pipeline.appearance import AcquisitionSampler, random_curves, random_partners, two_appearances


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_partners_are_others_of_the_group_as_often_as_asked():
    groups = torch.arange(400) // 4
    partners = random_partners(groups, 0.7)
    assert torch.equal(groups[partners], groups)
    assert (partners != torch.arange(400)).float().mean().item() == pytest.approx(0.7, abs=0.06)
    every = random_partners(groups, 1.0)
    assert (every != torch.arange(400)).all() and len(set((every % 4).tolist())) == 4
    alone = torch.arange(5)
    assert torch.equal(random_partners(alone, 1.0), alone)


def test_a_batch_is_of_pairs_of_anatomies_under_the_same_acquisitions():
    anatomies = np.repeat(np.arange(20), 2)  # five families of four, each under two acquisitions
    acquisitions = 2 * (anatomies // 4) + np.tile([0, 1], 20)
    sampler = AcquisitionSampler(anatomies, acquisitions, batch_size=8)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 5
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    assert batches != list(sampler)  # another order in each epoch
    for batch in batches:
        for four in np.array(batch).reshape(2, 4):
            assert len(set(anatomies[four])) == 2 and len(set(acquisitions[four])) == 2


def test_an_anatomy_without_a_partner_comes_with_its_own_rows_alone():
    rows = [row for batch in AcquisitionSampler([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], 2) for row in batch]
    assert sorted(rows) == list(range(6))


def test_curves_are_monotone_and_keep_black():
    images = torch.rand(6, 3, 32, 32)
    images[:, :, :8] = 0
    images[:, 2] = 0  # a modality that is missing
    curved = random_curves(images)
    assert curved.shape == images.shape and curved.min() >= 0 and curved.max() <= 1
    assert torch.equal(curved == 0, images == 0)
    for before, after in zip(images[:, :2].flatten(0, 1), curved[:, :2].flatten(0, 1), strict=True):
        order = before.flatten().argsort()
        assert (after.flatten()[order].diff() >= -1e-6).all()
    # Another curve for every image, and other contrasts, not only another brightness.
    middle, bright = (curved[:, :2][(images[:, :2] - v).abs() < 0.01] for v in (0.4, 0.8))
    assert middle.std() > 0.05 and bright.std() > 0.05
    ratio = [
        float(a[(i - 0.4).abs() < 0.02].mean() / a[(i - 0.8).abs() < 0.02].mean())
        for i, a in zip(images[:, 0], curved[:, 0], strict=True)
    ]
    assert np.std(ratio) > 0.03


def test_copies_share_the_anatomy_and_only_inputs_are_noisy():
    images = torch.rand(4, 2, 32, 32)
    images[:, :, :8] = 0
    batch = {"images": images, "mask": (images[:, 0] > 0.9).float(), "subject": list("abcd")}
    both = two_appearances(batch)
    assert both["subject"] == list("abcdabcd") and both["images"].shape == (8, 2, 32, 32)
    assert both["anatomy"].tolist() == [0, 1, 2, 3] * 2 and len(set(both["acquisition"].tolist())) == 8
    assert torch.equal(both["mask"][:4], both["mask"][4:])
    assert not torch.equal(both["images"][:4], both["images"][4:])
    for row in range(8):  # a target is a function of the slice's own values; an input is not
        order = images[row % 4, 0].flatten().argsort()
        assert (both["images"][row, 0].flatten()[order].diff() >= -1e-6).all()
        assert (both["inputs"][row, 0].flatten()[order].diff() < -1e-3).any()
    assert torch.equal(both["inputs"] == 0, both["images"] == 0) or (both["inputs"][both["images"] == 0] == 0).all()
