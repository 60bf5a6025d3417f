"""What diffusers' own common testers ask of a model and of a pipeline; docs/diffusers_tests.md lists them by name."""

import copy
import json

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import compute_module_sizes
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import disable_full_determinism, enable_full_determinism

from dldm_pipeline import DisentangledAutoencoder, DLDMPipeline, DLDMTranslationPipeline

SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
# On a schedule with zero terminal SNR, such as that of the pipelines that we train; the others work.
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


@pytest.fixture
def model(tiny_autoencoder) -> DisentangledAutoencoder:
    return tiny_autoencoder


@pytest.fixture(params=[DLDMPipeline, DLDMTranslationPipeline])
def pipe(request, tiny_pipeline):
    pipe = request.param(**tiny_pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, **options):
    """Two subjects, as tensors."""
    options = {"num_inference_steps": 3, "generator": seeded(), "output_type": "pt", **options}
    if isinstance(pipe, DLDMTranslationPipeline):
        return pipe({"T1": images()[:, 0], "WB": images()[:, 2]}, **options)
    return pipe(2, num_style_inference_steps=2, **options)


def load(pipe, folder, **options):
    loaded = type(pipe).from_pretrained(folder, **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


# -- the autoencoder: ModelTesterMixin


@torch.no_grad()
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_model_variants_and_shards(model, tmp_path, variant, max_shard_size):
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size)
    weights = list(tmp_path.glob("*.safetensors"))
    assert (len(weights) > 1) == (max_shard_size == "20KB") == any(tmp_path.glob("*.index*.json"))
    assert all((".fp16" in file.name) == (variant is not None) for file in weights)
    loaded = DisentangledAutoencoder.from_pretrained(tmp_path, variant=variant)
    assert not loaded.training and loaded.config.modalities == model.config.modalities
    torch.testing.assert_close(loaded(images()).sample, model(images()).sample, rtol=0, atol=1e-5)
    if variant is not None:
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
            DisentangledAutoencoder.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_dtypes(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = DisentangledAutoencoder.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    output, again = model(images().to(dtype)), loaded(images().to(dtype))
    assert output.sample.dtype == dtype and output.sample.isfinite().all()
    torch.testing.assert_close(again.sample, output.sample)


def test_model_saved_again_is_the_same_file_by_file(model, tmp_path):
    model.save_pretrained(tmp_path / "first")
    DisentangledAutoencoder.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]


@torch.no_grad()
def test_model_tuple_is_the_dictionary(model):
    for a, b in zip(model(images(), return_dict=False), model(images()).values(), strict=True):
        assert torch.equal(a, b)


def test_model_configuration_is_not_an_attribute(model):
    model.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 5
    with pytest.raises(AttributeError, match="does_not_exist"):
        _ = model.does_not_exist


# -- the autoencoder: TrainingTesterMixin, MemoryTesterMixin, TorchCompileTesterMixin


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
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_model_trains_with_ema_and_in_mixed_precision(model, dtype):
    model.train()
    ema = EMAModel(model.parameters())
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = torch.nn.functional.mse_loss(model(images()).sample.float(), images())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    ema.step(model.parameters())
    gradients = [parameter.grad for parameter in model.decoder_grids[-1].parameters()]
    assert loss.isfinite() and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@torch.no_grad()
def test_model_compiles_without_a_graph_break(model):
    torch.compiler.reset()
    present = torch.tensor([[True, False, True], [True, True, True]])
    expected = model(images(), present)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            output = compiled(images(), present)
    for name in ("sample", "mask", "foreground"):
        torch.testing.assert_close(output[name], expected[name], rtol=0, atol=1e-5)
    decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    posterior = model.encode(images())
    latents = posterior.structure_dist.mode(), posterior.style_dist.mode()
    torch.testing.assert_close(decode(*latents).sample, model.decode(*latents).sample, rtol=0, atol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
def test_model_exports(model):
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


@torch.no_grad()
def test_model_layerwise_casting(model):
    expected, size = model(images()).sample, compute_module_sizes(model)[""]
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.encoder_in.weight.dtype == torch.float8_e4m3fn and model.dtype == torch.float32
    assert compute_module_sizes(model)[""] < 0.6 * size
    output = model(images()).sample
    assert output.isfinite().all() and torch.corrcoef(torch.stack([output.flatten(), expected.flatten()]))[0, 1] > 0.8


# -- the pipelines: PipelineTesterMixin


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_pipeline_save_load(pipe, tmp_path, variant, max_shard_size):
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size, safe_serialization=True)
    for name in ("autoencoder", "unet"):
        weights = list((tmp_path / name).glob("*.safetensors"))
        assert (len(weights) > 1) == (max_shard_size == "20KB")
        assert all((".fp16" in file.name) == (variant is not None) for file in weights)
    loaded = load(pipe, tmp_path, variant=variant)
    assert torch.equal(call(loaded).images, call(pipe).images)


def test_pipeline_without_the_variant_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        load(pipe, tmp_path, variant="fp16")


def test_pipeline_dtypes(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = load(pipe, tmp_path, dtype=dtype)
        assert loaded.dtype == loaded.unet.dtype == loaded.autoencoder.dtype == dtype
        moved = copy.deepcopy(pipe).to(dtype)
        output = call(loaded)
        assert output.images.isfinite().all() and output.images.dtype == torch.float32
        assert torch.equal(output.images, call(moved).images)
    mixed = load(pipe, tmp_path, dtype={"autoencoder": torch.bfloat16, "default": torch.float16})
    assert mixed.autoencoder.dtype == torch.bfloat16 and mixed.unet.dtype == torch.float16
    assert call(mixed).images.isfinite().all()


def test_pipeline_saved_again_is_the_same_file_by_file(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    load(pipe, tmp_path / "first").save_pretrained(tmp_path / "second")
    files = [file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*") if file.is_file()]
    assert len(files) > 6
    for file in files:
        first, second = ((tmp_path / name / file).read_text("latin-1") for name in ("first", "second"))
        if file.name == "config.json":  # diffusers notes there where a model was loaded from
            first, second = ({**json.loads(text), "_name_or_path": None} for text in (first, second))
        assert first == second, file


def test_diffusion_pipeline_finds_the_class_of_a_saved_pipeline(pipe, tmp_path):
    assert isinstance(pipe, DiffusionPipeline)
    pipe.save_pretrained(tmp_path)
    index = DiffusionPipeline.load_config(tmp_path)
    assert index["_class_name"][1] == type(pipe).__name__


def test_pipeline_components(pipe, tiny_pipeline):
    assert set(pipe.components) == {"autoencoder", "unet", "scheduler"} and not pipe._optional_components
    assert set(pipe.model_cpu_offload_seq.split("->")) == {"autoencoder", "unet"}
    again = type(pipe)(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert again.components == tiny_pipeline.components
    assert pipe.to("cpu").device.type == "cpu" and torch.equal(call(pipe).images, call(again).images)


def test_pipeline_from_pipe_keeps_configuration_and_images(pipe):
    other = DLDMTranslationPipeline if type(pipe) is DLDMPipeline else DLDMPipeline
    expected = call(pipe).images
    back = type(pipe).from_pipe(other.from_pipe(pipe))
    back.set_progress_bar_config(disable=True)
    public = [{k: v for k, v in p.config.items() if not k.startswith("_")} for p in (pipe, back)]
    assert public[0] == public[1]
    assert torch.equal(call(back).images, expected) and torch.equal(call(pipe).images, expected)


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
    def raise_guidance(p, step, timestep, tensors):
        p._guidance_scale += 1.0
        return tensors

    raised = call(pipe, guidance_scale=2.0, callback_on_step_end=raise_guidance)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    plain = call(pipe, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0 and not torch.equal(raised.styles, plain.styles)

    class Cutoff(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._guidance_scale = 1.0
            return callback_kwargs

    cut = call(pipe, guidance_scale=2.0, callback_on_step_end=Cutoff(cutoff_step_ratio=None, cutoff_step_index=0))
    assert pipe.guidance_scale == 1.0 and not torch.equal(cut.styles, plain.styles)


def test_batch_is_its_subjects_one_by_one(tiny_pipeline):
    together = tiny_pipeline(3, num_inference_steps=3, generator=[seeded(k) for k in range(3)], output_type="pt")
    alone = [tiny_pipeline(1, num_inference_steps=3, generator=seeded(k), output_type="pt") for k in range(3)]
    assert torch.equal(together.images, torch.cat([output.images for output in alone]))


def test_full_determinism(pipe):
    enable_full_determinism()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.equal(call(pipe).images, call(pipe).images)
    finally:
        disable_full_determinism()


def test_pipeline_runs_compiled(pipe):
    torch.compiler.reset()
    expected = call(pipe).images
    pipe.unet.compile(fullgraph=True, backend="eager")
    pipe.autoencoder.decode = torch.compile(pipe.autoencoder.decode, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(pipe).images, expected, rtol=0, atol=1e-4)
    torch.compiler.reset()


def test_pipeline_layerwise_casting(pipe):
    pipe.to(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert call(pipe).images.isfinite().all()


def test_pipeline_loads_onto_a_device(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert torch.equal(call(load(pipe, tmp_path, device_map="cpu")).images, call(pipe).images)


# -- schedulers: PipelineKarrasSchedulerTesterMixin


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, under NumPy 2
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_images_or_says_why_not(pipe, name):
    config = dict(pipe.scheduler.config)
    if name in REFUSED:
        with pytest.raises((ValueError, ImportError), match=REFUSED[name]):
            type(pipe)(**{**pipe.components, "scheduler": getattr(diffusers, name).from_config(config)})
        if name != "PNDMScheduler":
            return
        config["skip_prk_steps"] = True
    pipe = type(pipe)(**{**pipe.components, "scheduler": getattr(diffusers, name).from_config(config)})
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 2, 5):
        output = call(pipe, num_inference_steps=steps)
        assert output.images.shape[0] == 2 and output.images.shape[2:] == (32, 32)
        for values in (output.images, output.structure, output.styles):
            assert values.isfinite().all() and values.abs().max() < 30


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - set(REFUSED)))
def test_every_scheduler_finds_a_known_latent(tiny_pipeline, name):
    """A denoiser that knows the answer: a scheduler that scales its input or its time in another way ends elsewhere."""
    target = 0.3 * torch.randn(7, 4, 4, generator=seeded(1))
    target[4:] = target[4:, :1, :1]
    signal = tiny_pipeline.scheduler.alphas_cumprod.clamp(min=1e-12)

    def predict_v(latents, t, class_labels):
        at = np.interp(float(t), np.arange(len(signal)), signal.log().numpy())
        share, noise = np.exp(at / 2), np.sqrt(-np.expm1(at))
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=(share * latents - target) / noise)

    tiny_pipeline.unet.forward = predict_v
    tiny_pipeline.scheduler = getattr(diffusers, name).from_config(tiny_pipeline.scheduler.config)
    output = tiny_pipeline(2, num_inference_steps=10, generator=seeded(), output_type="latent")
    structure = tiny_pipeline.autoencoder.normalize_structure(output.structure)
    torch.testing.assert_close(structure, target[:4].expand(2, -1, -1, -1), rtol=0, atol=0.06)


@pytest.mark.parametrize(
    "name, options, message",
    [
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
    ],
)
def test_a_scheduler_that_cannot_work_is_refused_at_construction_and_when_set_later(pipe, name, options, message):
    scheduler = getattr(diffusers, name)(**options)
    with pytest.raises(ValueError, match=message):
        type(pipe)(**{**pipe.components, "scheduler": scheduler})
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        call(pipe)


def test_a_scheduler_is_not_refused_for_what_another_was_told(pipe):
    """`from_config` keeps the options of the scheduler before, which the new one does not have."""
    clipping = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(clipping.config)
    assert call(pipe).images.isfinite().all()
