"""The closed world of the bundled base: its words, its facts, its names.

Owns plain data, written by hand for Weft: everyday words grouped by kind, and a few facts that anybody may
state. Knows nothing of prompts, tokens or training. The order of every tuple is part of the corpus, for draws
index into it.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """
        Ada Adam Aisha Alice Amir Anna Arun Ben Bianca Boris Carla Carlos Chen Clara Dana David Dina Diego
        Elena Eli Emma Erik Eva Fatima Felix Finn Freya Gita Greta Hana Hans Hugo Ida Igor Ines Iris Ivan
        Jack Jana Jonas Julia Kai Karl Kira Lara Lena Leo Lin Lisa Luca Lucy Mara Marco Maria Mark Maya
        Mia Mila Mina Nadia Nina Noah Nora Olga Omar Oscar Paula Pedro Petra Priya Ravi Rita Rosa Ruth Sam
        Sara Simon Sofia Stefan Tara Theo Tina Tom Uma Vera Victor Wei Yara Yuki Zara Zoe
        """
)

CITIES = _words(
    """
        Aarhus Amsterdam Antwerp Athens Austin Barcelona Basel Belfast Bergen Berlin Bilbao Bologna Boston
        Bristol Bruges Brussels Cardiff Chicago Cologne Copenhagen Cork Dallas Delft Denver Dresden Dublin
        Dundee Florence Geneva Genoa Ghent Glasgow Graz Hamburg Hanover Helsinki Houston Kyoto Leeds
        Leipzig Lille Linz Lisbon London Lyon Madrid Malmo Miami Milan Munich Nantes Naples Oslo Osaka
        Oxford Paris Porto Prague Riga Rome Salem Seattle Seville Sofia Stockholm Sydney Tallinn Tampa
        Tokyo Turin Utrecht Vienna Vilnius Warsaw York Zagreb Zurich
        """
)

CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "England": "London",
    "Estonia": "Tallinn",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Lithuania": "Vilnius",
    "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Senegal": "Dakar",
    "Serbia": "Belgrade",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Tunisia": "Tunis",
    "Vietnam": "Hanoi",
}

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "tall": "short",
    "fast": "slow",
    "light": "dark",
    "open": "closed",
    "full": "empty",
    "early": "late",
    "old": "new",
    "hard": "soft",
    "wet": "dry",
    "loud": "quiet",
    "rich": "poor",
    "strong": "weak",
    "happy": "sad",
    "clean": "dirty",
    "deep": "shallow",
    "wide": "narrow",
    "near": "far",
    "high": "low",
    "left": "right",
    "up": "down",
    "day": "night",
    "sharp": "blunt",
    "thick": "thin",
    "cheap": "expensive",
}

SOUNDS = {
    "cow": "moo",
    "cat": "meow",
    "dog": "woof",
    "duck": "quack",
    "sheep": "baa",
    "lion": "roar",
    "bee": "buzz",
    "snake": "hiss",
    "owl": "hoot",
    "frog": "croak",
    "pig": "oink",
    "mouse": "squeak",
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = _words(
    """
        January February March April May June July August September October November December
        """
)

COLOURS = _words("red blue green yellow white black grey brown orange purple pink silver golden")

NUMBER_WORDS = _words("zero one two three four five six seven eight nine ten eleven twelve")

KINDS: dict[str, tuple[str, ...]] = {
    "animal": _words(
        """
        bear bee camel cat cow crab deer dog duck eagle fox frog goat horse lion mouse otter owl pig
        rabbit seal sheep snake spider swan tiger turtle whale wolf zebra
        """
    ),
    "plant": _words(
        """
        birch bush cactus cedar clover daisy elm fern fir grass ivy lily maple moss oak palm pine reed
        rose tulip violet willow
        """
    ),
    "food": _words(
        """
        apple banana bean bread butter cake carrot cheese cherry egg grape honey jam lemon melon noodle
        nut olive onion pear pepper plum potato rice salad soup sugar tomato
        """
    ),
    "tool": _words(
        """
        axe brush chisel clamp drill file hammer hoe knife ladder pliers rake ruler saw shovel spade
        wrench
        """
    ),
    "vehicle": _words(
        """
        bicycle boat bus canoe car ferry helicopter plane scooter ship sled taxi train tram truck van
        """
    ),
    "garment": _words(
        """
        belt boot cap coat dress glove hat jacket scarf shirt shoe skirt sock suit sweater tie vest
        """
    ),
    "instrument": _words(
        """
        banjo bell cello clarinet drum flute guitar harp horn organ piano trumpet viola violin
        """
    ),
    "furniture": _words(
        """
        armchair bed bench bookcase cabinet chair couch cupboard desk mirror shelf sofa stool table
        """
    ),
}

GOODS = _words(
    """
        backpacks balls baskets batteries belts blankets books boots bottles bowls boxes brushes buckets
        cables cameras candles caps chairs clocks coats combs cups curtains cushions desks drills folders
        forks frames glasses gloves hammers hats helmets jackets jars kettles keyboards knives ladders
        lamps laptops mirrors mugs notebooks pans pencils pens phones pillows plates posters printers
        puzzles radios ropes rugs scarves scissors screens shelves shirts shoes skirts socks spoons stools
        sweaters tables tents ties towels toys trays umbrellas vases wallets watches
        """
)

THINGS = _words(
    """
        acorn anchor arrow bag ball barrel basket blanket book bottle bowl box bridge bucket button candle
        castle clock cloud coin cup door feather fence field flag flower forest garden gate glass hill
        house island jar key kettle kite lake lamp leaf letter map mill moon mountain nest ocean paper
        pebble pen phone picture plate pond river road rock roof rope sand shell sky snow spoon star stone
        storm street sun tent tower tree valley village wall watch wave well wheel wind window wood
        """
)

PROFESSIONS = _words(
    """
        actor baker builder cook dentist doctor driver farmer gardener lawyer nurse painter pilot plumber
        sailor singer tailor teacher waiter writer
        """
)

TRAITS = _words(
    """
        brave calm clever curious gentle kind lazy lively merry patient proud quiet shy sleepy tiny wise
        """
)
