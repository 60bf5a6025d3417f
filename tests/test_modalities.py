"""Modality names and how file names give them away."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dldm_pipeline.modalities import CANONICAL_MODALITIES, DEFAULT_MODALITIES, MASK, check_modalities, find_modality

NAMES = {
    "T1": (
        "BraTS2021_01476_t1.nii.gz BraTS-GLI-00000-000-t1n.nii.gz TCGA-DU-7294_t1_bet.nii.gz sub-01_T1w.nii.gz "
        "T1_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz t1_pre_contrast.nii.gz T1_to_FLAIR.nii.gz "
        "lesion_07_t1.nii.gz"
    ).split(),
    "T1CE": (
        "BraTS2021_01476_t1ce.nii.gz BraTS-GLI-00000-000-t1c.nii.gz t1c.nii.gz TCGA-DU-7294_t1c_bet.nii.gz "
        "T1POST_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz sub-01_ses-02_ce-gadolinium_T1w.nii.gz "
        "T1+C.nii"
    ).split()
    + ["AX T1 POST GD"],
    "T2": (
        "BraTS2021_01476_t2.nii.gz BraTS-GLI-00000-000-t2w.nii.gz sub-01_T2w.nii sub-t1_T2w.nii.gz "
        "T2_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz /data/t1/flair/T2.nii.gz"
    ).split(),
    "FLAIR": (
        "BraTS2021_01476_flair.nii.gz BraTS-GLI-00000-000-t2f.nii.gz TCGA-DU-7294_fla_bet.nii.gz sub-01_FLAIR.nii.gz "
        "FLAIR_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz sub-01_space-T1w_FLAIR.nii.gz "
        "t2_tirm_tra_dark-fluid"
    ).split()
    + ["Ax T2 FLAIR"],
    "WB": ["WB.nii"],
    "BB": ["case7_black-blood.nii.gz", "T1_BB.nii.gz"],
    MASK: (
        "BraTS2021_01476_seg.nii.gz TCGA-DU-7294_fusion_mav.nii.gz TCGA-02-0001_GlistrBoost.nii.gz t1_lesion.nii.gz "
        "GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI.nii.gz sub-01_label-lesion_mask.nii.gz tumor.nii.gz"
    ).split(),
    None: (
        "sub-01_space-T1w_desc-brain_mask.nii.gz sub-01_dseg.nii.gz dwi.nii.gz T1_brainmask.nii.gz outfit1.nii.gz"
    ).split()
    + [""],
}


@pytest.mark.parametrize("modality", NAMES)
def test_find_modality(modality: str | None) -> None:
    """In names of BraTS, TCGA, BIDS, a multiple sclerosis set registered to FLAIR, and DICOM series descriptions."""
    assert {name: find_modality(name) for name in NAMES[modality]} == dict.fromkeys(NAMES[modality], modality)


@given(st.text())
def test_find_modality_never_fails(text: str) -> None:
    assert find_modality(text) in (*CANONICAL_MODALITIES, MASK, None)


@given(st.sampled_from(CANONICAL_MODALITIES), st.integers(0, 9999), st.sampled_from([".nii", ".nii.gz"]))
def test_canonical_names_find_themselves(name: str, number: int, suffix: str) -> None:
    assert find_modality(f"case-{number}_{name}{suffix}") == name


def test_check_modalities_keeps_order_and_any_list() -> None:
    assert check_modalities(["B", "A", "c9"]) == ("B", "A", "c9")
    assert check_modalities(iter(DEFAULT_MODALITIES), known_only=True) == DEFAULT_MODALITIES


def test_check_modalities_refuses() -> None:
    for names, message in (
        ([], "empty"),
        (["T1", "T2", "T1"], "names T1 twice"),
        (["T1", "mask"], "'mask' cannot be a modality"),
        (["subject"], "'subject' cannot"),
        (["a/b"], "'a/b' is not usable"),
        ("T1", "the string 'T1'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_modalities(names)


def test_check_modalities_known_only() -> None:
    with pytest.raises(ValueError, match="unknown modality 't1ce'.*did you mean T1CE"):
        check_modalities(["T1", "t1ce"], known_only=True)
    with pytest.raises(ValueError, match="unknown modality 'PET'.*known are T1, T1CE"):
        check_modalities(["PET"], known_only=True)
