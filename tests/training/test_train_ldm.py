import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dldm_pipeline import DisentangledAutoencoder, DLDMPipeline
from dldm_pipeline.data.slices import SliceDataset, write_slices

SCRIPT = Path(__file__).parents[2] / "training" / "train_ldm.py"
spec = importlib.util.spec_from_file_location("train_ldm", SCRIPT)
train_ldm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_ldm)

MODALITIES = ("T1", "T2", "FLAIR")


def make_autoencoder(style_type="vector", modalities=MODALITIES, scales=True, size=32):
    torch.manual_seed(0)
    numbers = {}
    if scales:
        numbers = {
            "structure_shift": [0.1] * 4,
            "structure_scale": [0.5] * 4,
            "style_shift": [0.0] * 2,
            "style_scale": [2.0] * 2,
        }
    return DisentangledAutoencoder(
        modalities=list(modalities),
        sample_size=size,
        structure_channels=4,
        style_channels=2,
        style_type=style_type,
        encoder_channels=[8, 8],
        decoder_channels=[8, 8],
        head_channels=8,
        **numbers,
    ).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of ten subjects, the fourth without T1, and an autoencoder."""
    root = tmp_path_factory.mktemp("ldm")
    random = np.random.default_rng(0)

    def row(i):
        images = {name: random.random((32, 32)).astype(np.float32) for name in MODALITIES}
        if i == 3:
            images["T1"] = None
        mask = np.zeros((32, 32), np.uint8)
        mask[8:12, 8:12] = 1
        return {"subject": f"s{i}", "slice_index": i, "mask": mask, "source": "test", "pixel_spacing": [1, 1]} | images

    write_slices((row(i) for i in range(10)), root / "data", MODALITIES)
    make_autoencoder().save_pretrained(root / "autoencoder")
    make_autoencoder("map").save_pretrained(root / "map")
    return root


def words(folders, output, *more, autoencoder="autoencoder"):
    paths = {"dataset": folders / "data", "autoencoder": folders / autoencoder, "cache_dir": folders / "cache"}
    given = [f"--{name}={path}" for name, path in paths.items()]
    return ["--config", "ldm_tiny", *given, f"--output_dir={output}", *more]


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as caught, train_ldm.exit_on_user_error():
        train_ldm.main(arguments)
    output = capsys.readouterr().err
    assert caught.value.code == 2
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in output
    return lines[0]


@pytest.mark.parametrize("autoencoder", ["autoencoder", "map"])
def test_a_run_writes_a_pipeline_that_draws_subjects(folders, tmp_path, autoencoder):
    more = ("--validation_steps", "2", "--checkpointing_steps", "2", "--max_train_steps", "3")
    train_ldm.main(words(folders, tmp_path / "out", *more, autoencoder=autoencoder))
    output = tmp_path / "out"
    pipeline = DLDMPipeline.from_pretrained(output)
    images = pipeline(1, num_inference_steps=2, num_style_inference_steps=2, output_type="np").images
    assert images.shape == (1, 3, 32, 32)
    assert str(folders) not in (output / "autoencoder" / "config.json").read_text(encoding="utf-8")
    assert pipeline.scheduler.config.clip_sample is False and pipeline.scheduler.config.rescale_betas_zero_snr
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    assert Image.open(output / "samples.png").size[1] > Image.open(output / "validation" / "step-000002.png").size[1]
    card = (output / "README.md").read_text()
    assert "T1, T2, FLAIR" in card and "structure v-loss" in card and "Not for diagnosis" in card
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]
    # Averaged weights are what is published.
    average = load_file(output / "checkpoint-3" / "ema.safetensors")
    first = next(iter(pipeline.unet.parameters()))
    assert torch.equal(first, average["0000"])
    assert "optimization_step" not in json.loads((output / "unet" / "config.json").read_text())


def test_a_resumed_run_ends_like_one_that_never_stopped(folders, tmp_path):
    weights = {}
    for name, stops in {"whole": [4], "halves": [2, 4]}.items():
        for steps in stops:
            # A constant rate: the cosine of a shorter run would be another one.
            more = ("--max_train_steps", f"{steps}", "--checkpointing_steps", "2", "--lr_scheduler", "constant")
            train_ldm.main(words(folders, tmp_path / name, *more, "--resume_from_checkpoint", "latest"))
        weights[name] = load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(weights["whole"], weights["halves"], rtol=0, atol=0)


def test_latents_are_encoded_once_and_are_those_of_the_autoencoder(folders, tmp_path):
    autoencoder = DisentangledAutoencoder.from_pretrained(folders / "autoencoder").eval()
    dataset = SliceDataset(folders / "data", "train", MODALITIES)
    latents = train_ldm.encode_dataset(dataset, autoencoder, True, 0, False)
    assert latents.structure.shape == (8, 2, 4, 4, 4) and latents.style.shape == (8, 2, 3, 2)
    item = dataset[2]
    for view, images in enumerate((item["images"], item["images"].flip(-1))):
        posterior = autoencoder.encode(images[None], item["present"][None])
        expected = autoencoder.normalize_structure(posterior.structure_dist.mode())[0]
        torch.testing.assert_close(latents.structure[2, view].float(), expected, rtol=1e-2, atol=1e-2)
        expected = autoencoder.normalize_style(posterior.style_dist.mode())[0]
        torch.testing.assert_close(latents.style[2, view].float(), expected, rtol=1e-2, atol=1e-2)

    path = tmp_path / "latents.safetensors"
    first = train_ldm.cached_latents(path, lambda: latents)
    again = train_ldm.cached_latents(path, lambda: pytest.fail("encoded twice"))
    assert torch.equal(first.structure, again.structure) and torch.equal(again.present, latents.present)
    key = train_ldm.latents_key(dataset, folders / "data", "train", folders / "autoencoder")
    assert key == train_ldm.latents_key(dataset, folders / "data", "train", folders / "autoencoder")
    assert key != train_ldm.latents_key(dataset, folders / "data", "train", folders / "map")


def make_latents(present):
    n = len(present[0])
    number = len(present)
    return train_ldm.Latents(torch.randn(number, 2, 4, 4, 4), torch.randn(number, 2, n, 2), torch.tensor(present))


def test_batches_have_the_shares_asked_for_and_no_missing_modality():
    latents = make_latents([[True, False, True], [False, True, False]])
    scheduler = train_ldm.make_scheduler()
    args = Namespace(conditional_share=0.25, label_dropout=0.1)
    batch = train_ldm.draw_batch(latents, 4000, scheduler, args, torch.Generator().manual_seed(0))
    labels, conditional = batch["labels"], batch["conditional"]
    assert conditional.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(labels >= 4, conditional)
    assert (labels % 4 == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)
    drawn = (batch["style"][:, None, None, None] == latents.style).all(dim=-1)
    subject, _, modality = drawn.flatten(1).nonzero()[:, 1].div(6, rounding_mode="floor"), None, None
    modality = drawn.any(dim=2).any(dim=1).nonzero()[:, 1]
    assert latents.present[subject, modality].all()
    named = labels % 4 != 3
    assert torch.equal((labels % 4)[named], modality[named])
    # Times are stratified: each thousandth is drawn four times.
    counts = torch.bincount(batch["timesteps"], minlength=1000)
    assert counts.min() >= 2 and counts.max() <= 6


class Oracle(torch.nn.Module):
    """Predicts the velocity exactly, and remembers what it was shown."""

    def __init__(self, scheduler, batch):
        super().__init__()
        self.scheduler, self.batch = scheduler, batch

    def forward(self, sample, timesteps, class_labels):
        self.seen = sample
        structure = self.scheduler.get_velocity(self.batch["structure"], self.batch["structure_noise"], timesteps)
        style = self.scheduler.get_velocity(self.batch["style"], self.batch["style_noise"], timesteps)
        style = style[:, :, None, None].expand(-1, -1, *structure.shape[2:])
        return Namespace(sample=torch.cat([structure, style], dim=1))


def test_the_true_velocity_has_no_loss_and_a_conditional_pair_shows_its_structure():
    scheduler = train_ldm.make_scheduler()
    args = Namespace(conditional_share=0.5, label_dropout=0.1, style_weight=0.25)
    batch = train_ldm.draw_batch(make_latents([[True, True]] * 3), 32, scheduler, args)
    oracle = Oracle(scheduler, batch)
    assert train_ldm.training_loss(oracle, scheduler, batch, args).item() == pytest.approx(0, abs=1e-9)
    shown, clean = oracle.seen[:, :4], batch["structure"]
    same = (shown == clean).flatten(1).all(dim=1)
    assert torch.equal(same, batch["conditional"])
    # A vector style is shown as a flat map.
    assert torch.equal(oracle.seen[:, 4:].amax(dim=(2, 3)), oracle.seen[:, 4:].amin(dim=(2, 3)))


def test_every_time_counts_alike_and_the_last_one_has_no_signal():
    scheduler = train_ldm.make_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    args = Namespace(conditional_share=0.0, label_dropout=0.0, style_weight=0.0)
    batch = train_ldm.draw_batch(make_latents([[True, True]] * 3), 4, scheduler, args)

    def zero(sample, timesteps, class_labels):
        return Namespace(sample=torch.zeros_like(sample))

    for step in (0, 500, 999):
        batch["timesteps"] = torch.full((4,), step)
        velocity = scheduler.get_velocity(batch["structure"], batch["structure_noise"], batch["timesteps"])
        loss = train_ldm.training_loss(zero, scheduler, batch, args)
        assert loss.item() == pytest.approx(velocity.square().mean().item(), rel=1e-5)


def test_training_lowers_the_loss(folders, tmp_path):
    args = train_ldm.parse_args(train_ldm.build_parser(), words(folders, tmp_path))
    torch.manual_seed(0)
    autoencoder = make_autoencoder()
    unet, scheduler = train_ldm.build_unet(args, autoencoder), train_ldm.make_scheduler()
    batch = train_ldm.draw_batch(make_latents([[True] * 3] * 2), 16, scheduler, args)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = train_ldm.training_loss(unet, scheduler, batch, args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_can_start_from_a_pipeline(folders, tmp_path):
    train_ldm.main(words(folders, tmp_path / "first"))
    more = ("--init_from", str(tmp_path / "first"), "--learning_rate", "1e-12", "--no-use_ema")
    train_ldm.main(words(folders, tmp_path / "second", *more))
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second = (load_file(tmp_path / run / name) for run in ("first", "second"))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_a_run_can_start_from_a_pipeline_of_other_modalities(folders, tmp_path):
    train_ldm.main(words(folders, tmp_path / "first"))
    known = ["FLAIR", "T1CE", "T1"]
    make_autoencoder(modalities=known, size=64).save_pretrained(tmp_path / "other" / "autoencoder")
    unet = train_ldm.build_unet(
        Namespace(block_out_channels=[8, 16], layers_per_block=1, attention_sizes=[], attention_head_dim=8, dropout=0),
        DisentangledAutoencoder.from_pretrained(tmp_path / "other" / "autoencoder"),
    )
    unet.save_pretrained(tmp_path / "other" / "unet")
    more = ("--init_from", str(tmp_path / "other"), "--learning_rate", "1e-12", "--no-use_ema")
    train_ldm.main(words(folders, tmp_path / "out", *more))
    pipeline = DLDMPipeline.from_pretrained(tmp_path / "out")
    old, new = unet.class_embedding.weight, pipeline.unet.class_embedding.weight
    for half in (0, 4):  # joint labels and conditional ones: T1, T2, FLAIR, null
        theirs = old[half : half + 4]
        expected = torch.stack([theirs[2], theirs.mean(dim=0), theirs[0], theirs[3]])
        torch.testing.assert_close(new[half : half + 4], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(pipeline.unet.conv_in.weight, unet.conv_in.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--autoencoder", "absent"], "--autoencoder absent: no autoencoder there"),
        (["--dataset", "./absent"], "absent"),
        (["--dataset", "EMPTY"], "EMPTY"),
        (["--resolution", "64"], "--resolution 64"),
        (["--output_dir", "FILE"], "cannot write here"),
        (["--block_out_channels", "8", "12"], "--block_out_channels 12: must divide by 8"),
        (["--block_out_channels", "8", "8", "8", "8", "8"], "5 grids"),
        (["--attention_head_dim", "32"], "--attention_head_dim 32"),
        (["--init_from", "absent"], "--init_from absent: no pipeline there"),
        (["--conditional_share", "2"], "--conditional_share 2.0"),
        (["--resume_from_checkpoint", "absent"], "--resume_from_checkpoint absent"),
    ],
)
def test_bad_input_is_refused(folders, tmp_path, capsys, monkeypatch, more, expected):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("FILE").write_text("")
    assert expected in refused(capsys, words(folders, tmp_path / "out", *more))


def test_an_autoencoder_that_does_not_fit_is_refused(folders, tmp_path, capsys):
    for name, options, expected in (
        ("more", {"modalities": ("T1", "WB")}, "the autoencoder knows T1, WB"),
        ("size", {"size": 64}, "its slices are 32 pixels and the autoencoder takes 64"),
        ("unfinished", {"scales": False}, "no latent scales"),
    ):
        make_autoencoder(**options).save_pretrained(tmp_path / name)
        arguments = [*words(folders, tmp_path / "out"), "--autoencoder", str(tmp_path / name)]
        assert expected in refused(capsys, arguments)
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_the_presets_build(folders):
    for preset, size, most in (("ldm_small", 128, 6.6e6), ("ldm_paper", 256, 300e6), ("ldm_tiny", 32, 1e5)):
        args = train_ldm.parse_args(train_ldm.build_parser(), ["--config", preset])
        autoencoder = DisentangledAutoencoder(sample_size=size)
        with torch.device("meta"):
            unet = train_ldm.build_unet(args, autoencoder)
        assert unet.num_parameters() < most
        assert unet.config.num_class_embeds == 12
