"""Part `recited`: what Gemma 3 270M recites of public-domain texts.

`known.txt` holds nine passages of the United States' founding documents and the King James Bible,
as they stand on very many pages of the web. `control.txt` was written for this page: nine passages
of the same length and style with other words, which no model can have read.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from pretrained_page.planted import example
from torch import Tensor

import memcircuits as mc
from memcircuits.base.statistics import bootstrap_interval, count_groups, group_means
from memcircuits.data.bos import bos_ids
from memcircuits.data.documents import read_document
from memcircuits.data.tokens import tokenizer_of
from memcircuits.measure.document.document_map import DocumentMap

FOLDER = Path(__file__).parent
PICTURE = FOLDER.parent / "images" / "pretrained-map.png"
TITLES = (
    "Preamble of the Constitution",
    "First Amendment",
    "Second Amendment",
    "Fourth Amendment",
    "Declaration of Independence, beginning",
    "Declaration of Independence, self-evident truths",
    "Psalm 23",
    "Ecclesiastes 3",
    "Matthew 6, the Lord's Prayer",
)
LENGTHS = {"n_prefix": 40, "n_continuation": 12}
STRIDE, SEED, N_PASSAGES = 6, 0, 8


def measure() -> dict[str, Any]:
    """Every window of both texts, behind BOS; those of the known text also without it."""
    start = time.process_time()
    model = mc.load_model(example().gemma3())
    known, control = FOLDER / "known.txt", FOLDER / "control.txt"
    options = {**LENGTHS, "stride": STRIDE, "progress": False}
    mapped = mc.document_map(model, known, **options)
    maps = {
        "nine passages": mapped,
        "nine passages, without BOS": mc.document_map(model, known, bos=False, **options),
        "nine passages that it cannot know": mc.document_map(model, control, **options),
    }
    page = mapped.to_html(PICTURE.with_suffix(".html"))
    take_picture(page)
    n_bytes = page.stat().st_size
    page.unlink()
    longest = mapped.spans_frame().head(N_PASSAGES)
    return {
        "model": mapped.provenance.model,
        "windows": {name: of_windows(each) for name, each in maps.items()},
        "passages": of_passages(mapped),
        "beginnings": of_beginnings(model),
        "longest": longest[["text", "n_tokens", "n_windows", "probability"]].to_dict("records"),
        "bytes": n_bytes,
        "seconds": round(time.process_time() - start),
    }


def passage_of(mapped: DocumentMap) -> Tensor:
    """Number of the passage in which the continuation of each window begins, [window]."""
    places = mapped.token_starts[mapped.starts + mapped.n_prefix].tolist()
    return torch.tensor([mapped.text.count("\n\n", 0, place) for place in places])


def is_regular(mapped: DocumentMap) -> Tensor:
    """The windows `STRIDE` tokens apart, and the last one.

    Those between them begin where something is recited, and would count it twice.
    """
    last = mapped.n_tokens - mapped.n_prefix - mapped.n_continuation
    return (mapped.starts % STRIDE == 0) | (mapped.starts == last)


def of_windows(mapped: DocumentMap) -> dict[str, Any]:
    """Means over regular windows; the interval is over passages, whose windows overlap."""
    regular = is_regular(mapped)
    measures = {name: values[regular] for name, values in mapped.measures.items()}
    passages = passage_of(mapped)[regular]
    em = group_means(measures["em"].float(), passages)
    low, high = bootstrap_interval(em, seed=SEED).tolist()
    return {
        "n": len(passages),
        "n_passages": count_groups(passages),
        "recited": int(mapped.is_memorized[regular].sum()),
        "em": [float(em.mean()), low, high],
        "nll": float(group_means(measures["nll"], passages).mean()),
    }


def of_passages(mapped: DocumentMap) -> list[dict[str, Any]]:
    """Each passage by itself."""
    passages, regular, rows = passage_of(mapped), is_regular(mapped), []
    for number, title in enumerate(TITLES):
        chosen = regular & (passages == number)
        own = {name: values[chosen] for name, values in mapped.measures.items()}
        rows.append(
            {
                "title": title,
                "n": len(own["em"]),
                "recited": int((own["em"] == mapped.n_continuation).sum()),
                "em": float(own["em"].float().mean()),
                "nll": float(own["nll"].mean()),
                "probability": float(own["log_prob"].exp().max()),
                "greedy": float(own["loose_match"].mean()),
            }
        )
    return rows


def of_beginnings(model: Any) -> list[dict[str, Any]]:
    """The first window of each passage, and what the model writes in its place."""
    paragraphs = windows_of(model, "known", stride=10_000)
    scan = mc.scan(model, paragraphs, near_verbatim=True, progress=False)
    frame = scan.to_frame()[["em", "similarity", "longest_match"]]
    titles = [TITLES[int(group.split()[1])] for group in paragraphs.metadata["group"]]
    written = [tokenizer_of(model).decode(row) for row in scan.greedy.tolist()]
    return [
        {"title": title, "written": decoded, **row}
        for title, decoded, row in zip(titles, written, frame.to_dict("records"), strict=True)
    ]


def windows_of(model: Any, name: str, stride: int) -> mc.Paragraphs:
    """Windows of every passage of a text; those of one passage are one group."""
    length = sum(LENGTHS.values())
    windows, passages = [], []
    for number, passage in enumerate((FOLDER / f"{name}.txt").read_text("utf-8").split("\n\n")):
        ids = read_document(f"{passage}\n", model).ids
        for start in range(0, len(ids) - length + 1, stride):
            windows.append(ids[start : start + length])
            passages.append(f"{name} {number}")
    return mc.Paragraphs(
        torch.stack(windows),
        LENGTHS["n_prefix"],
        metadata={"group": tuple(passages)},
        bos=bos_ids(model, "auto"),
    )


def take_picture(page: Path) -> None:
    """The page from its text on, on a screen of ordinary width, with the network cut off."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": 1280, "height": 1000}, offline=True).new_page()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_load_state("load")
        tab.locator("h2", has_text="The text").evaluate("heading => heading.scrollIntoView()")
        tab.wait_for_timeout(1000)  # text is laid out when it comes into view
        tab.screenshot(path=PICTURE)
        browser.close()


def text(measured: dict[str, Any]) -> list[str]:
    """The part as Markdown lines."""
    model, length = measured["model"], LENGTHS
    return [
        "## What it recites",
        "",
        f"`{model['name']}` ({model['architecture']}, weights of four bits read as "
        f"{model['dtype']}) is given {length['n_prefix']} tokens and has to write the next "
        f"{length['n_continuation']}, in windows that begin every {STRIDE} tokens of two texts: "
        "nine passages of the founding documents of the United States and the King James Bible, "
        "which are in the public domain, and nine passages of the same style that were written for "
        "this page, which no model can have read. Intervals are 95 % bootstrap intervals over "
        "passages, since windows of one passage overlap.",
        "",
        "| text | windows | recited in full | mean EM of 12 | 95 % interval | NLL, nats/token |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {row['n']} | {row['recited']} | {row['em'][0]:.2f} "
            f"| {row['em'][1]:.2f} to {row['em'][2]:.2f} | {row['nll']:.2f} |"
            for name, row in measured["windows"].items()
        ),
        "",
        "Without BOS is what a tool says that does not read a text as the model was trained (see "
        "[how your text reaches the model](text.md)). What this model was trained on is not "
        "public: that it recites a text says that it read it, not where.",
        "",
        "| passage | windows | recited in full | mean EM | NLL | highest probability of a window "
        "| tokens that are the greedy choice |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['title']} | {row['n']} | {row['recited']} | {row['em']:.1f} "
            f"| {row['nll']:.2f} | {row['probability']:.2f} | {100 * row['greedy']:.0f} % |"
            for row in measured["passages"]
        ),
        "",
        "A model of four bits slips here and there. What it writes after the first "
        f"{length['n_prefix']} tokens of a passage (`scan(near_verbatim=True)`; similarity is 1 "
        "minus the normalised Levenshtein distance of the tokens):",
        "",
        "| passage | EM | longest common run | similarity | it writes |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['title']} | {row['em']} | {row['longest_match']} | {row['similarity']:.2f} "
            f"| {' '.join(row['written'].split())} |"
            for row in measured["beginnings"]
        ),
        "",
        "The longest recited passages, without the tokens that were given:",
        "",
        "| passage | tokens | windows | probability |",
        "| --- | --- | --- | --- |",
        *(
            f"| {' '.join(row['text'].split())} | {row['n_tokens']} | {row['n_windows']} "
            f"| {row['probability']:.2f} |"
            for row in measured["longest"]
        ),
        "",
        f"`memcircuits map docs/pretrained_page/known.txt --model MODEL.gguf --n-prefix "
        f"{length['n_prefix']} --n-continuation {length['n_continuation']} --stride {STRIDE}` "
        "makes the page of which this is a picture "
        f"({measured['bytes'] / 1e3:.0f} kB):",
        "",
        "![The nine passages with recited stretches marked](images/pretrained-map.png)",
        "",
        f"{measured['seconds']} processor seconds for this part, loading included.",
        "",
    ]
