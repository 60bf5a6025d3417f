"""Contact sheets: many small images on one dark page, tumours outlined."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

BACKGROUND = (16, 16, 20)
TEXT = (210, 210, 215)
OUTLINE = (255, 80, 60)
_GAP = 3  # pixels between tiles
_TILE = 128  # tiles smaller than this are enlarged, so that outlines and text stay thin against them


def contact_sheet(
    images: np.ndarray,
    masks: np.ndarray | None,
    column_names: Sequence[str],
    row_names: Sequence[str] | None,
    path: str | os.PathLike,
    outline_all: bool = False,
) -> None:
    """Draw a page of images, one row each subject and one column each modality, and save it as PNG.

    With `masks`, a last column shows the first modality with the tumour outlined.

    Args:
        images (`np.ndarray`): (rows, n, H, W), grey values; [0, 1] is black to white, what lies outside is clipped. NaN
            stands for a missing image and stays empty.
        masks (`np.ndarray`, *optional*): (rows, H, W); above 0.5 is tumour.
        column_names (`Sequence[str]`): n names, written above the columns.
        row_names (`Sequence[str]`, *optional*): Names of the rows, written to their left.
        path (`str` or `os.PathLike`): PNG file to write. It is written under another name first and then renamed.
        outline_all (`bool`, *optional*, defaults to `False`): Outline the tumour in every column.

    Raises:
        ValueError: If the shapes or the numbers of names do not fit together.
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images has shape {images.shape}; a contact sheet needs (rows, columns, height, width).")
    rows, columns, height, width = images.shape
    if len(column_names) != columns or (row_names is not None and len(row_names) != rows):
        names = len(column_names), None if row_names is None else len(row_names)
        raise ValueError(f"{columns} columns and {rows} rows of images, but {names[0]} and {names[1]} names for them.")
    if masks is not None and np.shape(masks) != (rows, height, width):
        raise ValueError(f"masks has shape {np.shape(masks)}; with these images it must be {(rows, height, width)}.")

    scale = max(1, round(_TILE / max(height, width)))
    tile_height, tile_width = height * scale, width * scale
    font = ImageFont.load_default(size=max(11, tile_width // 10))
    titles = list(column_names) + (["tumour"] if masks is not None else [])
    top = font.size + 2 * _GAP
    left = _GAP + max((int(font.getlength(name)) + 2 * _GAP for name in row_names or ()), default=0)
    size = (left + len(titles) * (tile_width + _GAP), top + rows * (tile_height + _GAP))
    page = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(page)

    for column, title in enumerate(titles):
        middle = left + column * (tile_width + _GAP) + tile_width // 2
        draw.text((middle, top // 2), title, fill=TEXT, font=font, anchor="mm")
    for row in range(rows):
        y = top + row * (tile_height + _GAP)
        if row_names is not None:
            draw.text((left - 2 * _GAP, y + tile_height // 2), row_names[row], fill=TEXT, font=font, anchor="rm")
        for column in range(len(titles)):
            is_outline = column == columns
            image = images[row, 0 if is_outline else column]
            tile = _tile(image, masks[row] if masks is not None and (is_outline or outline_all) else None, scale)
            page.paste(tile, (left + column * (tile_width + _GAP), y))
    save_png(page, path)


def _tile(image: np.ndarray, mask: np.ndarray | None, scale: int) -> Image.Image:
    """One image in grey, enlarged, with the mask's outline drawn one pixel wide just outside of it."""
    empty = np.isnan(image)
    grey = Image.fromarray(np.rint(np.clip(np.where(empty, 0, image), 0, 1) * 255).astype(np.uint8))
    size = (grey.width * scale, grey.height * scale)
    pixels = np.repeat(np.asarray(grey.resize(size, Image.Resampling.BICUBIC))[..., None], 3, axis=2)
    if empty.all():
        pixels[:] = BACKGROUND
    if mask is not None:
        inside = np.kron(np.asarray(mask) > 0.5, np.ones((scale, scale), bool))
        pixels[ndimage.binary_dilation(inside) & ~inside] = OUTLINE
    return Image.fromarray(pixels)


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Save an image as PNG under a temporary name and rename it, so that no half-written file is ever seen.

    Args:
        image (`PIL.Image.Image`): Image to save.
        path (`str` or `os.PathLike`): File to write; missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG")
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
