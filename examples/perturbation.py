"""Which token triggers a recitation, which head carries it? Run: python examples/perturbation.py

Replaces every prefix token of one memorized paragraph, shows what the model writes without the most
important one, and puts activations of the heads back, one at a time. Half a minute on two cores.
"""

import memcircuits as mc


def main() -> None:
    model = mc.load_model()
    planted = mc.Paragraphs.shipped("planted")
    rarely = [i for i, times in enumerate(planted.facts["repetitions"]) if times == 64]
    paragraph = mc.scan(model, planted[rarely]).memorized[0]
    tokens, n = paragraph.tokens(model), paragraph.n_prefix
    print(f"{paragraph.names[0]} was planted 64 times. After the prefix\n  {flat(tokens[:n])}")
    print(f"the model goes on\n  {flat(tokens[n:])}\n")

    perturbed = mc.perturb_prefix(model, paragraph, draws=4)
    print(perturbed)
    frame = perturbed.to_frame().sort_values("drop", ascending=False).head(5)
    frame["token"] = [repr(tokens[position]) for position in frame["position"]]
    columns = ["position", "token", "em", "em_se", "drop", "surprisal"]
    print(frame[columns].round(2).to_string(index=False))

    clean, corrupted = perturbed.pairs()
    position, em = corrupted.facts["position"][0], corrupted.facts["em"][0]
    new = corrupted.tokens(model)
    print(f"\n{new[position]!r} in the place of {tokens[position]!r} leaves {em} of 50 tokens:")
    print(f"  {flat(new[n:])}\n")

    options = {"metric": "logit_diff", "direction": "denoising"}
    print("Of what that did to the first wrong token, one head of the clean run brings back:")
    for site, positions in {"v": "changed", "z": None}.items():
        patched = mc.patch_heads(model, clean, corrupted, site=site, positions=positions, **options)
        best, share = patched.top(1)[0], float(patched.share.max())
        where = "at the replaced token" if positions else "at all positions"
        print(f"  {share:4.0%} by the {site} of {best} {where}")


def flat(tokens: list[str]) -> str:
    return " ".join("".join(tokens).split())


if __name__ == "__main__":
    main()
