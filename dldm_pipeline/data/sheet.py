"""Contact sheets: many small images on one dark page, tumours outlined or their regions coloured."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from dldm_pipeline.data.files import atomic_write
from dldm_pipeline.data.slices import SliceDataset

BACKGROUND = (16, 16, 20)
TEXT = (210, 210, 215)
OUTLINE = (255, 80, 60)
REGIONS = {1: (230, 60, 60), 2: (80, 200, 90), 3: (250, 210, 60)}  # red core, green oedema, yellow enhancing tumour
_GAP = 3  # pixels between tiles
_TILE = 128  # tiles smaller than this are enlarged, so that outlines and text stay thin against them

Images = Sequence[Sequence[np.ndarray | None]]  # rows of images; an array (rows, n, H, W) is one, too
Masks = Sequence[np.ndarray | None]


def contact_sheet(
    images: Images,
    masks: Masks | None,
    column_names: Sequence[str],
    row_names: Sequence[str] | None,
    path: str | os.PathLike,
    outline_all: bool = False,
    labels: Masks | None = None,
) -> None:
    """Save a page of images as PNG, one row each subject and one column each modality.

    If any mask is known, a last column shows the first modality with the tumour outlined. Where its regions are known,
    they are coloured instead: necrotic core red, oedema green, enhancing tumour yellow.

    Args:
        images (`Sequence[Sequence[np.ndarray | None]]`): For each row its n images (H, W), or an array (rows, n, H, W):
            uint8, or floats with [0, 1] from black to white, clipped outside. `None` is a missing image, left empty.
        masks (`Sequence[np.ndarray | None]`, *optional*): For each row its mask (H, W), tumour above 0.5, or `None` if
            it is unknown.
        column_names (`Sequence[str]`): n names, written above the columns.
        row_names (`Sequence[str]`, *optional*): Names of the rows, written to their left.
        path (`str` or `os.PathLike`): PNG file to write.
        outline_all (`bool`, *optional*, defaults to `False`): Outline the tumour in every column.
        labels (`Sequence[np.ndarray | None]`, *optional*): For each row with a mask its labels (H, W), 0 to 3, or `None`.

    Raises:
        ValueError: If the shapes or the numbers of names do not fit together.
    """
    known = [] if masks is None else [mask for mask in masks if mask is not None]
    masks = list(masks) if known else [None] * len(images)
    columns, counts = len(column_names), sorted({len(row) for row in images})
    if counts != [columns]:
        raise ValueError(f"{columns} columns ({', '.join(column_names)}) cannot show rows of {counts} images.")
    if len(masks) != len(images) or (row_names is not None and len(row_names) != len(images)):
        names = "no" if row_names is None else len(row_names)
        raise ValueError(f"{len(images)} rows of images come with {len(masks)} masks and {names} names of rows.")
    shown = [image for row in images for image in row if image is not None]
    sizes = sorted({np.shape(image) for image in [*known, *shown]})
    if len(sizes) != 1 or len(sizes[0]) != 2 or 0 in sizes[0]:
        raise ValueError(f"images and masks must be of one size (height, width); these have {sizes}.")
    height, width = sizes[0]

    scale = max(1, round(_TILE / max(height, width)))
    tile_height, tile_width = height * scale, width * scale
    font = ImageFont.load_default(size=max(11, tile_width // 10))
    titles = [*column_names, *(["tumour"] if known else [])]
    top = font.size + 2 * _GAP
    left = _GAP + max((int(font.getlength(name)) + 2 * _GAP for name in row_names or ()), default=0)
    size = (left + len(titles) * (tile_width + _GAP), top + len(images) * (tile_height + _GAP))
    page = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(page)

    for column, title in enumerate(titles):
        middle = left + column * (tile_width + _GAP) + tile_width // 2
        draw.text((middle, top // 2), title, fill=TEXT, font=font, anchor="mm")
    labels = [None] * len(images) if labels is None else labels
    for row, (tiles, mask, regions) in enumerate(zip(images, masks, labels, strict=True)):
        y = top + row * (tile_height + _GAP)
        if row_names is not None:
            draw.text((left - 2 * _GAP, y + tile_height // 2), row_names[row], fill=TEXT, font=font, anchor="rm")
        for column in range(len(titles)):
            is_outline = column == columns
            tile = _tile(tiles[0 if is_outline else column], (tile_width, tile_height))
            if regions is not None and (is_outline or outline_all):
                regions_of_tile = np.kron(regions, np.ones((scale, scale), np.uint8))
                for value, colour in REGIONS.items():
                    tile[regions_of_tile == value] = (
                        tile[regions_of_tile == value] // 2 + np.array(colour, np.uint8) // 2
                    )
            elif mask is not None and (is_outline or outline_all):
                inside = np.kron(np.asarray(mask) > 0.5, np.ones((scale, scale), bool))
                tile[ndimage.binary_dilation(inside) & ~inside] = OUTLINE  # one pixel wide, just outside of it
            page.paste(Image.fromarray(tile), (left + column * (tile_width + _GAP), y))
    save_png(page, path)


def _tile(image: np.ndarray | None, size: tuple[int, int]) -> np.ndarray:
    """One image in grey, enlarged to (width, height), or an empty tile: uint8 (H, W, 3)."""
    if image is None:
        return np.full((*size[::-1], 3), BACKGROUND, np.uint8)
    image = np.asarray(image)
    if image.dtype != np.uint8:
        image = np.rint(np.clip(image.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    return np.repeat(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))[..., None], 3, axis=2)


def subjects_sheet(
    path: str | os.PathLike, modalities: Sequence[str], groups: Mapping[str, tuple[Images, Masks | None]]
) -> None:
    """Save a contact sheet of groups of subjects, one above the other.

        subjects_sheet("s.png", ["T1", "T2"], {"generated": (images, masks), "real": evenly_spaced_rows(data, 4)})

    Args:
        path (`str` or `os.PathLike`): PNG file to write.
        modalities (`Sequence[str]`): Names of the columns.
        groups (`Mapping[str, tuple]`): A title, such as "generated", to the group's images and masks, both as
            [`contact_sheet`] takes them. Its rows are named "generated 1", "generated 2", ...
    """
    images = [row for rows, _ in groups.values() for row in rows]
    masks = [mask for rows, masks in groups.values() for mask in ([None] * len(rows) if masks is None else masks)]
    names = [f"{title} {i + 1}" for title, (rows, _) in groups.items() for i in range(len(rows))]
    contact_sheet(images, masks, modalities, names, path)


def appearances_sheet(images: np.ndarray, modalities: Sequence[str], path: str | os.PathLike) -> None:
    """Save a contact sheet of anatomies, one a row, each in the same appearances, one a column of every modality.

    Args:
        images (`np.ndarray`): (A, K, n, H, W), A anatomies in K appearances, as [`contact_sheet`] takes them.
        modalities (`Sequence[str]`): n names.
        path (`str` or `os.PathLike`): PNG file to write.
    """
    rows = images.swapaxes(1, 2).reshape(len(images), -1, *images.shape[3:])
    columns = [f"{name}, {k + 1}" for name in modalities for k in range(images.shape[1])]
    contact_sheet(rows, None, columns, [f"anatomy {i + 1}" for i in range(len(rows))], path)


def evenly_spaced_rows(data: SliceDataset, count: int) -> tuple[Images, Masks]:
    """Images and masks of `count` evenly spaced slices of a data set, or of all, as [`contact_sheet`] takes them."""
    items = [data[i] for i in np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)]
    images = [
        [image if there else None for image, there in zip(item["images"].numpy(), item["present"], strict=True)]
        for item in items
    ]
    return images, [item["mask"].numpy() if item["has_mask"] else None for item in items]


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Save an image as PNG, complete or not at all; missing folders are made."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
