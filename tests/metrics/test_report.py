"""The report of measured results: those of docs/comparison, which examples/evaluate.py wrote for three systems."""

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dldm_pipeline.metrics import report
from dldm_pipeline.metrics.report import PAPER, SECOND, build_tables, claims, mean_scores, show, write_report

MEASURED = Path(__file__).parents[2] / "docs" / "comparison" / "metrics.json"
ALONE = ("model", "dataset", "seed", "segmenter_dice", "reconstruction", "disentanglement", "alignment", "seconds")


@pytest.fixture
def results() -> dict:
    measured = json.loads(MEASURED.read_text())
    names = measured["reconstruction"]["modalities"]
    by_name = {name: 0.5 + 0.01 * i for i, name in enumerate(names)}
    truth = {key: by_name for key in ("own", "exchanged", "mean_style", "copied")}
    truth |= {f"{key}_mean": 20.0 + i for i, key in enumerate(truth)}
    truth |= {"exchange_cost": 0.7, "gap_closed": 0.85, "white_dice_kept": 0.97}
    probes = {kind: {tissue: by_name for tissue in ("white", "grey", "csf")} for kind in ("style", "structure")}
    return measured | {"exchange": {"truth": truth, "probes": probes}}


@pytest.fixture
def pictures(tmp_path) -> dict[str, Path]:
    names = ("appearances", "scores", "systems", "steps", "closest_pairs")
    for i, name in enumerate(names):
        Image.new("L", (4, 3), 50 * i).save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in names}


class Page(HTMLParser):
    """Reads a page: its tables, its links, its text, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.rows, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("html", "meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("h2", "p", "figcaption") else ""

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] in ("h2", "p", "code", "figcaption"):
            self.text += data


def test_both_forms_say_the_same(results, pictures, tmp_path):
    results["dataset"], results["systems"]["DLDM"]["folder"] = "<here> & there", "<a>|b"
    text = write_report(results, pictures, tmp_path)
    assert text == (tmp_path / "report.md").read_text() and re.match(r"# Evaluation\n\n## Overview\n\nModel: `", text)
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []

    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert rows == page.rows and len({len(row) for row in rows}) > 5 and ["DLDM", "<a>|b"] == rows[1][:2]
    tables = build_tables(results)
    tables |= tables.pop("alignment")
    assert sorted(rows) == sorted([show(cell) for cell in row] for table in tables.values() for row in table)
    words = re.sub(r"^#+ |`|^!.*|^\|.*", "", text.partition("## ")[2], flags=re.M).split()
    assert words == page.text.split()

    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == [path.name for path in pictures.values()]
    for link, path in zip(page.links, pictures.values(), strict=True):
        assert base64.b64decode(link.removeprefix("data:image/png;base64,")) == path.read_bytes()


def test_what_was_not_measured_has_no_section(results, pictures, tmp_path):
    def headings(measured: dict, shown: dict) -> list[str]:
        return re.findall("^## (.*)", write_report(measured, shown, tmp_path), re.M)

    assert len(headings(results, pictures)) == 12
    truth = (tmp_path / "report.md").read_text()
    assert "costs 0.70 dB, and goes 85 % of the way" in truth and "| grey matter, from z_struct | 0.500 |" in truth
    curves = {"donor": {"T1": 0.9}, "own": {"T1": 0.1}, "num_slices": 40}
    write_report(results | {"exchange": {"curves": curves}}, pictures, tmp_path)
    assert "| with that of the slice itself | 0.100 |" in (tmp_path / "report.md").read_text()
    alone = {name: results[name] for name in ALONE} | {"disentanglement": {"left_out": "too few subjects"}}
    alone |= {"exchange": {"left_out": "no T1"}}
    names = ["Overview", "One anatomy, many appearances", "Alignment", "Reconstruction", "Disentanglement"]
    assert headings(alone, {}) == names and "Left out: no T1" in (tmp_path / "report.md").read_text()
    assert "Left out: too few subjects" in (tmp_path / "report.html").read_text()
    results["reconstruction"]["mask_dice"] = None
    del results["steps"], results["memorization"]
    shorter = headings(results, {name: pictures[name] for name in ("scores", "systems")})
    assert len(shorter) == 10 and "Tumour mask" not in (tmp_path / "report.md").read_text()
    with pytest.raises(OSError, match="no.png"):
        write_report(alone, {"scores": tmp_path / "no.png"}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_cells_and_the_papers_claims():
    values = [None, float("nan"), 3, "a", 0.0, 1.23456, 0.98, 0.012345, -0.0005, 19.04]
    expected = ["-", "-", "3", "a", "0.000", "1.235", "0.980", "0.0123", "-0.0005", "19.040"]
    assert [show(value) for value in values] == expected
    paper = claims(PAPER)
    assert paper["frechet_ratio"] == pytest.approx(0.24, abs=0.002)
    assert paper["precision_gain"] == pytest.approx(0.23437) and paper["recall_gain"] == pytest.approx(0.27792)
    own = {"frechet_distance": 2.0, "precision": 0.9, "recall": 0.8}
    floor = {"frechet_distance": 1.0, "precision": 0.95, "recall": 1.0}
    assert claims({"DLDM": own, SECOND: floor}) == {"precision_share": 0.9 / 0.95, "recall_share": 0.8}


def test_tables_of_scores(results, pictures, tmp_path):
    fidelity, tables = results["fidelity"], build_tables(results)
    means = mean_scores(fidelity)
    assert list(means) == ["DLDM", "StyleGAN2", "plain LDM", SECOND] and claims(means)["frechet_ratio"] < 1
    header, *rows = tables["paper"]
    assert header[1:3] == ["paper: clean-FID", "ours: Fréchet distance (EfficientNet-Lite0, pooled)"]
    rows = {row[0]: row[1:] for row in rows}
    assert rows["DLDM"][:2] == ["0.00070", means["DLDM"]["frechet_distance"]]
    assert rows["StyleGAN2"][2] == "0.67771" and rows[SECOND][0] is None
    assert tables["claims"][1][1] == pytest.approx(0.239, abs=1e-3)

    scores, by_modality = tables["scores"], tables["scores_by_modality"]
    assert scores[0] == ["", *means, "best"] and len(scores) == 1 + 8
    assert re.fullmatch(r"\S+ \[\S+, \S+\]", scores[1][1])
    assert scores[7][-1] == fidelity["DLDM"]["diversity_real"]["mean"]
    assert by_modality[0] == ["", *fidelity["DLDM"]["modalities"], "mean"] and len(by_modality) == 1 + 8 * 4
    first, *_, last = tables["steps"][1:]
    assert last[0] == SECOND and first[1] == results["steps"]["entries"][0]["frechet_distance"]
    assert by_modality[2][1] == fidelity["StyleGAN2"]["scores"]["frechet_distance"]["T1"]["value"]

    assert "is not an FID" in write_report(results, pictures, tmp_path)
    fidelity["DLDM"]["extractor"]["name"] = "inception-v3"
    assert "clean-FID is thousands of times too small" in write_report(results, pictures, tmp_path)


def test_alignment_and_probes_show_every_measure_there_is(results, pictures, tmp_path):
    sets = results["alignment"]
    del sets["plain LDM"]
    sets["DLDM"]["enhancement"] = dict.fromkeys(sets["DLDM"]["enhancement"])  # as of a system without masks
    sets["validation"]["new_measure"], sets["rebuilt"]["new_measure"] = {"A": 1.0, "B": 3.0}, {"A": 2.0, "B": 3.0}
    for name in ("DLDM", "StyleGAN2"):
        sets[name]["new_measure"] = {"A": 0.0, "B": None}
    results["disentanglement"]["new"] = copy.copy(results["disentanglement"]["style"])
    tables = build_tables(results)
    edges = {row[0]: row[1:] for row in tables["alignment"]["edge_correlation"]}
    assert edges["validation subjects"][:-1] == list(sets["validation"]["edge_correlation"].values())
    assert edges["reference: shuffled validation subjects"][0] < edges["DLDM"][0]
    assert re.fullmatch(r"[+-]\d+\.\d %", edges["DLDM, change"][0]) and edges["DLDM, change"][-1] is None
    assert show({row[0]: row[1] for row in tables["alignment"]["enhancement"]}["DLDM"]) == "-"
    new = tables["alignment"]["new_measure"]
    assert new[0] == ["New measure", "A", "B", "mean"] and [row[-1] for row in new[1:]] == [2.0, 2.5, 0.0, 0.0]
    assert tables["modality_probes"][-1][0] == "new" and "| new | " in write_report(results, pictures, tmp_path)


def test_plots(results, tmp_path):
    scores = results["fidelity"]["DLDM"]["scores"]
    results["fidelity"]["DLDM"]["scores"] = {name: scores[name] for name in ("precision", "diversity")}
    report.plot_scores(results["fidelity"], tmp_path / "scores.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "scores.png").convert("RGB")).reshape(-1, 3), axis=0)) > 8
    steps = results["steps"]
    report.plot_steps(steps, tmp_path / "steps.png")
    report.plot_steps(steps | {"floor": None}, tmp_path / "alone.png")
    assert Image.open(tmp_path / "steps.png").width >= 400
    assert (tmp_path / "steps.png").read_bytes() != (tmp_path / "alone.png").read_bytes()


def test_sheet_of_systems(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (30, 2, 48, 48)).astype(np.uint8)
    present = np.ones((30, 2), dtype=bool)
    present[0, 1] = False
    systems = {"DLDM": images[:5], "plain LDM": images[5:6]}
    report.systems_sheet(images, present, systems, ["T1", "WB"], tmp_path / "sheet.png")
    page = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"), dtype=int)
    tile = 3 * 48  # enlarged to about 128
    assert page.shape[0] == pytest.approx(5 * tile, abs=60)  # two real, two DLDM, one plain LDM
    top = page.shape[0] - 5 * (tile + 3)
    assert page[top : top + tile, -tile:].std() < 3 < page[top + tile + 6 : top + 2 * tile, -tile:].std()
