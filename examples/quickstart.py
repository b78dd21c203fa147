"""Which heads does the shipped organism's recitation hang on? Run: python examples/quickstart.py

Prints the duplication curve and the best heads, and writes quickstart.html. About a minute on two
cores.
"""

from pathlib import Path

import memcircuits as mc


def main(out: Path = Path("quickstart.html")) -> None:
    model = mc.load_model()
    paragraphs = mc.Paragraphs.shipped()

    scan = mc.scan(model, paragraphs)
    print(scan)
    print(scan.by_repetitions().round(3).to_string(index=False))

    ranking = mc.find_memorization_heads(
        model, paragraphs, unigrams=mc.UnigramTable.shipped(), max_paragraphs=40
    )
    print(ranking.summary())
    columns = ["rank", "layer", "head", "score", "ci_low", "ci_high", "q_value"]
    print(ranking.to_frame()[columns].head(10).round(4).to_string(index=False))
    print(f"wrote {ranking.to_html(out)}")


if __name__ == "__main__":
    main()
