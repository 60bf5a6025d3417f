"""MR contrasts of simulated subjects: tissue values, sequences, and the signal equations that join them.

Tissue values (3 T): Wansapura et al., JMRI 9 (1999) 531 (white and grey matter); Stanisz et al., MRM 54 (2005) 507;
Lu et al., MRM 52 (2004) 679 (blood); Lin et al., JMRI 13 (2001) 114 and Rooney et al., MRM 57 (2007) 308
(cerebrospinal fluid); Rohrer et al., Invest. Radiol. 40 (2005) 715 (relaxivity of contrast agents); signal equations:
Bernstein, King and Zhou, Handbook of MRI Pulse Sequences (2004). Oedema and tumour lie in the range of the clinical
literature, which is wide.
"""

import numpy as np

TISSUES = ("white", "grey", "csf", "vessel", "oedema", "enhancing", "necrosis")

# T1 and T2 in ms, relative proton density, and contrast agent taken up (mmol/l) some minutes after injection.
TISSUE_VALUES = {
    "white": (840.0, 76.0, 0.70, 0.01),
    "grey": (1380.0, 98.0, 0.82, 0.03),
    "csf": (4200.0, 1700.0, 1.00, 0.0),
    "vessel": (1800.0, 90.0, 0.85, 0.65),
    "oedema": (1450.0, 165.0, 0.87, 0.02),
    "enhancing": (1600.0, 125.0, 0.85, 0.38),
    "necrosis": (2000.0, 260.0, 0.93, 0.05),
}
RELAXIVITY_R1, RELAXIVITY_R2 = 4.5, 5.5  # per second and mmol/l, gadolinium chelates at 3 T

# Times in ms, flip angle in degrees. `flow` is the part of the blood signal that survives (spin echo: outflow; black
# blood: flow-sensitive dephasing). `headroom`: top of the window over the brightest healthy tissue. It puts healthy tissue
# where `volumes.py` puts that of real scans: the 95th percentile of the brain (T2: the 98th) of ten BraTS 2021 scans has the
# median 0.77 in T1, 0.76 in T2, 0.70 in FLAIR and 0.63 with contrast agent (`benchmarks/simulation.py --phantom`).
SEQUENCES = {
    "T1": dict(kind="spin echo", TR=520.0, TE=10.0, contrast=False, flow=0.45, headroom=1.27),
    "T2": dict(kind="spin echo", TR=4800.0, TE=100.0, contrast=False, flow=0.15, headroom=1.22),
    "FLAIR": dict(kind="inversion recovery", TR=9000.0, TE=115.0, TI=2500.0, contrast=False, flow=0.15, headroom=1.69),
    "WB": dict(kind="gradient echo", TR=8.0, TE=3.0, flip=14.0, contrast=True, flow=1.0, headroom=1.58),
    "BB": dict(kind="spin echo", TR=560.0, TE=14.0, contrast=True, flow=0.04, headroom=1.53),
}


def sample_tissue_values(rng: np.random.Generator, factors: dict) -> dict[str, tuple[float, float, float, float]]:
    """T1, T2, proton density and agent of each tissue in this subject, a few per cent around `TISSUE_VALUES`."""
    values = {}
    agent = rng.normal(1, 0.08)  # dose and delay after injection, common to all tissues
    for tissue, mean in TISSUE_VALUES.items():
        lesion = tissue in ("oedema", "enhancing", "necrosis")
        std = (0.05, 0.06, 0.02, 0.08) if lesion else (0.025, 0.03, 0.01, 0.05)
        drawn = [m * np.clip(rng.normal(1, s), 1 - 2.5 * s, 1 + 2.5 * s) for m, s in zip(mean, std, strict=True)]
        drawn[3] *= agent
        values[tissue] = tuple(drawn)
        for key, value in zip(("T1_ms", "T2_ms", "PD", "agent_mM"), drawn, strict=True):
            factors[f"{tissue}_{key}"] = value
    factors["noise"] = float(rng.uniform(0.012, 0.018))
    return values


def sample_sequence(rng: np.random.Generator, name: str, factors: dict) -> dict:
    """The sequence with timings, and top of window, off by a few per cent: another scanner."""
    sequence = dict(SEQUENCES[name])
    for key in ("TR", "TE", "TI", "flip", "headroom"):
        if key in sequence:
            sequence[key] *= float(np.clip(rng.normal(1, 0.02), 0.95, 1.05))
            factors[f"{name}_{key}"] = sequence[key]
    return sequence


def signal(sequence: dict, tissue: str, t1: float, t2: float, density: float, agent: float) -> float:
    """Magnitude of the steady-state signal; times in ms, agent in mmol/l."""
    if sequence["contrast"]:
        t1 = 1 / (1 / t1 + RELAXIVITY_R1 * agent / 1000)
        t2 = 1 / (1 / t2 + RELAXIVITY_R2 * agent / 1000)
    decay, recovery = np.exp(-sequence["TE"] / t2), np.exp(-sequence["TR"] / t1)
    if sequence["kind"] == "spin echo":
        size = density * (1 - recovery) * decay
    elif sequence["kind"] == "inversion recovery":
        size = density * abs(1 - 2 * np.exp(-sequence["TI"] / t1) + recovery) * decay
    else:  # spoiled gradient echo (Ernst); T2* about half of T2
        flip = np.deg2rad(sequence["flip"])
        size = density * np.sin(flip) * (1 - recovery) / (1 - np.cos(flip) * recovery) * decay**2
    return float(size * (sequence["flow"] if tissue == "vessel" else 1))
