"""Plots about play and friends. Each takes a cast and returns the paragraphs: beginning, middle, end."""

from trainer.data import story_words as words
from trainer.data.story_cast import Cast, a, cap


def lost(c: Cast) -> list[str]:
    h, f = c.hero, c.friend
    full, noun = c.thing(words.TOYS)
    wrong, right = c.spots[:2]
    begin = f"{c.opening()} {cap(h.they)} had {a(full)} and " + c.pick(
        f"took it everywhere. {c.going()}", f"loved it very much. {c.going()}", f"was very proud of it. {c.going()}"
    )
    problem = c.pick(
        f"After a while, {h.name} saw that the {noun} was gone.",
        f"When it was time to go home, {h.name} could not find the {noun}.",
        f"{cap(h.they)} put the {noun} down to play {c.pick(*words.GAMES)}, and then it was gone.",
    )
    sad = c.pick(
        f'"Oh no! Where is my {noun}?" cried {h.name}.',
        f"{h.name} felt sad and began to cry.",
        f'"I lost my {full}," said {h.name} with a sad face.',
    )
    friend = c.pick(
        f"A {f.kind} named {f.name} heard {h.them}.", f"{cap(h.their)} friend {f.name} came to see what was wrong."
    )
    offer = c.pick(
        '"Do not worry. I will help you look,"', '"Let us look for it together,"', '"Two can look better than one,"'
    )
    search = c.pick(
        f"They looked {wrong}, but it was not there. Then they looked {right}.",
        f"First they looked {wrong}. No {noun}! Next they looked {right}.",
        f"{h.name} looked {wrong} and found nothing. {f.name} looked {right}.",
    )
    found = c.pick(f"There was the {full}!", f"And there it was, the {full}!", f'"Look! Here is the {noun}!" said {f.name}.')
    end = c.pick(
        f'{h.name} hugged the {noun} and said, "Thank you, {f.name}!" From then on, {h.they} always put it in a safe place.',
        f"{h.name} was so happy that {h.they} gave {f.name} a big hug. They played with the {noun} until the sun went down.",
        f'"You are a good friend," said {h.name}. {cap(h.they)} let {f.name} play with the {noun}, and they both laughed.',
        f"{h.name} smiled and held the {noun} tight. {cap(h.they)} learned that it is good to ask for help.",
    )
    return [begin, f"{problem} {sad} {friend} {offer} said {f.name}. {search} {found}", end]


def stuck(c: Cast) -> list[str]:
    h, f = c.hero, c.friend
    full, noun = c.thing(words.FLYING)
    where = c.pick("in a tall tree", "on the roof of a house", "on top of a high wall", "in the branches of an old oak")
    tool = c.pick("a long stick", "a ladder", "a fishing net", "a broom", "a long rope")
    begin = f"{c.opening()} {c.going()} {cap(h.they)} had {a(full)} with {h.them}."
    up = c.pick(
        f"A strong wind took the {noun} and blew it up high. It got stuck {where}.",
        f"The {noun} went up, up, up. Then it got stuck {where}!",
        f"{h.name} threw the {noun} too high, and it got stuck {where}.",
    )
    tries = c.pick(
        f"{h.name} jumped and jumped, but it was too high.",
        f"{h.name} tried to reach it, but {h.they} was too small.",
        f"{h.name} shook and pushed, but the {noun} did not come down.",
    )
    ask = c.pick(
        f'Then {h.their} friend {f.name} came by. "What is wrong?" asked {f.name}. "My {noun} is stuck," said {h.name}.',
        f'{h.name} saw {f.name}, a {f.kind} who lived near by. "Can you help me, please?" asked {h.name}.',
    )
    idea = c.pick(
        f'"I have an idea!" said {f.name}. {cap(f.they)} ran home and came back with {tool}.',
        f'{f.name} thought hard. "We can use {tool}," {f.they} said, and went to get it.',
    )
    down = c.pick(
        f"Together they used it to get the {noun} down.",
        f"They worked as a team, and soon the {noun} came down.",
        f"It took a long time, but at last the {noun} fell into the hands of {h.name}.",
    )
    end = c.pick(
        f'"We did it!" they shouted. {h.name} and {f.name} took turns with the {full} all day.',
        f"{h.name} thanked {f.name} and shared some {c.pick(*words.SNACKS)} with {f.them}. They became best friends.",
        f"{h.name} was very glad. {cap(h.they)} learned that a hard thing is easy when friends work together.",
    )
    return [begin, f"{up} {tries} {ask}", f"{idea} {down} {end}"]


def share(c: Cast) -> list[str]:
    h, f, e = c.hero, c.friend, c.elder
    full, noun = c.thing(words.TOYS)
    begin = f"{c.opening()} {c.going()} {cap(h.their)} friend {f.name} was there too."
    want = c.pick(
        f"They saw {a(full)} {c.spots[0]}, and both of them wanted it.",
        f"{h.name} had {a(full)}, and {f.name} wanted to play with it.",
        f"{f.name} found {a(full)}, but {h.name} wanted it too.",
    )
    fight = c.pick(
        f'"It is mine!" said {h.name}. "No, it is mine!" said {f.name}. They pulled and pulled.',
        f'"I want it!" shouted {h.name}. "I want it more!" shouted {f.name}. Soon they were both very angry.',
        f"{h.name} held it tight and would not let go. {f.name} began to cry.",
    )
    advice = c.pick(
        f'"If you fight, nobody can have fun," {c.pick("said", "explained")} {h.name}\'s {e.kind}. '
        '"Why do you not take turns?"',
        f'{h.name}\'s {e.kind} heard the noise and came. "{cap(a(noun))} is more fun for two," {e.they} said.',
        f'{h.name}\'s {e.kind} sat down with them. "Good friends share," {e.they} said softly.',
    )
    sorry = c.pick(
        f'{h.name} thought about it. "I am sorry, {f.name}. You can go first," {h.they} said.',
        f'{h.name} felt bad. "Let us share the {noun}," {h.they} said, and {f.name} nodded.',
        f'"I am sorry," said {h.name}. "I am sorry too," said {f.name}.',
    )
    end = c.pick(
        f"They took turns with the {full} and laughed a lot. It was much better than fighting.",
        f"They made up a new game with the {noun} and played it all day. Sharing made them both happy.",
        f"From that day on, {h.name} and {f.name} always shared their toys, and nobody was sad.",
    )
    return [begin, f"{want} {fight}", f"{advice} {sorry} {end}"]


def spoiled(c: Cast) -> list[str]:
    h, f, e = c.hero, c.friend, c.elder
    plan, weather, instead, feeling = c.random.choice(words.PLANS)
    snack = c.pick(*words.SNACKS)
    begin = f"{c.opening()} {c.time}, {h.name} and {h.their} friend {f.name} wanted to {plan}. " + c.pick(
        "They had waited for it all week.",
        f"They packed some {snack} and put on their shoes.",
        f"{f.name} was so excited that {f.they} jumped up and down.",
    )
    problem = c.pick(
        f"But then something happened. {weather}!",
        f"{weather} just as they opened the door.",
        f"They were almost ready. But oh no! {weather}.",
    )
    sad = c.pick(
        f'"Now the day is bad," said {h.name}.',
        f"{f.name} looked out of the window and sighed.",
        f"{h.name} and {f.name} were very sad.",
    )
    idea = c.pick(
        f'"Do not be sad," said {h.name}\'s {e.kind}. "We can find something else to do."',
        f'{h.name} thought and thought. "I have an idea!" {h.they} said.',
        f'"Wait," said {f.name}. "I know what we can do!"',
    )
    do = f"So they {instead}. It was {feeling}."
    end = c.pick(
        f"They ate {snack} and told stories until dinner. {h.name} said that it was the best day of the week.",
        f'"I am glad that we could not {plan}," laughed {h.name}. "This is even more fun!"',
        f'When it was time to go home, {f.name} asked, "Can we do this again?" "Yes!" said {h.name}.',
        f"{h.name} learned that a bad start can still become a good day.",
    )
    return [begin, f"{problem} {sad} {idea}", f"{do} {end}"]


def treasure(c: Cast) -> list[str]:
    h, f = c.hero, c.friend
    full, noun = c.thing(words.TREASURES)
    begin = f"{c.opening()} {c.going()} There, {c.spots[0]}, {h.they} found {a(full)}."
    want = c.pick(
        f'"How pretty! I want to keep it," thought {h.name}.',
        f"{h.name} put the {noun} into {h.their} pocket and smiled.",
        f'"This is my lucky day!" said {h.name}.',
    )
    owner = c.pick(
        f"Then {h.they} saw {f.name}, a {f.kind} who was looking for something and crying.",
        f"On the way home {h.they} met {h.their} friend {f.name}, who looked very sad.",
    )
    ask = c.pick(
        f'"What is wrong?" asked {h.name}. "I lost my {full}. '
        f'It was from my {c.pick("grandma", "grandpa", "mom", "dad")}," said {f.name}.',
        f'"Have you seen {a(full)}?" asked {f.name}. "It is gone, and I miss it so much."',
    )
    decide = c.pick(
        f"{h.name} wanted to keep the {noun}, but {h.they} knew what was right.",
        f"{h.name} looked at the {noun} and then at the sad face of {f.name}.",
    )
    back = c.pick(
        f'"Here it is. I found it {c.spots[0]}," said {h.name}.',
        f'"Is this yours?" asked {h.name} and held out the {noun}.',
    )
    end = c.pick(
        f'"Thank you! You are so honest," said {f.name}. The two had {c.pick(*words.SNACKS)} together, '
        f"and {h.name} had found a friend.",
        f"{f.name} was so happy that {f.they} danced. {h.name} felt better than if {h.they} had kept the {noun}.",
        f"{f.name} hugged {h.name} and gave {h.them} {a(c.thing(words.TOYS)[0])} to say thanks. "
        "It is good to give back what is not yours.",
    )
    return [begin, f"{want} {owner} {ask}", f"{decide} {back} {end}"]


def newcomer(c: Cast) -> list[str]:
    h, f = c.hero, c.friend
    game, snack = c.pick(*words.GAMES), c.pick(*words.SNACKS)
    full, _ = c.thing(words.TOYS)
    begin = f"{c.opening()} {c.going()} A new {f.kind} was sitting alone {c.spots[0]}."
    notice = c.pick(
        f"Nobody played with {f.them}, and {f.they} looked sad.",
        f"{cap(f.they)} held {a(full)} and looked at the ground.",
        f"{cap(f.they)} was too shy to talk to the others.",
    )
    hello = c.pick(
        f'{h.name} walked over. "Hello, I am {h.name}. What is your name?" "I am {f.name}," '
        f"said the {f.kind} in a small voice.",
        f'"Hi! Do you want to play?" asked {h.name}. The {f.kind} looked up. "My name is {f.name}. '
        'I do not know anybody here."',
    )
    offer = c.pick(
        f'"Now you know me," said {h.name}. "We can play {game}!"',
        f'"Come with me," said {h.name}. "I have some {snack}. We can share."',
        f'"I was new here once too," said {h.name}. "Let us play {game} together."',
    )
    fun = c.pick(
        f"Soon {f.name} was laughing and running with {h.name}.",
        f"At first {f.name} was quiet. Then {f.they} told a joke, and {h.name} laughed so hard that {h.they} fell over.",
        f"{f.name} knew a lot of games, and {h.name} liked every one of them.",
    )
    end = c.pick(
        f"When the sun went down, {f.name} was not lonely anymore. {cap(f.they)} had a friend.",
        f'"Will you come again tomorrow?" asked {f.name}. "I promise," said {h.name}. '
        "And they were friends from that day on.",
        f"{h.name} was happy too, because a kind word can make a new friend.",
    )
    return [begin, f"{notice} {hello} {offer}", f"{fun} {end}"]
