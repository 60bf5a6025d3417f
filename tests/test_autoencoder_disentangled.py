"""DisentangledAutoencoder: shapes, what depends on what, scales, and what is refused."""

from statistics import NormalDist

import pytest
import torch

from dldm_pipeline import DisentangledAutoencoder
from dldm_pipeline.autoencoder_disentangled import equalize, intensity_quantiles

MODALITIES = ["T1", "T1CE", "FLAIR"]


def build(**kwargs) -> DisentangledAutoencoder:
    """A tiny autoencoder whose residual branches are not zero, so that every input can matter."""
    torch.manual_seed(0)
    sizes = {"structure_channels": 4, "style_channels": 3, "encoder_channels": (8, 16), "decoder_channels": (16, 8)}
    model = DisentangledAutoencoder(modalities=MODALITIES, sample_size=32, head_channels=8, **(sizes | kwargs))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def test_shapes():
    model, images = build(), torch.rand(2, 3, 32, 32)
    posterior = model.encode(images)
    assert posterior.structure_dist.mode().shape == (2, 4, 4, 4)
    assert posterior.style_dist.mode().shape == posterior.style_dist.sample().shape == (2, 3, 3)
    output = model.decode(posterior.structure_dist.mode(), posterior.style_dist.mode()[:, :2])
    assert output.sample.shape == (2, 2, 32, 32) and output.mask.shape == output.foreground.shape == (2, 32, 32)
    for a, b in zip(model(images, return_dict=False), model(images).values(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    # Styles are sampled around their mode.
    posterior = model.encode(images[:1]).style_dist
    samples = torch.stack([posterior.sample() for _ in range(400)])
    std = posterior.std[:, :, 0, 0].unflatten(0, (1, 3))
    assert ((samples.mean(dim=0) - posterior.mode()).abs() < 5 * std / 20).all()
    torch.testing.assert_close(samples.std(dim=0), std, rtol=0.2, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("patch_size", "widths", "grid"), [(4, (8,), 8), (2, (8, 16), 8), (2, (8, 16, 24), 4), (1, (8, 8, 16, 24), 4)]
)
def test_levels_are_as_many_as_widths(patch_size, widths, grid):
    """Each has half the size of the one before, and everything in an image can reach the rebuilt one."""
    model = build(patch_size=patch_size, encoder_channels=widths, decoder_channels=widths[::-1])
    images = torch.rand(1, 3, 32, 32)
    structure = model.encode(images).structure_dist.mode()
    assert structure.shape == (1, 4, grid, grid) and model.latent_size == grid
    sample, changed = model(images).sample, images.clone()
    assert sample.shape == images.shape
    changed[:, :, 5, 9] += 0.5
    difference = (model(changed).sample - sample)[0].abs().amax(dim=0)
    assert difference[5, 9] > 0


@torch.no_grad()
def test_a_structure_is_that_of_the_modalities_present():
    model = build()
    images, present = torch.rand(2, 3, 32, 32), torch.tensor([[True, False, True], [False, True, False]])
    other = torch.where(present[:, :, None, None], images, torch.rand_like(images))
    a, b = (model.encode(x, present).structure_dist.mode() for x in (images, other))
    assert torch.equal(a, b) and not torch.equal(a, model.encode(other).structure_dist.mode())
    both = model.encode_subsets(images, [None, present])
    for output, expected in zip(both, (model.encode(images).structure_dist.mode(), a), strict=True):
        torch.testing.assert_close(output.structure_dist.mode(), expected)


@torch.no_grad()
def test_an_image_depends_on_its_own_pair_only():
    """Pair decoding: other styles beside it change nothing; its own style and its structure do."""
    model = build()
    posterior = model.encode(torch.rand(2, 3, 32, 32))
    structure, styles = posterior.structure_dist.mode(), posterior.style_dist.mode()
    together = model.decode(structure, styles)
    for b, m in ((0, 1), (1, 0), (1, 2)):
        alone = model.decode(structure[b : b + 1], styles[b : b + 1, m : m + 1])
        torch.testing.assert_close(together.sample[b, m], alone.sample[0, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.mask[b], alone.mask[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.sample[:, 0], model.decode(structure, styles + 1).sample[:, 0])
    assert not torch.allclose(together.sample, model.decode(structure + 1, styles).sample)
    assert torch.equal(together.mask, model.decode(structure, styles + 1).mask)


@torch.no_grad()
def test_linear_maps_run_beside_the_network():
    """Without what the network adds, structures are affine in the images, and images in the structure."""
    model = build()
    for layer in (model.structure_out[-1], model.head_out[-1]):
        torch.nn.init.zeros_(layer.weight)

    def is_affine(function, a, b):
        x, y, middle = function(a), function(b), function((a + b) / 2)
        return (x - y).abs().max() > 0.1 and torch.allclose((x + y) / 2, middle, rtol=0, atol=1e-4)

    def decode(z_struct):
        output = model.decode(z_struct, torch.ones(1, 1, 3))
        return output.sample[:, 0] / output.foreground.sigmoid()

    assert is_affine(lambda images: model.encode(images).structure_dist.mode(), *torch.rand(2, 1, 3, 32, 32))
    assert is_affine(decode, *torch.randn(2, 1, 4, 4, 4))
    # A subset's share of the sum stands for the whole: it makes no difference where all images and weights are the same.
    weight = model.encoder_linear.weight.unflatten(1, (3, -1))
    weight.copy_(weight[:, :1].clone())
    images, present = torch.rand(1, 1, 32, 32).expand(-1, 3, -1, -1), torch.tensor([[True, False, True]])
    whole, part = (output.structure_dist.mode() for output in model.encode_subsets(images, [None, present]))
    torch.testing.assert_close(part, whole)


@torch.no_grad()
def test_background_is_dark_in_every_image_of_a_subject():
    model, images = build(), torch.rand(2, 3, 32, 32)
    bright = model(images)
    model.foreground_out[-1].bias.sub_(100)
    dark = model(images)
    assert bright.sample.abs().max() > 0.1 and dark.sample.abs().max() < 1e-6 and (dark.foreground < 0).all()


def test_normalisation_is_inverted_and_saved(tmp_path):
    model = build()
    model.register_to_config(
        structure_shift=[1.0, 2.0, 3.0, 4.0], structure_scale=[0.5, 1.0, 2.0, 4.0],
        style_shift=[-1.0, 0.0, 1.0], style_scale=[2.0, 3.0, 4.0],
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded = DisentangledAutoencoder.from_pretrained(tmp_path)
    structure, styles = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 3)
    normal = loaded.normalize_structure(structure)
    torch.testing.assert_close(normal[:, 3], (structure[:, 3] - 4) / 4)
    torch.testing.assert_close(loaded.denormalize_structure(normal), structure)
    torch.testing.assert_close(loaded.normalize_style(styles)[..., 1], styles[..., 1] / 3)
    torch.testing.assert_close(loaded.denormalize_style(loaded.normalize_style(styles)), styles)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_configuration():
    for arguments, message in (
        ({"sample_size": 100}, "does not divide"),
        ({"sample_size": 72, "patch_size": 2, "encoder_channels": [8] * 4, "decoder_channels": [8] * 4}, "take 64"),
        ({"encoder_channels": (8, 16, 8)}, "as many in both"),
        ({"encoder_channels": (), "decoder_channels": ()}, "as many in both"),
        ({"modalities": []}, "non-empty"),
        ({"modalities": ["T1", ""]}, "non-empty"),
        ({"modalities": "T12"}, "non-empty"),
        ({"modalities": ["T1", "T1"]}, "different names"),
    ):
        with pytest.raises(ValueError, match=message):
            DisentangledAutoencoder(**arguments)


def test_a_config_with_style_maps_is_refused():
    config = dict(build().config)
    assert isinstance(DisentangledAutoencoder.from_config(config | {"style_type": "vector"}), DisentangledAutoencoder)
    with pytest.raises(ValueError, match="`style_type` is 'map'"):
        DisentangledAutoencoder.from_config(config | {"style_type": "map"})


def test_bad_input():
    model = build()
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="T1CE"):
        model.encode(images[:, :2])
    with pytest.raises(ValueError, match="at least one must be present"):
        model.encode(images, torch.tensor([[True, True, True], [False, False, False]]))
    with pytest.raises(ValueError, match="`present` must be"):
        model.encode(images, torch.ones(2, 2, dtype=torch.bool))
    for z_struct, z_style, name in (((2, 5, 4, 4), (2, 3, 3), "z_struct"), ((2, 4, 4, 4), (2, 3, 4), "z_style")):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            model.decode(torch.randn(z_struct), torch.randn(z_style))


@torch.no_grad()
def test_a_structure_from_ranks_does_not_see_an_intensity_curve():
    torch.manual_seed(0)
    options = dict(encoder_channels=(8, 16), decoder_channels=(16, 8), head_channels=8, structure_channels=4)
    model = DisentangledAutoencoder(["T1", "T2"], 32, num_quantiles=17, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.rand(3, 2, 32, 32).clamp(min=0.05)
    images[:, :, :10] = 0
    curved = (0.6 * images**1.5).clamp(max=1)
    one, other = (model.encode(x) for x in (images, curved))
    structures = [posterior.structure_dist.mode() for posterior in (one, other)]
    difference = (structures[0] - structures[1]).abs().mean() / structures[0].std()
    assert difference < 0.02
    assert ((one.style_dist.mode() - other.style_dist.mode()).abs().mean(dim=2) > 0.05).all()
    # An image that is missing or constant has no ranks to speak of, and still a code.
    flat = images * torch.tensor([1.0, 0.0])[:, None, None]
    flat[0, 0][flat[0, 0] > 0] = 0.5
    assert model.encode(flat).structure_dist.mode().isfinite().all()
    half = model.to(torch.bfloat16).encode(images.to(torch.bfloat16)).structure_dist.mode()
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_quantiles_and_ranks():
    images = torch.tensor([[[0.0, 0.0, 0.2], [0.4, 0.6, 0.8]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    quantiles = intensity_quantiles(images, 4)
    normal = NormalDist()
    levels = [normal.cdf(2.5 * x) for x in (-1, -1 / 3, 1 / 3, 1)]
    expected = [0.2 + 0.6 * (level - levels[0]) / (levels[-1] - levels[0]) for level in levels]
    torch.testing.assert_close(quantiles, torch.tensor([expected, [0.0] * 4]))
    ranks = equalize(images, quantiles)
    middle = (0.4 - expected[1]) / (expected[2] - expected[1])
    expected = [0.0, 0.0, 0.1, 0.1 + 0.3 * (1 + middle), 0.1 + 0.3 * (2 - middle), 1.0]
    torch.testing.assert_close(ranks[0].flatten(), torch.tensor(expected))
    assert not ranks[1].any()
