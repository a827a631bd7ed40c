"""Word lists of the story generator. Every phrase is lower case and has no article, unless it begins with "the"."""

GIRLS = (
    "Lily Mia Anna Sue Emma Lucy Ella Sara Ruby Zoe Nora Rosie Molly Daisy Amy Kate Maya Lena Ivy Clara Hana Tia Bella"
).split()
BOYS = (
    "Tim Tom Ben Max Sam Jack Leo Finn Noah Oscar Billy Toby Luke Adam Dan Joe Omar Hugo Pete Ravi Eli Theo Roy Bob"
).split()
ANIMALS = "rabbit bear fox mouse duck frog squirrel hedgehog kitten puppy owl turtle".split()
ANIMAL_NAMES = "Poppy Pip Bunny Coco Hazel Patch Dot Biscuit Pepper Sunny Maple Teddy Fluffy Button Cookie".split()

TRAITS = "kind curious brave shy cheerful clever playful gentle happy friendly quiet eager".split()
HOBBIES = (
    "sing songs",
    "pick flowers",
    "count the clouds",
    "draw pictures",
    "run and jump",
    "dance in the sun",
    "look for bugs",
    "tell funny jokes",
    "climb little hills",
    "read books",
    "build towers",
    "collect smooth stones",
)

COLOURS = "red blue green yellow orange purple pink white brown".split()
LOOKS = "little new old pretty special".split()
TOYS = (
    "ball",
    "kite",
    "doll",
    "toy car",
    "toy boat",
    "toy train",
    "book",
    "hat",
    "teddy bear",
    "drum",
    "scarf",
    "balloon",
    "umbrella",
    "whistle",
    "spinning top",
    "bucket",
)
FLYING = ("kite", "balloon", "ball", "paper plane", "hat", "scarf")
BREAKABLE = ("vase", "cup", "plate", "lamp", "bowl", "clock", "teapot", "picture frame")
TREASURES = ("coin", "ring", "necklace", "watch", "bracelet", "key", "purse", "silver bell")

# Place with its preposition, and where a small thing could lie there.
PLACES = {
    "in the park": ("under a bench", "behind a big tree", "in the tall grass", "next to the pond", "beside the swings"),
    "in the garden": ("behind the roses", "under a bush", "beside the gate", "near the apple tree", "in a flower pot"),
    "at the beach": (
        "behind a big rock",
        "in the wet sand",
        "near an old boat",
        "under a towel",
        "beside a sand castle",
    ),
    "in the forest": (
        "under some leaves",
        "behind a log",
        "near the stream",
        "in a hollow tree",
        "beside some mushrooms",
    ),
    "on the farm": ("behind the barn", "in the hay", "near the pig pen", "under the cart", "beside the well"),
    "at the market": (
        "under a table",
        "behind the bread stand",
        "beside the flower cart",
        "in a basket",
        "near the door",
    ),
    "at school": (
        "under a desk",
        "behind the door",
        "in a box of crayons",
        "next to the sink",
        "beside the book shelf",
    ),
    "by the lake": (
        "under a wooden boat",
        "in the reeds",
        "behind a willow tree",
        "near the dock",
        "between two stones",
    ),
    "on the hill": (
        "behind a rock",
        "in the yellow flowers",
        "under an old oak tree",
        "beside the path",
        "near the fence",
    ),
    "at the playground": (
        "under the slide",
        "in the sand box",
        "behind the swings",
        "beside the bench",
        "near the gate",
    ),
}

WEATHER = "sunny warm windy bright quiet cool lovely".split()
TIMES = ("One day", "One morning", "One afternoon", "One Sunday", "The next day", "One fine day")

# (what is feared, where it is met, what helps, how it looks in the end)
FEARS = (
    ("the dark", "When the lamp went out", "held up a small night light", "The stars outside were very pretty"),
    ("thunder", "When the storm came", "sang a loud and silly song", "The thunder sounded just like a big drum"),
    ("deep water", "When they came to the water", "took small steps into the water", "The water was cool and fun"),
    (
        "big dogs",
        "When a big dog ran up to them",
        "showed how to pet the dog softly",
        "The dog had soft ears and a happy tail",
    ),
    (
        "high places",
        "When it was time to go down the slide",
        "climbed up first",
        "Everything looked tiny from up there",
    ),
    ("bees", "When a bee flew by", "stood very still", "The bee only wanted to visit a flower"),
    ("the doctor", "When the doctor came in", "counted to ten out loud", "The doctor was nice and gave out a sticker"),
)

# (what is learned, what goes wrong, the tip, how success looks)
SKILLS = (
    ("ride a bike", "fell into the grass", "Look ahead and keep your feet moving", "rode all the way down the path"),
    ("swim", "swallowed some water", "Kick your legs and stay calm", "swam from one side to the other"),
    ("bake bread", "made the bread too hard", "Mix it slowly and wait a little longer", "baked a soft and warm bread"),
    ("draw a horse", "drew legs that were too long", "Draw big shapes first", "drew a horse that looked real"),
    ("jump rope", "got tangled in the rope", "Listen to the rope and then jump", "jumped twenty times in a row"),
    ("catch a ball", "dropped the ball", "Watch the ball with both eyes", "caught the ball ten times"),
    ("play the flute", "made a squeaky noise", "Blow softly and move one finger at a time", "played a sweet song"),
    ("skip stones", "made the stone sink", "Choose a flat stone and throw it low", "made a stone skip five times"),
    (
        "build a tower",
        "made the blocks fall down",
        "Put the big blocks at the bottom",
        "built a tower as high as the table",
    ),
)

# (gift, what is missing, what it is made from, how it is praised)
GIFTS = (
    ("cake", "eggs", "flour, butter and sugar", "the best cake in the world"),
    ("pie", "apples", "dough and cinnamon", "so sweet and warm"),
    ("card", "paint", "paper and glue", "so full of colour"),
    ("necklace", "string", "shells and beads", "as pretty as the stars"),
    ("salad", "carrots", "beans and tomatoes", "just right for a warm day"),
    ("quilt", "thread", "soft pieces of cloth", "so soft and cozy"),
    ("bird house", "nails", "wood and blue paint", "a lovely home for the birds"),
)

# (animal, trouble, first care, how it is freed or healed, thanks)
RESCUES = (
    ("bird", "had a hurt wing", "made it a nest in a box", "its wing was strong again", "sang a sweet song"),
    ("kitten", "was wet and cold", "dried it with a soft towel", "it was warm and dry", "purred loudly"),
    (
        "puppy",
        "had a thorn in its paw",
        "pulled the thorn out gently",
        "its paw did not hurt anymore",
        "wagged its tail",
    ),
    ("butterfly", "was caught in a web", "moved the web away with a stick", "its wings were free", "danced in the air"),
    ("lamb", "could not find its mother", "gave it some milk", "its mother came running", "jumped for joy"),
    (
        "fish",
        "was caught in a tiny pool",
        "put it in a bucket of water",
        "it was back in the deep water",
        "splashed its tail",
    ),
    ("hen", "was stuck in the mud", "dug the mud away", "it could walk again", "laid an egg as a gift"),
)

# (what must not be done, why, what goes wrong, what helps)
WARNINGS = (
    ("eat too many berries", "they will hurt your tummy", "had a very bad tummy ache", "brought some warm tea"),
    ("run on the wet floor", "it is slippery", "slipped and hurt a knee", "put a bandage on the knee"),
    ("climb the tall fence", "you could fall", "fell down and tore a sleeve", "sewed the sleeve up again"),
    ("touch the hot pot", "it can burn you", "burned a finger", "held the finger under cold water"),
    ("go out without a coat", "it is cold", "began to sneeze and shiver", "made a bowl of hot soup"),
    ("stay up late", "you need to sleep", "was too tired to play the next day", "made a soft bed for a nap"),
    ("poke the bees' nest", "bees can sting", "got a sting on the nose", "put some ice on the nose"),
    (
        "play in the mud with new shoes",
        "they will get dirty",
        "got mud all over the new shoes",
        "helped to scrub the shoes",
    ),
)

# (plan, weather that spoils it, what is done instead, how that feels)
PLANS = (
    ("have a picnic", "It began to rain", "put a blanket on the floor and had the picnic inside", "like a secret camp"),
    ("fly kites", "The wind stopped", "painted the kites with bright colours", "like making a rainbow"),
    ("go swimming", "It was too cold", "filled the bath and played with toy boats", "like a small sea"),
    (
        "build a snowman",
        "The snow began to melt",
        "made a snowman out of paper and cotton",
        "like winter that never ends",
    ),
    ("play outside", "A storm came", "built a fort out of pillows", "like a real castle"),
    (
        "look at the stars",
        "Clouds covered the sky",
        "cut stars out of paper and hung them up",
        "like a sky of their own",
    ),
)
GAMES = ("hide and seek", "tag", "catch", "jump rope", "a guessing game", "pirates", "follow the leader")
SNACKS = ("cookies", "apples", "pancakes", "grapes", "sandwiches", "muffins", "pears", "nuts")
