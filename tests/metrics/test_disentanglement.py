import sys

import numpy as np
import pytest

from dldm_pipeline.metrics.disentanglement import evaluate_disentanglement, modality_probe, pool_structure
from dldm_pipeline.metrics.reconstruction import EncodedSubjects

SUBJECTS = [f"s{i}" for i in range(60)]


def codes(offset: float, features: int = 200, noise: float = 0.1) -> np.ndarray:
    """Codes (60, 4, features): a large part of the subject's own, a little noise, and a planted offset a modality."""
    rng = np.random.default_rng(0)
    subject = rng.normal(size=(60, 1, features))
    return subject + noise * rng.normal(size=(60, 4, features)) + offset * rng.normal(size=(1, 4, features))


def test_a_planted_offset_is_found():
    assert modality_probe(codes(1.0), SUBJECTS)["accuracy"] == 1.0
    faint = modality_probe(codes(0.2, features=1000), SUBJECTS)  # far below the spread between subjects
    assert faint["accuracy"] > 0.9
    assert faint["features"] == 1000 and faint["num_codes"] == 240


def test_without_an_offset_nothing_is_found():
    probe = modality_probe(codes(0.0, features=1000), SUBJECTS)
    assert probe["chance"] == 0.25
    assert abs(probe["accuracy"] - 0.25) < 0.1


def test_shuffled_labels_hide_the_offset():
    probe = modality_probe(codes(1.0), SUBJECTS, shuffle=True)
    assert abs(probe["accuracy"] - 0.25) < 0.1


def test_identical_codes_score_chance_exactly():
    same = np.repeat(codes(0.0)[:, :1], 4, axis=1)
    assert modality_probe(same, SUBJECTS)["accuracy"] == 0.25


def test_subjects_are_never_on_both_sides():
    # The label can be learnt by heart for each subject, but follows no rule that holds for another one.
    rng = np.random.default_rng(1)
    subjects = [name for name in SUBJECTS for _ in range(3)]
    content = np.repeat(rng.normal(size=(60, 4, 300)), 3, axis=0)
    probe = modality_probe(content + 0.01 * rng.normal(size=content.shape), subjects)
    assert abs(probe["accuracy"] - 0.25) < 0.12


def test_missing_codes_are_left_out_and_chance_is_the_commonest():
    present = np.ones((60, 4), dtype=bool)
    present[:30, 3] = False
    probe = modality_probe(codes(1.0), SUBJECTS, present)
    assert probe["num_codes"] == 210
    assert probe["chance"] == pytest.approx(60 / 210)
    assert probe["recall"] == [1.0, 1.0, 1.0, 1.0]


def test_the_rotation_changes_nothing():
    # Padding with constant features triggers the rotation; the probe must score the same with and without it.
    plain = codes(0.05, features=40)
    padded = np.concatenate([plain, np.zeros((60, 4, 40 * 4))], axis=-1) / 1.0
    # Scaling by the number of features changes the penalty's range, so compare accuracies, not weights.
    assert modality_probe(padded, SUBJECTS)["accuracy"] == pytest.approx(
        modality_probe(plain, SUBJECTS)["accuracy"], abs=0.05
    )


def test_too_few_subjects_and_no_scikit_learn(monkeypatch):
    with pytest.raises(ValueError, match="at least 8 subjects"):
        modality_probe(codes(1.0)[:5], SUBJECTS[:5])
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"dldm_pipeline\[eval\]"):
        modality_probe(codes(1.0), SUBJECTS)


def test_pooling_is_mean_and_deviation():
    code = np.random.default_rng(0).normal(size=(3, 2, 5, 4, 4))
    pooled = pool_structure(code)
    assert pooled.shape == (3, 2, 10)
    np.testing.assert_allclose(pooled[..., :5], code.mean(axis=(-2, -1)))
    np.testing.assert_allclose(pooled[..., 5:], code.std(axis=(-2, -1)))


def test_the_higher_structure_probe_counts():
    rng = np.random.default_rng(0)
    subject = rng.normal(size=(60, 1, 4, 4, 4))
    pattern = rng.normal(size=(1, 4, 4, 4, 4))
    pattern -= pattern.mean(axis=(-2, -1), keepdims=True)  # a trace that the spatial mean does not show
    single = subject + 0.5 * pattern + 0.05 * rng.normal(size=(60, 4, 4, 4, 4))
    encoded = EncodedSubjects(
        modalities=["A", "B", "C", "D"],
        subjects=SUBJECTS,
        images=rng.random((60, 4, 32, 32)).astype(np.float32),
        present=np.ones((60, 4), dtype=bool),
        masks=np.zeros((60, 32, 32), dtype=bool),
        has_mask=np.ones(60, dtype=bool),
        structure=single.mean(axis=1),
        single_structures=single,
        styles=np.broadcast_to(np.eye(4), (60, 4, 4)) + 0.01 * rng.normal(size=(60, 4, 4)),
    )
    result = evaluate_disentanglement(encoded, progress=False)
    assert result["style_accuracy"] == 1.0
    assert result["structure_full"]["accuracy"] > 0.95 > result["structure_mean"]["accuracy"]
    assert result["structure_accuracy"] == result["structure_full"]["accuracy"]
    assert result["structure_over_chance"] == pytest.approx(100 * (result["structure_accuracy"] - 0.25))
