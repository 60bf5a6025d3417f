"""DLDMPipeline: what fixes a subject, what a caller can fix, and what is refused."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel

import dldm_pipeline.pipeline_dldm as module
from dldm_pipeline.pipeline_dldm import DLDMPipeline, DLDMPipelineOutput

STEPS = {"num_inference_steps": 4, "num_style_inference_steps": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["tiny_pipeline"])
def pipe(request):
    return request.getfixturevalue(request.param)


def call(pipe, num_subjects=2, **options):
    options = {"generator": seeded(), "output_type": "np", **STEPS, **options}
    return pipe(num_subjects, **options)


def test_output_shapes_ranges_and_names(pipe):
    output = call(pipe, 3)
    assert isinstance(output, DLDMPipelineOutput)
    assert output.images.shape == (3, 3, 32, 32) and output.images.dtype == np.float32
    assert output.images.min() >= 0 and output.images.max() <= 1 and output.images.std() > 0
    assert output.masks.shape == (3, 32, 32) and output.masks.dtype == bool
    assert output.structure.shape == (3, 4, 4, 4)
    assert output.styles.shape[:3] == (3, 3, 3)
    assert output.modalities == ["T1", "T2", "WB"]
    assert np.array_equal(output[0], output.images)
    assert np.array_equal(output.by_modality["T2"], output.images[:, 1])


def test_output_types_agree(tiny_pipeline):
    np_output = call(tiny_pipeline)
    pt_output = call(tiny_pipeline, output_type="pt")
    pil_output = call(tiny_pipeline, output_type="pil")
    latent_output = call(tiny_pipeline, output_type="latent")

    assert np.array_equal(pt_output.images.numpy(), np_output.images)
    assert np.array_equal(pt_output.masks.numpy(), np_output.masks)
    image = pil_output.images[1][2]
    assert isinstance(image, PIL.Image.Image) and image.mode == "L"
    assert np.array_equal(np.asarray(image), (np_output.images[1, 2] * 255).round().astype(np.uint8))
    assert np.array_equal(np.asarray(pil_output.masks[0]), np_output.masks[0] * np.uint8(255))
    assert pil_output.by_modality["WB"][1] is image
    assert latent_output.images is None and latent_output.masks is None
    for output in (pt_output, pil_output, latent_output):
        assert torch.equal(output.structure, np_output.structure)
        assert torch.equal(output.styles, np_output.styles)
    with pytest.raises(ValueError, match="latent"):
        _ = latent_output.by_modality


def test_tuple_return(tiny_pipeline):
    images, masks, structure, styles, names = call(tiny_pipeline, return_dict=False)
    output = call(tiny_pipeline)
    assert np.array_equal(images, output.images) and np.array_equal(masks, output.masks)
    assert torch.equal(structure, output.structure) and torch.equal(styles, output.styles)
    assert names == output.modalities


@pytest.mark.parametrize("modalities", [["T1"], ["T2"], "WB", ["WB", "T1"], ["T2", "WB", "T1"]])
def test_a_seed_fixes_a_subject_whatever_the_modalities(pipe, modalities):
    everything = call(pipe, 3)
    some = call(pipe, 3, modalities=modalities)
    assert torch.equal(some.structure, everything.structure)
    assert np.array_equal(some.masks, everything.masks)
    for name, images in some.by_modality.items():
        assert np.array_equal(images, everything.by_modality[name])


@pytest.mark.parametrize("num_subjects", [1, 2, 3, 4, 5, 9])
def test_a_seed_fixes_a_subject_whatever_the_batch(pipe, num_subjects):
    many = call(pipe, 9)
    few = call(pipe, num_subjects)
    assert torch.equal(few.structure, many.structure[:num_subjects])
    assert np.array_equal(few.images, many.images[:num_subjects])


def test_one_generator_a_subject(pipe):
    together = call(pipe, 3, generator=[seeded(5), seeded(6), seeded(7)], modalities=["T2", "T1"])
    alone = call(pipe, 1, generator=seeded(6))
    assert torch.equal(together.structure[1], alone.structure[0])
    assert np.array_equal(together.by_modality["T1"][1], alone.by_modality["T1"][0])
    assert not torch.equal(together.structure[0], together.structure[2])


def test_a_subject_is_the_same_under_a_stochastic_scheduler(tiny_pipeline):
    tiny_pipeline.scheduler = diffusers.DDPMScheduler.from_config(tiny_pipeline.scheduler.config)
    many, one = call(tiny_pipeline, 5), call(tiny_pipeline, 1, modalities=["T2"])
    assert np.array_equal(many.by_modality["T2"][:1], one.by_modality["T2"])


def test_successive_calls_draw_new_subjects_and_global_seed_counts(tiny_pipeline):
    generator = seeded()
    first, second = (call(tiny_pipeline, 1, generator=generator).images for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(np.concatenate([first, second]), call(tiny_pipeline, 2).images)
    torch.manual_seed(3)
    first = call(tiny_pipeline, generator=None).images
    torch.manual_seed(3)
    assert np.array_equal(first, call(tiny_pipeline, generator=None).images)


def test_a_generator_leaves_the_global_random_state_alone(tiny_pipeline):
    before = torch.get_rng_state()
    call(tiny_pipeline)
    assert torch.equal(before, torch.get_rng_state())


def test_fixed_structure_gives_one_anatomy_many_appearances(pipe):
    source = call(pipe, 1)
    output = call(pipe, 3, structure=source.structure, generator=seeded(9))
    assert all(torch.equal(z, source.structure[0]) for z in output.structure)
    assert all(np.array_equal(mask, source.masks[0]) for mask in output.masks)
    assert not np.array_equal(output.images[0], output.images[1])
    # the same seed with its own structure is the same subject
    assert np.array_equal(call(pipe, 1, structure=source.structure).images, source.images)


def test_fixed_styles_give_one_appearance_over_many_anatomies(pipe):
    source = call(pipe, 1, generator=seeded(4), modalities=["WB", "T1"])
    output = call(pipe, 3, styles=source.styles, modalities=["WB", "T1"])
    assert all(torch.equal(z, source.styles[0]) for z in output.styles)
    assert torch.equal(output.structure, call(pipe, 3).structure)


def test_both_latents_fixed_only_decodes(pipe, tiny_autoencoder):
    source = call(pipe, 2, noise_scale=0)
    output = call(pipe, 2, structure=source.structure, styles=source.styles, generator=seeded(8), noise_scale=0)
    assert np.array_equal(output.images, source.images)
    with torch.no_grad():
        decoded = pipe.autoencoder.decode(source.structure, source.styles)
    foreground = decoded.foreground > 0
    expected = (decoded.sample * foreground[:, None]).clamp(0, 1)
    np.testing.assert_allclose(output.images, expected.numpy(), atol=1e-5)
    assert np.array_equal(output.masks, ((decoded.mask > 0) & foreground).numpy())


def test_the_noise_is_the_training_images(tiny_pipeline):
    clean, noisy, twice = (call(tiny_pipeline, 8, noise_scale=scale).images for scale in (0, 1, 2))
    inside = (clean > 0.2) & (clean < 0.8)  # where nothing is cut off
    for m, level in enumerate(tiny_pipeline.autoencoder.config.noise_level):
        noise, double = ((images - clean)[:, m][inside[:, m]] for images in (noisy, twice))
        assert noise.size > 200
        np.testing.assert_allclose([noise.std(), double.std()], [level, 2 * level], rtol=0.2)
    with torch.no_grad():
        foreground = tiny_pipeline.autoencoder.decode(*call(tiny_pipeline, 8)[2:4]).foreground > 0
    outside = ~foreground.numpy()[:, None].repeat(3, axis=1)
    assert outside.any() and (noisy[outside] == 0).all()


def test_save_load_gives_the_same_images(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DLDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    before, after = call(tiny_pipeline), call(loaded)
    assert np.array_equal(before.images, after.images) and np.array_equal(before.masks, after.masks)
    assert loaded.autoencoder.config.modalities == ["T1", "T2", "WB"]
    assert not list(tmp_path.rglob("*.bin"))


def test_loads_by_a_hub_name(tiny_pipeline, tmp_path, monkeypatch):
    tiny_pipeline.save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    loaded = DLDMPipeline.from_pretrained("someone/dldm", revision="v1")
    assert isinstance(loaded, DLDMPipeline)
    assert asked["name"] == "someone/dldm" and asked["revision"] == "v1"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, under NumPy 2
@pytest.mark.parametrize(
    "name, prediction_type",
    [
        ("DDIMScheduler", "epsilon"),
        ("DDPMScheduler", "sample"),
        ("DPMSolverMultistepScheduler", "v_prediction"),
        ("UniPCMultistepScheduler", "v_prediction"),
        ("EulerDiscreteScheduler", "v_prediction"),
        ("EulerAncestralDiscreteScheduler", "epsilon"),
        ("HeunDiscreteScheduler", "v_prediction"),
        ("DEISMultistepScheduler", "epsilon"),
        ("LMSDiscreteScheduler", "v_prediction"),
    ],
)
def test_schedulers(tiny_pipeline, name, prediction_type):
    # The plain noise schedule: epsilon prediction is undefined where there is no signal.
    options = {"clip_sample": False} if name.startswith("DD") else {}
    tiny_pipeline.scheduler = getattr(diffusers, name)(prediction_type=prediction_type, **options)
    steps = {"num_inference_steps": 5, "num_style_inference_steps": 3}
    output = call(tiny_pipeline, 5, **steps)
    assert np.isfinite(output.images).all() and torch.isfinite(output.structure).all()
    assert np.array_equal(output.images[:1], call(tiny_pipeline, 1, **steps).images)


def test_ddim_recovers_a_known_latent(tiny_pipeline):
    """A denoiser that knows the answer: the scheduler and the flat state must bring the latents exactly to it."""
    target = torch.randn(7, 4, 4, generator=seeded(1))
    target[4:] = target[4:, :1, :1]
    tiny_pipeline.scheduler.register_to_config(prediction_type="sample")
    tiny_pipeline.unet.forward = lambda latents, t, class_labels: module.BaseOutput(
        sample=target.expand(len(latents), -1, -1, -1)
    )
    output = call(tiny_pipeline, 2, output_type="latent")
    autoencoder = tiny_pipeline.autoencoder
    structure = autoencoder.normalize_structure(output.structure)
    styles = autoencoder.normalize_style(output.styles)
    torch.testing.assert_close(structure, target[:4].expand(2, -1, -1, -1), atol=0.02, rtol=0)
    torch.testing.assert_close(styles, target[4:, 0, 0].expand(2, 3, -1), atol=0.02, rtol=0)


def test_labels_and_clean_structure_reach_the_denoiser(tiny_pipeline):
    seen = []
    forward = tiny_pipeline.unet.forward

    def spy(latents, t, class_labels):
        seen.append((class_labels.tolist(), latents.clone()))
        return forward(latents, t, class_labels=class_labels)

    tiny_pipeline.unet.forward = spy
    output = call(tiny_pipeline, 1, modalities=["WB", "T1"], guidance_scale=2.0, output_type="latent")
    joint, conditional = seen[: 2 * 4], seen[2 * 4 :]
    assert [set(labels) for labels, _ in joint] == [{0}, {3}] * 4
    assert [set(labels) for labels, _ in conditional] == [{4, 6}, {7}] * 2
    clean = tiny_pipeline.autoencoder.normalize_structure(output.structure)[0]
    for _, latents in conditional:
        assert torch.equal(latents[0, :4], clean)
        assert torch.equal(latents[:, 4:].std(dim=(2, 3)), torch.zeros(len(latents), 3))  # vectors are flat maps


def test_guidance_changes_the_images(tiny_pipeline):
    assert not np.array_equal(call(tiny_pipeline).images, call(tiny_pipeline, guidance_scale=3.0).images)


def test_noise_in_the_steps_changes_the_draw_and_stays_finite(tiny_pipeline):
    noisy = call(tiny_pipeline, eta=0.9)
    assert np.isfinite(noisy.images).all()
    assert not np.array_equal(call(tiny_pipeline).images, noisy.images)


def test_callback_sees_every_step_and_can_replace_latents(pipe):
    seen = []

    def callback(p, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else tensors

    output = call(pipe, 2, modalities=["T1"], callback_on_step_end=callback)
    assert seen == [(i, (2, 7, 4, 4)) for i in range(6)]
    zero = pipe.autoencoder.normalize_structure(output.structure)
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-6, rtol=0)
    watched = call(pipe, 2, callback_on_step_end=lambda p, i, t, tensors: None)
    assert np.array_equal(watched.images, call(pipe, 2).images)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_subjects": 0}, "num_subjects.*0"),
        ({"num_subjects": 1.5}, "num_subjects.*1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_style_inference_steps": -1}, "num_style_inference_steps"),
        ({"modalities": ["T1", "PET"]}, "PET.*T1"),
        ({"modalities": []}, "modalities"),
        ({"modalities": ["T1", "T1"]}, "twice"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"eta": 1.0}, "eta"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"generator": [torch.Generator()] * 3}, "generator.*2 subjects.*3"),
        ({"structure": torch.zeros(3, 4, 4, 4)}, r"structure.*\(2, 4, 4, 4\).*\(3, 4, 4, 4\)"),
        ({"structure": np.zeros((2, 4, 4, 4))}, "structure.*ndarray"),
        ({"styles": torch.zeros(2, 2, 3)}, r"styles.*\(2, 3, 3\)"),
        ({"output_type": "jpeg"}, "output_type.*jpeg"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_bad_arguments_are_named(tiny_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_pipeline, **options)


def test_a_clipping_scheduler_is_refused(tiny_pipeline):
    tiny_pipeline.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="clip_sample=False"):
        call(tiny_pipeline)


@pytest.mark.parametrize(
    "name, value", [("in_channels", 9), ("out_channels", 9), ("num_class_embeds", 4), ("sample_size", 8)]
)
def test_a_denoiser_that_does_not_fit_is_refused(tiny_pipeline, name, value):
    unet = UNet2DModel.from_config({**tiny_pipeline.unet.config, name: value})
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        DLDMPipeline(tiny_pipeline.autoencoder, unet, tiny_pipeline.scheduler)
