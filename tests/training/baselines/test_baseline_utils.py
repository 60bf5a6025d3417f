import json
import time

import pytest
import torch
from baseline_utils import Selection, Slices, read_slices, subject_generators

from dldm_pipeline.data.slices import SliceDataset
from dldm_pipeline.training_utils import TrainingClock


def test_slices_that_a_model_cannot_use_are_left_out(baseline_data):
    everything = [SliceDataset(baseline_data, split) for split in ("train", "validation")]
    read = {
        (complete, mask): sum(len(read_slices(dataset, complete, mask)) for dataset in everything)
        for complete in (False, True)
        for mask in (False, True)
    }
    assert read == {(False, False): 15, (True, False): 14, (False, True): 14, (True, True): 13}
    slices = read_slices(everything[0], mask=True)
    assert slices.images.shape[1:] == (3, 32, 32) and slices.images.dtype == torch.float16
    assert slices.masks.sum(dim=(1, 2)).unique().tolist() == [16]


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
    """Draws images of one grey value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def sample(self, num_subjects, generator):
        time.sleep(0.05)
        return torch.rand(num_subjects, 2, 8, 8, generator=generator) * 0.1 + self.value

    def save_pretrained(self, folder):
        (folder / "value.txt").write_text(str(self.value))


def test_the_best_model_is_kept_and_measuring_takes_no_training_time(tmp_path, extractor):
    present = torch.tensor([[True, True]] * 5 + [[True, False]])
    real = Slices(torch.rand(6, 2, 8, 8).half() * 0.1 + 0.5, present)
    selection = Selection(tmp_path, real, ("T1", "T2"), 4, extractor)
    clock = TrainingClock(1000, 1.0)
    for step, value in enumerate((0.2, 0.5, 0.8), start=1):
        clock.step = step
        figures = selection.offer(Grey(value), clock)
        assert figures["KID"] == pytest.approx((figures["KID T1"] + figures["KID T2"]) / 2)
    assert clock.elapsed < 0.1
    assert selection.best["step"] == 2 and (tmp_path / "value.txt").read_text() == "0.5"
    assert [entry["step"] for entry in json.loads((tmp_path / "selection.json").read_text())] == [1, 2, 3]

    assert selection.measure(torch.zeros(2, 2, 8, 8))["KID"] == float("inf")

    resumed = Selection(tmp_path, real, ("T1", "T2"), 4, extractor, resume=True)
    assert resumed.best == selection.best
    assert Selection(tmp_path, real, ("T1", "T2"), 4, extractor).best is None
    alone = Slices(real.images[4:], present[4:])
    with pytest.raises(ValueError, match="the validation split has 1 slices of T2"):
        Selection(tmp_path, alone, ("T1", "T2"), 4, extractor)
