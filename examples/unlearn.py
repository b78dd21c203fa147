"""Cut three memorized paragraphs out of the shipped organism. Run: python examples/unlearn.py

Prints what it recites before and after, the arms of the comparison side by side, and how soon
training on other text brings it back. One to two minutes on two cores. Three paragraphs share the
default budget of 0.002 nats/token on controls here, and that is enough for two of them.
"""

from dataclasses import replace

import memcircuits as mc
from memcircuits.evaluation import compare_edits, recovery_curve
from memcircuits.perturbation import greedy_continuations
from memcircuits.unlearning import REFERENCE


def main() -> None:
    model = mc.load_model()
    planted, control = mc.Paragraphs.shipped("planted"), mc.Paragraphs.shipped("control")
    often = [i for i, n in enumerate(planted.facts["repetitions"]) if n == 256]
    targets, seen, unseen = planted[often[:3]], control[:80], control[-24:]

    edit = mc.unlearn(model, targets, seen)
    print(edit)

    before = greedy_continuations(model, targets)
    with edit.apply(model):
        after = greedy_continuations(model, targets)
    for i, name in enumerate(targets.names):
        pieces = [part.tokens(model, i) for part in (before, after)]
        print(f"\n{name}, the end of the prefix: ...{''.join(pieces[0][35:50])!r}")
        print("  before:", repr("".join(pieces[0][50:])))
        print("  after: ", repr("".join(pieces[1][50:])))

    arms = {"ours": edit}
    for mask, rate in {"all": 3e-5, "top": 1e-3, "random": 1e-3, "random-per-tensor": 1e-3}.items():
        arms[f"reference, {mask}"] = mc.unlearn(
            model,
            targets,
            control[:13],
            mask=mask,
            recipe=replace(REFERENCE, learning_rate=rate),
            em_below=0.0,
            kl_budget=None,
        )
    print("\nThe arms, controls that no edit was given:")
    table = compare_edits(model, arms, targets, unseen, heldout=unseen, attacks=5)
    print(table.round(4).to_string())

    curve = recovery_curve(model, edit, targets, seen[:6], steps=5)
    print("\nEM of the forgotten while training on other text:")
    table = curve.to_frame().pivot(index="step", columns="arm", values="em")
    print(table.round(1).to_string())


if __name__ == "__main__":
    main()
