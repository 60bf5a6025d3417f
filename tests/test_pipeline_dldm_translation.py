"""DLDMTranslationPipeline: what is filled in, from what, and what is refused."""

import inspect
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

import dldm_pipeline
from dldm_pipeline import DLDMPipeline, DLDMPipelineOutput, DLDMTranslationPipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_images(count=3, names=("T1", "WB"), seed=0):
    random = np.random.default_rng(seed)
    return {name: random.random((count, 32, 32), dtype=np.float32) for name in names}


def translator(pipe) -> DLDMTranslationPipeline:
    translation = DLDMTranslationPipeline.from_pipe(pipe)
    translation.set_progress_bar_config(disable=True)
    return translation


@pytest.fixture(params=["tiny_pipeline"])
def pipe(request):
    return translator(request.getfixturevalue(request.param))


@pytest.fixture
def tiny(tiny_pipeline):
    return translator(tiny_pipeline)


def call(pipe, images=None, **options):
    images = make_images() if images is None else images
    return pipe(images, **{"generator": seeded(), "output_type": "np", "num_inference_steps": 2, **options})


def encode(pipe, images):
    """Structures and all styles, in one batch by the autoencoder itself."""
    known = pipe.autoencoder.config.modalities
    count = len(next(iter(images.values())))
    present = torch.tensor([[name in images for name in known]] * count)
    filled = [torch.from_numpy(images.get(name, np.full((count, 32, 32), 0.5, np.float32))) for name in known]
    with torch.no_grad():
        posterior = pipe.autoencoder.encode(torch.stack(filled, dim=1), present)
    return posterior.structure_dist.mode(), posterior.style_dist.mode()


@pytest.mark.parametrize(
    "names, missing",
    [(["WB"], ["T1", "T2"]), (["T2", "T1"], ["WB"]), (["T1"], ["T2", "WB"])],
)
def test_returns_the_missing_modalities_and_the_mask(pipe, names, missing):
    output = call(pipe, make_images(2, names))
    assert isinstance(output, DLDMPipelineOutput) and output.modalities == missing
    assert output.images.shape == (2, len(missing), 32, 32) and output.images.dtype == np.float32
    assert output.images.min() >= 0 and output.images.max() <= 1 and output.images.std() > 0
    assert output.masks.shape == (2, 32, 32) and output.masks.dtype == bool
    assert output.structure.shape == (2, 4, 4, 4) and output.styles.shape[:3] == (2, len(missing), 3)


def test_is_the_generating_pipeline_on_the_encoded_structure(pipe):
    images = make_images()
    output = call(pipe, images)
    torch.testing.assert_close(output.structure, encode(pipe, images)[0], atol=1e-5, rtol=1e-5)
    generate = DLDMPipeline.from_pipe(pipe)
    generate.set_progress_bar_config(disable=True)
    expected = generate(
        3,
        modalities=["T2"],
        structure=output.structure,
        num_style_inference_steps=2,
        generator=seeded(),
        output_type="np",
    )
    assert np.array_equal(output.images, expected.images) and np.array_equal(output.masks, expected.masks)
    assert torch.equal(output.styles, expected.styles)


def test_the_structure_depends_on_what_is_given_and_on_nothing_else(pipe):
    images = make_images(3, ["T1", "T2"])
    both, reversed_ = call(pipe, images), call(pipe, dict(reversed(images.items())), generator=seeded(7))
    assert torch.equal(both.structure, reversed_.structure) and np.array_equal(both.masks, reversed_.masks)
    assert not np.array_equal(both.images, reversed_.images)  # another seed, another style
    assert not torch.equal(both.structure, call(pipe, {"T1": images["T1"]}).structure)


@pytest.mark.parametrize("modalities", ["T2", ["WB"], ["T1", "WB"], ["WB", "T2", "T1"]])
def test_an_image_does_not_depend_on_the_others_asked_for(pipe, modalities):
    images = make_images(2, ["T1"])
    everything = call(pipe, images, modalities=["T1", "T2", "WB"])
    some = call(pipe, images, modalities=modalities)
    assert some.modalities == ([modalities] if isinstance(modalities, str) else modalities)
    for name, image in some.by_modality.items():
        assert np.array_equal(image, everything.by_modality[name])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_subject_does_not_depend_on_the_batch(pipe, count):
    images = make_images(6, ["WB"])
    many = call(pipe, images)
    few = call(pipe, {"WB": images["WB"][:count]})
    assert torch.equal(few.structure, many.structure[:count])
    assert np.array_equal(few.images, many.images[:count]) and np.array_equal(few.masks, many.masks[:count])
    last = call(pipe, {"WB": images["WB"][-1]}, generator=[seeded(5)])
    together = call(pipe, images, generator=[seeded(k) for k in range(6)])
    assert np.array_equal(last.images, together.images[-1:])


def test_all_kinds_of_images_are_the_same(tiny):
    levels = np.random.default_rng(0).integers(0, 256, (2, 32, 32))
    expected = call(tiny, {"T1": (levels / 255).astype(np.float32)}).images
    for kind, image in {
        "float64, read backwards": np.ascontiguousarray((levels / 255)[:, ::-1])[:, ::-1],
        "big-endian": (levels / 255).astype(">f4"),
        "tensor": torch.from_numpy((levels / 255).astype(np.float32)),
        "list of arrays": [(level / 255).astype(np.float32) for level in levels],
        "8-bit PIL": [PIL.Image.fromarray(level.astype(np.uint8)) for level in levels],
        "16-bit PIL": [PIL.Image.fromarray((level * 257).astype(np.uint16)) for level in levels],
        "32-bit PIL of a 16-bit file": [PIL.Image.fromarray((level * 257).astype(np.int32)) for level in levels],
        "float PIL": [PIL.Image.fromarray((level / 255).astype(np.float32)) for level in levels],
    }.items():
        assert np.array_equal(call(tiny, {"T1": image}).images, expected), kind
    one = PIL.Image.fromarray(levels[0].astype(np.uint8))
    assert np.array_equal(call(tiny, {"T1": one}).images, expected[:1])


def test_output_types_agree(tiny):
    output = call(tiny)
    pt, latent = call(tiny, output_type="pt"), call(tiny, output_type="latent")
    assert np.array_equal(pt.images.numpy(), output.images) and np.array_equal(pt.masks.numpy(), output.masks)
    assert latent.images is None and latent.masks is None and torch.equal(latent.styles, output.styles)
    pil = call(tiny, output_type="pil")
    assert np.array_equal(np.asarray(pil.images[1][0]), (output.images[1, 0] * 255).round().astype(np.uint8))
    images, masks, structure, styles, names = call(tiny, return_dict=False)
    assert np.array_equal(images, output.images) and np.array_equal(masks, output.masks)
    assert torch.equal(structure, output.structure) and torch.equal(styles, output.styles) and names == ["T2"]


def test_a_given_modality_is_rendered_in_its_own_style(pipe):
    images = make_images()
    output = call(pipe, images, modalities=["WB", "T1"], noise_scale=0)
    structure, styles = encode(pipe, images)
    torch.testing.assert_close(output.styles, styles[:, [2, 0]], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        decoded = pipe.autoencoder.decode(structure, styles[:, [2, 0]])
    expected = (decoded.sample * (decoded.foreground > 0)[:, None]).clamp(0, 1)
    np.testing.assert_allclose(output.images, expected.numpy(), atol=1e-4)


def test_all_given_needs_a_choice(tiny):
    images = make_images(2, ["T1", "T2", "WB"])
    with pytest.raises(ValueError, match="none is missing.*`modalities`"):
        call(tiny, images)
    assert call(tiny, images, modalities="T2").modalities == ["T2"]


def test_styles_of_a_reference_subject(pipe):
    images, reference = make_images(3, ["T1"]), make_images(1, ["T1", "T2"], seed=1)
    output = call(pipe, images, reference_images=reference)
    assert output.modalities == ["T2", "WB"]
    for subject in output.styles[:, 0]:
        torch.testing.assert_close(subject, encode(pipe, reference)[1][0, 1], atol=1e-5, rtol=1e-5)
    drawn = call(pipe, images)
    assert torch.equal(output.structure, drawn.structure)
    assert np.array_equal(output.by_modality["WB"], drawn.by_modality["WB"])  # not in the reference: still drawn
    assert not np.array_equal(output.by_modality["T2"], drawn.by_modality["T2"])
    # One reference each, and a given modality in the style of a reference.
    references = make_images(3, ["T1"], seed=2)
    output = call(pipe, images, reference_images=references, modalities="T1")
    torch.testing.assert_close(output.styles[:, 0], encode(pipe, references)[1][:, 0], atol=1e-5, rtol=1e-5)


def test_given_styles_are_used(pipe):
    drawn = call(pipe, make_images(1), modalities=["T2", "T1"], generator=seeded(3))
    seen = []
    output = call(
        pipe, modalities=["T2", "T1"], styles=drawn.styles, callback_on_step_end=lambda *inputs: seen.append(inputs)
    )
    assert not seen and all(torch.equal(subject, drawn.styles[0]) for subject in output.styles)
    assert torch.equal(output.structure, call(pipe).structure)


def test_noise_guidance_and_steps_reach_the_drawing(tiny):
    base = call(tiny)
    for options in ({"noise_scale": 0}, {"guidance_scale": 3.0}, {"eta": 0.9}, {"num_inference_steps": 4}):
        assert not np.array_equal(call(tiny, **options).images, base.images), options


def test_default_steps_are_those_of_the_generating_pipeline():
    here, there = (inspect.signature(cls.__call__).parameters for cls in (DLDMTranslationPipeline, DLDMPipeline))
    assert here["num_inference_steps"].default == there["num_style_inference_steps"].default
    for name in {*here} & {*there} - {"num_inference_steps"}:
        assert here[name].default == there[name].default, name


def test_callback_sees_every_step_and_can_replace_latents(tiny):
    seen = []

    def callback(p, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = call(tiny, make_images(2, ["WB"]), modalities=["T1", "T2", "WB"], callback_on_step_end=callback)
    assert seen == [(i, (4, 7, 4, 4)) for i in range(2)]
    drawn = tiny.autoencoder.normalize_style(output.styles)[:, :2]
    torch.testing.assert_close(drawn, torch.zeros_like(drawn), atol=1e-6, rtol=0)


def test_loads_what_the_generating_pipeline_saved_and_back(tiny_pipeline, tiny, tmp_path, caplog):
    tiny_pipeline.save_pretrained(tmp_path / "generating")
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = DLDMTranslationPipeline.from_pretrained(tmp_path / "generating")
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is DLDMTranslationPipeline
    assert np.array_equal(call(loaded).images, call(tiny).images)

    loaded.save_pretrained(tmp_path / "translating")
    back = DLDMPipeline.from_pretrained(tmp_path / "translating")
    back.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "num_style_inference_steps": 2, "output_type": "np"}
    images = [p(1, generator=seeded(), **options).images for p in (back, tiny_pipeline)]
    assert np.array_equal(*images)


def test_from_pipe_shares_the_components_and_takes_others(tiny_pipeline, tiny):
    assert all(tiny.components[name] is component for name, component in tiny_pipeline.components.items())
    other = type(tiny.scheduler).from_config(tiny.scheduler.config)
    assert DLDMTranslationPipeline.from_pipe(tiny_pipeline, scheduler=other).scheduler is other


def test_loads_as_remote_code(tiny_pipeline, tiny, tmp_path, monkeypatch):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    for name in ("pipeline_dldm.py", "pipeline_dldm_translation.py"):
        shutil.copy(Path(dldm_pipeline.__file__).with_name(name), tmp_path / "pipeline")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path / "pipeline", custom_pipeline="pipeline_dldm_translation", trust_remote_code=True
    )
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded).__name__ == "DLDMTranslationPipeline" and type(loaded) is not DLDMTranslationPipeline
    assert np.array_equal(call(loaded).images, call(tiny).images)


GOOD = np.full((2, 32, 32), 0.5, np.float32)


@pytest.mark.parametrize(
    "images, message",
    [
        ({}, "`images` must be a dictionary.*empty"),
        (GOOD, "`images` must be a dictionary.*'T1'.*ndarray"),
        ({"PET": GOOD}, r"`images` has \['PET'\].*it knows \['T1', 'T2', 'WB'\]"),
        ({"T1": GOOD, "t1": GOOD}, r"`images` has \['t1'\]"),
        ({"T1": GOOD, "T2": GOOD[:1]}, "same subjects.*'T1': 2, 'T2': 1"),
        ({"T1": GOOD[:, :16]}, r"`images\['T1'\]` is 16x32 and must be 32x32"),
        ({"T1": [GOOD[0], GOOD[1, :16, :16]]}, r"`images\['T1'\]\[1\]` is 16x16"),
        ({"T1": GOOD[None]}, r"`images\['T1'\]` must have the shape.*\(1, 2, 32, 32\)"),
        ({"T1": GOOD[:0]}, r"shape.*\(0, 32, 32\)"),
        ({"T1": []}, "an empty list"),
        ({"T1": "t1.png"}, "`images.'T1'.`.*str"),
        ({"T1": None}, "`images.'T1'.`.*NoneType"),
        ({"T1": (GOOD * 255).astype(np.uint8)}, "dtype uint8.*255"),
        ({"T1": torch.ones(2, 32, 32, dtype=torch.long)}, r"dtype torch\.int64"),
        ({"T1": GOOD * 3}, "values from 1.5 to 1.5.*rescale"),
        ({"T1": torch.from_numpy(GOOD - 1)}, "values from -0.5 to -0.5"),
        ({"T1": np.where(np.eye(32, dtype=bool), np.nan, GOOD)}, "NaN"),
        ({"T1": np.where(np.eye(32, dtype=bool), np.inf, GOOD)}, "infinite"),
        ({"T1": PIL.Image.new("RGB", (32, 32))}, "mode 'RGB'.*convert"),
        ({"T1": [PIL.Image.new("L", (32, 32)), PIL.Image.new("L", (30, 32))]}, r"\[1\]` is 32x30"),
    ],
)
def test_bad_images_are_named(tiny, images, message):
    with pytest.raises(ValueError, match=message):
        call(tiny, images)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modalities": ["T2", "PET"]}, "modalities.*PET"),
        ({"modalities": ["T2", "T2"]}, "modalities.*twice"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"generator": [torch.Generator()] * 2}, "generator.*3 subjects.*2"),
        ({"styles": torch.zeros(3, 2, 3)}, r"styles.*\(3, 1, 3\)"),
        ({"output_type": "jpeg"}, "output_type.*jpeg"),
        ({"reference_images": {"T2": GOOD}}, "reference_images.*1 subject or 3.*2"),
        ({"reference_images": {"T1": GOOD[:1]}}, r"reference_images.*\['T1'\].*\['T2'\]"),
        ({"reference_images": {"T2": GOOD[:1] * 3}}, r"reference_images\['T2'\].*1\.5"),
        ({"reference_images": {}}, "`reference_images` must be a dictionary.*empty"),
        ({"reference_images": {"T2": GOOD[:1]}, "styles": torch.zeros(3, 1, 3)}, "one of them"),
    ],
)
def test_bad_arguments_are_named(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        call(tiny, **options)
