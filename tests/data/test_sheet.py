"""Contact sheets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dldm_pipeline.data.sheet import OUTLINE, contact_sheet


def has_outline(path: Path) -> bool:
    return bool((np.asarray(Image.open(path)) == OUTLINE).all(axis=-1).any())


def test_sheet_shows_every_tile_and_the_outline(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 16, 20), np.float32)
    images[1, 2] = 5  # clipped to white
    images[0, 1] = np.nan
    masks = np.zeros((2, 16, 20))
    contact_sheet(images, None, ["a", "b", "c"], None, tmp_path / "new" / "plain.png")
    plain = np.asarray(Image.open(tmp_path / "new" / "plain.png"))
    assert plain[-20, -20].tolist() == [255, 255, 255] and not has_outline(tmp_path / "new" / "plain.png")
    contact_sheet(images, masks, ["a", "b", "c"], ["x", "y"], tmp_path / "empty.png")
    assert not has_outline(tmp_path / "empty.png")
    masks[0, 4:9, 4:9] = 1
    contact_sheet(images, masks, ["a", "b", "c"], ["x", "y"], tmp_path / "full.png")
    assert has_outline(tmp_path / "full.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "full.png", "new"]


@pytest.mark.parametrize(
    ("shape", "mask_shape", "columns", "message"),
    [
        ((2, 16, 16), None, 2, r"images has shape \(2, 16, 16\)"),
        ((2, 2, 16, 16), (2, 8, 8), 2, r"masks has shape \(2, 8, 8\)"),
        ((2, 2, 16, 16), None, 3, "2 columns and 2 rows of images, but 3 and None names"),
    ],
)
def test_sheet_refuses(tmp_path: Path, shape: tuple, mask_shape: tuple | None, columns: int, message: str) -> None:
    masks = None if mask_shape is None else np.zeros(mask_shape)
    with pytest.raises(ValueError, match=message):
        contact_sheet(np.zeros(shape), masks, ["m"] * columns, None, tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []
