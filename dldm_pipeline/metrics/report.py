"""The evaluation report, as Markdown and as one HTML page that holds its pictures and loads nothing.

[`write_report`] writes what `examples/evaluate.py` measured. [`build_tables`] arranges the figures; the text is in
`templates/report.jinja`, and `templates/markdown.jinja` and `templates/html.jinja` hold the two forms of a paragraph, a
table and a picture. The pictures are made by [`plot_scores`], [`plot_steps`] and [`systems_sheet`].
"""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dldm_pipeline.data.files import write_text
from dldm_pipeline.data.sheet import save_png, subjects_sheet

from .reconstruction import mean_of_known

Table = list[list]  # rows of cells: the names of the columns, then rows that begin with their name

# Table 1 of Na et al., MIDL 2023: averages over the sequences, 1,000 generated images each.
PAPER = {
    "DLDM": {"frechet_distance": 0.00070, "precision": 0.91208, "recall": 0.96021},
    "StyleGAN2": {"frechet_distance": 0.00293, "precision": 0.67771, "recall": 0.68229},
}
SECOND = "second real sample"
# Names of scores; those of the two distances depend on the extractor.
SCORE_TITLES = {"diversity": "MS-SSIM diversity", "two_sample_auc": "two-sample AUC"}
CLAIM_TITLES = {
    "frechet_ratio": "Fréchet distance, DLDM over StyleGAN2",
    "precision_gain": "precision, DLDM minus StyleGAN2",
    "recall_gain": "recall, DLDM minus StyleGAN2",
    "precision_share": f"precision, DLDM over the {SECOND}",
    "recall_share": f"recall, DLDM over the {SECOND}",
}
APPEARANCE_TITLES = {"white": "white matter", "grey": "grey matter", "csf": "CSF", "top": "top of the window"}
STYLE_TITLES = {
    "shift": "difference of means",
    "spread": "spread",
    "covariance": "difference of covariances",
    "relation": "relation to the other modalities",
}
PROBE_TITLES = {
    "style": "z_style",
    "structure_mean": "z_struct of one modality, mean over space",
    "structure_full": "z_struct of one modality, whole",
    "structure_mean_deviation": "not linear, does not count: mean and std over space",
    "structure_full_shuffled": "reference: the same with shuffled labels",
    "images": "reference: images in 8×8 blocks",
    "subject_structure": "z_struct of one modality, whole",
    "subject_images": "reference: images in 8×8 blocks",
}


def write_report(results: dict, pictures: Mapping[str, Path], folder: str | os.PathLike) -> str:
    """Writes `report.md` and `report.html`, the same text, tables and pictures in two forms.

    Args:
        results: what `examples/evaluate.py` returns, or its `metrics.json`; what was not measured has no section.
        pictures: `scores`, `systems`, `steps`, `closest_pairs` → PNG file.
        folder: where to write, and where links in the Markdown start.

    Returns:
        The Markdown.
    """
    links = {name: Path(os.path.relpath(path, folder)).as_posix() for name, path in pictures.items()}
    codes = {name: base64.b64encode(Path(path).read_bytes()).decode() for name, path in pictures.items()}
    text = _render("markdown", results, links)
    page = _render("html", results, {name: f"data:image/png;base64,{code}" for name, code in codes.items()})
    write_text(Path(folder) / "report.md", text)
    write_text(Path(folder) / "report.html", page)
    return text


def _render(format: str, results: dict, pictures: dict[str, str]) -> str:
    """The report's template with the macros of `markdown.jinja` or `html.jinja`."""
    loader, options = FileSystemLoader(Path(__file__).parent / "templates"), dict(trim_blocks=True, lstrip_blocks=True)
    environment = Environment(loader=loader, autoescape=format == "html", undefined=StrictUndefined, **options)
    environment.filters |= {"show": show, "inline": _inline_html if format == "html" else _inline}
    titles = _score_titles(results["fidelity"]["DLDM"]) if "fidelity" in results else {}
    text = environment.get_template("report.jinja").render(
        format=format, results=results, tables=build_tables(results), pictures=pictures, titles=titles, second=SECOND
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _inline(text: str) -> str:
    """A paragraph or cell on one line."""
    return " ".join(text.split())


def _inline_html(text: str) -> Markup:
    """The same, escaped; `backticks` mark code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", _inline(str(escape(text)))))


def show(value: object) -> str:
    """A cell's text: three decimals, or three digits of what is smaller than 0.1; a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.0995 else f"{value:.3g}"
    return str(value)


def plot_scores(fidelity: dict[str, dict], path: str | os.PathLike) -> None:
    """Plots every score in every modality, with its interval, as PNG: one panel a score, one colour a system.

    `fidelity`: system → result of [`~dldm_pipeline.metrics.fidelity.evaluate_fidelity`].
    """
    first = fidelity["DLDM"]
    names, scores, systems = [*first["modalities"], "mean"], list(first["scores"]), _with_floor(fidelity)
    rows = -(-len(scores) // 4)
    figure = Figure(figsize=(12.8, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False).ravel()
    for axes, score in zip(panels, scores, strict=False):
        for i, (system, values) in enumerate(systems.items()):
            # NaN where there is no interval: matplotlib then plots the point alone.
            entries = [[values[score][name][key] for key in ("value", "low", "high")] for name in names]
            middle, low, high = np.array(entries, dtype=float).T
            place = np.arange(len(names)) + 0.16 * (i - (len(systems) - 1) / 2)
            errors = np.clip([middle - low, high - middle], 0, None)
            axes.errorbar(place, middle, errors, fmt="o", markersize=3, label=system)
        axes.set_title(_score_titles(first)[score], fontsize=8)
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(systems), fontsize=8)
    _save(figure, path)


def plot_steps(steps: dict, path: str | os.PathLike) -> None:
    """Plots distance and time against the steps of [`~dldm_pipeline.metrics.comparison.Comparison.steps`] as PNG."""
    keys = ("num_inference_steps", "frechet_distance", "seconds_per_subject")
    counts, distances, times = zip(*([entry[key] for key in keys] for entry in steps["entries"]), strict=True)
    figure = Figure(figsize=(5.0, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(counts, distances, "o-", label="DLDM")
    if steps["floor"] is not None:
        axes.axhline(steps["floor"]["frechet_distance"], color="grey", linestyle=":", label=SECOND)
    axes.set(xticks=counts, xlabel="structure steps", ylabel="Fréchet distance")
    axes.set_ylim(bottom=0)
    seconds = axes.twinx()
    seconds.plot(counts, times, "s--", color="tab:red")
    seconds.set_ylabel("seconds a subject (dashed)", color="tab:red")
    seconds.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette makes the file several times smaller; plots have few colours.
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64), path)


def systems_sheet(
    real: np.ndarray,
    real_present: np.ndarray,
    generated: dict[str, np.ndarray],
    modalities: Sequence[str],
    path: str | os.PathLike,
) -> None:
    """Saves the paper's figure 2 as PNG: the first and last real subject, then the first two of each system.

    Images are uint8 (N, n, H, W), and `real_present` is bool (N, n).
    """
    shown = np.linspace(0, len(real) - 1, min(2, len(real))).astype(int)
    first = [[x if there else None for x, there in zip(real[i], real_present[i], strict=True)] for i in shown]
    synthetic = {f"synthetic, {name}": (images[:2], None) for name, images in generated.items()}
    subjects_sheet(path, modalities, {"real": (first, None)} | synthetic)


def build_tables(results: dict) -> dict:
    """Name → table, for what was measured; `alignment` is a dictionary of tables. `results` as in [`write_report`]."""
    tables = _alignment_tables(results["alignment"], results["segmenter_dice"])
    tables |= _reconstruction_tables(results["reconstruction"])
    tables |= _exchange_tables(results.get("exchange", {}))
    if "left_out" not in results.get("styles", {"left_out": ""}):
        tables["styles"] = [["", *results["reconstruction"]["modalities"]]]
        for kind, styles in (("drawn", results["styles"]), ("one half", results["styles"]["validation_halves"])):
            tables["styles"] += [[f"{title}, {kind}", *styles[key].values()] for key, title in STYLE_TITLES.items()]
    if "left_out" not in results["disentanglement"]:
        tables |= _probe_tables(results["disentanglement"])
    if "fidelity" in results:
        tables |= _fidelity_tables(results["fidelity"])
    if "systems" in results:
        tables["systems"] = [["", "folder", "parameters, millions", "seconds a subject"]]
        for name, one in results["systems"].items():
            tables["systems"].append([name, one["folder"], one["parameters"] / 1e6, one["seconds_per_subject"]])
    if "steps" in results:
        scores = ("frechet_distance", "kernel_distance", "precision", "recall")
        keys = ("num_inference_steps", *scores, "seconds_per_subject")
        entries, floor = results["steps"]["entries"], results["steps"]["floor"]
        entries = entries + ([] if floor is None else [{"num_inference_steps": SECOND} | floor])
        tables["steps"] = [["structure steps", "Fréchet", "kernel", "precision", "recall", "seconds a subject"]]
        tables["steps"] += [[entry.get(key) for key in keys] for entry in entries]
    if "memorization" in results:
        tables |= _memorization_tables(results["memorization"])
    if "generation" in results:
        spectrum = results["generation"]["spectrum"]
        tables["generated_spectrum"] = _spectrum_table(spectrum, results["reconstruction"]["modalities"])
    return tables


def mean_scores(fidelity: dict[str, dict]) -> dict[str, dict[str, float]]:
    """System, or the second real sample → score → its average over modalities. `fidelity` as in [`plot_scores`]."""
    systems = _with_floor(fidelity)
    return {name: {score: one["mean"]["value"] for score, one in scores.items()} for name, scores in systems.items()}


def claims(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the paper claims of DLDM, as figures, where the systems they need are in `scores` (`PAPER`, or [`mean_scores`]).

    Returns:
        dict with `frechet_ratio` (DLDM over StyleGAN2), `precision_gain`, `recall_gain` (DLDM minus StyleGAN2), and
        `precision_share`, `recall_share` (DLDM over the second real sample).
    """
    own, other, floor = (scores.get(name) for name in ("DLDM", "StyleGAN2", SECOND))
    found = {}
    if other is not None:
        found["frechet_ratio"] = own["frechet_distance"] / (other["frechet_distance"] or math.nan)
        found |= {f"{score}_gain": own[score] - other[score] for score in ("precision", "recall")}
    if floor is not None:
        found |= {f"{score}_share": own[score] / (floor[score] or math.nan) for score in ("precision", "recall")}
    return found


def _fidelity_tables(fidelity: dict[str, dict]) -> dict[str, Table]:
    first, systems, means = fidelity["DLDM"], _with_floor(fidelity), mean_scores(fidelity)
    titles, names = _score_titles(first), [*first["modalities"], "mean"]

    paper = [[""], *([name] for name in systems)]
    for score, title in {"frechet_distance": "clean-FID", "precision": "precision", "recall": "recall"}.items():
        paper[0] += [f"paper: {title}", f"ours: {titles[score]}"]
        for row in paper[1:]:
            published = PAPER.get(row[0], {}).get(score)
            row += [None if published is None else f"{published:.5f}", means[row[0]][score]]

    # MS-SSIM has no best value: it is compared with that of the real images.
    best = first["best"] | {"diversity": (first["diversity_real"] or {}).get("mean")}
    scores, by_modality = [["", *systems, "best"]], [["", *names]]
    for score in first["scores"]:
        scores.append([titles[score], *(_with_interval(one[score]["mean"]) for one in systems.values()), best[score]])
        for system, one in systems.items():
            by_modality.append([f"{titles[score]}: {system}", *(one[score][name]["value"] for name in names)])

    counts = [["", "real", "generated", SECOND, "real subjects"]]
    for name, images in first["num_images"].items():
        subjects = first["num_subjects"][name]["real"]
        counts.append([name, images["real"], images["generated"], images["floor"], subjects])
    claimed = [[CLAIM_TITLES[name], claims(PAPER).get(name), value] for name, value in claims(means).items()]
    tables = {"paper": paper, "claims": [["", "paper", "ours"], *claimed], "scores": scores}
    return tables | {"scores_by_modality": by_modality, "counts": counts}


def _alignment_tables(sets: dict[str, dict], segmenter_dice: dict[str, float]) -> dict:
    """Every measure of `evaluate_alignment`, whatever their number."""
    real, tables = sets["validation"], {}
    titles = {"validation": "validation subjects", "rebuilt": "rebuilt validation subjects"}
    for key, values in real.items():
        if not isinstance(values, dict) or not values or key.endswith(("_shuffled", "_p95", "_change")):
            continue
        rows = []
        for name, one in sets.items():
            rows.append([titles.get(name, name), *one[key].values()])
            if f"{key}_change" in one:
                rows.append([f"{rows[-1][0]}, change", *map(_percent, one[f"{key}_change"].values())])
        if f"{key}_shuffled" in real:
            rows.append(["reference: shuffled validation subjects", *real[f"{key}_shuffled"].values()])
        if key == "mask_agreement" and segmenter_dice:
            rows.append(["reference: the segmenter's own test", *(segmenter_dice.get(column) for column in values)])
        header = [key.replace("_", " ").capitalize(), *values]
        # Systems are compared by the average; that of vessels or enhancement has no meaning.
        if len(values) > 1 and key not in ("enhancement", "vessels"):
            header.append("mean")
            rows = [[*row, None if isinstance(row[-1], str) else _mean(row[1:])] for row in rows]
        tables[key] = [header, *rows]
    misaligned = [["", "slices", "misaligned, % of pairs", "empty masks"]]
    for name, one in sets.items():
        misaligned.append([titles.get(name, name), one["num_slices"], 100 * one["misaligned"], one["num_empty_masks"]])
    return {"alignment": tables, "misaligned": misaligned}


def _memorization_tables(memorization: dict[str, dict]) -> dict[str, Table]:
    """Every system, and held-out subjects, which copy nobody."""
    first = memorization["DLDM"]
    summary, ratios = (
        [["", "samples", "refused, %", "smallest ratio", "authenticity"]],
        [["median ratio", *first["channels"]]],
    )
    sets = {name: result["samples"] for name, result in memorization.items()}
    for name, one in (sets | {"reference: held-out subjects": first["held_out"]}).items():
        smallest = min(filter(_is_finite, one["ratio_min"].values()), default=None)
        summary.append([name, one["num"], 100 * one["refused_share"], smallest, one["authenticity_mean"]])
        ratios.append([name, *(one["ratio"][channel] for channel in first["channels"])])
    return {"memorization": summary, "memorization_ratio": ratios}


def _exchange_tables(result: dict) -> dict[str, Table]:
    """What `measure_autoencoder` found of exchanged styles: against the truth and by probes, or by curves."""
    tables = {}
    if "truth" in result:
        truth, probes = result["truth"], result["probes"]
        names = list(truth["own"])
        titles = {
            "own": "structure and style of the image",
            "exchanged": "structure of A, style of another anatomy under B",
        }
        titles |= {
            "mean_style": "structure of A, mean style",
            "copied": "reference: A under another scanner, unchanged",
        }
        tables["exchange"] = [["", *names, "mean"]]
        tables["exchange"] += [[title, *truth[key].values(), truth[f"{key}_mean"]] for key, title in titles.items()]
        tables["appearance_probes"] = [["", *names]]
        tables["appearance_probes"] += [
            [f"{APPEARANCE_TITLES.get(target, target)}, from {code}", *probes[kind][target].values()]
            for target in probes["style"]
            for kind, code in (("style", "its z_style"), ("structure", "z_struct"))
        ]
    if "curves" in result:
        curves = result["curves"]
        tables["exchange"] = [["", *curves["donor"]]]
        tables["exchange"] += [
            ["with that of the donor of the style", *curves["donor"].values()],
            ["with that of the slice itself", *curves["own"].values()],
        ]
    return tables


def _reconstruction_tables(result: dict) -> dict[str, Table]:
    names, score = result["modalities"], result["psnr"]

    def rows(named: dict[str, dict[str, float]]) -> Table:
        values = {title: [one[name] for name in names] for title, one in named.items()}
        return [["", *names, "mean"], *([title, *row, _mean(row)] for title, row in values.items())]

    psnr = {"structure from all": score["all"]} | {
        f"structure from {name} alone": score["single"][name] for name in names
    }
    tables = {"psnr": rows(psnr), "psnr_loss": rows({"structure from this modality alone": result["single_cost"]})}
    if result["mask_dice"] is not None:
        header = ["structure from", "all", *(f"{name} alone" for name in names)]
        tables["mask_dice"] = [header, ["Dice", result["mask_dice"], *map(result["mask_dice_single"].get, names)]]
    return tables | {"rebuilt_spectrum": _spectrum_table(result["spectrum"], names)}


def _spectrum_table(spectrum: dict, names: list[str]) -> Table:
    """Power ratio at a few rings, and the largest deviation over all of them."""
    rings = len(spectrum["ratio_mean"]) - 1
    shown = sorted({round(rings * part) for part in (0.05, 0.25, 0.5, 0.75, 1.0)})
    rows = {name: (spectrum["ratio"][name], spectrum["largest_deviation"][name]) for name in names}
    rows["mean of ratios"] = spectrum["ratio_mean"], spectrum["largest_deviation_mean_ratio"]
    table = [["", *(f"ring {r}" for r in shown), "largest deviation from 1, all rings"]]
    return table + [[name, *(ratio[r] for r in shown), largest] for name, (ratio, largest) in rows.items()]


def _probe_tables(result: dict) -> dict[str, Table]:
    """Every probe of `evaluate_disentanglement`, whatever their number."""
    header = ["code", "features", "accuracy", "chance"]
    modality, subject = [header], [[*header, "AUC"]]
    for key, probe in result.items():
        if isinstance(probe, dict) and "accuracy" in probe:
            row = [PROBE_TITLES.get(key, key), probe["features"], 100 * probe["accuracy"], 100 * probe["chance"]]
            if "auc" in probe:
                subject.append([*row, probe["auc"]])
            else:
                modality.append(row)
    return {"modality_probes": modality, "subject_probes": subject}


def _with_floor(fidelity: dict[str, dict]) -> dict[str, dict]:
    """System → its scores, and at the end those of the second real sample."""
    return {name: result["scores"] for name, result in fidelity.items()} | {SECOND: fidelity["DLDM"]["floor"]["scores"]}


def _score_titles(result: dict) -> dict[str, str]:
    """Score → name; those of the two distances name the network."""
    return {score: (SCORE_TITLES | result["titles"]).get(score, score) for score in result["scores"]}


def _with_interval(entry: dict) -> str:
    interval = "" if entry["low"] is None else f" [{show(entry['low'])}, {show(entry['high'])}]"
    return show(entry["value"]) + interval


def _percent(value: float | None) -> str | None:
    return f"{100 * value:+.1f} %" if _is_finite(value) else None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float | None]) -> float:
    """Of what is known: JSON's None is NaN."""
    return float(mean_of_known(values))
