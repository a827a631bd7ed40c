"""Plots about growing and helping. Each takes a cast and returns the paragraphs: beginning, middle, end."""

from trainer.data import story_words as words
from trainer.data.story_cast import Cast, a, cap


def scared(c: Cast) -> list[str]:
    h = c.hero
    fear, when, method, after = c.random.choice(words.FEARS)
    helper = c.random.choice((c.friend, c.elder))
    name = helper.name
    begin = f"{c.opening()} But {h.name} " + c.pick(
        f"was afraid of {fear}.",
        f"had one problem. {cap(h.they)} was scared of {fear}.",
        f"did not like {fear} at all.",
    )
    meet = (
        f"{c.time}, {h.name} was with {name}. " if helper is c.elder else f"{c.time}, {h.name} met {h.their} friend {name}. "
    )
    react = c.pick(
        f"{when}, {h.name} closed {h.their} eyes and wanted to run away.",
        f"{when}, {h.name} began to shake.",
        f'{when}, {h.name} cried, "I am scared!"',
    )
    comfort = c.pick(
        f'"It is fine to be scared," said {name}. "I am here with you."',
        f'"Take my hand," said {name}. "We can be brave together."',
        f'"I was scared of {fear} once too," said {name}. "I will show you what I do."',
    )
    act = c.pick(f"Then {name} {method}.", f"{cap(name)} {method}, and {h.name} watched.")
    look = c.pick(
        f"Slowly, {h.name} opened {h.their} eyes. {after}.",
        f"{h.name} took a deep breath and looked again. {after}.",
        f"{h.name} tried it too. It was not so bad! {after}.",
    )
    end = c.pick(
        f"{h.name} smiled. {cap(h.they)} was not afraid of {fear} anymore.",
        f'"I did it!" said {h.name}. {cap(h.they)} felt very brave.',
        f"After that, {h.name} knew that being brave means to try even when you are scared.",
        f'"Thank you," said {h.name}, and gave {name} a big hug. That night {h.they} slept very well.',
    )
    return [begin, f"{meet}{react} {comfort} {act}", f"{look} {end}"]


def broken(c: Cast) -> list[str]:
    h, e = c.hero, c.elder
    full, noun = c.thing(words.BREAKABLE)
    begin = f"{c.opening()} {cap(e.name)} had {a(full)} that {e.they} liked very much. " + c.pick(
        f'"Please be careful with it," {e.they} always said.',
        f"It stood on a shelf in the {c.pick('kitchen', 'hall', 'living room')}.",
    )
    crash = c.pick(
        f"{c.time}, {h.name} played {c.pick('tag', 'catch')} in the house and bumped into the {noun}.",
        f"{c.time}, {h.name} ran too fast and hit the {noun} with {h.their} arm.",
        f"{c.time}, {h.name} wanted to look at the {noun}, but it was heavy and {h.they} dropped it.",
    )
    crash += c.pick(
        " Crash! It broke into many pieces.", " It fell down and broke.", " The floor was full of little pieces."
    )
    choice = c.pick(
        f"{h.name} wanted to hide the pieces under the rug. But then {h.they} felt bad inside.",
        f'"What should I do?" thought {h.name}. {cap(h.they)} was afraid that {e.name} would be angry.',
        f"At first {h.name} wanted to say that the cat did it. But that was a lie.",
    )
    tell = c.pick(
        f'So {h.they} told the truth. "I broke your {noun}. I am sorry," said {h.name}.',
        f'{h.name} went to {e.name} and said, "I am so sorry. I broke the {full}."',
    )
    forgive = c.pick(
        f'"Thank you for telling me the truth," said {e.name}. "You are more important than a {noun}."',
        f'{cap(e.name)} was sad, but not angry. "It was brave of you to tell me," {e.they} said.',
    )
    end = c.pick(
        f"Together they fixed the {noun} with glue. It looked a little funny, but they both loved it.",
        f"They cleaned the floor together and made a new {noun} out of clay. {h.name} painted a heart on it.",
        f"{h.name} gave {h.their} own coins for a new {noun}. "
        f"{cap(h.they)} felt light and happy because {h.they} had been honest.",
    )
    return [begin, f"{crash} {choice}", f"{tell} {forgive} {end}"]


def gift(c: Cast) -> list[str]:
    h, f, e = c.hero, c.friend, c.elder
    item, missing, base, praise = c.random.choice(words.GIFTS)
    begin = f"{c.opening()} It was almost the birthday of {e.name}. " + c.pick(
        f'"I will make a {item}," said {h.name}.', f"{h.name} wanted to make {e.them} a {item} as a surprise."
    )
    make = c.pick(
        f"{h.name} got {base} and began to work. But there was one problem. There was no more {missing}!"
        if missing in ("paint", "string", "thread")
        else f"{h.name} got {base} and began to work. But there was one problem. There were no {missing}!",
        f"On the table there were {base}. But {h.name} could not find any {missing}.",
    )
    ask = c.pick(
        f'{cap(h.they)} went to the house of {h.their} friend {f.name} and asked, "Do you have some {missing}?"',
        f'{cap(h.they)} ran to {f.name}, a {f.kind} who lived next door. "May I have some {missing}, please?" '
        f"asked {h.name}.",
    )
    give = c.pick(
        f'"Yes, take as much as you need," said {f.name}. "May I help you?" "Of course!" said {h.name}.',
        f'"I have a lot of {missing}," said {f.name}. "Let us make the {item} together!"',
    )
    work = c.pick(
        f"They worked all {c.pick('morning', 'afternoon')}, and the {item} was ready just in time.",
        f"They made a big mess, but in the end the {item} was lovely.",
    )
    end = c.pick(
        f'"Happy birthday!" they shouted. {cap(e.name)} said that the {item} was {praise}. Everyone was happy.',
        f'When {e.name} saw the {item}, {e.they} smiled. "It is {praise}," {e.they} said, '
        f"and gave {h.name} and {f.name} a kiss.",
        f"{cap(e.name)} loved the {item} and said it was {praise}. "
        f"{h.name} learned that a gift made with love is the best gift.",
    )
    return [begin, f"{make} {ask} {give}", f"{work} {end}"]


def rescue(c: Cast) -> list[str]:
    h, e = c.hero, c.elder
    animal, trouble, care, healed, thanks = c.random.choice(words.RESCUES)
    begin = f"{c.opening()} {c.going()} " + c.pick(
        f"Then {h.they} heard a small sound {c.spots[0]}.",
        f"Something was moving {c.spots[0]}.",
        f"{cap(h.they)} saw something {c.spots[0]}.",
    )
    find = c.pick(
        f"It was a little {animal}. It {trouble}.",
        f"{h.name} went closer and found a {animal} that {trouble}.",
    )
    feel = c.pick(
        f'"You poor thing," said {h.name}. "I will help you."',
        f"{h.name} felt sorry for the {animal} and wanted to help.",
        f'"Do not be afraid," whispered {h.name} to the {animal}.',
    )
    fetch = c.pick(
        f'{cap(h.they)} called {e.name}. "Be very gentle," said {e.name}.',
        f"{cap(h.they)} asked {e.name} what to do, and {e.they} told {h.them}.",
        f"{cap(h.they)} thought of what {e.name} had taught {h.them}.",
    )
    heal = c.pick(
        f"{h.name} {care}. {c.pick('After some time', 'A little later', 'Soon')}, {healed}.",
        f"So {h.name} {care} and stayed with it. At last {healed}.",
    )
    end = c.pick(
        f"The {animal} {thanks} to say thank you. {h.name} waved and felt warm inside.",
        f"The {animal} {thanks}. After that, it came to visit {h.name} every {c.pick('day', 'week', 'spring')}.",
        f'The {animal} {thanks}, and {h.name} laughed. "You were very kind," said {e.name}.',
    )
    return [begin, f"{find} {feel} {fetch}", f"{heal} {end}"]


def learn(c: Cast) -> list[str]:
    h, f = c.hero, c.friend
    skill, fail, tip, success = c.random.choice(words.SKILLS)
    begin = f"{c.opening()} More than anything, {h.they} wanted to learn to {skill}."
    first = c.pick(
        f"{c.time}, {h.name} tried for the first time. But {h.they} {fail}.",
        f"{c.time}, {h.they} went out to try it. But {h.name} {fail} again and again.",
    )
    give_up = c.pick(
        f'"I will never learn it!" {h.they} cried.',
        f'"This is too hard," said {h.name} and sat down.',
        f"{h.name} was angry and wanted to stop.",
    )
    teach = c.pick(
        f'{cap(h.their)} friend {f.name} saw it. "I can {skill}. {tip}," said {f.name}.',
        f'Then {f.name}, a {f.kind} from down the road, came by. "I was bad at it too. {tip}," said {f.name}.',
    )
    practise = c.pick(
        f"{h.name} tried it again. The first time {h.they} {fail}, but {h.they} did not stop.",
        f"{h.name} practised every day, in the {c.pick('morning', 'evening')} and after lunch.",
        f"They practised together {c.place}. Each time it was a little better.",
    )
    end = c.pick(
        f'Then one day {h.name} {success}! "Look at me!" {h.they} shouted, and {f.name} clapped.',
        f"At last {h.name} {success}. {cap(h.they)} was so proud. {cap(h.they)} learned that you must never give up.",
        f'At the end of the week, {h.name} {success}. "You see? You only had to try again," said {f.name}.',
    )
    return [begin, f"{first} {give_up} {teach}", f"{practise} {end}"]


def warned(c: Cast) -> list[str]:
    h, e = c.hero, c.elder
    rule, why, result, cure = c.random.choice(words.WARNINGS)
    begin = f'{c.opening()} {c.time}, {e.name} said, "{h.name}, do not {rule}, because {why}." ' + c.pick(
        f'"I will be careful," said {h.name}.',
        f"{h.name} nodded, but {h.they} did not really listen.",
        f'"Yes, I know," said {h.name}.',
    )
    tempt = c.pick(
        f'But soon {h.name} forgot about it. "Just once," {h.they} thought.',
        f"But when nobody was looking, {h.name} did it anyway.",
        f"But {h.name} did not think that it was true, and {h.they} wanted to find out.",
    )
    happen = c.pick(
        f"Then it happened. {h.name} {result}.",
        f"It was fun for a moment. Then {h.name} {result}.",
        f"Oh no! {h.name} {result}.",
    )
    cry = c.pick('"Oh no, oh no!"', '"Oh dear, help me!"', '"I should have listened!"')
    help_ = f"{cry} cried {h.name}. {cap(e.name)} came quickly and {cure}."
    talk = c.pick(
        f'"Now you know why I told you not to {rule}," {e.they} said.',
        f'"I am not angry. I only want you to be safe," {e.they} said.',
    )
    end = c.pick(
        f'"I am sorry. Next time I will listen," said {h.name}. And {h.they} did.',
        f"{h.name} felt better and gave {e.name} a hug. {cap(h.they)} never did it again.",
        f"From then on, {h.name} listened when {e.name} told {h.them} to be careful.",
    )
    return [begin, f"{tempt} {happen}", f"{help_} {talk} {end}"]
