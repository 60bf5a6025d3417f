import torch
import train_decoder

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.losses import DetailDiscriminator, PerceptualDistance
from dldm_pipeline.training_args import DecoderArgs


def batch(pipeline, size=4):
    n, pixels = pipeline.autoencoder.num_modalities, pipeline.autoencoder.config.sample_size
    return {
        "images": torch.rand(size, n, pixels, pixels).clamp(min=0.1),
        "present": torch.ones(size, n, dtype=torch.bool),
        "mask": (torch.rand(size, pixels, pixels) < 0.1).float(),
        "has_mask": torch.ones(size, dtype=torch.bool),
        "labels": torch.zeros(size, pixels, pixels, dtype=torch.uint8),
        "has_labels": torch.zeros(size, dtype=torch.bool),
    }


def make_loss(pipeline, perceptual=None, discriminator=None, **options):
    model = pipeline.autoencoder
    generated = torch.zeros(3, model.config.structure_channels, *[model.latent_size] * 2)
    return train_decoder.DecoderLoss(pipeline, DecoderArgs(**options), generated, perceptual, discriminator)


def test_a_run_changes_the_decoder_and_nothing_else(words, ldm_run, tmp_path):
    train_decoder.main(words("decoder", tmp_path, f"--pipeline={ldm_run}"))
    first, second = (DLDMPipeline.from_pretrained(folder) for folder in (ldm_run, tmp_path))
    for name, weight in first.unet.state_dict().items():
        assert torch.equal(weight, second.unet.state_dict()[name])
    before, after = first.autoencoder.state_dict(), second.autoencoder.state_dict()
    changed = {key.split(".")[0].split("_")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "style", "head", "mask", "foreground"}
    assert torch.equal(before["style_out.0.weight"], after["style_out.0.weight"])
    assert first.autoencoder.config.structure_scale == second.autoencoder.config.structure_scale
    for name in ("samples.png", "README.md", "validation/step-000003.png", "checkpoint-6/training_state.json"):
        assert (tmp_path / name).stat().st_size > 0


def test_new_subjects_are_compared_with_real_ones_and_those_before_them(tiny_pipeline, monkeypatch):
    """Structures of zeros decode to what no real patch looks like; the gradient does not shrink as the pool grows."""
    torch.manual_seed(0)
    weight, subjects = tiny_pipeline.autoencoder.head_out[-1].weight, batch(tiny_pipeline)
    objective = make_loss(tiny_pipeline)
    monkeypatch.setattr(train_decoder, "PATCH_POOL", 10)
    lengths = []
    for expected in ([2, 4], [4, 8], [6, 10], [8, 10], [10, 10]):
        patch = objective(subjects)["patch"]
        assert patch > 0 and [len(images) for images, *_ in objective.pools] == expected
        lengths.append(torch.autograd.grad(patch, weight)[0].norm().item())
    assert lengths[0] / 3 < lengths[-1] < lengths[0] * 3


def test_every_term_has_a_gradient_in_the_decoder(tiny_pipeline):
    model, subjects = tiny_pipeline.autoencoder, batch(tiny_pipeline)
    perceptual = PerceptualDistance([subjects], show_progress=False)
    terms = make_loss(tiny_pipeline, perceptual, DetailDiscriminator(model.num_modalities + 1))(subjects)
    assert set(terms) == {*train_decoder.WEIGHTS, "spectrum", "patch", "perceptual", "adversarial"}
    for name, term in terms.items():
        target = {"mask": model.mask_out, "foreground": model.foreground_out}.get(name, model.head_out)
        (gradient,) = torch.autograd.grad(term, target[-1].weight, retain_graph=True)
        assert term.isfinite() and gradient.any(), name
    without = make_loss(tiny_pipeline, patch_weight=0)(subjects)
    assert set(without) == {*train_decoder.WEIGHTS, "spectrum"}


def test_half_of_a_batch_is_new_and_a_quarter_is_denoised(tiny_pipeline, monkeypatch):
    objective, given = make_loss(tiny_pipeline), []
    decode, encode_exchanged = objective.autoencoder.decode, train_decoder.encode_exchanged

    def encode(*args):
        structure, *others = encode_exchanged(*args)
        return torch.ones_like(structure), *others

    monkeypatch.setattr(train_decoder, "encode_exchanged", encode)
    monkeypatch.setattr(
        objective.autoencoder, "decode", lambda structure, styles: given.append(structure) or decode(structure, styles)
    )
    monkeypatch.setattr(objective, "denoise", lambda structure, styles, present: structure + 4)
    objective.generated = torch.full_like(objective.generated, -3.0)
    objective(batch(tiny_pipeline, 8))
    assert given[0].mean(dim=(1, 2, 3)).tolist() == [5, 5, 1, 1, -3, -3, -3, -3]


def test_denoised_structures_stay_near_their_own(tiny_pipeline, monkeypatch):
    objective, model = make_loss(tiny_pipeline), tiny_pipeline.autoencoder
    structure = torch.randn(6, model.config.structure_channels, *[model.latent_size] * 2)
    styles = torch.randn(6, model.num_modalities, model.config.style_channels)
    present = torch.tensor([[False, True, True], [True, False, False]] * 3)
    calls, inner = [], tiny_pipeline._draw_structures

    def spy(count, steps, **options):
        calls.append((steps, options["strength"], options["start"][2]))
        return inner(count, steps, **options)

    monkeypatch.setattr(tiny_pipeline, "_draw_structures", spy)
    for _ in range(20):
        assert objective.denoise(structure, styles, present).shape == structure.shape
    starts = [strength for _, strength, _ in calls]
    assert max(starts) <= 0.5 and min(starts) < 0.2 and len(set(starts)) > 5
    assert all(round(steps * strength) == train_decoder.DENOISING_STEPS for steps, strength, _ in calls)
    assert all(present[torch.arange(6), labels].all() for _, _, labels in calls)


def test_bad_input_is_one_line(words, ldm_run, tmp_path, refused):
    for more, message in (
        (["--pipeline=absent"], "--pipeline absent: no such folder"),
        (["--train_batch_size=1"], "--train_batch_size 1: must be at least 2"),
        (["--adversarial_weight=-1"], "--adversarial_weight -1.0"),
        (["--dataset=./absent"], "absent"),
    ):
        assert message in refused(
            train_decoder.main, words("decoder", tmp_path / "out", f"--pipeline={ldm_run}", *more)
        )


def test_data_of_another_size_are_refused(words, tmp_path, refused):
    """The bundled pipeline is the default, of 128 pixels and other modalities."""
    assert "modalities do not match" in refused(train_decoder.main, words("decoder", tmp_path))
