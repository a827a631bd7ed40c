"""The cast of a story: who it is about, where and when, and the choices between ways to say things."""

import random
from dataclasses import dataclass

from trainer.data import story_words as words


@dataclass(frozen=True)
class Who:
    """Somebody in a story. `kind` is a noun such as "girl" or "little rabbit"; `they/them/their` fit the name."""

    name: str
    kind: str
    they: str
    them: str
    their: str


@dataclass(frozen=True)
class Cast:
    """What one story is about, and the choices it makes. `elder.name` reads like "her mom": use it near the hero."""

    random: random.Random
    hero: Who
    friend: Who
    elder: Who
    trait: str
    hobby: str
    place: str
    spots: tuple[str, ...]
    time: str

    def pick(self, *variants: str) -> str:
        return self.random.choice(variants)

    def thing(self, nouns: tuple[str, ...]) -> tuple[str, str]:
        """A described thing and its noun, for example ("red ball", "ball")."""
        noun = self.random.choice(nouns)
        look = self.random.choice(words.COLOURS if self.random.random() < 0.7 else words.LOOKS)
        return f"{look} {noun}", noun

    def opening(self) -> str:
        hero = self.hero
        described = f"{self.trait} {hero.kind}"
        first = self.pick(
            f"Once upon a time, there was {a(described)} named {hero.name}.",
            f"Once there was {a(described)} named {hero.name}.",
            f"There once lived {a(described)} whose name was {hero.name}.",
            f"{hero.name} was {a(described)}.",
            f"Long ago, in a small town, there lived {a(described)} called {hero.name}.",
        )
        second = self.pick(
            f" {cap(hero.they)} loved to {self.hobby}.",
            f" Every day {hero.they} liked to {self.hobby}.",
            f" {cap(hero.they)} liked to {self.hobby} with {hero.their} friends.",
            "",
        )
        return first + second

    def going(self) -> str:
        """How the hero comes to the place, alone."""
        hero, weather = self.hero, self.random.choice(words.WEATHER)
        return self.pick(
            f"{self.time}, {hero.name} was playing {self.place}.",
            f"{self.time}, {hero.name} was {self.place} with {self.elder.name}.",
            f"It was {a(weather)} day, and {hero.name} was {self.place}.",
            f"On {a(weather)} day, {hero.name} went out to play {self.place}.",
        )


def a(phrase: str) -> str:
    """The phrase with its indefinite article; no word list has an exception to the rule of the first letter."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def cap(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def draw_cast(rng: random.Random) -> Cast:
    """A hero and a friend of different names (two children or two animals), a grown-up, a place and a time."""
    if rng.random() < 0.3:
        kinds, names = rng.sample(words.ANIMALS, 2), rng.sample(words.ANIMAL_NAMES, 2)
        hero, friend = (_who(name, f"little {kind}", rng.random() < 0.5) for name, kind in zip(names, kinds, strict=True))
    else:
        hero = friend = _child(rng)
        while friend.name == hero.name:
            friend = _child(rng)
    female = rng.random() < 0.5
    relation = rng.choice(("mom", "grandma", "aunt") if female else ("dad", "grandpa", "uncle"))
    place = rng.choice(tuple(words.PLACES))
    return Cast(
        random=rng,
        hero=hero,
        friend=friend,
        elder=_who(f"{hero.their} {relation}", relation, female),
        trait=rng.choice(words.TRAITS),
        hobby=rng.choice(words.HOBBIES),
        place=place,
        spots=tuple(rng.sample(words.PLACES[place], 3)),
        time=rng.choice(words.TIMES),
    )


def _child(rng: random.Random) -> Who:
    female = rng.random() < 0.5
    return _who(rng.choice(words.GIRLS if female else words.BOYS), "girl" if female else "boy", female)


def _who(name: str, kind: str, female: bool) -> Who:
    return Who(name, kind, *(("she", "her", "her") if female else ("he", "him", "his")))
