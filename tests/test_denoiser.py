import pytest
import torch

from dldm_pipeline.denoiser import make_scheduler, make_unet, stratified_timesteps

TINY = {"block_out_channels": [8, 16], "layers_per_block": 1, "attention_sizes": [0], "attention_head_dim": 8}


def test_the_last_step_has_no_signal_and_latents_are_not_clipped():
    scheduler = make_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.config.clip_sample is False
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


def test_attention_is_where_it_is_asked_for_and_on_the_last_level():
    unet = make_unet(6, 8, 4, **TINY | {"attention_sizes": [8], "block_out_channels": [32, 64]})
    assert unet.config.down_block_types == ("AttnDownBlock2D", "DownBlock2D")
    assert unet.config.up_block_types == ("UpBlock2D", "AttnUpBlock2D")
    assert unet.mid_block.attentions[0] is not None and unet.config.norm_num_groups == 32
    sample = unet(torch.randn(2, 6, 8, 8), 5, class_labels=torch.tensor([0, 3])).sample
    assert sample.shape == (2, 6, 8, 8)


def test_what_does_not_divide_is_refused():
    for name, value, expected in (
        ("block_out_channels", [8] * 5, "5 levels"),
        ("block_out_channels", [8, 12], "a width of 12"),
        ("block_out_channels", [8, 0], "a width of 0"),
        ("attention_head_dim", 32, "attention_head_dim: 32"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_unet(6, 8, 4, **TINY | {name: value})


def test_times_are_stratified():
    times = stratified_timesteps(20, 1000, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert times.dtype == torch.int64 and (times // 50).sort().values.tolist() == list(range(20))
    assert not torch.equal(times, times.sort().values)  # in no order
    many = torch.cat([stratified_timesteps(100, 1000, torch.device("cpu")) for _ in range(50)])
    assert set((many % 10).tolist()) == set(range(10))
