import json

import pytest
import torch
from baseline_utils import Selection, Slices, read_slices, subject_generators

from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.training_args import BaselineArgs
from dldm_pipeline.training_state import TrainingClock


def test_slices_that_a_model_cannot_use_are_left_out(data):
    everything = [SliceDataset(data, split) for split in ("train", "validation")]
    counts = {joint: sum(len(read_slices(dataset, joint)) for dataset in everything) for joint in (False, True)}
    assert counts == {False: 15, True: 13}  # one lacks T1, another one the mask
    slices = read_slices(everything[0], joint=True)
    assert slices.images.shape[1:] == (3, 32, 32) and slices.images.dtype == torch.float16
    assert slices.present.all() and slices.masks.any(dim=(1, 2)).all() and read_slices(everything[0]).masks is None


def test_generators_of_subjects():
    first = [g.initial_seed() for g in subject_generators(3, torch.Generator().manual_seed(5))]
    again = [g.initial_seed() for g in subject_generators(3, torch.Generator().manual_seed(5))]
    assert first == again and len(set(first)) == 3
    own = [torch.Generator().manual_seed(i) for i in range(3)]
    assert subject_generators(3, own) == own
    with pytest.raises(ValueError, match="generator has 3 entries for 4 subjects"):
        subject_generators(4, own)
    with pytest.raises(ValueError, match="num_subjects is 0"):
        subject_generators(0, None)


class Grey(torch.nn.Module):
    """Generates images of one grey value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def sample(self, num_subjects, generator):
        return torch.rand(num_subjects, 2, 8, 8, generator=generator) * 0.1 + self.value

    def save_pretrained(self, folder):
        (folder / "value.txt").write_text(str(self.value))


def test_the_best_model_is_kept(tmp_path, extractor):
    present = torch.tensor([[True, True]] * 5 + [[True, False]])
    real = Slices(torch.rand(6, 2, 8, 8).half() * 0.1 + 0.5, present)
    args = BaselineArgs(output_dir=str(tmp_path), selection_subjects=4)
    selection = Selection(args, real, ("T1", "T2"), extractor)
    clock = TrainingClock(1000, 1.0)
    for step, value in enumerate((0.2, 0.5, 0.8), start=1):
        clock.step = step
        figures = selection.offer(Grey(value), clock)
        assert figures["KID"] == pytest.approx((figures["KID T1"] + figures["KID T2"]) / 2)
    assert selection.best["step"] == 2 and (tmp_path / "value.txt").read_text() == "0.5"
    assert [entry["step"] for entry in json.loads((tmp_path / "selection.json").read_text())] == [1, 2, 3]
    assert selection.measure(torch.zeros(2, 2, 8, 8))["KID"] == float("inf")

    args.resume_from_checkpoint = "latest"
    assert Selection(args, real, ("T1", "T2"), extractor).best == selection.best
    args.resume_from_checkpoint = None
    assert Selection(args, real, ("T1", "T2"), extractor).best is None
    with pytest.raises(ValueError, match="the validation split has 1 slices of T2"):
        Selection(args, Slices(real.images[4:], present[4:]), ("T1", "T2"), extractor)
