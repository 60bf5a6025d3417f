"""Contact sheets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dldm_pipeline.data.sheet import BACKGROUND, OUTLINE, REGIONS, contact_sheet, evenly_spaced_rows, subjects_sheet
from dldm_pipeline.data.slices import SliceDataset, write_slices

NAMES = ["a", "b", "c"]
TILE = 128 + 3  # images of 16 pixels are enlarged eightfold, and a gap follows each


def page(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def tile(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    """A tile counted from the lower right, (-1, -1) is the last: no names are there."""
    y, x = pixels.shape[0] + row * TILE, pixels.shape[1] + column * TILE
    return pixels[y : y + 128, x : x + 128]


def has_outline(pixels: np.ndarray) -> bool:
    return bool((pixels == OUTLINE).all(axis=-1).any())


def test_sheet_shows_images_gaps_and_outlines(tmp_path: Path) -> None:
    image, mask = np.full((16, 16), 0.5, np.float32), np.zeros((16, 16))
    mask[4:9, 4:9] = 1
    rows = [[image, None, image], [image, image, image * 10]]
    contact_sheet(rows, None, NAMES, None, tmp_path / "new" / "plain.png")
    plain = page(tmp_path / "new" / "plain.png")
    assert (tile(plain, -1, -1) == 255).all() and (tile(plain, -1, -2) == 128).all()  # clipped to white, grey
    assert (tile(plain, -2, -2) == BACKGROUND).all() and not has_outline(plain)
    contact_sheet(rows, [None, mask], NAMES, ["x", "y"], tmp_path / "one.png")
    one = page(tmp_path / "one.png")
    assert one.shape[1] > plain.shape[1] + TILE  # a column for the tumour, and names
    assert has_outline(tile(one, -1, -1)) and not has_outline(tile(one, -2, -1)) and not has_outline(tile(one, -1, -2))
    contact_sheet(rows, [None, mask], NAMES, ["x", "y"], tmp_path / "all.png", outline_all=True)
    assert has_outline(tile(page(tmp_path / "all.png"), -1, -2))
    labels = mask.astype(np.uint8)
    labels[4:6, 4:9], labels[8, 8] = 2, 3
    contact_sheet(rows, [mask, mask], NAMES, ["x", "y"], tmp_path / "regions.png", labels=[None, labels])
    regions = page(tmp_path / "regions.png")
    assert has_outline(tile(regions, -2, -1)) and not has_outline(tile(regions, -1, -1))
    for value, (y, x) in {1: (6, 4), 2: (4, 4), 3: (8, 8)}.items():
        block = tile(regions, -1, -1)[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        assert (block == 64 + np.array(REGIONS[value]) // 2).all()
    assert (tile(regions, -1, -1)[:32] == 128).all()
    contact_sheet(rows, [None, None], NAMES, None, tmp_path / "unknown.png")
    assert np.array_equal(page(tmp_path / "unknown.png"), plain)
    contact_sheet(np.stack([[image] * 3] * 2), None, NAMES, None, tmp_path / "float.png")
    contact_sheet(np.full((2, 3, 16, 16), 128, np.uint8), None, NAMES, None, tmp_path / "bytes.png")
    assert np.array_equal(page(tmp_path / "float.png"), page(tmp_path / "bytes.png"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]


@pytest.mark.parametrize(
    ("images", "masks", "names", "message"),
    [
        (np.zeros((2, 3, 16)), None, None, r"of one size \(height, width\); these have \[\(16,\)\]"),
        ([[None, None, None]], None, None, r"these have \[\]"),
        ([[np.zeros((4, 4))] * 2 + [np.zeros((4, 5))]], None, None, r"these have \[\(4, 4\), \(4, 5\)\]"),
        (np.zeros((2, 3, 4, 4)), np.zeros((2, 8, 8)), None, r"these have \[\(4, 4\), \(8, 8\)\]"),
        (np.zeros((2, 2, 4, 4)), None, None, r"3 columns \(a, b, c\) cannot show rows of \[2\] images"),
        (np.zeros((2, 3, 4, 4)), np.zeros((1, 4, 4)), ["x"], "2 rows of images come with 1 masks and 1 names"),
    ],
)
def test_sheet_refuses(tmp_path: Path, images, masks, names, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(images, masks, NAMES, names, tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []


def test_groups_of_subjects_stand_one_above_the_other(tmp_path: Path) -> None:
    images, mask = np.linspace(0, 1, 5), np.zeros((16, 16))
    mask[2:5, 2:5] = 1
    rows = [
        {"subject": f"{i}", "slice_index": 0, "a": np.full((16, 16), v), "b": None, "mask": mask if i else None}
        for i, v in enumerate(images)
    ]
    write_slices(rows, tmp_path / "data", ["a", "b"], val_fraction=0)
    found, masks = evenly_spaced_rows(SliceDataset(tmp_path / "data"), 3)
    assert [row[0][0, 0] for row in found] == pytest.approx([0, 0.5, 1], abs=1e-4)
    assert [row[1] for row in found] == [None] * 3
    assert masks[0] is None and np.array_equal(masks[2], mask)
    assert len(evenly_spaced_rows(SliceDataset(tmp_path / "data"), 9)[0]) == 5

    generated = np.full((2, 2, 16, 16), 0.25, np.float32)
    subjects_sheet(tmp_path / "s.png", ["a", "b"], {"generated": (generated, None), "real": (found, masks)})
    names = ["generated 1", "generated 2", "real 1", "real 2", "real 3"]
    contact_sheet([*generated, *found], [None, None, *masks], ["a", "b"], names, tmp_path / "same.png")
    assert np.array_equal(page(tmp_path / "s.png"), page(tmp_path / "same.png"))
    assert has_outline(tile(page(tmp_path / "s.png"), -1, -1)) and (tile(page(tmp_path / "s.png"), -4, -2) == 64).all()
