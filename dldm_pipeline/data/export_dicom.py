"""A synthetic subject as DICOM: MR images and a segmentation, every one of them marked as synthetic."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset


def write_dicom(
    files: Sequence[Path],
    images: Mapping[str, np.ndarray],
    mask: np.ndarray,
    name: str,
    spacing: tuple[float, float],
    notice: str,
    version: str,
) -> None:
    """Write one subject as one study: a series of one MR image for each modality, and one with the mask's Segmentation.

    MR Image is taken rather than Secondary Capture, which has no position in space to overlay the mask by. These
    attributes say that nothing was acquired: Synthetic Data YES, Image Type DERIVED\\SECONDARY, Content Qualification
    RESEARCH, Scanning Sequence RM (research mode) and Manufacturer, and in words Patient's Name, Study and Series
    Description, Derivation Description and the comments. UIDs are new with each call; Patient ID depends on the pixels.

    Args:
        files (`Sequence[Path]`): Files to write, one for each image and last the mask's.
        images (`Mapping[str, np.ndarray]`): Modality to uint16 (H, W).
        mask (`np.ndarray`): uint8 (H, W), 1 in the tumour.
        name (`str`): The subject's name.
        spacing (`tuple[float, float]`): Distance between rows, then columns, in mm.
        notice (`str`): What every file says of itself.
        version (`str`): Version of this package.
    """
    from pydicom.uid import generate_uid

    now = datetime.datetime.now()
    # Subjects of two exports share their names and must not become one patient in an archive.
    digest = hashlib.sha256(b"".join(image.tobytes() for image in (*images.values(), mask))).hexdigest()
    common = {
        "SpecificCharacterSet": "ISO_IR 192",
        "PatientName": f"SYNTHETIC^{name}",
        "PatientID": f"{name}-{digest[:8]}",
        "PatientBirthDate": "",
        "PatientSex": "",
        "PatientComments": notice,
        "StudyInstanceUID": generate_uid(),
        "StudyDate": now.strftime("%Y%m%d"),
        "StudyTime": now.strftime("%H%M%S"),
        "StudyID": "1",
        "StudyDescription": "SYNTHETIC, not for diagnosis",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
        "FrameOfReferenceUID": generate_uid(),
        "PositionReferenceIndicator": "",
        "Manufacturer": "dldm_pipeline",
        "ManufacturerModelName": "generative model, no scanner",
        "SoftwareVersions": version,
        "SyntheticData": "YES",
        "ContentQualification": "RESEARCH",
    }
    items = [_mr_image(common, *item, number, spacing) for number, item in enumerate(images.items(), start=1)]
    items.append(_segmentation(items, mask))
    for path, item in zip(files, items, strict=True):
        item.save_as(path, enforce_file_format=True)


def _mr_image(
    common: dict[str, str], modality: str, image: np.ndarray, number: int, spacing: tuple[float, float]
) -> "Dataset":
    """A DICOM MR image (PS3.3 A.4) that says of itself that no scanner acquired it."""
    from pydicom import Dataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
    from pydicom.valuerep import format_number_as_ds

    height, width = image.shape
    attributes = common | {
        "SOPClassUID": MRImageStorage,
        "SOPInstanceUID": generate_uid(),
        "Modality": "MR",
        "SeriesInstanceUID": generate_uid(),
        "SeriesNumber": number,
        "SeriesDescription": f"SYNTHETIC {modality}, not for diagnosis",
        "InstanceNumber": 1,
        "BodyPartExamined": "BRAIN",
        "ImageType": ["DERIVED", "SECONDARY", "OTHER"],
        "DerivationDescription": common["PatientComments"],
        "ImageComments": common["PatientComments"],
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
        # What the standard asks of an MR image; there are no echoes to tell of, and RM is research mode.
        "ScanningSequence": "RM",
        "SequenceVariant": "NONE",
        "ScanOptions": "",
        "MRAcquisitionType": "2D",
        "RepetitionTime": None,
        "EchoTime": None,
        "EchoTrainLength": None,
        # DICOM's axes point left and posterior, as the image's columns and rows run.
        "PatientPosition": "HFS",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [
            format_number_as_ds(-(width - 1) / 2 * spacing[1]),
            format_number_as_ds(-(height - 1) / 2 * spacing[0]),
            0,
        ],
        "PixelSpacing": [format_number_as_ds(step) for step in spacing],
        "SliceThickness": 1,
        "SpacingBetweenSlices": 1,
        "WindowCenter": 32768,
        "WindowWidth": 65536,
    }
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.set_pixel_data(image, "MONOCHROME2", 16)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _segmentation(images: list["Dataset"], label: np.ndarray) -> "Dataset":
    """The mask as a DICOM Segmentation (PS3.3 A.51) of the first of the images, in a series of its own."""
    import highdicom
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    first = images[0]
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="tumour",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="dldm_pipeline", version=first.SoftwareVersions, family=codes.DCM.ArtificialIntelligence
        ),
    )
    segmentation = highdicom.seg.Segmentation(
        source_images=[first],
        pixel_array=label[None],
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=generate_uid(),
        series_number=len(images) + 1,
        series_description="SYNTHETIC tumour segmentation, not for diagnosis",
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=first.Manufacturer,
        manufacturer_model_name=first.ManufacturerModelName,
        software_versions=first.SoftwareVersions,
        device_serial_number="none",
        omit_empty_frames=False,
    )
    segmentation.SyntheticData = first.SyntheticData
    segmentation.ContentQualification = first.ContentQualification
    # highdicom calls the maker of the source images their acquisition equipment; nothing was acquired.
    del segmentation.ContributingEquipmentSequence[0]
    return segmentation
