"""The nearest slice is found under flips, shifts and new contrasts."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from dldm_pipeline.metrics.copy_search import FLIPS, CopySearch, StructureRenderer, orientation_field
from dldm_pipeline.metrics.images import Slices


def textures(count: int, channels: int = 1, seed: int = 0, size: int = 32) -> np.ndarray:
    """Random discs: (count, channels, size, size) in [0, 1]."""
    noise = np.random.default_rng(seed).normal(size=(count, channels, size, size))
    texture = ndimage.gaussian_filter(noise, (0, 0, size / 20, size / 20))
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return (np.clip(0.5 + 0.2 * texture / texture.std(), 0.05, 1) * (np.hypot(y, x) < 0.4 * size)).astype(np.float32)


def test_orientation_forgets_contrast_but_not_anatomy() -> None:
    image = torch.from_numpy(textures(2, size=64)[:, 0])
    field = orientation_field(image)

    def similarity(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first * second.conj()).sum().real / (first.norm() * second.norm()))

    for remapped in (0.2 + 0.5 * image, 1 - image, image**0.5, image**2):
        assert similarity(field, orientation_field(remapped)) > 0.93
    assert similarity(field[0], field[1]) < 0.6 and field.abs().max() <= 1
    assert not orientation_field(torch.full((1, 8, 8), 0.7)).abs().any()
    # A flipped image has the conjugate field.
    torch.testing.assert_close(orientation_field(image.flip(-1)), field.flip(-1).conj().resolve_conj())
    torch.testing.assert_close(orientation_field(image.flip(-2, -1)), field.flip(-2, -1))


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_search_tells_which_flip_and_shift_lays_the_copy_over_its_original(size: tuple[int, int]) -> None:
    images = np.pad(textures(10), ((0, 0), (0, 0), (0, size[0] - 32), (0, size[1] - 32)))
    moved = np.roll(images[7], (-2, 1), axis=(-2, -1))
    queries = Slices(np.stack([np.flip(moved, axes) for axes in FLIPS]))
    found = CopySearch(Slices(images)).search(queries)
    assert (found.index == 7).all() and (found.similarity > 0.99).all()
    assert found.flip[:, 0].tolist() == [[-2 in axes, -1 in axes] for axes in FLIPS]
    assert (found.shift == [2, -1]).all()


def test_search_agrees_with_a_plain_one() -> None:
    images, queries = Slices(textures(6)), Slices(textures(3, seed=1))
    found = CopySearch(images).search(queries)
    fields = orientation_field(torch.from_numpy(images.images[:, 0]))
    for q, image in enumerate(queries.images[:, 0]):
        best = -1.0
        for axes in FLIPS:
            field = orientation_field(torch.from_numpy(np.flip(image, axes).copy())[None])[0]
            for down in range(-2, 3):
                for right in range(-2, 3):
                    moved = field.roll((down, right), (0, 1))
                    scores = (fields * moved.conj()).sum((1, 2)).real / (fields.flatten(1).norm(dim=1) * field.norm())
                    best = max(best, float(scores.max()))
        # The flip is settled by the coarse search, so that the plain one may find a little more.
        assert best - 0.05 <= found.similarity[q, 0] <= best + 1e-4


def test_own_subject_and_missing_images_are_not_compared() -> None:
    names, present = ["a", "a", "b", "b", "c", "c"], np.ones((6, 3), dtype=bool)
    present[2:, 2] = False
    reference = Slices(textures(6, 3), names, present)
    search = CopySearch(reference)
    found = search.search(Slices(reference.images, names), other_subjects=True)
    assert all(names[found.index[q, 0]] != names[q] for q in range(6))
    assert (found.index[:2, 2] == -1).all() and np.isnan(found.similarity[:2, 2]).all()  # "a" alone has the third
    assert set(found.index[2:, 2]) <= {0, 1}
    itself = search.search(reference)
    assert (itself.index[:, 0] == np.arange(6)).all() and np.isnan(itself.similarity[2:, 2]).all()


def test_structures_are_rendered_under_one_appearance(tiny_autoencoder: torch.nn.Module) -> None:
    train = Slices(textures(3, 3), present=np.array([[False, True, True]] * 3))
    renderer = StructureRenderer(tiny_autoencoder, train)
    with torch.no_grad():
        pixels, present = torch.from_numpy(train.images / np.float32(255)), torch.from_numpy(train.present)
        encoded = tiny_autoencoder.encode(pixels, present)
        structure, style = encoded.structure_dist.mode(), encoded.style_dist.mode()[:, 1].mean(dim=0)  # T2: none has T1
        expected = tiny_autoencoder.decode(structure, style.expand(3, 1, -1)).sample[:, 0]
    rendered = renderer.render(structure)
    assert rendered.dtype == np.uint8 and rendered.std() > 1
    np.testing.assert_allclose(rendered, 255 * expected.clamp(0, 1).numpy(), atol=1)
    encoded, given = renderer.add_channel(train), renderer.add_channel(train, structure.flip(0))
    np.testing.assert_array_equal(encoded.images[:, 3], rendered)
    np.testing.assert_array_equal(given.images[::-1, 3], rendered)
    assert encoded.present.tolist() == given.present.tolist() == [[False, True, True, True]] * 3


def test_queries_of_another_shape_are_refused() -> None:
    slices = Slices(textures(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\); it must be \(queries, \*\(3, 32, 32\)\)"):
        CopySearch(slices).search(Slices(slices.images[:, :1]))
