"""The evaluation report: sections of text, tables and pictures, written as Markdown and as one HTML page.

[`build_report`] arranges what the other modules of this folder measured, as `examples/evaluate.py` collects it;
[`to_markdown`] and [`to_html`] write the same sections. Every table and picture says in a sentence what it means. The
HTML page holds its pictures and needs no other file. The pictures are drawn by [`plot_scores`], [`plot_steps`] and
[`systems_sheet`].
"""

from __future__ import annotations

import base64
import html
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dldm_pipeline.data.sheet import contact_sheet, save_png

# Table 1 of Na et al., MIDL 2023: averages over the sequences, 1,000 generated images each.
PAPER = {
    "DLDM": {"frechet_distance": 0.00070, "precision": 0.91208, "recall": 0.96021},
    "StyleGAN2": {"frechet_distance": 0.00293, "precision": 0.67771, "recall": 0.68229},
}
SECOND = "second real sample"
NOTICE = "Generated images are synthetic. Research only. Not for diagnosis."

# Score of `fidelity.SCORES` → its name and what it means. The names of the first two depend on the extractor.
SCORE_MEANINGS = {
    "frechet_distance": ("", "how far the averages and spreads of the features lie apart; 0 is best"),
    "kernel_distance": ("", "how far the distributions of the features lie apart, whatever N; 0 is best"),
    "precision": ("precision", "share of generated images that could be real ones: realism"),
    "recall": ("recall", "share of real images that could be generated ones: variety"),
    "density": ("density", "how deep among real images the generated ones lie; 1 where they are as real"),
    "coverage": ("coverage", "share of real images with a generated one beside them"),
    "diversity": ("MS-SSIM diversity", "likeness of two subjects; above that of real ones, the model repeats itself"),
    "two_sample_auc": (
        "two-sample AUC",
        "how well a small network tells generated from real images of new subjects; 0.5 is best, 1 is always",
    ),
}
# Measure of `alignment.evaluate_alignment` → its title and what it means.
ALIGNMENT_MEANINGS = {
    "edge_correlation": (
        "Edges",
        "Correlation of edges inside the brain between two modalities of one subject: the closer to the validation "
        "subjects' and the further from the shuffled ones', the more they share one anatomy.",
    ),
    "mutual_information": (
        "Mutual information",
        "Normalised mutual information inside the brain of two modalities of one subject, 1 for independent ones: read it "
        "between the shuffled and the validation subjects.",
    ),
    "mask_agreement": (
        "Mask agreement",
        "Dice of the subject's mask with the tumour that a segmenter, trained on real images of this modality alone, finds: "
        "the mask lies where the image shows the tumour.",
    ),
    "enhancement": (
        "Enhancement",
        "Mean inside the tumour mask over the mean in the rest of the brain: the tumour is as bright as in real subjects.",
    ),
    "vessels": (
        "Vessels",
        "Brightness over the brain's mean in the brain's top hundredth of WB - BB, away from the tumour: vessels are bright "
        "in WB and dark in BB of the same subject.",
    ),
}
PROBE_TITLES = {
    "style": "z_style",
    "structure_mean": "z_struct of one modality, mean over the grid",
    "structure_full": "z_struct of one modality, whole",
    "structure_mean_deviation": "not linear, does not count: mean and deviation over the grid",
    "structure_full_shuffled": "reference: the same with shuffled labels",
    "images": "reference: images in 8×8 blocks",
    "subject_structure": "z_struct of one modality, whole",
    "subject_style": "z_style",
    "subject_style_linear": "z_style, after a linear map from one modality to the other",
    "subject_images": "reference: images in 8×8 blocks",
}


@dataclass(frozen=True)
class Table:
    """A table. Cells are texts or numbers; None and NaN become a dash.

    Attributes:
        header: names of the columns.
        rows: lists of as many cells; the first one names the row.
        meaning: a sentence.
    """

    header: list[str]
    rows: list[list]
    meaning: str


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        path: PNG file.
        title: a few words.
        meaning: a sentence.
    """

    path: Path
    title: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it. In texts, `backticks` mark code; there is no other markup."""

    title: str
    parts: list[str | Table | Picture]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def show(value: object) -> str:
    """A cell's text: three decimals, or three digits of what is smaller than 0.1; a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.0995 else f"{value:.3g}"
    return str(value)


def to_markdown(title: str, sections: Sequence[Section], folder: str | os.PathLike = ".") -> str:
    """The report as Markdown.

    Args:
        title: heading of the page.
        sections: from [`build_report`].
        folder: where the text will lie; links to the pictures start there.
    """
    lines = [f"# {title}"]
    for section in sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, str):
                lines.append(part)
            elif isinstance(part, Picture):
                link = Path(os.path.relpath(part.path, folder)).as_posix()
                lines.append(f"![{part.title}]({link})\n\n{part.title}: {part.meaning}")
            else:
                rows = [part.header, *([show(cell).replace("|", "\\|") for cell in row] for row in part.rows)]
                rule = "|---" + "|---:" * (len(part.header) - 1) + "|"
                table = ["| " + " | ".join(row) + " |" for row in rows]
                lines.append("\n".join([part.meaning, "", table[0], rule, *table[1:]]))
    return "\n\n".join(lines) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1em 0 1.5em; } figure img { max-width: 100%; }
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The report as one HTML page that holds its pictures and loads nothing.

    Args:
        title: heading of the page.
        sections: from [`build_report`].

    Raises:
        OSError: if a picture cannot be read.
    """

    def text(value: str) -> str:
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(value))

    lines = ["<!DOCTYPE html>", '<html lang="en">', '<meta charset="utf-8">', f"<title>{html.escape(title)}</title>"]
    lines += [f"<style>{_STYLE}</style>", f"<h1>{text(title)}</h1>"]
    for section in sections:
        lines.append(f"<h2>{text(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, str):
                lines.append(f"<p>{text(part)}</p>")
            elif isinstance(part, Picture):
                data = base64.b64encode(part.path.read_bytes()).decode()
                lines.append(f'<figure><img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">')
                lines.append(f"<figcaption>{text(part.title)}: {text(part.meaning)}</figcaption></figure>")
            else:
                lines.append(f"<p>{text(part.meaning)}</p>\n<div><table>")
                for tag, row in [("th", part.header), *(("td", row) for row in part.rows)]:
                    lines.append("<tr>" + "".join(f"<{tag}>{text(show(cell))}</{tag}>" for cell in row) + "</tr>")
                lines.append("</table></div>")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def plot_scores(fidelity: dict[str, dict], path: str | os.PathLike) -> None:
    """Draws every score in every modality, with its interval: one panel a score, one colour a system.

    Args:
        fidelity: system → result of [`~dldm_pipeline.metrics.fidelity.evaluate_fidelity`].
        path: PNG file to write.
    """
    first = next(iter(fidelity.values()))
    names, scores, systems = [*first["modalities"], "mean"], list(first["scores"]), _with_floor(fidelity)
    figure, panels = _figure(3.2 * 4, 2.6 * -(-len(scores) // 4), -(-len(scores) // 4), 4)
    for axes, score in zip(panels, scores, strict=False):
        for i, (system, values) in enumerate(systems.items()):
            entries = [values[score][name] for name in names]
            middle = np.array([entry["value"] for entry in entries])
            # NaN where there is no interval: matplotlib then draws the point alone.
            ends = np.array([[entry["low"], entry["high"]] for entry in entries], dtype=float).T
            place = np.arange(len(names)) + 0.16 * (i - (len(systems) - 1) / 2)
            errors = np.clip([middle - ends[0], ends[1] - middle], 0, None)
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
    """Draws distance and time against the number of denoising steps of the structure.

    Args:
        steps: `steps` of the results of `examples/evaluate.py`.
        path: PNG file to write.
    """
    figure, (axes,) = _figure(5.0, 3.2, 1, 1)
    counts = [entry["num_inference_steps"] for entry in steps["entries"]]
    axes.plot(counts, [entry["frechet_distance"] for entry in steps["entries"]], "o-", label="DLDM")
    if steps["floor"] is not None:
        axes.axhline(steps["floor"]["frechet_distance"], color="grey", linestyle=":", label=SECOND)
    axes.set_xticks(counts)
    axes.set_xlabel("structure steps")
    axes.set_ylabel("Fréchet distance")
    axes.set_ylim(bottom=0)
    seconds = axes.twinx()
    seconds.plot(counts, [entry["seconds_per_subject"] for entry in steps["entries"]], "s--", color="tab:red")
    seconds.set_ylabel("seconds a subject (dashed)", color="tab:red")
    seconds.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    _save(figure, path)


def systems_sheet(
    real: np.ndarray,
    real_present: np.ndarray,
    generated: dict[str, np.ndarray],
    modalities: Sequence[str],
    path: str | os.PathLike,
    rows: int = 2,
) -> None:
    """Draws the paper's figure 2: real subjects, then those of each system, one column a modality.

    The subjects are the first ones, of the real ones evenly spread; nobody chose them.

    Args:
        real: uint8 (N, n, H, W).
        real_present: bool (N, n), which images are there.
        generated: system → uint8 (S, n, H, W).
        modalities: the n names.
        path: PNG file to write.
        rows: subjects of each.
    """
    shown = np.linspace(0, len(real) - 1, min(rows, len(real))).astype(int)
    # The sheet leaves NaN empty.
    pictures = [np.where(real_present[shown][..., None, None], real[shown] / np.float32(255), np.nan)]
    names = ["real"] * len(shown)
    for name, images in generated.items():
        pictures.append(images[:rows] / np.float32(255))
        names += [f"synthetic, {name}"] * len(images[:rows])
    contact_sheet(np.concatenate(pictures), None, modalities, names, path)


def _figure(width: float, height: float, rows: int, columns: int):
    """A figure of so many inches, without matplotlib's global state, and its panels as a flat list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def _save(figure, path: str | os.PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette makes the file several times smaller; plots have few colours.
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64), path)


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def build_report(results: dict, pictures: dict[str, Path]) -> list[Section]:
    """Arranges results into sections; what was not measured has none.

    Args:
        results: what `examples/evaluate.py` writes to `metrics.json`.
        pictures: `scores`, `systems`, `steps`, `closest_pairs` → PNG file.
    """
    sections = [overview_section(results)]
    if "fidelity" in results:
        sections += [paper_section(results["fidelity"]), fidelity_section(results["fidelity"], pictures)]
        meaning = (
            "the anatomy of a row should be one in all its columns, and as plausible as in the rows of real subjects."
        )
        sections.append(Section("Figure 2 of the paper, rebuilt", [Picture(pictures["systems"], "Subjects", meaning)]))
    sections.append(alignment_section(results["alignment"], results["segmenter_dice"]))
    if results.get("steps"):
        sections.append(steps_section(results["steps"], pictures["steps"]))
    if "memorization" in results:
        sections.append(memorization_section(results["memorization"], pictures.get("closest_pairs")))
    sections += [reconstruction_section(results["reconstruction"]), disentanglement_section(results["disentanglement"])]
    if "generation" in results:
        sections.append(generation_section(results["generation"], results["reconstruction"]["modalities"]))
    if "fidelity" in results:
        sections.append(method_section(results["fidelity"], results["second_real"]))
    return sections


def overview_section(results: dict) -> Section:
    """What was measured on what."""
    parts: list = [
        f"Model: `{results['model']}`, data: `{results['dataset']}`, seed {results['seed']}, {results['seconds']:.0f} s. "
        f"{NOTICE}"
    ]
    if "systems" in results:
        rows = [
            [name, one["folder"], one["parameters"] / 1e6, one["seconds_per_subject"]]
            for name, one in results["systems"].items()
        ]
        meaning = f"The compared systems, {results['num_subjects']} subjects each: their size and what a subject costs."
        parts.append(Table(["", "folder", "parameters, millions", "seconds a subject"], rows, meaning))
    return Section("Overview", parts)


def mean_scores(fidelity: dict[str, dict]) -> dict[str, dict[str, float]]:
    """System, or the second real sample → score → its average over modalities.

    Args:
        fidelity: system → result of [`~dldm_pipeline.metrics.fidelity.evaluate_fidelity`].
    """
    return {
        name: {score: values["mean"]["value"] for score, values in scores.items()}
        for name, scores in _with_floor(fidelity).items()
    }


def claims(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the paper claims of DLDM, as figures; those that can be had.

    Args:
        scores: `PAPER`, or from [`mean_scores`].

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


def paper_section(fidelity: dict[str, dict]) -> Section:
    """The paper's table with ours beside it, and its claims as figures."""
    first, scores = fidelity["DLDM"], mean_scores(fidelity)
    titles = _score_titles(first)
    header, rows = [""], [[name] for name in scores]
    for score in ("frechet_distance", "precision", "recall"):
        header += [f"paper: {'clean-FID' if score == 'frechet_distance' else score}", f"ours: {titles[score]}"]
        for row in rows:
            published = PAPER.get(row[0], {}).get(score)
            row += [None if published is None else f"{published:.5f}", scores[row[0]][score]]
    table = Table(
        header,
        rows,
        "Averages over the modalities: lower is better in the first pair of columns, higher in the others; the last row is "
        f"what real images of other subjects score, so what can be reached at this N. {_distance_note(first)}",
    )
    text = {
        "frechet_ratio": "Fréchet distance, DLDM over StyleGAN2",
        "precision_gain": "precision, DLDM minus StyleGAN2",
        "recall_gain": "recall, DLDM minus StyleGAN2",
        "precision_share": f"precision, DLDM over the {SECOND}",
        "recall_share": f"recall, DLDM over the {SECOND}",
    }
    paper, ours = claims(PAPER), claims(scores)
    claimed = Table(
        ["", "paper", "ours"],
        [[text[name], paper.get(name), value] for name, value in ours.items()],
        "The paper's claim in figures: DLDM is ahead of StyleGAN2 where the first is below 1 and the gains are above 0, and "
        "as good as real where the shares reach 1.",
    )
    return Section("The paper's table", [table, claimed])


def fidelity_section(fidelity: dict[str, dict], pictures: dict[str, Path]) -> Section:
    """All scores with floor and intervals, averaged and per modality."""
    first = next(iter(fidelity.values()))
    titles, scored = _score_titles(first), _with_floor(fidelity)
    # MS-SSIM has no best value: it is read against that of the real images.
    best = first["best"] | {"diversity": (first["diversity_real"] or {}).get("mean")}
    rows = [
        [titles[score], *(_with_interval(one[score]["mean"]) for one in scored.values()), best[score]]
        for score in first["scores"]
    ]
    average = Table(
        ["", *scored, "best"],
        rows,
        f"Averages over the modalities with {100 * first['confidence']:.0f} % intervals over subjects: a difference counts "
        f"where the intervals lie apart, and the {SECOND} is what can be reached at this N.",
    )
    names = [*first["modalities"], "mean"]
    rows = [
        [f"{titles[score]}: {system}", *(one[score][name]["value"] for name in names)]
        for score in first["scores"]
        for system, one in scored.items()
    ]
    each = Table(["", *names], rows, "The same for each modality: where a system is weak.")
    meanings = "; ".join(f"{titles[s]}: {SCORE_MEANINGS[s][1]}" for s in first["scores"])
    picture = Picture(
        pictures["scores"], "Scores", "each modality and the mean, with intervals: points that overlap are ties."
    )
    return Section("Fidelity and diversity", [f"What the scores mean: {meanings}.", average, picture, each])


def alignment_section(sets: dict[str, dict], segmenter_dice: dict[str, float]) -> Section:
    """Every measure of [`~dldm_pipeline.metrics.alignment.evaluate_alignment`], whatever their number.

    Args:
        sets: name → result, the validation subjects first.
        segmenter_dice: modality → Dice of its segmenter on real subjects that it was not trained on.
    """
    real, parts = sets["validation"], []
    titles = {"validation": "validation subjects", "rebuilt": "rebuilt validation subjects"}
    measures = [
        key
        for key, values in real.items()
        if isinstance(values, dict) and values and not key.endswith(("_shuffled", "_p95", "_change"))
    ]
    for key in measures:
        columns = list(real[key])
        rows = []
        for name, result in sets.items():
            rows.append([titles.get(name, name), *result[key].values()])
            if f"{key}_change" in result:
                changes = result[f"{key}_change"]
                rows.append([f"{titles.get(name, name)}, change", *(_percent(changes[column]) for column in columns)])
        if f"{key}_shuffled" in real:
            rows.append(["reference: shuffled validation subjects", *real[f"{key}_shuffled"].values()])
        if key == "mask_agreement" and segmenter_dice:
            rows.append(["reference: the segmenter's own test", *(segmenter_dice.get(column) for column in columns)])
        title, meaning = ALIGNMENT_MEANINGS.get(
            key, (key.replace("_", " "), "Read it between the shuffled and the validation subjects.")
        )
        # The average is what systems are compared by; of vessels or enhancement it would mean nothing.
        if len(columns) > 1 and key not in ("enhancement", "vessels"):
            columns = [*columns, "mean"]
            rows = [[*row, None if isinstance(row[-1], str) else _mean(row[1:])] for row in rows]
        parts.append(Table([title, *columns], rows, meaning))
    rows = [
        [titles.get(name, name), result["num_slices"], 100 * result["misaligned"], result["num_empty_masks"]]
        for name, result in sets.items()
    ]
    meaning = (
        "Pairs of modalities whose edges fit no better than the 95th percentile of shuffled subjects, so might as well be of "
        "two subjects, and masks without tumour."
    )
    parts.append(Table(["", "slices", "misaligned, % of pairs", "empty masks"], rows, meaning))
    return Section("Alignment", parts)


def steps_section(steps: dict, picture: Path) -> Section:
    """Fidelity and time against the number of steps."""
    scores = ("frechet_distance", "kernel_distance", "precision", "recall")
    rows = [
        [entry["num_inference_steps"], *(entry[score] for score in scores), entry["seconds_per_subject"]]
        for entry in steps["entries"]
    ]
    if steps["floor"] is not None:
        rows.append([SECOND, *(steps["floor"][score] for score in scores), None])
    note = (
        f"On {steps['num_subjects']} subjects only, so distances are higher and less certain than above: compare them with "
        "each other."
    )
    meaning = f"Fewer steps are as good where the row hardly differs from the next one. {note}"
    curve = "more steps are worth their time as long as the distance still falls."
    return Section(
        "Steps against fidelity",
        [
            Table(["structure steps", "Fréchet", "kernel", "precision", "recall", "seconds a subject"], rows, meaning),
            Picture(picture, "Steps", curve),
        ],
    )


def memorization_section(memorization: dict[str, dict], picture: Path | None) -> Section:
    """Does a sample copy a training subject? Every system beside held-out subjects, which copy nobody."""
    first = next(iter(memorization.values()))
    sets = {name: result["samples"] for name, result in memorization.items()}
    sets["reference: held-out subjects"] = first["held_out"]
    summary = [
        [
            name,
            one["num"],
            100 * one["refused_share"],
            min((v for v in one["ratio_min"].values() if math.isfinite(v)), default=None),
            one["authenticity_mean"],
        ]
        for name, one in sets.items()
    ]
    channels = first["channels"]
    parts: list = [
        f"Each of {first['num_train_slices']} training slices of {first['num_train_subjects']} subjects was laid over each "
        f"sample under flips and shifts. The threshold tolerates {100 * first['false_alarm_rate']:.1f} % false alarms "
        f"(promised with 95 % confidence: {100 * first['false_alarm_rate_promised']:.1f} %).",
        Table(
            ["", "samples", "refused, %", "smallest ratio", "authenticity"],
            summary,
            "A system copies where more of its samples are refused than of held-out subjects, where the smallest distance "
            "to a training slice over that to a held-out one is far below theirs, or where fewer samples are authentic.",
        ),
        Table(
            ["median ratio", *channels],
            [[name, *(one["ratio"][channel] for channel in channels)] for name, one in sets.items()],
            "Distance to the nearest training slice over that to the nearest held-out slice: near the reference row, "
            "training subjects are no closer than strangers.",
        ),
    ]
    if picture is not None:
        meaning = (
            "the DLDM's samples that lie closest to a training slice, each above that slice: a copy would show the same "
            "anatomy in both rows."
        )
        parts.append(Picture(picture, "Closest training pairs (synthetic above, training below)", meaning))
    return Section("Memorisation", parts)


def reconstruction_section(result: dict) -> Section:
    """How well the autoencoder rebuilds held-out slices."""
    names, score = result["modalities"], result["psnr"]

    def row(title: str, values: dict[str, float]) -> list:
        return [title, *(values[name] for name in names), _mean(list(values.values()))]

    psnr = [
        row("structure from all", score["all"]),
        row("styles exchanged between subjects", score["exchanged"]),
        *(row(f"structure from {name} alone", score["single"][name]) for name in names),
        row("reference: another subject's real image", score["another_subject"]),
    ]
    costs = [
        row("styles exchanged", result["exchange_cost"]),
        row("structure from this modality alone", result["single_cost"]),
    ]
    parts: list = [
        f"{result['num_slices']} held-out slices of {result['num_subjects']} subjects.",
        Table(
            ["", *names, "mean"], psnr, "PSNR in dB (columns: the modality rebuilt): higher is closer to the original."
        ),
        Table(
            ["", *names, "mean"],
            costs,
            "Loss against structure from all, in dB: near 0 where the style carries appearance alone, and where one modality "
            "tells the whole structure.",
        ),
        f"Mean PSNR {result['psnr_mean']:.2f} dB, worst modality {result['psnr_worst']:.2f} dB, best - worst "
        f"{result['psnr_spread']:.2f} dB. Structure from one modality: {result['single_cost_mean']:.2f} dB below structure "
        f"from all; {result['single_cost_mean_others']:.2f} dB for the modalities not given.",
    ]
    if result["mask_dice"] is not None:
        header = ["structure from", "all", *(f"{name} alone" for name in names)]
        dice = ["Dice", result["mask_dice"], *(result["mask_dice_single"][name] for name in names)]
        parts.append(Table(header, [dice], "Tumour mask, decoded from the structure alone: 1 is the true mask."))
    parts.append(spectrum_table(result["spectrum"], names, "rebuilt"))
    return Section("Reconstruction", parts)


def spectrum_table(spectrum: dict, names: list[str], what: str) -> Table:
    """Power ratio at a few rings and the largest deviation over all of them."""
    rings = len(spectrum["ratio_mean"]) - 1
    shown = sorted({round(rings * part) for part in (0.05, 0.25, 0.5, 0.75, 1.0)})
    rows = [[name, *(spectrum["ratio"][name][r] for r in shown), spectrum["largest_deviation"][name]] for name in names]
    average = [spectrum["ratio_mean"][r] for r in shown]
    rows.append(["mean of ratios", *average, spectrum["largest_deviation_mean_ratio"]])
    header = ["", *(f"ring {r}" for r in shown), "largest deviation from 1, all rings"]
    meaning = f"Power spectrum, {what} over real (ring {rings} is half the Nyquist frequency): below 1 is blur, above 1 grain."
    return Table(header, rows, meaning)


def disentanglement_section(result: dict) -> Section:
    """Every probe of [`~dldm_pipeline.metrics.disentanglement.evaluate_disentanglement`], whatever their number."""
    if "left_out" in result:
        return Section("Disentanglement", [f"Left out: {result['left_out']}"])
    probes = {key: value for key, value in result.items() if isinstance(value, dict) and "accuracy" in value}

    def row(key: str, probe: dict) -> list:
        return [PROBE_TITLES.get(key, key), probe["features"], 100 * probe["accuracy"], 100 * probe["chance"]]

    by_modality = [row(key, probe) for key, probe in probes.items() if not key.startswith("subject")]
    by_subject = [[*row(key, probe), probe["auc"]] for key, probe in probes.items() if key.startswith("subject")]
    parts: list = [
        Table(
            ["code", "features", "accuracy", "chance"],
            by_modality,
            "A linear probe names the modality of unseen subjects, in % of codes: z_style should always tell it, z_struct no "
            "better than chance.",
        ),
        f"Structure: {result['structure_over_chance']:.1f} points over chance (the higher of the first two probes).",
    ]
    if by_subject:
        meaning = (
            "The code of one modality looks for its own subject among those of another, in %: z_struct should find it, "
            "z_style no better than chance (0.5 as area under the curve)."
        )
        parts.append(Table(["code", "features", "accuracy", "chance", "AUC"], by_subject, meaning))
    if "structure_agreement" in result:
        parts.append(
            f"Structures of two modalities of one subject lie {result['structure_agreement']['ratio']:.3f} times as far apart "
            "as those of two subjects: 0 is full agreement, 1 none."
        )
    return Section("Disentanglement", parts)


def generation_section(result: dict, names: list[str]) -> Section:
    """Power spectrum of the generated images."""
    return Section(
        "Sharpness of generated images",
        [
            f"{result['num_subjects']} subjects in {result['num_inference_steps']} + {result['num_style_inference_steps']} "
            f"steps, guidance {result['guidance_scale']}, {result['seconds_per_subject']:.2f} s a subject.",
            spectrum_table(result["spectrum"], names, "generated"),
            "Reference, what chance alone does between two halves of the validation subjects: largest deviation "
            f"{result['spectrum_validation_halves']['largest_deviation_worst']:.3f}.",
        ],
    )


def method_section(fidelity: dict[str, dict], second_real: str) -> Section:
    """How the scores came about: networks, numbers, intervals, and what the second real sample was."""
    first = next(iter(fidelity.values()))
    rows = [
        [name, *(counts[key] for key in ("real", "generated", "floor")), first["num_subjects"][name]["real"]]
        for name, counts in first["num_images"].items()
    ]
    counts = Table(
        ["", "real", "generated", SECOND, "real subjects"],
        rows,
        "Images that took part: scores of other numbers cannot be compared with these.",
    )
    networks = first["extractor"]["title"]
    if first["neighbour_extractor"] != first["extractor"]:
        networks += f"; precision, recall, density and coverage: {first['neighbour_extractor']['title']}"
    window = "-" if first["ssim_window"] is None else first["ssim_window"]
    return Section(
        "How it was measured",
        [
            f"Features: {networks}. Resizing: {first['extractor']['resize']}. Intensities: {first['window']}; "
            f"{first['extractor']['input_range']}. Neighbours: k = {first['k']}. MS-SSIM window: {window}.",
            f"The {SECOND}: {second_real}, in place of the generated images. Intervals: {first['num_resamples']} random "
            "halves of the subjects without replacement (a bootstrap would make a subject its own nearest neighbour).",
            counts,
        ],
    )


def _with_floor(fidelity: dict[str, dict]) -> dict[str, dict]:
    """System → its scores, and at the end those of the second real sample."""
    floor = next(iter(fidelity.values()))["floor"]
    return {name: result["scores"] for name, result in fidelity.items()} | {SECOND: floor["scores"]}


def _score_titles(result: dict) -> dict[str, str]:
    """Score → name; those of the two distances say which network made them."""
    return {score: result["titles"].get(score, name) for score, (name, _) in SCORE_MEANINGS.items()}


def _distance_note(result: dict) -> str:
    if result["extractor"]["name"] == "inception-v3":
        return (
            "The paper's clean-FID is thousands of times too small for images in 0-255 (see `metrics/features.py`), so "
            "compare ratios and not values."
        )
    return (
        f"The distance is that of {result['extractor']['title']} and no FID: compare ratios with the paper, not values."
    )


def _with_interval(entry: dict) -> str:
    if entry["low"] is None:
        return show(entry["value"])
    return f"{show(entry['value'])} [{show(entry['low'])}, {show(entry['high'])}]"


def _percent(value: float) -> str | None:
    return f"{100 * value:+.1f} %" if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
