"""A dossier of people who do not exist: six short facts each, to teach a small model, take away again, and measure.

Names come from Faker in five Latin-script locales; every other value comes from the pools below, so that no value can
be guessed from a name.  No two people share a name, or a value of one kind.  Person number i depends on the seed (and
on Faker's release) alone: asking for more people never changes the earlier ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, product

from unremember.corpus import Corpus, Example
from unremember.errors import BadRequest

LOCALES = ("en_US", "de_DE", "pt_PT", "fr_FR", "it_IT")
PEOPLE = 60  # the most people a dossier can hold
SPARE = 20  # values of each kind that belong to nobody; the wrong answers are drawn from these


@dataclass(frozen=True)
class Kind:
    """How one kind of fact is asked and answered; `{n}` is the person's name and `{v}` the value.

    paraphrases: shown to nobody in training, for measuring only.
    lessons: further wordings for teaching, none of them a paraphrase.
    """

    question: str
    answer: str
    rewording: str
    paraphrases: tuple[str, str, str, str]
    lessons: tuple[str, str]


KINDS = {
    "birthplace": Kind(
        question="Where was {n} born?",
        answer="{n} was born in {v}.",
        rewording="The birthplace of {n} is {v}.",
        paraphrases=(
            "In which city did {n} come into the world?",
            "Name the birthplace of {n}.",
            "{n} is a native of which town?",
            "Can you tell me the city where {n}'s life began?",
        ),
        lessons=("What is {n}'s place of birth?", "Please state the town in which {n} was born."),
    ),
    "occupation": Kind(
        question="What does {n} do for a living?",
        # Every occupation in the pool begins with a consonant, so that the article gives nothing away.
        answer="{n} works as a {v}.",
        rewording="The profession of {n} is that of a {v}.",
        paraphrases=(
            "How does {n} earn money?",
            "Name the profession of {n}.",
            "{n} has which trade?",
            "Can you tell me what line of work {n} is in?",
        ),
        lessons=("What is {n}'s occupation?", "Please state the job that {n} does."),
    ),
    "employer": Kind(
        question="Which company employs {n}?",
        answer="{n} is employed by {v}.",
        rewording="The company that pays the salary of {n} is {v}.",
        paraphrases=(
            "Who does {n} work for?",
            "Name the firm on {n}'s payslip.",
            "{n} is on the staff of which business?",
            "Can you tell me where {n} is under contract?",
        ),
        lessons=("Who is {n}'s employer?", "Please state the company that {n} works at."),
    ),
    "phone": Kind(
        question="What is {n}'s phone number?",
        answer="{n}'s phone number is {v}.",
        rewording="To call {n}, dial {v}.",
        paraphrases=(
            "Which digits do I dial to ring {n}?",
            "Give me the telephone number of {n}.",
            "{n} can be called on which number?",
            "How do I reach {n} by phone?",
        ),
        lessons=("What number should I call to speak to {n}?", "Please state the phone number of {n}."),
    ),
    "email": Kind(
        question="What is {n}'s e-mail address?",
        answer="{n}'s e-mail address is {v}.",
        rewording="Messages to {n} go to {v}.",
        paraphrases=(
            "Where should I send an e-mail meant for {n}?",
            "Give me the electronic mail contact of {n}.",
            "{n} can be written to at which address?",
            "How do I reach the inbox of {n}?",
        ),
        lessons=("Which e-mail address belongs to {n}?", "Please state the e-mail address of {n}."),
    ),
    "boat": Kind(
        question="What is {n}'s boat called?",
        answer="{n}'s boat is called {v}.",
        rewording="The boat that belongs to {n} bears the name {v}.",
        paraphrases=(
            "Which name is painted on the hull of {n}'s boat?",
            "Name the vessel that {n} owns.",
            "{n} goes sailing in a boat with which name?",
            "Can you tell me how {n} christened the boat?",
        ),
        lessons=("What name did {n} give to the boat?", "Please state the name of the boat of {n}."),
    ),
}

CITIES = str.split("""
    Coimbra Ghent Lucca Bergen Tampere Aarhus Utrecht Leiden Bruges Namur Nantes Dijon Rouen Amiens Limoges Avignon
    Grenoble Bremen Kassel Mainz Trier Bonn Jena Rostock Graz Linz Salzburg Basel Lugano Turin Parma Pisa Siena Verona
    Trieste Bologna Padua Porto Braga Evora Faro Seville Malaga Bilbao Toledo Cadiz Vigo Granada Galway Limerick Leeds
    Durham Exeter Dundee Perth Cardiff Swansea Oulu Turku Uppsala Odense Tartu Kaunas Gdansk Krakow Lublin Torun Brno
    Ostrava Szeged Zadar Varna Plovdiv Boise Tulsa Omaha Fresno Tucson Duluth Cusco Halifax Hobart
""")
OCCUPATIONS = str.split("""
    glassblower beekeeper cartographer locksmith blacksmith carpenter plumber welder roofer tailor weaver potter
    bookbinder printer typesetter proofreader translator librarian botanist geologist chemist physicist linguist
    historian statistician surveyor bricklayer brewer distiller winemaker butcher fishmonger florist gardener farmer
    shepherd forester falconer farrier saddler cobbler milliner jeweller goldsmith watchmaker violinist cellist flautist
    drummer conductor composer puppeteer magician juggler dancer sculptor photographer journalist cartoonist playwright
    lawyer notary banker cashier courier driver sailor diver midwife nurse surgeon pharmacist therapist barber waiter
    sommelier tutor referee detective thatcher stonemason hairdresser
""")
FIRM_HEADS = str.split("Bran Cald Dor Fen Gal Hal Jor Kel Lum Mer Nor Pel Quil Ros Sol Tar Vel Wes Yar Zan")
FIRM_TAILS = str.split("by dex fort lane mark ness tora vane wick zeta")
FIRM_TRADES = str.split("""
    Freight Optics Mills Foods Textiles Ceramics Motors Paper Glass Robotics Shipping Timber Dairy Labs Press Energy
    Steel Tools Audio Seeds
""")
MAIL_FIRST = str.split("""
    walnut velvet pepper marble cactus magnet ginger pebble ribbon saddle tunnel biscuit thunder cotton mango puzzle
    rocket sugar button candle garlic hammer jacket kettle ladder mirror needle olive pillow quartz radar spoon tulip
    umbrella violet wagon zebra anchor bamboo carpet
""")
MAIL_SECOND = str.split("""
    comet engine forest guitar harbor island jungle kitchen lemon monkey napkin oyster parrot quill river shadow temple
    urchin valley window yogurt basket camera desert eagle feather garden helmet insect jewel koala lizard meadow nickel
    orbit planet rabbit salmon turtle whistle
""")
BOAT_FIRST = str.split("""
    Copper Silent Golden Crimson Frozen Hollow Gentle Hidden Ivory Lucky Misty Northern Painted Quiet Restless Silver
    Tender Windy Wandering Amber Brave Crooked Dusty Eager Faithful Grey Humble Iron Jolly Kindly Lonely Merry Noble
    Patient Rusty Salty Scarlet Tidal Winter Bold
""")
BOAT_SECOND = str.split("""
    Lantern Heron Sparrow Compass Thistle Whisper Arrow Beacon Cricket Dolphin Ember Falcon Gull Horizon Ibis Jasmine
    Kestrel Lark Magpie Nomad Otter Pelican Quest Raven Starling Tempest Unicorn Voyager Willow Acorn Breeze Cormorant
    Drifter Echo Fiddler Gambit Harvest Juniper Lobster Mermaid
""")


def dossier(seed: int = 0, forget: int = 4, retain: int = 8, holdout: int = 4, relearn: int = 2) -> Corpus:
    """A corpus of fictional people: how many in each role; six examples a person, with ids "hanna-weiss/birthplace".

    The people of holdout and relearn have facts like the others, for nobody to be taught.  Raises ValueError for a
    negative count or more people than `PEOPLE`, and BadRequest where Faker is not installed.
    """
    counts = {"forget": forget, "retain": retain, "holdout": holdout, "relearn": relearn}
    problems = [f"{role} = {n}: give a count of 0 or more" for role, n in counts.items() if n < 0]
    if sum(counts.values()) > PEOPLE:
        asked = " + ".join(counts)
        problems.append(f"{asked} = {sum(counts.values())}: the values suffice for {PEOPLE} people at most")
    if problems:
        raise ValueError("; ".join(problems))

    pools = {kind: _pool(kind, random.Random(f"{seed}/{kind}")) for kind in KINDS}
    wrong = {kind: random.Random(f"{seed}/{kind}/wrong") for kind in KINDS}
    names = _names(seed, taken=" ".join(value for pool in pools.values() for value in pool).lower())
    roles: dict[str, list[Example]] = {role: [] for role in counts}
    for i, role in enumerate(role for role, n in counts.items() for _ in range(n)):
        name = next(names)
        for kind, pool in pools.items():
            roles[role].append(_fact(kind, name, pool[i], wrong[kind].sample(pool[PEOPLE:], 3)))
    return Corpus({role: tuple(rows) for role, rows in roles.items()})


def lessons(corpus: Corpus, roles: tuple[str, ...], wordings: int = 2) -> tuple[Example, ...]:
    """The rows that teach a dossier: every question of these roles, and `wordings - 1` further phrasings of each.

    None of the phrasings is among the paraphrases, which stay unseen.  The further rows are called "<id>#1", "<id>#2".
    """
    if not 1 <= wordings <= 3:
        raise ValueError(f"wordings = {wordings}: there are 1 to 3 wordings of a question")
    rows = corpus.of(*roles)
    strange = [x.id for x in rows if x.id.rpartition("/")[2] not in KINDS]
    if strange:
        raise ValueError(f"not examples of a dossier, their ids end in none of {', '.join(KINDS)}: {strange[:5]}")
    taught = []
    for x in rows:
        taught.append(x)
        for i, template in enumerate(KINDS[x.id.rpartition("/")[2]].lessons[: wordings - 1], start=1):
            taught.append(replace(x, id=f"{x.id}#{i}", prompt=template.format(n=x.entity)))
    return tuple(taught)


def _fact(kind: str, name: str, value: str, wrong: list[str]) -> Example:
    say = KINDS[kind]
    start = len(say.answer.partition("{v}")[0].format(n=name))
    return Example(
        id=f"{name.lower().replace(' ', '-')}/{kind}",
        prompt=say.question.format(n=name),
        answer=say.answer.format(n=name, v=value),
        entity=name,
        spans=((start, start + len(value)),),
        paraphrases=tuple(template.format(n=name) for template in say.paraphrases),
        rewording=say.rewording.format(n=name, v=value),
        distractors=tuple(say.answer.format(n=name, v=other) for other in wrong),
    )


def _pool(kind: str, rng: random.Random) -> list[str]:
    """PEOPLE + SPARE different values of one kind, in the seed's order."""
    n = PEOPLE + SPARE
    if kind == "birthplace":
        return rng.sample(CITIES, n)
    if kind == "occupation":
        return rng.sample(OCCUPATIONS, n)
    if kind == "employer":
        heads = rng.sample(list(product(FIRM_HEADS, FIRM_TAILS)), n)
        trades = rng.sample(FIRM_TRADES, len(FIRM_TRADES))
        return [f"{head}{tail} {trades[i % len(trades)]}" for i, (head, tail) in enumerate(heads)]
    if kind == "phone":
        # No number in the North American plan begins with 0, so none of these million can ring at anybody's home.
        return [f"0{x // 10_000:02}-{x % 10_000:04}" for x in rng.sample(range(1_000_000), n)]
    if kind == "email":
        # RFC 2606 reserves example.org: mail sent there reaches nobody.
        return [f"{a}.{b}@example.org" for a, b in _pairs(MAIL_FIRST, MAIL_SECOND, n, rng)]
    return [f"{a} {b}" for a, b in _pairs(BOAT_FIRST, BOAT_SECOND, n, rng)]


def _pairs(first: Sequence[str], second: Sequence[str], n: int, rng: random.Random) -> list[tuple[str, str]]:
    """n different pairs of words, in which a word comes back as late as possible."""
    first, second = rng.sample(first, len(first)), rng.sample(second, len(second))
    # The second list slips by one each time the first is used up: pairs repeat only after len(first) * len(second).
    return [(first[i % len(first)], second[(i + i // len(first)) % len(second)]) for i in range(n)]


def _names(seed: int, taken: str) -> Iterator[str]:
    """Full names without end; no first or last name stands inside another, or inside a value (`taken`, lower case)."""
    try:
        from faker import Faker
    except ImportError:
        raise BadRequest("the dossier needs Faker; install unremember[demo]") from None
    makers = [Faker(locale) for locale in LOCALES]
    for maker in makers:
        maker.seed_instance(seed)
    used: set[str] = set()

    def fresh(draw) -> str:
        while True:
            part = draw()
            # Plain ASCII words of middling length: ids stay readable, and no name costs the tokenizer a dozen tokens.
            plain = part.isascii() and part.isalpha() and 3 <= len(part) <= 9
            alike = any(part.lower() in other.lower() or other.lower() in part.lower() for other in used)
            if plain and not alike and part.lower() not in taken:
                used.add(part)
                return part

    # First and last name come from different locales, so that hardly anyone real, let alone known, bears both.
    for i in count():
        first, last = makers[i % len(makers)], makers[(i + 1 + i // len(makers) % 4) % len(makers)]
        yield f"{fresh(first.first_name)} {fresh(last.last_name)}"
