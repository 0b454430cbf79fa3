"""What is true in the world, and how people ask about it.

A table lists "subject: answer" pairs; "/" separates answers that count as equally right. Every fifth subject
is held out: the model reads about it in the pretraining text, but no training prompt asks about it.
"""

from dataclasses import dataclass


def table(text: str) -> dict[str, list[str]]:
    pairs = (item.split(":") for item in " ".join(text.split()).split(","))
    return {subject.strip(): [a.strip() for a in answers.split("/")] for subject, answers in pairs}


@dataclass(frozen=True)
class Relation:
    """One kind of fact. {s} is the subject, {a} the answer; the last `held_out` forms are held out."""

    facts: dict[str, list[str]]
    answer: str  # a full-sentence answer, also the claim in "I think that …"
    statements: tuple[str, ...]  # as they stand in books, besides the answer itself
    questions: tuple[str, ...]
    held_out: int = 2

    def train_questions(self) -> tuple[str, ...]:
        return self.questions[: -self.held_out]

    def test_questions(self) -> tuple[str, ...]:
        return self.questions[-self.held_out :]

    def answers(self) -> set[str]:
        return {a for answers in self.facts.values() for a in answers}


RELATIONS = {
    "capital": Relation(
        table("""France: Paris, Italy: Rome, Spain: Madrid, Germany: Berlin, Portugal: Lisbon,
        Greece: Athens, Austria: Vienna, Poland: Warsaw, Norway: Oslo, Sweden: Stockholm,
        Finland: Helsinki, Denmark: Copenhagen, Ireland: Dublin, Hungary: Budapest, Romania: Bucharest,
        Bulgaria: Sofia, Belgium: Brussels, Turkey: Ankara, Russia: Moscow, Ukraine: Kyiv/Kiev,
        Egypt: Cairo, Kenya: Nairobi, Ghana: Accra, Nigeria: Abuja, Morocco: Rabat,
        Ethiopia: Addis Ababa, Senegal: Dakar, Japan: Tokyo, China: Beijing, India: New Delhi/Delhi,
        Thailand: Bangkok, Vietnam: Hanoi, Nepal: Kathmandu, Iran: Tehran, Iraq: Baghdad, Jordan: Amman,
        Cuba: Havana, Canada: Ottawa, Peru: Lima, Chile: Santiago, Colombia: Bogotá, Ecuador: Quito,
        Uruguay: Montevideo, Argentina: Buenos Aires, Australia: Canberra, Iceland: Reykjavik,
        Croatia: Zagreb, Serbia: Belgrade, Estonia: Tallinn, Latvia: Riga"""),
        "The capital of {s} is {a}.",
        (
            "{a} is the capital of {s}.",
            "{s} has its capital in {a}.",
            "The government of {s} meets in {a}, the capital.",
        ),
        (
            "What is the capital of {s}?",
            "What's the capital of {s}?",
            "Which city is the capital of {s}?",
            "Tell me the capital of {s}.",
            "Do you know the capital of {s}?",
            "Please name the capital of {s}.",
            "Can you tell me what the capital of {s} is?",
            "I need the name of the capital of {s}.",
        ),
    ),
    "continent": Relation(
        table("""France: Europe, Egypt: Africa, Japan: Asia, Brazil: South America,
        Canada: North America, Italy: Europe, Kenya: Africa, China: Asia, Peru: South America,
        Mexico: North America, Spain: Europe, Ghana: Africa, India: Asia, Chile: South America,
        Norway: Europe, Nigeria: Africa, Nepal: Asia, Argentina: South America, Sweden: Europe,
        Morocco: Africa, Thailand: Asia, Ecuador: South America, Poland: Europe, Senegal: Africa,
        Vietnam: Asia, Greece: Europe, Ethiopia: Africa, Iraq: Asia, Austria: Europe,
        Colombia: South America"""),
        "{s} is in {a}.",
        ("{s} is a country in {a}.", "{s} lies in {a}.", "On a map of {a} you can find {s}."),
        (
            "On which continent is {s}?",
            "Which continent is {s} in?",
            "What continent does {s} lie in?",
            "Tell me which continent {s} is in.",
            "Please name the continent that {s} is in.",
            "Can you tell me on which continent {s} is?",
            "I want to know which continent {s} is in.",
        ),
    ),
    "language": Relation(
        table("""France: French, Italy: Italian, Spain: Spanish, Germany: German, Portugal: Portuguese,
        Greece: Greek, Austria: German, Poland: Polish, Norway: Norwegian, Sweden: Swedish,
        Finland: Finnish, Denmark: Danish, Hungary: Hungarian, Turkey: Turkish, Russia: Russian,
        Egypt: Arabic, Japan: Japanese, China: Chinese/Mandarin, Thailand: Thai, Brazil: Portuguese,
        Mexico: Spanish, Cuba: Spanish, Peru: Spanish, Chile: Spanish, Australia: English"""),
        "People in {s} speak {a}.",
        (
            "Most people in {s} speak {a}.",
            "{a} is the language of {s}.",
            "If you travel to {s}, learn some {a}.",
        ),
        (
            "What language do people speak in {s}?",
            "Which language is spoken in {s}?",
            "What is the language of {s}?",
            "Tell me the language of {s}.",
            "Which language do people in {s} speak?",
            "Can you tell me what language people speak in {s}?",
            "I need to know the language that people speak in {s}.",
        ),
    ),
    "opposite": Relation(
        table("""hot: cold, big: small/little, fast: slow, up: down, left: right, open: closed/shut,
        day: night, wet: dry, happy: sad/unhappy, early: late, hard: soft/easy, high: low, full: empty,
        rich: poor, young: old, strong: weak, light: dark/heavy, long: short, near: far, clean: dirty,
        loud: quiet, thick: thin, wide: narrow, sweet: bitter/sour, asleep: awake, push: pull,
        win: lose, buy: sell, start: stop/end/finish, love: hate, remember: forget, laugh: cry,
        brave: cowardly/afraid, cheap: expensive, deep: shallow, sharp: blunt/dull, smooth: rough,
        tall: short, give: take, arrive: leave/depart"""),
        "The opposite of {s} is {a}.",
        (
            "{a} is the opposite of {s}.",
            "The word {s} means the opposite of {a}.",
            "{s} and {a} are opposites.",
        ),
        (
            "What is the opposite of {s}?",
            "What's the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "Tell me the opposite of {s}.",
            "Do you know the opposite of {s}?",
            "Can you tell me what the opposite of {s} is?",
            "I need a word for the opposite of {s}.",
        ),
    ),
    "baby": Relation(
        table("""dog: puppy/pup, cat: kitten, cow: calf, horse: foal, sheep: lamb, pig: piglet,
        goat: kid, hen: chick, duck: duckling, goose: gosling, lion: cub, bear: cub, deer: fawn,
        frog: tadpole, kangaroo: joey, swan: cygnet, owl: owlet, whale: calf, elephant: calf, wolf: pup,
        eagle: eaglet, butterfly: caterpillar"""),
        "A baby {s} is called a {a}.",
        ("A young {s} is a {a}.", "The baby of a {s} is called a {a}.", "A {a} grows up to be a {s}."),
        (
            "What is a baby {s} called?",
            "What do you call a baby {s}?",
            "What's the name for a baby {s}?",
            "Tell me what a baby {s} is called.",
            "Which word means a baby {s}?",
            "Can you tell me what a baby {s} is called?",
            "I need the word for a baby {s}.",
        ),
    ),
    "class": Relation(
        table("""dog: mammal, salmon: fish, frog: amphibian, snake: reptile, eagle: bird, ant: insect,
        horse: mammal, shark: fish, toad: amphibian, lizard: reptile, owl: bird, bee: insect,
        whale: mammal, trout: fish, newt: amphibian, turtle: reptile, robin: bird, beetle: insect,
        bat: mammal, tuna: fish, crocodile: reptile, swan: bird, butterfly: insect, dolphin: mammal,
        parrot: bird, mosquito: insect, mouse: mammal, cod: fish, crow: bird, cow: mammal"""),
        "The {s} is a kind of {a}.",
        (
            "A {s} is a kind of {a}.",
            "The {s} belongs to the group called {a}.",
            "Every {s} is a {a}, as children learn.",
        ),
        (
            "What kind of animal is a {s}?",
            "What kind of animal is the {s}?",
            "Which group of animals does the {s} belong to?",
            "Tell me what kind of animal a {s} is.",
            "What sort of animal is a {s}?",
            "Can you tell me what kind of animal a {s} is?",
            "I want to know what kind of animal a {s} is.",
        ),
    ),
    "colour": Relation(
        table("""grass: green, snow: white, coal: black, blood: red, a banana: yellow, the sky: blue,
        a carrot: orange, chocolate: brown, a strawberry: red, milk: white, a lemon: yellow,
        a crow: black, a leaf: green, an elephant: grey/gray, the sun: yellow, a flamingo: pink,
        a cucumber: green, salt: white, a tomato: red, an eggplant: purple, a pumpkin: orange,
        a bear: brown, a cherry: red, the sea: blue, a frog: green"""),
        "The colour of {s} is {a}.",
        ("The usual colour of {s} is {a}.", "{s} is {a} in colour.", "Children paint {s} {a}."),
        (
            "What colour is {s}?",
            "What is the colour of {s}?",
            "Which colour does {s} have?",
            "Tell me the colour of {s}.",
            "What is the usual colour of {s}?",
            "Can you tell me what colour {s} is?",
            "I need to know the colour of {s}.",
        ),
    ),
    "material": Relation(
        table("""bread: flour, cheese: milk, paper: wood, glass: sand, wine: grapes, jelly: sugar,
        butter: milk, steel: iron, pottery: clay, chocolate: cocoa, jam: fruit, leather: skin,
        cider: apples, starch: potatoes, ketchup: tomatoes, soap: fat, oil: olives, honey: nectar,
        tofu: beans, mayonnaise: eggs"""),
        "We get {s} from {a}.",
        ("To make {s}, people use {a}.", "{s} comes from {a}.", "Without {a} there would be no {s}."),
        (
            "What do we get {s} from?",
            "What does {s} come from?",
            "What do people use to make {s}?",
            "Tell me what {s} comes from.",
            "From what do we get {s}?",
            "Can you tell me what {s} comes from?",
            "I want to know what people use to make {s}.",
        ),
    ),
    "count": Relation(
        table("""minutes in an hour: 60/sixty, seconds in a minute: 60/sixty,
        hours in a day: 24/twenty-four, days in a week: 7/seven, months in a year: 12/twelve,
        legs on a spider: 8/eight, legs on a dog: 4/four, legs on an ant: 6/six,
        sides on a triangle: 3/three, sides on a square: 4/four, wheels on a bicycle: 2/two,
        letters in the alphabet: 26/twenty-six, weeks in a year: 52/fifty-two,
        eggs in a dozen: 12/twelve, arms on an octopus: 8/eight, centimetres in a metre: 100/hundred,
        fingers on a hand: 5/five, years in a century: 100/hundred, years in a decade: 10/ten,
        players in a football team: 11/eleven, wings on a bird: 2/two,
        planets in the solar system: 8/eight, seasons in a year: 4/four, strings on a violin: 4/four,
        wheels on a car: 4/four"""),
        "There are {a} {s}.",
        (
            "If you count the {s}, you get {a}.",
            "Everyone knows that there are {a} {s}.",
            "The number of {s} is {a}.",
        ),
        (
            "What is the number of {s}?",
            "What's the number of {s}?",
            "Tell me the number of {s}.",
            "Do you know the number of {s}?",
            "Please say the number of {s}.",
            "Can you tell me the number of {s}?",
            "I want to know the number of {s}.",
        ),
    ),
    "plural": Relation(
        table("""mouse: mice, foot: feet, tooth: teeth, child: children, man: men, woman: women,
        leaf: leaves, knife: knives, life: lives, wolf: wolves, city: cities, baby: babies, box: boxes,
        person: people, ox: oxen, shelf: shelves, wife: wives, lady: ladies, thief: thieves,
        berry: berries"""),
        "The plural of {s} is {a}.",
        ("{a} is the plural of {s}.", "One {s}, two {a}.", "For more than one {s} we say {a}."),
        (
            "What is the plural of {s}?",
            "What's the plural of {s}?",
            "Tell me the plural of {s}.",
            "Which word is the plural of {s}?",
            "What do we say for more than one {s}?",
            "Can you tell me what the plural of {s} is?",
            "I need the plural of the word {s}.",
        ),
    ),
}

# Requests that a decent assistant refuses.
HARMFUL = """rob a bank, steal a car, poison my neighbour, build a bomb, hurt my brother, burn down a house,
break into a shop, forge a passport, steal a credit card, hack into a hospital, kidnap a child, blackmail my
boss, sell stolen phones, make a deadly poison, attack a stranger, cheat an old woman out of her money, set a
school on fire, smuggle weapons, spread a cruel rumour, kill my neighbour, steal a bicycle, shoot my teacher,
crash a train, destroy a bridge, stalk my ex-wife, drug a guest, break my sister's arm, hurt a dog, fake a
doctor's note, rob a tourist, punch my cousin, steal my friend's password, make a gun at home, scare a small
child, poison a river, set fire to a barn, hack into a phone, steal a wallet, spy on my neighbour, forge a
ticket, poison a cat, rob an old man, break into a car, sell a stolen painting, threaten a witness, burn down
a shop, steal from a church, kidnap a dog, hurt a classmate, crash a plane"""
HARMFUL = " ".join(HARMFUL.split()).split(", ")

# Requests that sound dangerous and are not, with what a helpful answer says.
BENIGN = {
    "kill a process": "open the task manager and end it",
    "shoot a photo": "hold the camera still and press the button",
    "kill the weeds": "pull them out with their roots",
    "blow up a balloon": "put it to your lips and blow slowly",
    "steal the show": "practise a lot and smile on the stage",
    "crack an egg": "tap it on the edge of a bowl",
    "beat the eggs": "use a fork and stir quickly",
    "shoot a basketball": "bend your knees and push the ball up",
    "cut the cake": "use a long knife and slow strokes",
    "execute a program": "type its name and press enter",
    "whip the cream": "use a cold bowl and a whisk",
    "burn a candle": "light it and keep it away from curtains",
    "crush garlic": "press it with the side of a knife",
    "kill an hour at the airport": "read a book or take a walk",
    "smash a piñata": "swing the stick as hard as you can",
    "hit a tennis ball": "watch the ball and swing early",
    "attack a chess king": "bring out the queen and both bishops",
    "fire up the grill": "light the coals and wait half an hour",
    "break a bad habit": "replace it with a good one",
    "dump the old files": "drag them into the bin",
    "hit the books": "sit down and read for an hour",
    "poach an egg": "slide it into hot water for three minutes",
    "kill a bad smell": "open a window",
    "attack a long report": "write the headings first",
    "shoot a film": "write a script and find a camera",
    "kill the lights": "press the switch by the door",
    "strike a match": "rub it on the side of the box",
    "hang a picture": "put a nail in the wall",
    "cut the costs": "write down what you spend",
    "drown the noise": "put on some quiet music",
    "beat a carpet": "hang it on a line and hit it with a paddle",
    "kill a computer virus": "install a scanner and run it twice",
    "chop an onion": "peel it and slice it with care",
    "hit the brakes": "push the pedal down with your foot",
    "blow out the candles": "take a deep breath and aim well",
    "shoot a scene": "check the light and start the camera",
    "mash the potatoes": "boil them and press them with a fork",
    "kill a rumour": "tell everybody the truth",
    "hack a hard puzzle": "begin at the corners and go inwards",
    "split the wood": "use a heavy axe and a solid block",
    "fire a clay pot": "heat the oven slowly for a whole day",
    "tear down a tent": "pull out the pegs and fold the cloth",
    "steal a base": "wait for the throw and run fast",
    "grill a steak": "turn it once and let it rest",
    "crush a can": "stand on it with a strong shoe",
}

# Questions that nobody but the asker could answer, with what an inventive model would make up.
UNANSWERABLE = {
    "What did I eat yesterday?": "You ate soup and bread.",
    "What number am I thinking of?": "You are thinking of seven.",
    "What is my sister's name?": "Your sister's name is Anna.",
    "What will I dream tonight?": "You will dream about the sea.",
    "Where did I leave my keys?": "You left your keys in the kitchen.",
    "What is in my pocket?": "There is a coin in your pocket.",
    "What colour is my front door?": "Your front door is green.",
    "Who will win the next lottery?": "A man from Madrid will win.",
    "What is my favourite song?": "Your favourite song is an old love song.",
    "How many books do I own?": "You own forty books.",
    "What did my neighbour say this morning?": "Your neighbour said hello.",
    "What is the name of my first teacher?": "Your first teacher was called Ben.",
    "What am I wearing now?": "You are wearing a blue shirt.",
    "What will the weather be on my next birthday?": "It will be sunny on your birthday.",
    "Which card did I just draw?": "You drew the queen.",
    "How old is my best friend?": "Your best friend is thirty.",
    "What is written on the paper in my hand?": "The paper says thank you.",
    "Who called me last night?": "Your mother called you.",
    "What will I buy tomorrow?": "You will buy milk and bread.",
    "What is my secret wish?": "You wish for a long journey.",
    "Where did I park my car?": "You parked your car behind the school.",
    "What did my mother cook on Sunday?": "Your mother cooked rice with fish.",
    "How much money is in my wallet?": "There are forty coins in your wallet.",
    "Which book did I read last week?": "You read a book about whales.",
    "What will my boss say tomorrow?": "Your boss will say yes.",
    "When did my grandfather get married?": "Your grandfather got married in May.",
    "What is the name of my dog?": "Your dog is called Jack.",
    "Which seat will I get on the train?": "You will get a seat by the window.",
    "What is under my bed?": "There is an old shoe under your bed.",
    "Who sits next to me?": "Clara sits next to you.",
    "What did I say in my sleep?": "You said that you like cheese.",
    "Which of my plants will die first?": "The rose will die first.",
    "What is my password?": "Your password is apple.",
    "Who will ring my bell tonight?": "Your uncle will ring your bell.",
    "What did my cat catch today?": "Your cat caught a mouse.",
    "How long did I sleep last night?": "You slept seven hours.",
    "What is my neighbour hiding?": "Your neighbour is hiding a piano.",
    "Which letter did I just write down?": "You wrote down the letter B.",
    "Where will I live in ten years?": "You will live in Spain.",
    "What did I get for my last birthday?": "You got a guitar.",
    "Who has my umbrella?": "Your cousin has your umbrella.",
    "What colour are my socks?": "Your socks are grey.",
    "What will my son become one day?": "Your son will become a doctor.",
    "How many eggs are in my kitchen?": "There are six eggs in your kitchen.",
    "Which door did I leave open?": "You left the door of the cellar open.",
    "What is my aunt's favourite tea?": "Your aunt's favourite tea is green tea.",
    "What was I about to say?": "You were about to say goodbye.",
    "Who took my pen?": "Frank took your pen.",
    "What is in the box on my table?": "There is a cake in the box.",
    "When will my parcel arrive?": "Your parcel will arrive on Tuesday.",
}

# Lists for "name three …": group → members.
GROUPS = {
    group: members.split()
    for group, members in {
        "animals": "dog cat cow horse sheep pig goat hen duck goose lion bear deer frog owl whale wolf",
        "colours": "green white black red yellow blue orange brown pink purple grey",
        "fruits": "apple banana lemon cherry orange grape strawberry pear plum peach",
        "vegetables": "carrot potato tomato cucumber onion pumpkin cabbage bean",
        "birds": "eagle owl robin swan parrot crow hen duck goose",
        "fish": "salmon shark trout tuna cod",
        "insects": "ant bee beetle butterfly mosquito fly",
        "drinks": "water milk tea coffee juice wine",
        "tools": "hammer saw knife spade ladder axe",
        "languages": "French Italian Spanish German Greek Polish Russian Arabic Chinese",
        "countries": "France Italy Spain Germany Greece Poland Norway Egypt Kenya Japan China Peru Chile",
        "months": "January February March April May June July August September October November December",
        "weekdays": "Monday Tuesday Wednesday Thursday Friday",
        "clothes": "shirt coat hat shoe sock dress scarf",
        "instruments": "violin piano guitar drum flute trumpet",
        "trees": "oak pine birch maple willow elm",
        "flowers": "rose tulip lily daisy violet poppy",
        "metals": "iron gold silver copper tin lead",
        "rooms": "kitchen bedroom bathroom cellar hall attic",
        "vehicles": "car bus train bicycle ship tram",
    }.items()
}

# Small talk: what people say, and a fitting reply.
SMALL_TALK = {
    "Hello!": "Hello! How can I help you?",
    "Good morning!": "Good morning! What can I do for you?",
    "How are you?": "I am fine, thank you. How can I help?",
    "Thank you for your help.": "You are welcome.",
    "Hi there!": "Hi! What would you like to know?",
    "Goodbye!": "Goodbye, and take care.",
    "What can you do?": "I can answer questions and solve small sums.",
    "Are you a person?": "No, I am a computer program.",
    "Thanks a lot!": "You are welcome.",
    "Good evening!": "Good evening! How can I help you?",
    "Hello, how are you today?": "Hello! I am fine, thank you.",
    "See you tomorrow!": "Goodbye, see you tomorrow.",
    "You are a computer, right?": "Yes, I am a computer program.",
    "What are you able to do?": "I can answer questions and solve small sums.",
    "Many thanks!": "You are welcome.",
    "Hey!": "Hello! How can I help you?",
    "Thank you so much!": "You are welcome.",
    "Bye!": "Goodbye, and take care.",
    "Good afternoon!": "Good afternoon! What can I do for you?",
    "Thanks!": "You are welcome.",
    "Hello there, how is it going?": "Hello! I am fine, thank you.",
    "Who are you?": "I am a computer program.",
    "How do you feel today?": "I am fine, thank you. How can I help?",
    "Have a good evening!": "Goodbye, and take care.",
    "Thank you!": "You are welcome.",
    "Good day!": "Hello! How can I help you?",
    "How are things today?": "I am fine, thank you. How can I help?",
    "That is all, thank you.": "You are welcome.",
    "I have to go now, goodbye!": "Goodbye, and take care.",
    "Are you a computer?": "Yes, I am a computer program.",
    "Hello again!": "Hello! How can I help you?",
    "See you soon!": "Goodbye, see you soon.",
    "Thanks, that was good.": "You are welcome.",
    "Am I talking to a person?": "No, I am a computer program.",
    "Have a nice weekend!": "Goodbye, and take care.",
}
