"""DLDMPipeline: what fixes a subject, what a caller can fix, and what is refused."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from dldm_pipeline.autoencoder_disentangled import DisentangledAutoencoder
from dldm_pipeline.pipeline_dldm import DLDMPipeline, DLDMPipelineOutput


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(tiny_pipeline) -> DLDMPipeline:
    return tiny_pipeline


def call(pipe, num_subjects=2, **options):
    steps = {"num_inference_steps": 3, "num_style_inference_steps": 2}
    return pipe(num_subjects, **{"generator": seeded(), "output_type": "pt", **steps, **options})


def assert_same(some, many, subjects=slice(None)):
    """The subjects of `some` are those of `many`, in the modalities that `some` has."""
    places = [many.modalities.index(name) for name in some.modalities]
    for name in ("structure", "masks", "styles", "images"):
        a, b = getattr(some, name), getattr(many, name)[subjects]
        torch.testing.assert_close(a, b[:, places] if name in ("styles", "images") else b, rtol=0, atol=1e-4)


def watch(pipe) -> list[tuple[list[int], torch.Tensor]]:
    """Labels and latents of each call of the denoiser, from now on."""
    seen, forward = [], pipe.unet.forward

    def spy(latents, t, class_labels):
        seen.append((class_labels.tolist(), latents.clone()))
        return forward(latents, t, class_labels=class_labels)

    pipe.unet.forward = spy
    return seen


# -- the output


def test_output_has_the_shapes_ranges_and_names_that_it_says(pipe):
    output = call(pipe, 3, output_type="np")
    assert isinstance(output, DLDMPipelineOutput)
    assert output.images.shape == (3, 3, 32, 32) and output.images.dtype == np.float32
    assert output.images.min() >= 0 and output.images.max() <= 1 and output.images.std() > 0
    assert output.masks.shape == (3, 32, 32) and output.masks.dtype == bool
    assert output.structure.shape == (3, 4, 4, 4) and output.styles.shape == (3, 3, 3)
    assert output.modalities == ["T1", "T2", "WB"]
    assert output[0] is output.images and np.array_equal(output.by_modality["T2"], output.images[:, 1])


def test_output_types_agree(pipe):
    output = call(pipe, output_type="np")
    others = {kind: call(pipe, output_type=kind) for kind in ("pt", "pil", "latent")}
    others["tuple"] = DLDMPipelineOutput(*call(pipe, output_type="np", return_dict=False))
    for kind in ("pt", "tuple"):
        assert np.array_equal(others[kind].images, output.images) and np.array_equal(others[kind].masks, output.masks)
    assert all(torch.equal(other.structure, output.structure) for other in others.values())
    assert all(torch.equal(other.styles, output.styles) for other in others.values())
    image = others["pil"].images[1][2]
    assert isinstance(image, PIL.Image.Image) and image.mode == "L"
    assert np.array_equal(image, (output.images[1, 2] * 255).round().astype(np.uint8))
    assert np.array_equal(others["pil"].masks[0], output.masks[0] * np.uint8(255))
    assert others["pil"].by_modality["WB"][1] is image
    assert others["latent"].images is None and others["latent"].masks is None
    assert len(call(pipe, output_type="latent", return_dict=False)) == 6
    with pytest.raises(ValueError, match="latent"):
        _ = others["latent"].by_modality


def test_labels_are_where_the_mask_is(pipe):
    assert call(pipe, output_type="np").labels is None  # this autoencoder knows the whole tumour only
    pipe.autoencoder = DisentangledAutoencoder.from_config(pipe.autoencoder.config, num_regions=3).eval()
    for parameter in pipe.autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    output = call(pipe, output_type="np")
    assert output.labels.dtype == np.uint8 and set(np.unique(output.labels)) == {0, 1, 2, 3}
    assert np.array_equal(output.labels > 0, output.masks)
    with torch.no_grad():
        decoded = pipe.autoencoder.decode(output.structure, output.styles)
    _, core, enhancing = (decoded.regions > 0).numpy().swapaxes(0, 1)
    assert np.array_equal(output.labels == 2, output.masks & ~core)
    assert np.array_equal(output.labels == 3, output.masks & core & enhancing)
    assert np.array_equal(call(pipe, output_type="pt").labels, output.labels)
    assert np.array_equal(call(pipe, output_type="pil").labels[1], output.labels[1])


# -- what fixes a subject


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_a_seed_fixes_a_subject(pipe, scheduler):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    many = call(pipe, 5)
    assert len({row.sum().item() for row in many.structure}) == len({row.sum().item() for row in many.styles}) == 5
    for batch_size in (1, 3, 5):
        assert_same(call(pipe, 5, batch_size=batch_size), many)
    for modalities in ("WB", ["T2"], ["WB", "T1"], ["T2", "WB", "T1"]):
        assert_same(call(pipe, 2, modalities=modalities), many, slice(2))
    for batch_size in (None, 2):
        structure = pipe._draw_structures(5, 3, seeded(), batch_size=batch_size)
        torch.testing.assert_close(structure, many.structure, rtol=0, atol=1e-4)
    assert_same(call(pipe, 1, guidance_scale=1.5), call(pipe, 3, guidance_scale=1.5, batch_size=2), slice(1))


def test_one_generator_a_subject(pipe):
    together = call(pipe, 3, generator=[seeded(5), seeded(6), seeded(7)], batch_size=2)
    assert_same(call(pipe, 3, generator=[seeded(7), seeded(5), seeded(6)]), together, [2, 0, 1])
    assert_same(call(pipe, 1, generator=seeded(6), modalities="T1"), together, [1])


def test_successive_calls_give_new_subjects_and_the_global_seed_counts(pipe):
    both, generator = call(pipe), seeded()
    before = torch.get_rng_state()
    for k in range(2):
        assert_same(call(pipe, 1, generator=generator), both, [k])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    first = call(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(first.images, call(pipe, generator=None).images)
    assert not torch.equal(first.images, call(pipe, generator=None).images)


# -- what a caller can fix


def test_given_latents_are_decoded_as_they_are(pipe):
    source = call(pipe, 2, noise_scale=0)
    latents = {"structure": source.structure, "styles": source.styles}
    output = call(pipe, 2, **latents, generator=seeded(8), noise_scale=0, batch_size=1)
    assert_same(output, source)
    with torch.no_grad():
        decoded = pipe.autoencoder.decode(source.structure, source.styles)
    foreground = decoded.foreground > 0
    expected = (decoded.sample * foreground[:, None]).clamp(0, 1)
    torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-4)
    assert torch.equal(output.masks, (decoded.mask > 0) & foreground)
    assert foreground.any() and not foreground.all() and output.masks.any()


def test_one_anatomy_has_many_appearances_and_the_reverse(pipe):
    source = call(pipe, 1)
    output = call(pipe, 3, structure=source.structure, generator=seeded(9))
    assert all(torch.equal(z, source.structure[0]) for z in output.structure)
    assert all(torch.equal(mask, source.masks[0]) for mask in output.masks)
    assert not torch.equal(output.images[0], output.images[1])
    # the same seed with its own structure is the same subject
    assert_same(call(pipe, 1, structure=source.structure), source)

    output = call(pipe, 3, styles=source.styles[:, [2, 0]], modalities=["WB", "T1"])
    assert all(torch.equal(z, source.styles[0, [2, 0]]) for z in output.styles)
    assert torch.equal(output.structure, call(pipe, 3).structure)


def test_structures_are_returned_from_some_noise(pipe):
    """Noised beside their own normalised style under their own label; the fewer steps remain, the less they change."""
    structure, style, labels = torch.randn(3, 4, 4, 4), torch.randn(3, 3), torch.tensor([2, 0, 1])
    clean = pipe.autoencoder.normalize_style(style)[:, :, None, None].expand(-1, -1, 4, 4)
    clean = torch.cat([pipe.autoencoder.normalize_structure(structure), clean], dim=1)
    seen, changes = watch(pipe), []
    for strength in (0.02, 0.2):
        output = pipe._draw_structures(3, 50, seeded(), (structure, style, labels), strength, batch_size=2)
        changes.append((output - structure).abs().mean())
    assert [labels for labels, _ in seen] == [[2, 0], [1]] * (1 + 10)
    torch.testing.assert_close(torch.cat([seen[0][1], seen[1][1]]), clean, rtol=0, atol=0.25)
    assert changes[0] < 0.1 < changes[1]
    # at full strength nothing is left of what was given, but for the label
    output = pipe._draw_structures(3, 3, seeded(), (structure, style, 0 * labels))
    torch.testing.assert_close(output, pipe._draw_structures(3, 3, seeded()), rtol=0, atol=1e-4)


# -- the steps


def test_latents_reach_a_known_answer(pipe):
    """The scheduler, the flat state and the scales of the latents bring a denoiser's answer to the output."""
    answer = torch.randn(7, 4, 4, generator=seeded(1))
    pipe.scheduler.register_to_config(prediction_type="sample")
    pipe.unet.forward = lambda x, t, class_labels: UNet2DOutput(
        sample=F.adaptive_avg_pool2d(answer, x.shape[2:]).expand(len(x), -1, -1, -1)
    )
    output = call(pipe, 2, output_type="latent")
    config = pipe.autoencoder.config
    shift, scale = (torch.tensor(config[f"structure_{name}"])[:, None, None] for name in ("shift", "scale"))
    torch.testing.assert_close(output.structure, (answer[:4] * scale + shift).expand(2, -1, -1, -1), atol=0.05, rtol=0)
    shift, scale = (torch.tensor(config[f"style_{name}"]) for name in ("shift", "scale"))
    expected = (answer[4:].mean(dim=(1, 2)) * scale + shift).expand(2, 3, -1)
    torch.testing.assert_close(output.styles, expected, atol=0.05, rtol=0)


def test_labels_and_clean_structure_reach_the_denoiser(pipe):
    seen = watch(pipe)
    output = call(pipe, 3, modalities=["WB", "T1"], guidance_scale=2.0, output_type="latent", batch_size=2)
    pairs, styles = seen[: 3 * 4], seen[3 * 4 :]
    assert [labels for labels, _ in pairs] == [[0, 0], [0], [3, 3], [3]] * 3
    assert [labels for labels, _ in styles] == [[6, 4, 6, 4], [6, 4], [7] * 4, [7] * 2] * 2
    clean = pipe.autoencoder.normalize_structure(output.structure).repeat_interleave(2, dim=0)
    clean = clean.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean(dim=(3, 5))
    for (_, first), (_, second) in zip(styles[::2], styles[1::2], strict=True):
        latents = torch.cat([first, second])
        torch.testing.assert_close(latents[:, :4], clean)
        assert torch.equal(latents[:, 4:].std(dim=(2, 3)), torch.zeros(6, 3))  # vectors are flat maps


def test_styles_of_a_subject_are_related_as_the_autoencoder_says(pipe):
    pipe.scheduler.register_to_config(prediction_type="epsilon", rescale_betas_zero_snr=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    seen = []

    def forward(x, t, class_labels):
        seen.append(x)
        return UNet2DOutput(sample=x)

    pipe.unet.forward = forward
    structure = torch.zeros(1, 4, 4, 4)
    relation = torch.eye(9)
    relation[0, 3] = relation[3, 0] = 0.9  # first numbers of T1 and T2
    relation[4, 8] = relation[8, 4] = -0.6  # second of T2, third of WB
    alone = call(pipe, 400, structure=structure, output_type="latent", batch_size=400).styles
    pipe.autoencoder.register_to_config(style_relation=relation.tolist())
    seen.clear()
    related = call(pipe, 400, structure=structure, output_type="latent", batch_size=400).styles
    noise = seen[0][:, 4:, 0, 0].reshape(400, 9)
    torch.testing.assert_close(torch.corrcoef(noise.T), relation, rtol=0, atol=0.2)
    assert torch.equal(related[:, 0], alone[:, 0]) and not torch.equal(related[:, 1], alone[:, 1])
    some = call(pipe, 400, structure=structure, output_type="latent", modalities=["WB"], batch_size=400).styles
    torch.testing.assert_close(some[:, 0], related[:, 2])  # whatever else is wanted


def test_styles_beside_the_whole_structure(pipe):
    """As of pipelines that were trained without `style_grid`."""
    whole = DLDMPipeline(**pipe.components)
    assert whole.config.style_grid is None
    whole.set_progress_bar_config(disable=True)
    seen = watch(whole)
    output = call(whole, 2, output_type="latent")
    clean = whole.autoencoder.normalize_structure(output.structure).repeat_interleave(3, dim=0)
    assert torch.equal(seen[-1][1][:, :4], clean)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, under NumPy 2
@pytest.mark.parametrize(
    "name, kind", [("DDIMScheduler", "epsilon"), ("DDPMScheduler", "sample"), ("HeunDiscreteScheduler", "v_prediction")]
)
def test_schedulers_on_the_plain_noise_schedule(pipe, name, kind):
    options = {"clip_sample": False} if name.startswith("DD") else {}
    pipe.scheduler = getattr(diffusers, name)(prediction_type=kind, **options)
    output = call(pipe, 3)
    assert output.images.isfinite().all() and output.structure.isfinite().all()
    assert_same(call(pipe, 1), output, slice(1))


def test_guidance_and_noise_in_the_steps_change_the_images(pipe):
    plain = call(pipe).images
    for name, value in {
        "guidance_scale": 3.0,
        "eta": 0.9,
        "num_inference_steps": 2,
        "num_style_inference_steps": 1,
    }.items():
        images = call(pipe, **{name: value}).images
        assert images.isfinite().all() and not torch.allclose(images, plain, atol=1e-3), name


def test_callback_sees_every_step_of_all_subjects_and_can_replace_latents(pipe):
    seen = []

    def callback(p, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    output = call(pipe, 3, modalities=["T1", "WB"], callback_on_step_end=callback, batch_size=2)
    assert seen == [(i, (3, 7, 4, 4)) for i in range(3)] + [(i, (6, 7, 2, 2)) for i in (3, 4)]
    zero = pipe.autoencoder.normalize_structure(output.structure)
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-6, rtol=0)
    watched = call(pipe, callback_on_step_end=lambda p, i, t, tensors: None)
    assert torch.equal(watched.images, call(pipe).images)


def test_the_noise_is_the_training_images(pipe):
    clean, noisy, twice = (call(pipe, 8, noise_scale=scale).images for scale in (0, 1, 2))
    inside = (clean > 0.2) & (clean < 0.8)  # where nothing is cut off
    for m, level in enumerate(pipe.autoencoder.config.noise_level):
        noise, double = ((images - clean)[:, m][inside[:, m]] for images in (noisy, twice))
        assert noise.numel() > 200
        np.testing.assert_allclose([noise.std(), double.std()], [level, 2 * level], rtol=0.2)
    with torch.no_grad():
        foreground = pipe.autoencoder.decode(*call(pipe, 8)[2:4]).foreground > 0
    outside = ~foreground[:, None].expand_as(noisy)
    assert outside.any() and (noisy[outside] == 0).all()


# -- what is refused


def test_bad_arguments_are_named(pipe):
    for options, message in (
        ({"num_subjects": 0}, "`num_subjects`.*0"),
        ({"num_subjects": 1.5}, "`num_subjects`.*1.5"),
        ({"num_inference_steps": True}, "`num_inference_steps`.*True"),
        ({"num_style_inference_steps": -1}, "`num_style_inference_steps`.*-1"),
        ({"batch_size": 0}, "`batch_size`.*0"),
        ({"modalities": ["T1", "PET"]}, r"`modalities`.*\['T1', 'T2', 'WB'\].*PET"),
        ({"modalities": []}, "`modalities`"),
        ({"modalities": ["T1", "T1"]}, "`modalities`.*twice"),
        ({"guidance_scale": 0.5}, "`guidance_scale`.*0.5"),
        ({"eta": 1.0}, "`eta`.*1.0"),
        ({"noise_scale": float("nan")}, "`noise_scale`.*nan"),
        ({"generator": [torch.Generator()] * 3}, "`generator`.*2 subjects.*3"),
        ({"structure": torch.zeros(3, 4, 4, 4)}, r"`structure`.*\(2, 4, 4, 4\).*\(3, 4, 4, 4\)"),
        ({"structure": np.zeros((2, 4, 4, 4))}, "`structure`.*ndarray"),
        ({"styles": torch.zeros(2, 2, 3)}, r"`styles`.*\(2, 3, 3\)"),
        ({"output_type": "jpeg"}, "`output_type`.*jpeg"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`.*latents.*noise"),
    ):
        with pytest.raises(ValueError, match=message):
            call(pipe, **options)


def test_a_denoiser_that_does_not_fit_and_images_that_are_no_numbers_are_refused(pipe):
    for name, value in {"in_channels": 9, "out_channels": 9, "num_class_embeds": 4, "sample_size": 8}.items():
        unet = UNet2DModel.from_config({**pipe.unet.config, name: value})
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            DLDMPipeline(pipe.autoencoder, unet, pipe.scheduler)
    for grid in (0, 1, 3, 8, "4"):
        with pytest.raises(ValueError, match=r"`style_grid` must be one of \[2, 4\]"):
            DLDMPipeline(**pipe.components, style_grid=grid)
    for relation in ([[1.0]], (torch.eye(9) * 4).tolist(), (2 * torch.eye(9) - 1).tolist()):
        pipe.autoencoder.register_to_config(style_relation=relation)
        with pytest.raises(
            ValueError, match="`style_relation` of the autoencoder must be a correlation matrix of 9 rows"
        ):
            DLDMPipeline(**pipe.components)
    pipe.autoencoder.register_to_config(style_relation=None)
    with pytest.raises(ValueError, match="hold NaN"):
        call(pipe, 1, structure=torch.full((1, 4, 4, 4), float("nan")))
