"""Modality names and how file names give them away."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dldm_pipeline.modalities import CANONICAL_MODALITIES, DEFAULT_MODALITIES, MASK, check_modalities, find_modality


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        # BraTS 2018-2021, 2023 and later
        ("BraTS2021_01476_t1.nii.gz", "T1"),
        ("BraTS2021_01476_t1ce.nii.gz", "T1CE"),
        ("BraTS2021_01476_t2.nii.gz", "T2"),
        ("BraTS2021_01476_flair.nii.gz", "FLAIR"),
        ("BraTS2021_01476_seg.nii.gz", MASK),
        ("BraTS-GLI-00000-000-t1n.nii.gz", "T1"),
        ("BraTS-GLI-00000-000-t1c.nii.gz", "T1CE"),
        ("BraTS-GLI-00000-000-t2w.nii.gz", "T2"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", "FLAIR"),
        ("t1c.nii.gz", "T1CE"),
        # TCGA
        ("TCGA-DU-7294_fla_bet.nii.gz", "FLAIR"),
        ("TCGA-DU-7294_t1_bet.nii.gz", "T1"),
        ("TCGA-DU-7294_t1c_bet.nii.gz", "T1CE"),
        ("TCGA-DU-7294_fusion_mav.nii.gz", MASK),
        ("TCGA-02-0001_GlistrBoost.nii.gz", MASK),
        # multiple sclerosis set: every file was registered to FLAIR
        ("T1_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz", "T1"),
        ("T1POST_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz", "T1CE"),
        ("T2_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz", "T2"),
        ("FLAIR_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz", "FLAIR"),
        ("GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI.nii.gz", MASK),
        # BIDS
        ("sub-01_T1w.nii.gz", "T1"),
        ("sub-01_ses-02_ce-gadolinium_T1w.nii.gz", "T1CE"),
        ("sub-01_T2w.nii", "T2"),
        ("sub-01_FLAIR.nii.gz", "FLAIR"),
        ("sub-t1_T2w.nii.gz", "T2"),
        ("sub-01_space-T1w_FLAIR.nii.gz", "FLAIR"),
        ("sub-01_label-lesion_mask.nii.gz", MASK),
        ("sub-01_space-T1w_desc-brain_mask.nii.gz", None),
        ("sub-01_dseg.nii.gz", None),
        # plain names and DICOM series descriptions
        ("WB.nii", "WB"),
        ("case7_black-blood.nii.gz", "BB"),
        ("T1_BB.nii.gz", "BB"),
        ("AX T1 POST GD", "T1CE"),
        ("t1_pre_contrast.nii.gz", "T1"),
        ("T1+C.nii", "T1CE"),
        ("Ax T2 FLAIR", "FLAIR"),
        ("t2_tirm_tra_dark-fluid", "FLAIR"),
        ("T1_to_FLAIR.nii.gz", "T1"),
        ("lesion_07_t1.nii.gz", "T1"),
        ("t1_lesion.nii.gz", MASK),
        ("tumor.nii.gz", MASK),
        ("/data/t1/flair/T2.nii.gz", "T2"),
        # nothing known
        ("dwi.nii.gz", None),
        ("T1_brainmask.nii.gz", None),
        ("outfit1.nii.gz", None),
        ("", None),
    ],
)
def test_find_modality(filename: str, expected: str | None) -> None:
    assert find_modality(filename) == expected


@given(st.text())
def test_find_modality_never_fails(text: str) -> None:
    assert find_modality(text) in (*CANONICAL_MODALITIES, MASK, None)


@given(st.sampled_from(CANONICAL_MODALITIES), st.integers(0, 9999), st.sampled_from([".nii", ".nii.gz"]))
def test_canonical_names_find_themselves(name: str, number: int, suffix: str) -> None:
    assert find_modality(f"case-{number}_{name}{suffix}") == name


def test_check_modalities_keeps_order_and_any_list() -> None:
    assert check_modalities(["B", "A", "c9"]) == ("B", "A", "c9")
    assert check_modalities(iter(DEFAULT_MODALITIES), known_only=True) == DEFAULT_MODALITIES


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "empty"),
        (["T1", "T2", "T1"], "names T1 twice"),
        (["T1", "mask"], "'mask' cannot be a modality"),
        (["subject"], "'subject' cannot"),
        (["a/b"], "'a/b' is not usable"),
        ("T1", "the string 'T1'"),
    ],
)
def test_check_modalities_refuses(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_modalities(names)


def test_check_modalities_known_only() -> None:
    with pytest.raises(ValueError, match="unknown modality 't1ce'.*did you mean T1CE"):
        check_modalities(["T1", "t1ce"], known_only=True)
    with pytest.raises(ValueError, match="unknown modality 'PET'.*known are T1, T1CE"):
        check_modalities(["PET"], known_only=True)
