"""Write docs/images from the shipped organism: python docs/make_screenshots.py [--work DIR].

Computes every result that a picture shows (seed 0; about ten minutes on two cores; results kept in
--work are not computed again), opens the pages in Chromium with the network cut off, and prints how
long the report took to open and what each picture weighs. Needs the extra `dev` and Chromium.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import memcircuits as mc
from memcircuits.display import figures
from memcircuits.editing.edit_report import edit_arms
from memcircuits.editing.evaluation import evaluate_edit
from memcircuits.editing.noise import weight_noise
from memcircuits.editing.planting import Planted
from memcircuits.editing.relearning import recovery_curve
from memcircuits.evidence.patching.sweeps import patch_layers
from memcircuits.evidence.triggers.minimal_sets import minimal_sets
from memcircuits.measure.decoding import greedy_continuations
from memcircuits.organism.delta import FILE as PLANTED
from memcircuits.results.result import Result

IMAGES = Path(__file__).with_name("images")
HEAD = mc.Head(0, 6)  # the first head, which also attends most to rare tokens
MODEL = "organism, seed 0"


class Results:
    """Results by name, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in mc.__all__:  # a result is read by the module that made it
            getattr(mc, name)

    def get(self, name: str, make: Callable[[], Result]) -> Any:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            print(f"computing {name}", flush=True)
            make().save(path)
        return Result.load(path)


def collect(kept: Results) -> dict[str, Any]:
    """Figures by name; writes the report and the attention view."""
    model, paragraphs = mc.load_model(), mc.Paragraphs.shipped()
    unigrams = mc.UnigramTable.shipped()
    scan = kept.get("scan", lambda: mc.scan(model, paragraphs))
    ranking = kept.get(
        "ranking", lambda: mc.find_memorization_heads(model, paragraphs, unigrams=unigrams)
    )
    ranking = dataclasses.replace(ranking, model=model, unigrams=unigrams)  # these are not saved
    memorized, control = ranking.memorized, ranking.control
    five, ten = list(range(5)), list(range(10))
    few, others = memorized[list(range(20))], control[list(range(20))]
    perturbed = {
        "memorized": kept.get("perturbed", lambda: mc.perturb_prefix(model, few)),
        "control": kept.get(
            "perturbed-control",
            lambda: mc.perturb_prefix(model, greedy_continuations(model, others)),
        ),
    }
    pairs = perturbed["memorized"].pairs(model=model)
    patches = {
        site: kept.get(
            f"patch-{site}",
            lambda site=site: mc.patch_heads(model, pairs.clean, pairs.corrupted, site=site),
        )
        for site in ("q", "k", "v", "z")
    }
    rare = kept.get("rare", lambda: mc.rare_token_attention(model, memorized, unigrams))
    targets, rest = memorized[five], memorized[list(range(5, 15))]
    objective, heldout = control[list(range(40))], control[list(range(40, 60))]
    edits = {
        f"{mask} 0.1 %": kept.get(
            f"edit-{mask}",
            lambda mask=mask: mc.unlearn(model, targets, objective, depth="surface", mask=mask),
        )
        for mask in ("top", "random")
    }
    reports = {
        name: kept.get(
            f"report-{name.split()[0]}",
            lambda edit=edit: evaluate_edit(model, edit, targets, heldout, attacks=5),
        )
        for name, edit in edits.items()
    }
    top = edits["top 0.1 %"]
    shown = {
        "duplication": scan.figure(),
        "em-against-nll": figures.em_against_nll(
            scan.to_frame(), title=f"Paragraphs by recitation and loss ({MODEL})"
        ),
        "heads": ranking.figure(),
        "gradients": kept.get(
            "gradients", lambda: mc.parameter_gradients(model, memorized)
        ).figure(),
        "activations": kept.get(
            "activations", lambda: mc.activation_gradients(model, few)
        ).figure(),
        "perturbation": figures.perturbation_curves(
            pd.concat([result.curves().assign(set=name) for name, result in perturbed.items()]),
            title="One prefix token replaced at random: mean of 20 paragraphs",
        ),
        "minimal": kept.get("minimal", lambda: minimal_sets(model, few[five])).figure(),
        "rare-tokens": rare.figure(),
        "attention-by-rank": rare.figure(head=HEAD),
        "patching": figures.patching_map(
            {site: result.values for site, result in patches.items()},
            title="Each head patched with its activation from the perturbed run (20 pairs)",
            name="effect on NLL",
            units=patches["z"].units,
        ),
        "patching-layers": kept.get(
            "patch-layers", lambda: patch_layers(model, pairs.clean[five], pairs.corrupted[five])
        ).figure(),
        "unlearning": figures.arms(
            edit_arms({"before": reports["top 0.1 %"], **reports}),
            title="5 paragraphs unlearned, 0.1 % of the weights for each",
        ),
        "edit": top.figure(),
        "recovery": kept.get(
            "recovery", lambda: recovery_curve(model, top, targets, rest, steps=10)
        ).figure(),
        "noise": kept.get("noise", lambda: weight_noise(model, few[ten], others[ten])).figure(),
    }
    scan.to_html(kept.folder / "scan.html", model=model)
    ranking.to_html(kept.folder / "report.html")
    ranking.attention(pairs.clean[0], compare=pairs.corrupted[0], heads=6).to_html(
        kept.folder / "attention.html"
    )
    compare_with_planted(kept, model, scan)
    return shown


def compare_with_planted(kept: Results, model: Any, scan: Any) -> None:
    """The page that compares the organism with itself after four paragraphs were planted."""
    paragraphs = scan.memorized[:10] + mc.Paragraphs.shipped("control")[:10]
    compared = kept.get(
        "comparison",
        lambda: mc.compare(
            model,
            mc.load_model("organism-planted"),
            paragraphs + Planted.load(PLANTED).paragraphs,
        ),
    )
    compared.to_html(kept.folder / "compare.html", model=model)


def write(name: str, raw: bytes) -> None:
    """Save a picture with a palette: charts have few colours."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    path = IMAGES / f"{name}.png"
    image.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(IMAGES.parents[1])}: {path.stat().st_size / 1000:.0f} kB")


def opened(browser: Browser, path: Path, width: int, height: int, **options: Any) -> Page:
    """A page opened from a file, offline."""
    context = browser.new_context(
        offline=True, viewport={"width": width, "height": height}, **options
    )
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    return page


def shoot(browser: Browser, shown: dict[str, Any], folder: Path) -> None:
    """Take all pictures."""
    page = opened(browser, folder / "report.html", 1200, 900)
    timing = "performance.getEntriesByType('navigation')[0]"
    print(f"the report opened in {page.evaluate(f'{timing}.loadEventEnd'):.0f} ms")
    write("report-top", page.screenshot())
    page.set_viewport_size({"width": 1200, "height": 1700})
    opened_at(page, "Every head")
    write("report", page.screenshot())
    write("scan", opened(browser, folder / "scan.html", 1200, 1100).screenshot())
    write("compare", opened(browser, folder / "compare.html", 1200, 1100).screenshot())
    phone = opened(browser, folder / "report.html", 390, 1500, device_scale_factor=1.5)
    opened_at(phone, "Every head")
    write("report-phone", phone.screenshot())
    view = opened(browser, folder / "attention.html", 1200, 900)
    drawn(view)
    write("attention", view.locator("section").first.screenshot())
    for name, figure in shown.items():
        path = folder / f"{name}.html"
        figure.write_html(path, include_plotlyjs=True)
        width, height = int(figure.layout.width), int(figure.layout.height)
        page = opened(browser, path, width + 20, height + 20)
        page.wait_for_selector(".main-svg")
        write(name, page.locator(".svg-container").screenshot())


def opened_at(page: Page, heading: str) -> None:
    """Scroll to a section, as a link of the table of contents does."""
    page.locator("nav a", has_text=heading).click()
    page.wait_for_timeout(500)


def drawn(page: Page) -> None:
    """Scroll to every view, wait until CircuitsVis has drawn, and go back to the top."""
    for place in page.locator(".cv").all():
        place.scroll_into_view_if_needed()
        canvas = place.locator("canvas")
        canvas.wait_for()
        page.wait_for_function("canvas => canvas.width > 200", arg=canvas.element_handle())
    page.wait_for_timeout(3000)  # it grows into its place
    page.evaluate("scrollTo(0, 0)")


def main() -> None:
    """Compute, open, shoot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder that keeps results and pages")
    work = parser.parse_args().work
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        IMAGES.mkdir(exist_ok=True)
        shown = collect(Results(folder))
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            shoot(browser, shown, folder)
            browser.close()
    total = sum(path.stat().st_size for path in IMAGES.iterdir())
    print(f"all pictures: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
