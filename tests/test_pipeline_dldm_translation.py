"""DLDMTranslationPipeline: what is filled in, from what, and what is refused."""

import inspect
import logging
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from dldm_pipeline import DLDMPipeline, DLDMPipelineOutput, DLDMTranslationPipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_images(count=3, names=("T1", "WB"), seed=0):
    random = np.random.default_rng(seed)
    return {name: random.random((count, 32, 32), dtype=np.float32) for name in names}


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_pipeline) -> DLDMTranslationPipeline:
    return silent(DLDMTranslationPipeline.from_pipe(tiny_pipeline))


def call(pipe, images=None, **options):
    images = make_images() if images is None else images
    return pipe(images, **{"generator": seeded(), "output_type": "np", "num_inference_steps": 2, **options})


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def encode(pipe, images):
    """Structures and all styles, by the autoencoder itself."""
    known = pipe.autoencoder.config.modalities
    count = len(next(iter(images.values())))
    present = torch.tensor([[name in images for name in known]] * count)
    filled = [torch.from_numpy(images.get(name, np.full((count, 32, 32), 0.5, np.float32))) for name in known]
    with torch.no_grad():
        posterior = pipe.autoencoder.encode(torch.stack(filled, dim=1), present)
    return posterior.structure_dist.mode(), posterior.style_dist.mode()


# -- what is filled in


def test_returns_the_missing_modalities_and_the_mask(pipe):
    for names, missing in ((["WB"], ["T1", "T2"]), (["T2", "T1"], ["WB"])):
        output = call(pipe, make_images(2, names))
        assert isinstance(output, DLDMPipelineOutput) and output.modalities == missing
        assert output.images.shape == (2, len(missing), 32, 32) and output.images.dtype == np.float32
        assert output.images.min() >= 0 and output.images.max() <= 1 and output.images.std() > 0
        assert output.masks.shape == (2, 32, 32) and output.masks.dtype == bool
        assert output.structure.shape == (2, 4, 4, 4) and output.styles.shape == (2, len(missing), 3)


def test_is_the_generating_pipeline_on_the_encoded_structure(pipe):
    images = make_images()
    output = call(pipe, images)
    close(output.structure, encode(pipe, images)[0])
    options = {"modalities": ["T2"], "structure": output.structure, "num_style_inference_steps": 2}
    expected = silent(DLDMPipeline.from_pipe(pipe))(3, **options, generator=seeded(), output_type="np")
    images, masks, structure, styles, names, labels = call(pipe, images, return_dict=False)
    assert np.array_equal(images, expected.images) and np.array_equal(masks, expected.masks) and names == ["T2"]
    assert torch.equal(structure, output.structure) and torch.equal(styles, expected.styles)


def test_a_subject_depends_on_its_own_images_and_seed_only(pipe):
    images = make_images(4, ["T1", "T2"])
    many = call(pipe, images, modalities=["T1", "T2", "WB"], generator=[seeded(k) for k in range(4)])
    backwards = call(pipe, dict(reversed(images.items())), generator=seeded(7))
    close(backwards.structure, many.structure)
    assert not np.allclose(backwards.images, many.by_modality["WB"][:, None])  # another seed, another style
    assert not np.allclose(call(pipe, {"T1": images["T1"]}).structure, many.structure)
    for rows, modalities, batch_size in (
        ([0, 1, 2, 3], ["WB", "T2"], 1),
        ([3, 1, 0], "WB", 2),
        ([2], ["T1", "WB"], None),
    ):
        given = {name: image[rows] for name, image in images.items()}
        generator = [seeded(k) for k in rows]
        some = call(pipe, given, modalities=modalities, generator=generator, batch_size=batch_size)
        assert some.modalities == ([modalities] if isinstance(modalities, str) else modalities)
        close(some.structure, many.structure[rows])
        assert np.array_equal(some.masks, many.masks[rows])
        for name, image in some.by_modality.items():
            close(image, many.by_modality[name][rows])


def test_all_kinds_of_images_are_the_same(pipe):
    levels = np.random.default_rng(0).integers(0, 256, (2, 32, 32))
    expected = call(pipe, {"T1": (levels / 255).astype(np.float32)}).structure
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
        assert torch.equal(call(pipe, {"T1": image}, output_type="latent").structure, expected), kind
    one = PIL.Image.fromarray(levels[0].astype(np.uint8))
    close(call(pipe, {"T1": one}, output_type="latent").structure, expected[:1])


# -- from which styles


def test_a_given_modality_is_rendered_in_its_own_style(pipe):
    images = make_images()
    output = call(pipe, images, modalities=["WB", "T1"], noise_scale=0)
    structure, styles = encode(pipe, images)
    close(output.styles, styles[:, [2, 0]])
    with torch.no_grad():
        decoded = pipe.autoencoder.decode(structure, styles[:, [2, 0]])
    close(output.images, (decoded.sample * (decoded.foreground > 0)[:, None]).clamp(0, 1))
    # Where all are given, one has to choose.
    images = make_images(2, ["T1", "T2", "WB"])
    with pytest.raises(ValueError, match="none is missing.*`modalities`"):
        call(pipe, images)
    assert call(pipe, images, modalities="T2").modalities == ["T2"]


def test_styles_of_a_reference_subject(pipe):
    images, reference = make_images(3, ["T1"]), make_images(1, ["T2"], seed=1)
    output = call(pipe, images, reference_images=reference, modalities=["T2", "WB", "T1"])
    close(output.styles[:, 0], encode(pipe, reference)[1][[0, 0, 0], 1])
    close(output.styles[:, 2], encode(pipe, images)[1][:, 0])  # not in the reference, but given
    sampled = call(pipe, images)
    assert torch.equal(output.structure, sampled.structure)
    close(output.by_modality["WB"], sampled.by_modality["WB"])  # in neither: sampled
    assert not np.allclose(output.by_modality["T2"], sampled.by_modality["T2"])
    # one reference each, and a given modality in the style of a reference
    references = make_images(3, ["T1"], seed=2)
    output = call(pipe, images, reference_images=references, modalities="T1", batch_size=2)
    close(output.styles[:, 0], encode(pipe, references)[1][:, 0])


def test_given_styles_are_used(pipe):
    source, seen = call(pipe, make_images(1), modalities=["T2", "T1"], generator=seeded(3)), []
    given = {"modalities": ["T2", "T1"], "styles": source.styles}
    output = call(pipe, **given, callback_on_step_end=lambda *inputs: seen.append(inputs))
    assert not seen and all(torch.equal(subject, source.styles[0]) for subject in output.styles)
    assert torch.equal(output.structure, call(pipe).structure)


def test_options_reach_the_sampling(pipe):
    base, seen = call(pipe), []
    for options in ({"noise_scale": 0}, {"guidance_scale": 3.0}, {"eta": 0.9}, {"num_inference_steps": 4}):
        assert not np.allclose(call(pipe, **options).images, base.images, atol=1e-3), options

    def callback(p, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = call(pipe, make_images(2, ["WB"]), modalities=["T1", "T2", "WB"], callback_on_step_end=callback)
    assert seen == [(i, (4, 7, 2, 2)) for i in range(2)]
    sampled = pipe.autoencoder.normalize_style(output.styles)[:, :2]
    torch.testing.assert_close(sampled, torch.zeros_like(sampled), atol=1e-6, rtol=0)
    here, there = (inspect.signature(cls.__call__).parameters for cls in (DLDMTranslationPipeline, DLDMPipeline))
    assert here["num_inference_steps"].default == there["num_style_inference_steps"].default
    for name in {*here} & {*there} - {"num_inference_steps"}:
        assert here[name].default == there[name].default, name


# -- loading


def test_loads_what_the_generating_pipeline_saved_and_back(tiny_pipeline, pipe, tmp_path, caplog):
    tiny_pipeline.save_pretrained(tmp_path / "generating")
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = silent(DLDMTranslationPipeline.from_pretrained(tmp_path / "generating"))
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records and type(loaded) is DLDMTranslationPipeline
    expected = call(pipe).images
    close(call(loaded).images, expected)

    loaded.save_pretrained(tmp_path / "translating")
    back = silent(DLDMPipeline.from_pretrained(tmp_path / "translating"))
    options = {"num_inference_steps": 2, "num_style_inference_steps": 2, "output_type": "np"}
    close(*(p(1, generator=seeded(), **options).images for p in (back, tiny_pipeline)))


def test_loads_as_remote_code(tiny_pipeline, pipe, tmp_path, monkeypatch):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    options = {"num_inference_steps": 2, "num_style_inference_steps": 2, "generator": seeded(), "output_type": "np"}
    expected = tiny_pipeline(1, **options).images
    folder, trust = tmp_path / "pipeline", {"trust_remote_code": True}
    loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), **trust)
    assert type(loaded).__name__ == "DLDMPipeline" and type(loaded) is not DLDMPipeline
    close(silent(loaded)(1, **{**options, "generator": seeded()}).images, expected)
    loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_dldm_translation", **trust)
    assert type(loaded).__name__ == "DLDMTranslationPipeline" and type(loaded) is not DLDMTranslationPipeline
    close(call(silent(loaded)).images, call(pipe).images)


# -- what is refused

GOOD = np.full((2, 32, 32), 0.5, np.float32)


def test_bad_images_are_named(pipe):
    for images, message in (
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
        ({"T1": (GOOD * 255).astype(np.uint8)}, "dtype uint8.*255"),
        ({"T1": torch.ones(2, 32, 32, dtype=torch.long)}, r"dtype torch\.int64"),
        ({"T1": GOOD * 3}, "values from 1.5 to 1.5.*rescale"),
        ({"T1": torch.from_numpy(GOOD - 1)}, "values from -0.5 to -0.5"),
        ({"T1": np.where(np.eye(32, dtype=bool), np.nan, GOOD)}, "NaN"),
        ({"T1": np.where(np.eye(32, dtype=bool), np.inf, GOOD)}, "infinite"),
        ({"T1": PIL.Image.new("RGB", (32, 32))}, "mode 'RGB'.*convert"),
        ({"T1": [PIL.Image.new("L", (32, 32)), PIL.Image.new("L", (30, 32))]}, r"\[1\]` is 32x30"),
    ):
        with pytest.raises(ValueError, match=message):
            call(pipe, images)


def test_bad_arguments_are_named(pipe):
    for options, message in (
        ({"modalities": ["T2", "PET"]}, "`modalities`.*PET"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"noise_scale": -1.0}, "`noise_scale`"),
        ({"generator": [torch.Generator()] * 2}, "`generator`.*3 subjects.*2"),
        ({"styles": torch.zeros(3, 2, 3)}, r"`styles`.*\(3, 1, 3\)"),
        ({"reference_images": {"T2": GOOD}}, "`reference_images`.*1 subject or 3.*2"),
        ({"reference_images": {"T1": GOOD[:1]}}, r"`reference_images`.*\['T1'\].*\['T2'\]"),
        ({"reference_images": {"T2": GOOD[:1] * 3}}, r"`reference_images\['T2'\]`.*1\.5"),
        ({"reference_images": {}}, "`reference_images` must be a dictionary.*empty"),
        ({"reference_images": {"T2": GOOD[:1]}, "styles": torch.zeros(3, 1, 3)}, "one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            call(pipe, **options)
