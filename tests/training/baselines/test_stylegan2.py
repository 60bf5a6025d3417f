import pytest
import torch
import torch.nn.functional as F
from stylegan2 import Discriminator, ModulatedConv2d, StyleGAN2, blur, minibatch_deviation, translate, upsample

from dldm_pipeline.losses import r1_penalty

CHANNELS = (16, 8, 8, 8)


def make_generator(**options):
    torch.manual_seed(0)
    options = {"modalities": ["T1", "T2"], "sample_size": 32, "channels": CHANNELS, "latent_dim": 16} | options
    generator = StyleGAN2(**options, mapping_layers=2)
    for conv in generator.convs:
        conv.noise_strength.data.fill_(0.5)  # it starts at zero, and a test should see it work
    return generator


@pytest.mark.parametrize("up", [False, True])
def test_modulation_is_a_kernel_for_each_image(up):
    """Equations 1 to 3 of the paper, as the grouped convolution that it describes."""
    conv = ModulatedConv2d(4, 6, 3, 5, up=up)
    x, w = torch.randn(3, 4, 8, 8), torch.randn(3, 5)
    kernels = conv.weight * conv.scale * conv.style(w)[:, None, :, None, None]
    kernels = kernels * (kernels.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    if up:
        spread = x.new_zeros(3, 4, 17, 17)
        spread[:, :, 1::2, 1::2] = x
        spread = F.pad(spread, [1] * 4)
        grouped = F.conv2d(spread.reshape(1, 12, 19, 19), kernels.flip(3, 4).reshape(18, 4, 3, 3), groups=3)
        expected = blur(grouped.reshape(3, 6, 17, 17), gain=4.0)
    else:
        expected = F.conv2d(x.reshape(1, 12, 8, 8), kernels.reshape(18, 4, 3, 3), padding=1, groups=3)
        expected = expected.reshape(3, 6, 8, 8)
    torch.testing.assert_close(conv(x, w), expected, rtol=1e-4, atol=1e-5)


def test_demodulation_keeps_the_variance():
    conv = ModulatedConv2d(32, 32, 3, 5)
    conv.style.bias.data.fill_(30.0)
    output = conv(torch.randn(16, 32, 16, 16), torch.randn(16, 5))
    assert output[:, :, 2:-2, 2:-2].std().item() == pytest.approx(1, abs=0.05)


def test_resampling_passes_what_is_smooth():
    x = torch.randn(2, 3, 8, 8)
    spread = x.new_zeros(2, 3, 16, 16)
    spread[:, :, ::2, ::2] = x
    # Zero insertion and blur, away from the border, where interpolation repeats the last pixel.
    expected = blur(F.pad(spread, [1, 0, 1, 0]), gain=4.0)
    torch.testing.assert_close(upsample(x)[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1])
    assert blur(torch.ones(1, 2, 8, 8), stride=2)[:, :, 1:-1, 1:-1].unique().tolist() == [1]


def test_minibatch_deviation_shows_repetition():
    x = torch.randn(8, 3, 4, 4)
    output = minibatch_deviation(x, 4)
    assert output.shape == (8, 4, 4, 4) and torch.equal(output[:, :3], x)
    # Images 0, 2, 4, 6 are one group.
    expected = x[::2].std(dim=0, unbiased=False).mean()
    torch.testing.assert_close(output[0, 3], expected.expand(4, 4), rtol=1e-3, atol=1e-4)
    assert minibatch_deviation(x[:1].expand(8, -1, -1, -1))[:, 3].max() < 1e-3
    assert minibatch_deviation(x[:5]).shape == (5, 4, 4, 4)


def test_the_penalty_reaches_the_weights():
    judge = Discriminator(2, 32, CHANNELS)
    images = torch.randn(4, 2, 32, 32, requires_grad=True)
    r1_penalty(judge(images), images).backward()
    assert judge.from_image.weight.grad.abs().sum() > 0


def test_translation_shifts_all_channels_alike_over_grey():
    images = torch.zeros(64, 2, 16, 16)
    images[:, :, 8, 8] = torch.tensor([1.0, 2.0])
    output = translate(images.requires_grad_(), 0.125)
    assert output.shape == images.shape
    spots = (output[:, 0] == 1).nonzero()
    assert len(spots) == 64 and torch.equal(spots, (output[:, 1] == 2).nonzero())
    assert spots[:, 1:].min() == 6 and spots[:, 1:].max() == 10 and translate(torch.ones(64, 1, 16, 16)).min() == 0
    output.sum().backward()
    assert (images.grad[:, :, 4:12, 4:12] == 1).all() and translate(images, 0.0) is images


def test_a_seed_fixes_the_subjects(tmp_path):
    model = make_generator()
    images, masks = model.sample(5, torch.Generator().manual_seed(1), return_masks=True)
    assert images.shape == (5, 2, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0
    assert masks.shape == (5, 32, 32) and masks.unique().tolist() == [0, 1]
    assert (images[0] - images[1]).abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = StyleGAN2.from_pretrained(tmp_path)
    again = loaded.sample(5, torch.Generator().manual_seed(1), batch_size=2)
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-5)
    own = [torch.Generator().manual_seed(i) for i in (7, 8)]
    pair = model.sample(2, own)
    torch.testing.assert_close(model.sample(1, [torch.Generator().manual_seed(8)])[0], pair[1], rtol=1e-4, atol=1e-5)


def test_noise_is_drawn_and_used():
    generator = make_generator()
    z = torch.randn(1, 16)
    assert generator.noise_sizes() == [4, 8, 8, 16, 16, 32, 32] and (generator(z) - generator(z)).abs().max() > 1e-3
    noises = [torch.zeros(1, 1, size, size) for size in generator.noise_sizes()]
    assert torch.equal(generator(z, noises), generator(z, noises))


def test_bad_input_is_refused():
    for options, expected in (
        ({"sample_size": 48}, "sample_size is 48"),
        ({"sample_size": 64}, "give 5 positive widths, one for each grid: 4, 8, 16, 32, 64"),
        ({"modalities": []}, "modalities is empty"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_generator(**options)
