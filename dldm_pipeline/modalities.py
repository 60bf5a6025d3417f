"""What a modality is: canonical names, their order, and how file names give them away.

A modality is one MRI contrast of a subject. Its name is an ordinary string; a model's modality list is any ordered,
non-empty list of distinct names, and nothing in the package expects five of them. The names below are the ones that
`find_modality` recognises in file names.

| name  | contrast                                              |
|-------|-------------------------------------------------------|
| T1    | T1-weighted, no contrast agent                        |
| T1CE  | T1-weighted after a gadolinium contrast agent         |
| T2    | T2-weighted                                           |
| FLAIR | T2-weighted, fluid-attenuated inversion recovery      |
| WB    | white blood, contrast-enhanced: vessels bright        |
| BB    | black blood, contrast-enhanced: vessels dark          |
| mask  | not a contrast: the tumour (or lesion) outline        |
"""

import re
from collections.abc import Iterable

CANONICAL_MODALITIES = ("T1", "T1CE", "T2", "FLAIR", "WB", "BB")
"""Every contrast that `find_modality` knows, in the order in which data sets store them."""

DEFAULT_MODALITIES = ("T1", "T2", "FLAIR", "WB", "BB")
"""The modalities of the paper, of the phantom and of the bundled checkpoint."""

MASK = "mask"
"""Name of the tumour mask: an extra target beside the modalities, never one of them."""

LABELS = "labels"
"""Name of the tumour's regions, as in BraTS: 1 necrotic core, 2 oedema, 3 enhancing tumour, 0 else."""

SIMULATED = ("anatomy_seed", "acquisition_seed", "height", "factors")
"""Columns of the slice table that only simulated slices fill."""

RESERVED_NAMES = (MASK, LABELS, "subject", "slice_index", "present", "source", "pixel_spacing", *SIMULATED)
"""Names that no modality may have, because the slice table already has a column of that name."""

# Words as they stand in file names, lower case, in reading order of the canonical names.
_ALIASES = {
    "T1": {"t1", "t1n", "t1w", "t1pre", "mprage", "mp2rage"},
    "T1CE": {"t1ce", "t1c", "t1gd", "t1gad", "t1post", "t1postcontrast", "t1wce", "t1wpost", "t1cw"},
    "T2": {"t2", "t2w"},
    "FLAIR": {"flair", "t2f", "fla", "t2flair", "flairw"},
    "WB": {"wb", "whiteblood"},
    "BB": {"bb", "blackblood"},
}
_CONTRAST_AGENT = {"ce", "c", "gd", "gad", "gadolinium", "post", "postcontrast", "postgd", "contrast"}
_STRONG_MASK = {"seg", "segmentation", "mask", "goldstandard", "groundtruth", "glistrboost", "lesionmask", "tumormask"}
_WEAK_MASK = {"lesion", "lesions", "tumor", "tumour", "roi", "label", "labels", "consensus"}
# Masks and parcellations of healthy tissue, which must not pass for a tumour or for an image.
_OTHER_LABELS = {"brainmask", "dseg", "probseg", "aseg", "aparc", "parcellation", "tissueseg"}
# What follows one of these words names a subject, or the image that this one was registered to: not the contrast.
_NAMES_SOMETHING_ELSE = {"sub", "ses", "run", "acq", "space", "to", "regto", "reg"}
# Pairs of words that mean one.
_JOINED = {
    ("gold", "standard"): "goldstandard",
    ("ground", "truth"): "groundtruth",
    ("fusion", "mav"): "mask",
    ("white", "blood"): "whiteblood",
    ("black", "blood"): "blackblood",
    ("dark", "fluid"): "flair",
    ("brain", "mask"): "brainmask",
}


def find_modality(filename: str) -> str | None:
    """Tell which modality a file (or a DICOM series) is, from its name alone.

    The name is cut into words at every character that is no letter or digit, so `T1_N4_regtoFLAIR_brain.nii.gz` is
    `T1`: `regtoFLAIR` is one word, and it is no alias. Case does not matter.

    Args:
        filename (`str`): File name or DICOM series description. Folders in front of it are ignored.

    Returns:
        `str` or `None`: One of `CANONICAL_MODALITIES`, `"mask"`, or `None` if the name says nothing known.

    Examples:
        >>> find_modality("BraTS2021_01476_t1ce.nii.gz"), find_modality("sub-01_ce-gadolinium_T1w.nii.gz")
        ('T1CE', 'T1CE')
        >>> find_modality("TCGA-DU-7294_fusion_mav.nii.gz"), find_modality("notes.nii.gz")
        ('mask', None)
    """
    name = re.split(r"[/\\]", filename)[-1].lower()
    name = re.sub(r"\.(nii|nii\.gz|dcm|ima|mgz|img|hdr)$", "", name)
    words: list[str] = []
    for word in re.findall(r"[a-z0-9]+", name):
        if words and (words[-1], word) in _JOINED:
            words[-1] = _JOINED[words[-1], word]
        elif words and words[-1] in _NAMES_SOMETHING_ELSE:
            words[-1] = "\0"  # spent: neither this pair of words nor what it names says anything about the contrast
        else:
            words.append(word)

    found = [(at, modality) for at, word in enumerate(words) for modality in _ALIASES if word in _ALIASES[modality]]
    first = found[0][0] if found else -1
    if set(words) & _OTHER_LABELS:
        return None
    # "lesion_07_t1" is the T1 of a case called lesion 07; "t1_lesion" is a mask drawn on a T1.
    if set(words) & _STRONG_MASK or any(at > first and word in _WEAK_MASK for at, word in enumerate(words)):
        return MASK
    if not found:
        return None

    names = [modality for _, modality in found]
    for modality in ("WB", "BB"):  # often written as an attribute of a T1: "T1_BB"
        if modality in names:
            return modality
    modality = names[0]
    if modality == "T1" and "pre" not in words:
        if "T1CE" in names or set(words) & _CONTRAST_AGENT:
            return "T1CE"
    if modality == "T2" and "FLAIR" in names:  # "T2_FLAIR", "t2_tirm_dark-fluid"
        return "FLAIR"
    return modality


def check_modalities(names: Iterable[str], known_only: bool = False) -> tuple[str, ...]:
    """Check a list of modality names, in the wanted order, and return it as a tuple.

    With `known_only`, names that are not in `CANONICAL_MODALITIES` are also refused, for scripts that look for them in
    file names.

    Raises:
        ValueError: If the list is empty, a name is repeated, reserved, not fit for a file name, or unknown.
    """
    if isinstance(names, str):
        raise ValueError(f"modalities must be a list of names, got the string {names!r}; write [{names!r}].")
    names = tuple(names)
    if not names:
        raise ValueError("modalities is empty; name at least one, for example T1.")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]*", name):
            raise ValueError(f"modality name {name!r} is not usable; take letters, digits, '_', '+' and '-' only.")
        if name in RESERVED_NAMES:
            raise ValueError(f"{name!r} cannot be a modality: the data have another column of that name; rename it.")
        if known_only and name not in CANONICAL_MODALITIES:
            meant = find_modality(name)
            hint = f"; did you mean {meant}?" if meant in CANONICAL_MODALITIES else "."
            raise ValueError(f"unknown modality {name!r}; known are {', '.join(CANONICAL_MODALITIES)}{hint}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"modalities {list(names)} names {', '.join(repeated)} twice; name each modality once.")
    return names
