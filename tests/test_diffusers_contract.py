"""What diffusers' own common testers ask of a model and of a pipeline; docs/diffusers_tests.md lists them by name."""

import json

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import disable_full_determinism, enable_full_determinism

from dldm_pipeline import DisentangledAutoencoder, DLDMPipeline, DLDMTranslationPipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, under NumPy 2
SCHEDULERS = {scheduler.name for scheduler in KarrasDiffusionSchedulers}
# On a schedule with zero terminal SNR, such as that of the pipelines that we train.
REFUSED = {
    "PNDMScheduler": "skip_prk_steps=True",
    "HeunDiscreteScheduler": "diverges.*take `DDIMScheduler`",
    "KDPM2AncestralDiscreteScheduler": "NaN.*take `DDIMScheduler`",
    "EDMEulerScheduler": "has none; take `DDIMScheduler`",
    "DPMSolverSDEScheduler": "torchsde|one noise for all subjects.*take `DDIMScheduler`",
}


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count=2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=seeded())


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def model(tiny_autoencoder) -> DisentangledAutoencoder:
    return tiny_autoencoder


@pytest.fixture(params=[DLDMPipeline, DLDMTranslationPipeline])
def pipe(request, tiny_pipeline):
    return silent(request.param(**tiny_pipeline.components))


def call(pipe, **options):
    """Two subjects, as tensors."""
    options = {"num_inference_steps": 2, "generator": seeded(), "output_type": "pt", **options}
    if isinstance(pipe, DLDMTranslationPipeline):
        return pipe({"T1": images()[:, 0], "WB": images()[:, 2]}, **options)
    return pipe(2, num_style_inference_steps=1, **options)


# -- the autoencoder


@torch.no_grad()
def test_model_variants_shards_and_dtypes(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16", max_shard_size="20KB")
    weights = list(tmp_path.glob("*.safetensors"))
    assert len(weights) > 1 and all(".bf16" in file.name for file in weights)
    loaded = DisentangledAutoencoder.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    output, again = model(images().bfloat16()), loaded(images().bfloat16())
    assert output.sample.dtype == torch.bfloat16 and output.sample.isfinite().all()
    torch.testing.assert_close(again.sample, output.sample)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        DisentangledAutoencoder.from_pretrained(tmp_path)


def test_gradient_checkpointing_changes_memory_and_nothing_else(model):
    model.train()
    model.structure_offset.normal_(generator=seeded(1))
    present = torch.tensor([[True, False, True], [True, True, True]])
    results = []
    for enable in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        enable()
        model.zero_grad()
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=stored: (s.append(x.numel()), x)[1], lambda x: x):
            sample, mask, foreground = model(images(), present, return_dict=False)
        (sample.square().mean() + mask.mean() + foreground.mean()).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append(([sample, mask, foreground, *gradients], sum(stored)))
    assert model.is_gradient_checkpointing
    (plain, plain_size), (checkpointed, checkpointed_size) = results
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert checkpointed_size < 0.7 * plain_size


def test_model_trains_in_mixed_precision(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.nn.functional.mse_loss(model.train()(images()).sample.float(), images())
    loss.backward()
    gradients = [parameter.grad for parameter in model.decoder_grids[-1].parameters()]
    assert loss.isfinite() and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@torch.no_grad()
def test_model_compiles_without_a_graph_break_and_exports(model):
    torch.compiler.reset()
    present = torch.tensor([[True, False, True], [True, True, True]])
    expected = model(images(), present)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            output = compiled(images(), present)
    for name in ("sample", "regions", "foreground"):
        torch.testing.assert_close(output[name], expected[name], rtol=0, atol=1e-5)
    torch.compiler.reset()
    exported = torch.export.export(model, args=(), kwargs={"images": images()})
    torch.testing.assert_close(exported.module()(images=images()).sample, model(images()).sample, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level", "sequential"])
def test_model_offloads(model, offload_type):
    expected = model(images())
    if offload_type == "sequential":
        cpu_offload(model, torch.device("cpu"))
        assert next(model.parameters()).device.type == "meta"
    else:
        groups = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        model.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **groups)
    # As the pipelines call it, and as a training loop does.
    posterior = model.encode(images())
    decoded = model.decode(posterior.structure_dist.mode(), posterior.style_dist.mode())
    for output in (decoded, model(images())):
        torch.testing.assert_close(output.sample, expected.sample, rtol=0, atol=1e-5)


# -- the pipelines: saving and loading


def test_pipeline_variants_shards_and_device_map(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    for name in ("autoencoder", "unet"):
        weights = list((tmp_path / name).glob("*.safetensors"))
        assert len(weights) > 1 and all(".fp16" in file.name for file in weights)
    loaded = silent(DLDMPipeline.from_pretrained(tmp_path, variant="fp16", device_map="cpu"))
    torch.testing.assert_close(call(loaded).images, call(tiny_pipeline).images, rtol=0, atol=1e-4)


def test_pipeline_dtypes(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = silent(type(pipe).from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert loaded.dtype == loaded.unet.dtype == loaded.autoencoder.dtype == torch.bfloat16
    output = call(loaded)
    assert output.images.isfinite().all() and output.images.dtype == torch.float32
    assert torch.equal(output.images, call(pipe.to(torch.bfloat16)).images)
    mixed = silent(
        type(pipe).from_pretrained(tmp_path, dtype={"autoencoder": torch.bfloat16, "default": torch.float16})
    )
    assert mixed.autoencoder.dtype == torch.bfloat16 and mixed.unet.dtype == torch.float16
    assert call(mixed).images.isfinite().all()


def test_pipeline_saved_again_is_the_same_file_by_file(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    assert DiffusionPipeline.load_config(tmp_path / "first")["_class_name"][1] == type(pipe).__name__
    type(pipe).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    files = [file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*") if file.is_file()]
    assert len(files) > 6
    for file in files:
        first, second = ((tmp_path / name / file).read_text("latin-1") for name in ("first", "second"))
        if file.name == "config.json":  # diffusers notes there where a model was loaded from
            first, second = ({**json.loads(text), "_name_or_path": None} for text in (first, second))
        assert first == second, file


def test_pipeline_from_pipe_keeps_configuration_and_images(pipe):
    other = DLDMTranslationPipeline if type(pipe) is DLDMPipeline else DLDMPipeline
    expected = call(pipe).images
    back = silent(type(pipe).from_pipe(other.from_pipe(pipe)))
    assert all(back.components[name] is component for name, component in pipe.components.items())
    replaced = scheduler("DDPMScheduler", pipe)
    assert other.from_pipe(pipe, scheduler=replaced).scheduler is replaced
    public = [{k: v for k, v in p.config.items() if not k.startswith("_")} for p in (pipe, back)]
    assert public[0] == public[1] and set(pipe.components) == {"autoencoder", "unet", "scheduler"}
    assert torch.equal(call(back).images, expected) and torch.equal(call(pipe).images, expected)


# -- the pipelines: calls


def test_progress_bar(pipe, capsys):
    call(pipe)
    assert not capsys.readouterr().err
    pipe.set_progress_bar_config(disable=False, desc="given")
    call(pipe)
    assert "styles: 100%" in capsys.readouterr().err


def test_callback_gets_what_it_asks_for_and_counts_to_num_timesteps(pipe):
    seen = []

    def callback(p, step, timestep, tensors):
        seen.append(step)
        assert set(tensors) == {"latents"}
        return {"latents": torch.zeros_like(tensors["latents"])} if step == p.num_timesteps - 1 else tensors

    inputs = pipe._callback_tensor_inputs
    output = call(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert seen == list(range(pipe.num_timesteps)) and seen
    styles = pipe.autoencoder.normalize_style(output.styles)
    torch.testing.assert_close(styles, torch.zeros_like(styles), rtol=0, atol=1e-6)
    given = []
    watch = {"callback_on_step_end": lambda p, i, t, tensors: given.append(tensors)}
    call(pipe, callback_on_step_end_tensor_inputs=[], **watch)
    assert given == [{}] * len(seen)


def test_callback_changes_the_guidance(pipe):
    class Cutoff(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._guidance_scale = 1.0
            return callback_kwargs

    plain = call(pipe, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0
    cut = call(pipe, guidance_scale=2.0, callback_on_step_end=Cutoff(cutoff_step_ratio=None, cutoff_step_index=0))
    assert pipe.guidance_scale == 1.0 and not torch.equal(cut.styles, plain.styles)


def test_full_determinism(pipe):
    enable_full_determinism()
    try:
        assert torch.equal(call(pipe).images, call(pipe).images)
    finally:
        disable_full_determinism()


def test_pipeline_layerwise_casting(pipe):
    pipe.to(torch.bfloat16)
    for module in (pipe.unet, pipe.autoencoder):
        module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert pipe.autoencoder.encoder_in.weight.dtype == torch.float8_e4m3fn and pipe.autoencoder.dtype == torch.bfloat16
    assert call(pipe).images.isfinite().all()


# -- schedulers


def scheduler(name, pipe, **options):
    return getattr(diffusers, name).from_config(pipe.scheduler.config, **options)


@pytest.mark.parametrize("name", sorted(SCHEDULERS - {*REFUSED} | {"PNDMScheduler"}))
def test_scheduler_works(tiny_pipeline, name):
    pipe, options = tiny_pipeline, {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = scheduler(name, pipe, **options)
    for steps in (1, 3):
        output = pipe(2, "T2", steps, steps, generator=seeded(), output_type="pt")
        for values in (output.images, output.structure, output.styles):
            assert values.isfinite().all() and values.abs().max() < 30

    # A denoiser that knows the answer: a scheduler that scales its input or its time in another way ends elsewhere.
    answer = 0.3 * torch.randn(7, 4, 4, generator=seeded(1))
    answer[4:] = answer[4:, :1, :1]
    signal = pipe.scheduler.alphas_cumprod.clamp(min=1e-12)

    def predict_v(latents, t, class_labels):
        at = np.interp(float(t), np.arange(len(signal)), signal.log().numpy())
        return UNet2DOutput(sample=(np.exp(at / 2) * latents - answer) / np.sqrt(-np.expm1(at)))

    pipe.unet.forward = predict_v
    known = pipe.autoencoder.denormalize_structure(answer[None, :4]).expand(2, -1, -1, -1)
    start = known, pipe.autoencoder.denormalize_style(answer[4:, 0, 0]).expand(2, -1), torch.tensor([0, 1])
    for options in ({}, {"start": start, "strength": 0.4}):
        if options and name in ("LMSDiscreteScheduler", "PNDMScheduler"):
            continue  # they cannot start in the middle
        structure = pipe._draw_structures(2, 10, seeded(), **options)
        torch.testing.assert_close(structure, known, rtol=0, atol=0.06)


def test_scheduler_that_scales_its_input_samples_the_same(tiny_pipeline):
    """Euler's steps are those of DDIM in another scale of the latents, and of the noise that they start from."""
    expected = tiny_pipeline._draw_structures(2, 10, seeded())
    tiny_pipeline.scheduler = scheduler("EulerDiscreteScheduler", tiny_pipeline)
    torch.testing.assert_close(tiny_pipeline._draw_structures(2, 10, seeded()), expected, rtol=0, atol=0.02)
    tiny_pipeline.scheduler = scheduler("DPMSolverMultistepScheduler", tiny_pipeline, solver_order=1)
    torch.testing.assert_close(tiny_pipeline._draw_structures(2, 10, seeded()), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", REFUSED)
def test_scheduler_that_cannot_work_on_zero_terminal_snr_is_refused(tiny_pipeline, name):
    with pytest.raises((ValueError, ImportError), match=REFUSED[name]):
        DLDMPipeline(**{**tiny_pipeline.components, "scheduler": scheduler(name, tiny_pipeline)})


def test_scheduler_that_cannot_work_is_refused_when_set_later(pipe):
    for name, options, message in (
        ("DDIMScheduler", {}, "clip_sample=False"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding=False"),
        (
            "DDIMScheduler",
            {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "DDIMScheduler diverges.*nan.*'epsilon'.*take",
        ),
        ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, "KDPM2DiscreteScheduler.*'sample'.*take"),
        ("FlowMatchEulerDiscreteScheduler", {}, "beta schedule, and FlowMatchEulerDiscreteScheduler has none; take"),
        ("RePaintScheduler", {"clip_sample": False}, "RePaintScheduler fails.*take"),
    ):
        pipe.scheduler = getattr(diffusers, name)(**options)
        with pytest.raises(ValueError, match=message):
            call(pipe)


def test_scheduler_is_not_refused_for_what_another_was_told(tiny_pipeline):
    """`from_config` keeps the options of the scheduler before, which the new one does not have."""
    tiny_pipeline.scheduler = scheduler("DDIMScheduler", tiny_pipeline, clip_sample=True)
    tiny_pipeline.scheduler = scheduler("EulerDiscreteScheduler", tiny_pipeline)
    assert call(tiny_pipeline).images.isfinite().all()
