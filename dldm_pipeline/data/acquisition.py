"""The scanner behind simulated images: field strength, sequences, coil, noise, point spread, window and intensity curve.

All sequences of one acquisition come from one scanner: they share its field, tissue values, contrast agent and coil. Tissue
values at 3 T and the signal equations are those of `mr_signal.py`. T1 grows with the field as its power 0.39 (white matter),
0.38 (grey matter) and 0.34 (blood): Rooney et al., MRM 57 (2007) 308. How window and curve scatter is fitted to 21 real
subjects (`benchmarks/simulation.py`).
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from dldm_pipeline.data.anatomy import Anatomy, SmoothField, entropy
from dldm_pipeline.data.mr_signal import TISSUE_VALUES, TISSUES, signal

_FIELD_POWER = {
    "white": 0.39,
    "grey": 0.38,
    "csf": 0.0,
    "vessel": 0.34,
    "oedema": 0.3,
    "enhancing": 0.3,
    "necrosis": 0.15,
}

_VALUES = TISSUE_VALUES | {"oedema": (1450.0, 148.0, 0.87, 0.02), "enhancing": (1600.0, 138.0, 0.85, 0.38)}

# Lowest and highest of the protocols in use: times in ms, flip angle in degrees. A sequence with two entries is drawn as
# one of them, a spin echo or a gradient echo (prepared by an inversion for T1). `flow`: see `mr_signal.py`.
_PROTOCOLS = {
    "T1": (
        dict(kind="spin echo", TR=(450, 700), TE=(8, 17), contrast=False, flow=0.45),
        dict(kind="inversion recovery", TR=(1700, 2300), TE=(2, 5), TI=(850, 1100), contrast=False, flow=0.8),
    ),
    "T2": (dict(kind="spin echo", TR=(3500, 6000), TE=(85, 115), contrast=False, flow=0.4),),
    "FLAIR": (dict(kind="inversion recovery", TR=(8000, 10000), TE=(90, 140), TI=(2200, 2600), contrast=False, flow=0.4),),
    "WB": (
        dict(kind="gradient echo", TR=(6, 11), TE=(2.5, 5), flip=(12, 20), contrast=True, flow=1.0),
        dict(kind="spin echo", TR=(450, 700), TE=(8, 15), contrast=True, flow=0.8),
    ),
    "BB": (dict(kind="spin echo", TR=(500, 650), TE=(10, 18), contrast=True, flow=0.04),),
}  # fmt: skip
SEQUENCES = tuple(_PROTOCOLS)

# The window of a volume goes from `bottom` times the darkest of white matter, grey matter and fluid to `top` times the
# brightest of the tissues `under` it; `curve` is the exponent that follows. Mean and standard deviation, of the logarithm
# for `top` and `curve`. The top of FLAIR hangs on oedema, the brightest tissue there.
_HEALTHY = ("white", "grey", "csf")
_WINDOWS = {
    "T1": dict(bottom=(0.67, 0.36), top=(0.46, 0.19), curve=(-0.41, 0.21), under=_HEALTHY),
    "T2": dict(bottom=(0.05, 0.2), top=(0.22, 0.07), curve=(0.15, 0.32), under=_HEALTHY),
    "FLAIR": dict(bottom=(0.5, 0.1), top=(0.26, 0.11), curve=(-0.2, 0.25), under=("oedema",)),
    "WB": dict(bottom=(0.38, 0.35), top=(0.93, 0.36), curve=(-0.09, 0.12), under=_HEALTHY),
    "BB": dict(bottom=(0.38, 0.3), top=(0.85, 0.3), curve=(-0.09, 0.12), under=_HEALTHY),
}
# Correlation of two sequences' tops, of their curves and of their bottoms: T1, T2, FLAIR, WB, BB.
_CORRELATION = np.array(
    [
        [1.00, 0.30, 0.85, 0.52, 0.47],
        [0.30, 1.00, 0.34, 0.86, 0.78],
        [0.85, 0.34, 1.00, 0.66, 0.60],
        [0.52, 0.86, 0.66, 1.00, 0.90],
        [0.47, 0.78, 0.60, 0.90, 1.00],
    ]
)
_BLUR = {"T1": 1.8, "T2": 1.05, "FLAIR": 1.4, "WB": 1.35, "BB": 1.35}  # of a sequence, relative to the scanner's
_OWN_SHADING = 0.8  # of a sequence, relative to the shading that all share
_MIXING = np.linalg.cholesky(_CORRELATION)


@dataclass
class Acquisition:
    """One scanner with its five sequences.

    Attributes:
        values: tissue -> T1 and T2 in ms, relative proton density, contrast agent in mmol/l.
        signals: sequence -> tissue -> signal, before coil, noise and window.
        windows: sequence -> (low, high, exponent): a signal s becomes ((s - low) / (high - low)) ** exponent.
        point_spread: sequence -> standard deviation in mm.
        noise: sequence -> standard deviation as a part of the window.
        coil: fields of the coil: one common to all, then one a sequence.
        coil_strength: standard deviation of the common field's logarithm.
        factors: name -> number drawn.
    """

    values: dict[str, tuple[float, ...]]
    signals: dict[str, dict[str, float]]
    windows: dict[str, tuple[float, float, float]]
    point_spread: dict[str, float]
    noise: dict[str, float]
    coil: SmoothField
    coil_strength: float
    factors: dict[str, float] = field(default_factory=dict)

    def tissue_means(self, name: str) -> dict[str, float]:
        """Where each pure tissue lies in the window of a sequence, in [0, 1]."""
        low, high, exponent = self.windows[name]
        return {t: float(np.clip((s - low) / (high - low), 0, 1) ** exponent) for t, s in self.signals[name].items()}


def sample_acquisition(seed: int | tuple[int, ...]) -> Acquisition:
    """Draws a scanner. The same seed gives the same one, whatever the anatomy."""
    # Other streams than an anatomy of the same seed has.
    rng, coil_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(entropy(seed), spawn_key=(1,)).spawn(2))
    factors: dict[str, float] = {}

    strong = rng.random() < 0.6
    factors["field_T"] = 3.0 if strong else 1.5
    agent = float(np.exp(rng.normal(-0.3, 0.2)))  # dose and delay after injection
    values = {}
    for tissue, mean in _VALUES.items():
        std = (0.05, 0.05, 0.02, 0.2) if tissue in ("oedema", "enhancing", "necrosis") else (0.04, 0.05, 0.01, 0.05)
        t1, t2, density, uptake = (
            m * np.clip(rng.normal(1, s), 1 - 2.5 * s, 1 + 2.5 * s) for m, s in zip(mean, std, strict=True)
        )
        values[tissue] = (t1 * (factors["field_T"] / 3) ** _FIELD_POWER[tissue], t2, density, uptake * agent)
        for key, value in zip(("T1_ms", "T2_ms", "PD", "agent_mM"), values[tissue], strict=True):
            factors[f"{tissue}_{key}"] = float(value)

    scatter = np.clip(_MIXING @ rng.standard_normal((len(SEQUENCES), 3)), -2.2, 2.2)
    base_noise, base_spread = np.exp(rng.normal(np.log(0.009), 0.4)), rng.uniform(0.45, 0.95)
    signals, windows, noise, spread = {}, {}, {}, {}
    for (name, protocols), (wide, bent, dark) in zip(_PROTOCOLS.items(), scatter, strict=True):
        protocol = dict(protocols[int(rng.random() * len(protocols))])
        for key in ("TR", "TE", "TI", "flip"):
            if key in protocol:
                protocol[key] = rng.uniform(*protocol[key])
                factors[f"{name}_{key}"] = float(protocol[key])
        factors[f"{name}_gradient_echo"] = float(
            protocol["kind"] == "gradient echo" or name == "T1" and "TI" in protocol
        )
        signals[name] = {tissue: signal(protocol, tissue, *values[tissue]) for tissue in TISSUES}
        window = _WINDOWS[name]
        bottom = np.clip(window["bottom"][0] + window["bottom"][1] * dark, 0.0, 0.95)
        top = np.exp(window["top"][0] + window["top"][1] * wide)
        exponent = np.exp(window["curve"][0] + window["curve"][1] * bent)
        low = bottom * min(signals[name][tissue] for tissue in _HEALTHY)
        high = top * max(signals[name][tissue] for tissue in window["under"])
        windows[name] = (low, high, float(exponent))
        noise[name] = float(base_noise * np.exp(rng.normal(0, 0.3)))
        spread[name] = float(_BLUR[name] * base_spread * rng.uniform(0.8, 1.3))
        for key, value in (("bottom", bottom), ("top", top), ("exponent", exponent)):
            factors[f"{name}_{key}"] = float(value)
        factors[f"{name}_noise"], factors[f"{name}_point_spread_mm"] = noise[name], spread[name]
    coil_strength = float(rng.uniform(0.015, 0.045))
    factors["coil_strength"] = coil_strength
    coil = SmoothField(coil_rng, 1 + len(SEQUENCES), 70.0)
    return Acquisition(values, signals, windows, spread, noise, coil, coil_strength, factors)


def image_slice(
    anatomy: Anatomy, acquisition: Acquisition, tissues: dict, textures: dict, height: float,
    modalities: tuple[str, ...], rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Images (n, size, size) float32 in [0, 1] of a slice that `Anatomy.cut` gave.

    Args:
        anatomy, acquisition: who and where.
        tissues, textures, height: the slice and its relative height.
        modalities: names out of `SEQUENCES`.
        rng: for the noise.
    """
    inside = sum(tissues.values()) >= 0.5
    size = len(inside)
    x, y = anatomy.pixel_axes(size)
    # 1 on average over this brain, so that shading does not move its tissues' means.
    coil = acquisition.coil.slice(x, y, anatomy.level(height))
    coil -= acquisition.coil.points(anatomy.inside).mean(1)[:, None, None]
    pixel = anatomy.field_of_view / size
    modulated = {name: fraction * textures.get(name, 1) for name, fraction in tissues.items()}
    nuclei = tissues["grey"] * textures["iron"]
    images = {}
    for number, name in enumerate(SEQUENCES, start=1):
        # Drawn for every sequence, wanted or not: an image does not depend on the others asked for.
        noise = rng.standard_normal((2, size, size), dtype=np.float32)
        if name not in modalities:
            continue
        signals, (low, high, exponent) = acquisition.signals[name], acquisition.windows[name]
        image = sum(np.float32(signals[t]) * modulated[t] for t in TISSUES)
        if name in ("T2", "FLAIR"):  # iron in the deep grey nuclei shortens T2
            image -= np.float32(0.16 * signals["grey"]) * nuclei
        image *= np.exp(np.float32(acquisition.coil_strength) * (coil[0] + np.float32(_OWN_SHADING) * coil[number]))
        noise *= np.float32(acquisition.noise[name] * (high - low))
        noise[0] += image
        # What k-space has left of a point, for signal and noise.
        noise = ndimage.gaussian_filter(noise, (0, *(2 * [acquisition.point_spread[name] / pixel])), truncate=3.0)
        image = (np.hypot(noise[0], noise[1]) - np.float32(low)) / np.float32(high - low)
        images[name] = np.clip(image, 0, 1) ** np.float32(exponent) * inside
    return np.stack([images[name] for name in modalities]).astype(np.float32)
