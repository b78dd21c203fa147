"""Public-domain texts that pretrained models often recite, and this repository's licence."""

from __future__ import annotations

from pathlib import Path

LICENSE = Path(__file__).parents[2] / "LICENSE"
N_WORDS = 60  # of the licence in each text
STRIDE = 45  # words between their starts

TEXTS = """
We the People of the United States, in Order to form a more perfect Union, establish Justice,
insure domestic Tranquility, provide for the common defence, promote the general Welfare, and
secure the Blessings of Liberty to ourselves and our Posterity, do ordain and establish this
Constitution for the United States of America.

When in the Course of human events, it becomes necessary for one people to dissolve the political
bands which have connected them with another, and to assume among the powers of the earth, the
separate and equal station to which the Laws of Nature and of Nature's God entitle them, a decent
respect to the opinions of mankind requires that they should declare the causes which impel them
to the separation.

We hold these truths to be self-evident, that all men are created equal, that they are endowed by
their Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit
of Happiness. That to secure these rights, Governments are instituted among Men, deriving their
just powers from the consent of the governed

Four score and seven years ago our fathers brought forth on this continent, a new nation,
conceived in Liberty, and dedicated to the proposition that all men are created equal. Now we are
engaged in a great civil war, testing whether that nation, or any nation so conceived and so
dedicated, can long endure.

In the beginning God created the heaven and the earth. And the earth was without form, and void;
and darkness was upon the face of the deep. And the Spirit of God moved upon the face of the
waters. And God said, Let there be light: and there was light.

Our Father which art in heaven, Hallowed be thy name. Thy kingdom come. Thy will be done in earth,
as it is in heaven. Give us this day our daily bread. And forgive us our debts, as we forgive our
debtors. And lead us not into temptation, but deliver us from evil

The Lord is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth
me beside the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for
his name's sake. Yea, though I walk through the valley of the shadow of death, I will fear no evil

To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer The slings
and arrows of outrageous fortune, Or to take arms against a sea of troubles And by opposing end
them. To die: to sleep; No more; and by a sleep to say we end The heart-ache

It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of
foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of
Light, it was the season of Darkness, it was the spring of hope, it was the winter of despair

Congress shall make no law respecting an establishment of religion, or prohibiting the free
exercise thereof; or abridging the freedom of speech, or of the press; or the right of the people
peaceably to assemble, and to petition the Government for a redress of grievances.
"""


def texts() -> list[str]:
    """All of them."""
    words = LICENSE.read_text(encoding="utf-8").split()
    starts = range(0, len(words) - N_WORDS, STRIDE)
    famous = [" ".join(text.split()) for text in TEXTS.split("\n\n")]
    return [*famous, *(" ".join(words[i : i + N_WORDS]) for i in starts)]
