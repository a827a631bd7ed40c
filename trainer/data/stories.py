"""`stories`: an endless supply of simple children's stories, each a pure function of (index, seed).

A story has a cast (`story_cast`: hero, friend, grown-up, place), a plot that tells what happens to it (`story_plots`)
and words for the things in it (`story_words`). Names, pronouns and things are carried through, and the ending answers
the problem.
"""

import random

from trainer.data.story_cast import draw_cast
from trainer.data.story_plots import PLOTS


def story(index: int, seed: int = 0) -> str:
    """Story number `index` of the collection `seed`: 60 to 200 words of plain text, paragraphs divided by a line end.

    A pure function of its arguments, the same on every machine.
    """
    # A string seed goes through SHA-512 and not through hash(), which differs from process to process.
    rng = random.Random(f"story {seed} {index}")
    plot = rng.choice(PLOTS)
    return "\n".join(plot(draw_cast(rng)))
