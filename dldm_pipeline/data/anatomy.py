"""The anatomy of simulated subjects: a three-dimensional description that any slice is cut from.

The atlas (`atlas.py`) is turned, scaled and bent by one smooth warp; lesions are bodies with a distance to their surface,
and vessels are tubes. Coordinates are millimetres in the scanner: x to the right of the atlas, y to the front, z up.
"""

import hashlib
from functools import lru_cache

import numpy as np
from scipy import ndimage

from dldm_pipeline.data.atlas import WHOLE_BRAIN, distance, interpolate, load_atlas
from dldm_pipeline.data.mr_signal import TISSUES

# Anatomy is computed on about this many pixels across, then averaged down: anti-aliased, and alike at every size.
_SUPERSAMPLED = 256
EXTENT = np.array([96.0, 114.0, 98.0])  # mm: half of the box that holds every subject, around `_CENTRE`
_CENTRE = np.array([0.0, -17.0, 5.0])  # MNI coordinates of the scanner's middle
_BOX_MARGIN = 1.04  # field of view over the brain's longest side, as real scans are cut (`volumes.py`)
_PATH_STEP = 0.8  # mm between the points of a vessel
_VESSEL_BANK = 1500  # vessels traced in the atlas; each subject has some of them


def entropy(seed: int | tuple[int, ...]) -> list[int]:
    """What a random generator takes for a seed: different for every integer and every tuple, which NumPy's own is not."""
    return list(hashlib.sha256(repr(seed).encode()).digest())


class SmoothField:
    """Random smooth fields in space: cubic B-splines with random coefficients, about unit variance.

    Args:
        rng: where the coefficients come from.
        number: how many fields.
        distance: mm between the knots, about the size of the fields' features.
    """

    def __init__(self, rng: np.random.Generator, number: int, distance: float) -> None:
        self.distance = distance
        self.first = -EXTENT - distance
        shape = np.ceil(2 * EXTENT / distance).astype(int) + 4
        # 0.332: standard deviation of a cubic B-spline surface in three dimensions with unit coefficients.
        self.coefficients = rng.standard_normal((number, *shape[::-1]), dtype=np.float32) / np.float32(0.332)

    def _basis(self, at: np.ndarray, axis: int) -> np.ndarray:
        knots = np.arange(self.coefficients.shape[3 - axis])
        t = np.abs((np.atleast_1d(at)[:, None] - self.first[axis]) / self.distance - knots)
        return np.where(t < 1, 2 / 3 - t * t * (1 - t / 2), np.maximum(2 - t, 0) ** 3 / 6).astype(np.float32)

    def slice(self, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
        """Values (number, len(y), len(x)) in the plane at height z."""
        weights = self._basis(z, 2)[0]
        near = np.flatnonzero(weights)
        plane = np.tensordot(weights[near], self.coefficients[:, near], axes=(0, 1))
        return self._basis(y, 1) @ plane @ self._basis(x, 0).T

    def points(self, at: np.ndarray) -> np.ndarray:
        """Values (number, N) at points (N, 3)."""
        x, y, z = (self._basis(at[:, axis], axis) for axis in range(3))
        plane = np.einsum("nkji,pi->nkjp", self.coefficients, x, optimize=True)
        return np.einsum("nkjp,pj,pk->np", plane, y, z)

    def grid(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Values (number, len(x), len(y), len(z))."""
        by = (self._basis(z, 2), self._basis(y, 1), self._basis(x, 0))
        return np.einsum("nkji,zk,yj,xi->nxyz", self.coefficients, *by, optimize=True)


@lru_cache(maxsize=1)
def _landmarks() -> dict[str, np.ndarray]:
    """What is looked up in the atlas once: MNI coordinates of its surface, of places for lesions, and of vessels.

    Returns:
        surface: (N, 3) points on the brain's surface.
        inside: (N, 3) points all over the brain.
        places: (N, 4) points in white or grey matter, and the mm to the nearest large fluid space or the surface.
        vessels: (V, P, 3) paths, `_PATH_STEP` mm a step.
        sinus: (P, 3) path of the superior sagittal sinus, from the front to the back.
        choroid: (N, 3) points in the atria of the lateral ventricles, where the choroid plexus lies.
    """
    maps, origin = load_atlas(WHOLE_BRAIN)
    fluid, depth = maps[..., 0], maps[..., 2]
    rng = np.random.default_rng(0)

    def some(where: np.ndarray, number: int) -> np.ndarray:
        found = np.flatnonzero(where)
        found = found[rng.choice(len(found), min(number, len(found)), replace=False)]
        return np.column_stack(np.unravel_index(found, where.shape))

    surface = some((depth > 0) & (depth < 1), 2000) + origin
    pools = ndimage.gaussian_filter(fluid, 2.0) > 0.4
    room = distance(~pools & (depth > 2))
    roomy = some((room > 3) & (np.arange(depth.shape[2]) + origin[2] > -45), 12000)
    places = np.column_stack([roomy + origin, room[tuple(roomy.T)]])

    # Vessels of the sulci: all at once, one step after another towards the deepest fluid ahead.
    only_fluid = ndimage.gaussian_filter(np.clip(fluid, -1, 2), 0.7)[..., None]
    seeds = some((only_fluid[..., 0] > 0.1) & (depth > 1) & (depth < 30) & (maps[..., 3] > 6), _VESSEL_BANK)
    at, heading = seeds.astype(float), rng.normal(size=(len(seeds), 3))
    path = [at]
    for _ in range(30):
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        ahead = heading + 0.45 * rng.normal(size=(7, *heading.shape))
        ahead /= np.linalg.norm(ahead, axis=2, keepdims=True)
        found = interpolate(only_fluid, (at + 2 * ahead).reshape(-1, 3).T).reshape(7, -1)
        heading = np.take_along_axis(ahead, found.argmax(0)[None, :, None], 0)[0]
        at = at + _PATH_STEP * heading
        path.append(at)
    vessels = np.stack(path, 1) + origin

    # The sinus: along the upper edge of the middle plane, in equal steps.
    middle = depth[int(-origin[0])] > 0
    top = middle.shape[1] - 1 - middle[:, ::-1].argmax(1)
    edge = np.flatnonzero(middle.any(1) & (top + origin[2] > -8))[::-1]
    edge = np.column_stack([edge, top[edge]]) + origin[1:]
    length = np.concatenate([[0], np.linalg.norm(np.diff(edge, axis=0), axis=1).cumsum()])
    steps = np.arange(0, length[-1], _PATH_STEP)
    sinus = np.column_stack([0 * steps, *(np.interp(steps, length, axis) for axis in edge.T)])
    y = (np.arange(depth.shape[1]) + origin[1])[:, None]
    choroid = some((maps[..., 3] < 0) & (y > -46) & (y < -26), 300) + origin
    # The first of them are those near the middle of their side: a plexus, however many a subject has.
    right = choroid[:, :1] > 0
    middle = np.where(right, np.median(choroid[right[:, 0]], 0), np.median(choroid[~right[:, 0]], 0))
    choroid = choroid[np.linalg.norm(choroid - middle, axis=1).argsort()]
    inside = some(depth > 2, 300) + origin
    return {"surface": surface, "inside": inside, "places": places, "vessels": vessels, "sinus": sinus,
            "choroid": choroid}  # fmt: skip


class Anatomy:
    """One subject's head: everything but how it is imaged.

    Args:
        seed: non-negative integer, or a tuple of them.
        tumour: whether it has lesions.

    Attributes:
        factors: name -> number drawn.
        bottom, top: z in mm of the brain's lowest and highest point.
        field_of_view: side in mm of the square that is imaged, the same for all slices.
        inside: (N, 3) points all over the brain.
        lesions: one dictionary a lesion: centre (3,), radius in mm, and its shape.
    """

    def __init__(self, seed: int | tuple[int, ...], tumour: bool = True) -> None:
        frame, details, lesions, vessels = (
            np.random.default_rng(s) for s in np.random.SeedSequence(entropy(seed), spawn_key=(0,)).spawn(4)
        )
        self.factors: dict[str, float] = {}
        self.maps, self.origin = load_atlas(WHOLE_BRAIN)
        self._place_frame(frame)
        self.ripples = SmoothField(details, 4, 6.0)
        self.patches = SmoothField(details, 3, 16.0)
        marks = _landmarks()
        surface = self._from_atlas(marks["surface"])
        low, high = surface.min(0), surface.max(0)
        self.bottom, self.top = float(low[2]), float(high[2])
        self.middle = (low + high) / 2
        self.field_of_view = float(_BOX_MARGIN * max(high[:2] - low[:2]))
        self.factors.update(bottom_mm=self.bottom, top_mm=self.top, field_of_view_mm=self.field_of_view)
        self.inside = self._from_atlas(marks["inside"])
        self.lesions = self._place_lesions(lesions, marks["places"]) if tumour else []
        self.factors["lesions"] = len(self.lesions)
        self._place_vessels(vessels, marks)

    def _place_frame(self, rng: np.random.Generator) -> None:
        angles = rng.normal(0, [7.0, 2.5, 3.0])  # degrees about x, y and z
        flip = rng.choice([-1.0, 1.0])
        stretch = rng.normal(1, [0.035, 0.035, 0.04])
        (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))
        turn = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        turn = (
            turn @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]) @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        )
        self.matrix = np.diag([flip, 1, 1]) @ turn / stretch  # scanner to atlas
        self.warps = [(SmoothField(rng, 3, 40.0), 3.2), (SmoothField(rng, 3, 18.0), 1.3)]
        self.fluid_bias, self.white_bias = rng.normal(-1.4, 0.35), rng.normal(-0.15, 0.2)
        self.ventricle_growth = 3.5 * rng.beta(1.2, 2)  # mm
        for name, value in zip(("tilt_x_deg", "tilt_y_deg", "turn_deg"), angles, strict=True):
            self.factors[name] = float(value)
        for name, value in zip(("width", "length", "height"), stretch, strict=True):
            self.factors[f"relative_{name}"] = float(value)
        self.factors.update(
            flipped=float(flip < 0), fluid_bias=self.fluid_bias, white_bias=self.white_bias,
            ventricle_growth_mm=self.ventricle_growth,
        )  # fmt: skip
        # The warp on a coarse grid: to keep it from folding, and to invert it.
        self.axes = [np.arange(-extent, extent + 1, 9.0) for extent in EXTENT]
        self.shift = sum(std * field.grid(*self.axes) for field, std in self.warps)
        slopes = [np.gradient(s, 9.0) for s in self.shift]
        self.strength = 1.0
        while _determinant(slopes, self.strength).min() < 0.35:
            self.strength *= 0.85
        self.shift = np.ascontiguousarray(np.moveaxis(self.strength * self.shift, 0, -1), dtype=np.float32)

    def _from_atlas(self, points: np.ndarray) -> np.ndarray:
        """Scanner coordinates of MNI points (N, 3), by fixed-point iteration."""
        goal = (points - _CENTRE) @ np.linalg.inv(self.matrix).T
        at = goal
        for _ in range(3):
            at = goal - interpolate(self.shift, ((at - [axis[0] for axis in self.axes]) / 9.0).T)
        return at

    def _place_lesions(self, rng: np.random.Generator, places: np.ndarray) -> list[dict]:
        """Either one large infiltrating lesion or one to five small ones."""
        large = rng.random() < 0.6
        count = 1 if large else int(rng.choice([1, 2, 3, 4, 5], p=[0.35, 0.28, 0.18, 0.12, 0.07]))
        radii = [rng.uniform(12, 29)] if large else np.clip(rng.lognormal(np.log(7), 0.4, count), 4.5, 14.0)
        lesions: list[dict] = []
        self.factors["large_lesion"] = float(large)
        for number, radius in enumerate(np.sort(radii)[::-1], start=1):
            weight = np.where(places[:, 3] > min(0.6 * radius, 0.9 * places[:, 3].max()), 1.0, 0.0)
            for other in lesions:
                apart = np.linalg.norm(places[:, :3] - other["place"], axis=1)
                weight *= apart > other["radius"] + radius + 4
            if not weight.any():
                continue
            place = places[rng.choice(len(places), p=weight / weight.sum()), :3]
            radius = float(radius)
            lesion = {
                "place": place,
                "centre": self._from_atlas(place[None])[0],
                "radius": radius,
                "stretch": np.exp(rng.normal(0, 0.16 if large else 0.08, 3)),
                "ragged": rng.uniform(0.1, 0.28) * radius if large else rng.uniform(0.3, 1.0),
                "enhances": rng.random() < (0.75 if large else 1.0),
                "solid": rng.random() < (0.15 if radius > 6 else 0.8),
                "rim": max(rng.uniform(0.08, 0.3) * radius, 1.8),
                "gaps": rng.uniform(0.5, 1.2) if large else 0.4,
                "septa": rng.uniform(-0.1, 0.25) if large else 0.0,
                "reach": rng.uniform(3, 20) if large else radius * rng.uniform(0.2, 1.5) + 2,
                "wetness": rng.uniform(0.85, 1.0),
                "push": rng.uniform(0.2, 0.6) if rng.random() < (0.7 if large else 0.3) else 0.0,
                "necrosis": rng.uniform(0.4, 1.0),
            }
            lesions.append(lesion)
            for name in ("radius", "rim", "reach"):
                self.factors[f"lesion_{number}_{name}_mm"] = lesion[name]
            self.factors[f"lesion_{number}_push"] = lesion["push"]
            self.factors[f"lesion_{number}_height"] = self.relative_height(lesion["centre"][2])
        return lesions

    def _place_vessels(self, rng: np.random.Generator, marks: dict[str, np.ndarray]) -> None:
        bank, sinus = marks["vessels"], marks["sinus"]
        count = int(rng.integers(120, 350))
        self.factors["vessels"] = count
        chosen = bank[rng.choice(len(bank), count, replace=False)]
        lengths = rng.integers(3, chosen.shape[1] + 1, count)
        radii = rng.uniform(0.4, 1.1, count)
        kept = np.arange(chosen.shape[1]) < lengths[:, None]
        size = np.linspace(rng.uniform(0.8, 1.6), rng.uniform(2.6, 4.4), len(sinus))
        choroid = marks["choroid"][: rng.integers(20, 120)]
        self.vessel_points = self._from_atlas(np.concatenate([chosen[kept], sinus, choroid]))
        self.vessel_radii = np.concatenate(
            [np.broadcast_to(radii[:, None], kept.shape)[kept], size, rng.uniform(0.6, 1.6, len(choroid))]
        )

    def level(self, height: float) -> float:
        """z in mm of a relative height."""
        return self.bottom + height * (self.top - self.bottom)

    def relative_height(self, z: float) -> float:
        """The relative height of a level in mm."""
        return float((z - self.bottom) / (self.top - self.bottom))

    def pixel_axes(self, pixels: int) -> tuple[np.ndarray, np.ndarray]:
        """x of the columns and y of the rows, in mm; row 0 is the forehead."""
        offset = ((np.arange(pixels) + 0.5) / pixels - 0.5) * self.field_of_view
        return np.float32(self.middle[0] + offset), np.float32(self.middle[1] - offset)

    def cut(self, height: float, size: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
        """The slice at a relative height.

        Returns:
            tissues: name in `TISSUES` -> (size, size) float32 partial-volume fraction.
            textures: tissue -> (size, size) float32 factor around 1; `"iron"`: how much of the grey matter is nuclei.
            labels: (size, size) uint8.
        """
        pixels = size * max(1, round(_SUPERSAMPLED / size))
        x, y = self.pixel_axes(pixels)
        z = self.level(height)
        ripples, patches = self.ripples.slice(x, y, z), self.patches.slice(x, y, z)
        where = sum(np.float32(std * self.strength) * field.slice(x, y, z) for field, std in self.warps)
        for lesion in self.lesions:
            if lesion["push"]:
                dx, dy, dz = (a - c for a, c in zip((x, y[:, None], z), lesion["centre"], strict=True))
                wide = 1.8 * lesion["radius"]
                pull = np.float32(lesion["push"]) * np.exp(-(dx * dx + dy * dy + dz * dz) / np.float32(wide**2))
                where[0] -= dx * pull
                where[1] -= dy * pull
                where[2] -= np.float32(dz) * pull
        where[0] += x
        where[1] += y[:, None]
        where[2] += np.float32(z)
        voxels = self.matrix.astype(np.float32) @ where.reshape(3, -1)
        voxels += np.float32(_CENTRE - self.origin)[:, None]
        near = self._near_brain(voxels.reshape(where.shape)).ravel()
        sampled = np.full((4, pixels * pixels), np.float32(-9))
        sampled[:, near] = interpolate(self.maps, voxels[:, near]).T
        fluid, matter, depth, away = sampled.reshape(4, pixels, pixels)
        fluid = np.maximum(fluid + np.float32(self.fluid_bias) + 0.25 * ripples[0], self.ventricle_growth - away)
        csf = sigmoid(1.7 * fluid)
        white = (1 - csf) * sigmoid(1.9 * (matter + np.float32(self.white_bias) + 0.2 * ripples[1]))
        tissues = {"white": white, "grey": 1 - csf - white, "csf": csf}
        enhancing, necrosis, healthy = self._lesion_fractions(x, y, z, depth, away, ripples, patches)
        core = enhancing + necrosis
        vessel = self._vessel_fraction(x, y, z) * (1 - core)
        for name in tissues:
            tissues[name] = tissues[name] * (1 - core - vessel)
        # Oedema spreads along white matter and hardly enters the cortex.
        swollen = 1 - healthy
        oedema = swollen * (tissues["white"] + 0.35 * tissues["grey"])
        tissues["white"] = tissues["white"] * healthy
        tissues["grey"] = tissues["grey"] * (1 - 0.35 * swollen)
        tissues.update(enhancing=enhancing, necrosis=necrosis, oedema=oedema, vessel=vessel)
        edge = sigmoid((depth - 0.8 + 0.5 * ripples[3]) / 0.3)
        tissues = {name: shrink((tissues[name] * edge).astype(np.float32), size) for name in TISSUES}
        brain = sum(tissues.values())
        inside = brain >= 0.5
        for name in tissues:
            tissues[name] *= inside
        textures = {
            "white": shrink(1 + 0.015 * ripples[2] + 0.04 * patches[2], size),
            "grey": shrink(1 + 0.02 * ripples[3] + 0.03 * patches[2], size),
            "csf": shrink(1 + 0.06 * ripples[1] + 0.06 * patches[0], size),
            "enhancing": shrink(1 + 0.15 * ripples[2] + 0.12 * patches[1], size),
            "oedema": shrink(1 + 0.05 * ripples[3] + 0.04 * patches[1], size),
            "necrosis": shrink(1 + 0.12 * ripples[0] + 0.12 * patches[0], size),
            "iron": shrink(sigmoid((depth - 36) / 4), size),
        }
        labels = np.where(tissues["oedema"] >= 0.4, 2, 0)
        dead, living = tissues["necrosis"], tissues["enhancing"]
        labels = np.where(dead + living >= 0.5, np.where(living >= dead, 3, 1), labels) * inside
        return tissues, textures, labels.astype(np.uint8)

    def _near_brain(self, voxels: np.ndarray) -> np.ndarray:
        """Which pixels may show brain: blocks of 4 x 4 whose middle is less than 6 mm away from it."""
        corner = np.rint(voxels[:, 2::4, 2::4]).astype(int)
        last = np.array(self.maps.shape[:3])[:, None, None] - 1
        depth = self.maps[(*np.clip(corner, 0, last), 2)] - np.abs(corner - np.clip(corner, 0, last)).max(0)
        near = np.repeat(np.repeat(depth > -6, 4, 0), 4, 1)
        height, width = voxels.shape[1:]
        return np.pad(near, ((0, max(0, height - len(near))), (0, max(0, width - near.shape[1]))), "edge")[
            :height, :width
        ]

    def _lesion_fractions(
        self, x: np.ndarray, y: np.ndarray, z: float, depth: np.ndarray, away: np.ndarray, ripples: np.ndarray,
        patches: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """Enhancing and necrotic fractions, and what oedema leaves of white matter."""
        enhancing, necrosis, healthy = np.zeros_like(depth), np.zeros_like(depth), np.ones_like(depth)
        for lesion in self.lesions:
            radius, ragged = lesion["radius"], lesion["ragged"]
            extent = 2.2 * radius + 2 * lesion["reach"] + 8
            cx, cy, cz = lesion["centre"]
            if abs(z - cz) > extent:
                continue
            window = (
                slice(*np.searchsorted(-y, (-cy - extent, -cy + extent))),
                slice(*np.searchsorted(x, (cx - extent, cx + extent))),
            )
            sx, sy, sz = lesion["stretch"]
            dx, dy = (x[window[1]] - cx) / sx, (y[window[0], None] - cy) / sy
            distance = np.sqrt(dx * dx + dy * dy + ((z - cz) / sz) ** 2, dtype=np.float32)
            coarse, other = patches[0][window], patches[1][window]
            fine, grain = ripples[2][window], ripples[1][window]
            outside = distance - radius + np.float32(ragged) * np.clip(coarse, -2, 2) + np.float32(0.35 * ragged) * fine
            # A tumour grows round the ventricles and stops at the surface.
            outside = np.maximum(outside, np.maximum(1.5 - away[window], 2.0 - depth[window]))
            core = sigmoid(-outside / 0.4)
            # The rim is broken where its thickness is negative; membranes of living tumour cross what is dead.
            rim = np.float32(lesion["rim"]) * (1 + np.float32(lesion["gaps"]) * np.tanh(1.3 * other)) + 0.5 * grain
            if lesion["solid"]:
                rim = rim + np.float32(radius)
            dead = core * sigmoid((-outside - rim) / 0.5)
            if lesion["septa"] > 0:
                dead *= sigmoid((np.abs(ripples[0][window]) - np.float32(lesion["septa"])) / 0.08)
            if not lesion["enhances"]:
                dead = core
            reach = np.float32(lesion["reach"])
            fingers = 0.35 * reach * other + 1.6 * fine + 1.0 * grain
            wet = np.float32(lesion["wetness"]) * sigmoid((reach + fingers - outside) / 1.2)
            enhancing[window] = np.maximum(enhancing[window], core - dead)
            necrosis[window] = np.maximum(necrosis[window], dead)
            healthy[window] *= 1 - wet
        total = np.maximum(enhancing + necrosis, 1)
        return enhancing / total, necrosis / total, healthy

    def _vessel_fraction(self, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
        """Fraction of blood, from the points of the vessels' paths as balls."""
        canvas = np.zeros((len(y), len(x)), dtype=np.float32)
        across = self.vessel_radii**2 - (self.vessel_points[:, 2] - z) ** 2
        near = np.flatnonzero(across > 0)
        pixel = self.field_of_view / len(x)
        column = (self.vessel_points[near, 0] - x[0]) / pixel
        row = (y[0] - self.vessel_points[near, 1]) / pixel
        radius = np.sqrt(across[near]) / pixel
        reach = int(np.ceil(radius.max(initial=0))) + 1
        steps = np.arange(-reach, reach + 1)
        rows, columns = np.rint(row).astype(int)[:, None] + steps, np.rint(column).astype(int)[:, None] + steps
        distance = np.hypot((rows - row[:, None])[:, :, None], (columns - column[:, None])[:, None, :])
        cover = np.clip(radius[:, None, None] + 0.5 - distance, 0, 1).astype(np.float32)
        valid = (
            (rows >= 0)[:, :, None]
            & (rows < len(y))[:, :, None]
            & (columns >= 0)[:, None]
            & (columns < len(x))[:, None]
        )
        flat = rows[:, :, None] * len(x) + columns[:, None]
        np.maximum.at(canvas.reshape(-1), flat[valid], cover[valid])
        return canvas


def _determinant(slopes: list[list[np.ndarray]], strength: float) -> np.ndarray:
    """Determinant of the Jacobian of x + strength * shift(x), from the gradients of the shift's components."""
    a, b, c = ([strength * slope + (i == j) for j, slope in enumerate(row)] for i, row in enumerate(slopes))
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Mean over blocks of pixels, down to size x size."""
    block = image.shape[0] // size
    rows = sum(image[i::block] for i in range(block))
    return sum(rows[:, i::block] for i in range(block)) / np.float32(block**2)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function in float32."""
    return np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.5) * x, dtype=np.float32)
