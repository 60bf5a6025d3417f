import importlib
import sys

import numpy as np
import pytest

from dldm_pipeline.metrics import disentanglement
from dldm_pipeline.metrics.disentanglement import (
    evaluate_disentanglement,
    modality_probe,
    pool_structure,
    structure_agreement,
    subject_probe,
)
from dldm_pipeline.metrics.reconstruction import EncodedSubjects

SUBJECTS = [f"s{i}" for i in range(60)]


def codes(offset: float, features: int = 200, noise: float = 0.1) -> np.ndarray:
    """Codes (60, 4, features): a large part of the subject's own, a little noise, and a planted offset a modality."""
    rng = np.random.default_rng(0)
    subject = rng.normal(size=(60, 1, features))
    return subject + noise * rng.normal(size=(60, 4, features)) + offset * rng.normal(size=(1, 4, features))


def test_a_planted_offset_is_found_and_shuffled_labels_hide_it():
    assert modality_probe(codes(1.0), SUBJECTS)["accuracy"] == 1.0
    assert abs(modality_probe(codes(1.0), SUBJECTS, shuffle=True)["accuracy"] - 0.25) < 0.1
    faint = modality_probe(codes(0.2, features=600), SUBJECTS)  # far less than subjects differ
    assert faint["accuracy"] > 0.9 and faint["features"] == 600 and faint["num_codes"] == 240
    # Without an offset nothing is found.
    probe = modality_probe(codes(0.0, features=600), SUBJECTS)
    assert probe["chance"] == 0.25 and abs(probe["accuracy"] - 0.25) < 0.1
    same = np.repeat(codes(0.0)[:, :1], 4, axis=1)
    assert modality_probe(same, SUBJECTS)["accuracy"] == 0.25


def test_subjects_are_never_on_both_sides():
    # The label can be memorised for each subject, but no rule holds for another one.
    rng = np.random.default_rng(1)
    subjects = [name for name in SUBJECTS for _ in range(3)]
    content = np.repeat(rng.normal(size=(60, 4, 300)), 3, axis=0)
    probe = modality_probe(content + 0.01 * rng.normal(size=content.shape), subjects)
    assert abs(probe["accuracy"] - 0.25) < 0.12


def test_missing_codes_are_left_out_and_chance_is_the_commonest():
    present = np.ones((60, 4), dtype=bool)
    present[:30, 3] = False
    probe = modality_probe(codes(1.0), SUBJECTS, present)
    assert probe["num_codes"] == 210 and probe["chance"] == pytest.approx(60 / 210) and probe["recall"] == [1.0] * 4


def test_too_few_subjects_and_no_scikit_learn(monkeypatch):
    with pytest.raises(ValueError, match="at least 8 subjects"):
        modality_probe(codes(1.0)[:5], SUBJECTS[:5])
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"dldm_pipeline\[eval\]"):
        importlib.reload(disentanglement)


def test_pooling_is_mean_and_std():
    code = np.random.default_rng(0).normal(size=(3, 2, 5, 4, 4))
    expected = np.concatenate([code.mean(axis=(-2, -1)), code.std(axis=(-2, -1))], axis=-1)
    np.testing.assert_allclose(pool_structure(code), expected)


def test_a_subject_is_found_however_the_modalities_differ():
    probe = subject_probe(codes(100.0), SUBJECTS)
    assert probe["accuracy"] == probe["auc"] == 1.0
    assert probe["chance"] == pytest.approx(1 / 60) and probe["features"] == 200
    pairs = np.array(probe["accuracy_by_pair"])
    assert np.isnan(np.diag(pairs)).all() and (pairs[~np.eye(4, dtype=bool)] == 1).all()


def test_codes_without_the_subject_find_none():
    rng = np.random.default_rng(0)
    probe = subject_probe(rng.normal(size=(60, 4, 8)) + 5 * rng.normal(size=(1, 4, 8)), SUBJECTS)
    assert abs(probe["accuracy"] - probe["chance"]) < 0.03
    assert probe["auc"] == pytest.approx(0.5, abs=0.05)
    assert probe["chance"] == pytest.approx(1 / 60)
    same = subject_probe(np.ones((60, 4, 8)), SUBJECTS)
    assert same["accuracy"] == pytest.approx(same["chance"]) and same["auc"] == 0.5


def test_subject_probe_with_several_slices_and_missing_codes():
    rng = np.random.default_rng(0)
    subjects = [f"s{i // 3}" for i in range(120)]
    content = np.repeat(rng.normal(size=(40, 1, 6)), 3, axis=0) + 0.02 * rng.normal(size=(120, 4, 6))
    probe = subject_probe(content, subjects)
    assert probe["accuracy"] == 1.0 and probe["chance"] == pytest.approx(1 / 40)
    present = np.ones((120, 4), dtype=bool)
    present[:60, 3], present[:, 2] = False, False
    content[~present] = np.nan
    probe = subject_probe(content, subjects, present)
    assert np.isnan(probe["accuracy_by_pair"][0][2]) and probe["accuracy"] > 0.9


def test_structure_agreement_of_known_codes():
    rng = np.random.default_rng(0)
    subject, noise = rng.normal(size=(60, 1, 4, 8, 8)), rng.normal(size=(60, 4, 4, 8, 8))
    assert structure_agreement(np.repeat(subject, 4, axis=1), SUBJECTS)["ratio"] == pytest.approx(0, abs=1e-5)
    assert structure_agreement(noise, SUBJECTS)["ratio"] == pytest.approx(1, abs=0.03)
    # Two codes differ by noise of variance 2 x 0.25, two subjects by 2 x 1.25, for each number.
    result = structure_agreement(subject + 0.5 * noise, SUBJECTS)
    assert result["ratio"] == pytest.approx((0.25 / 1.25) ** 0.5, abs=0.02)
    assert result["within"] / result["between"] == pytest.approx(result["ratio"], rel=0.01)
    scaled = (subject + 0.5 * noise) * np.array([1, 1000, 0.001, 1])[:, None, None]
    assert structure_agreement(scaled, SUBJECTS)["ratio"] == pytest.approx(result["ratio"])
    present = np.ones((60, 4), dtype=bool)
    present[:, 3] = False
    pairs = np.array(structure_agreement(subject + 0.5 * noise, SUBJECTS, present)["ratio_by_pair"])
    assert np.isnan(pairs[3]).all() and np.isfinite(pairs[0, 1])


def test_the_higher_structure_probe_counts():
    rng = np.random.default_rng(0)
    subject = rng.normal(size=(60, 1, 4, 4, 4))
    pattern = rng.normal(size=(1, 4, 4, 4, 4))
    pattern -= pattern.mean(axis=(-2, -1), keepdims=True)  # a trace that the spatial mean does not show
    single = subject + 0.5 * pattern + 0.05 * rng.normal(size=(60, 4, 4, 4, 4))
    images, present, has_mask = np.zeros((60, 4, 32, 32), np.float32), np.ones((60, 4), bool), np.ones(60, bool)
    styles = np.eye(4) + 0.01 * rng.normal(size=(60, 4, 4))
    latents = {"structure": single.mean(axis=1), "single_structures": single, "styles": styles}
    encoded = EncodedSubjects(list("ABCD"), SUBJECTS, images, present, images[:, 0] > 0, has_mask, **latents)
    result = evaluate_disentanglement(encoded)
    assert result["style_accuracy"] == 1.0
    assert result["structure_full"]["accuracy"] > 0.95 > result["structure_mean"]["accuracy"]
    assert abs(result["structure_full_shuffled"]["accuracy"] - 0.25) < 0.1
    assert result["structure_accuracy"] == result["structure_full"]["accuracy"]
    assert result["structure_over_chance"] == pytest.approx(100 * (result["structure_accuracy"] - 0.25))
    assert result["subject_structure_accuracy"] == 1.0
    assert 0.1 < result["structure_agreement"]["ratio"] < 0.9
