"""Two hundred varied texts in several scripts, for tokenizers to agree on."""

import random

SEEDS = [
    "I go home.",
    "She opened the door, and the cat ran out!",
    "We'll meet at 7:45 p.m. -- won't we?",
    "The quick brown fox jumps over 13 lazy dogs.",
    "나는 집에 간다.",
    "우리는 시장에서 사과 3개와 달걀 12개를 샀다.",
    "그는 오후에 커피를 마시지 않는다…",
    "猫が机の下で寝ている。",
    "私たちは七時に駅で会います。",
    "雪昨晚覆盖了山。",
    "他没有喝咖啡，对吗？",
    "Старая собака спит под столом.",
    "Где ты оставил мои ключи?",
    "القط ينام تحت الطاولة.",
    "सूरज धीरे-धीरे डूब रहा है।",
    "Η γάτα κοιμάται.",
    "แมวนอนอยู่ใต้โต๊ะ",
    "Le garçon a mangé une pêche à Noël.",
    "Straße, Übermut und ÄRGER",
    "İstanbul'da ışıklar söndü",
    "naïve café résumé",
    "e\u0301clair and n\u0303",
    "def f(x):\n    return x ** 2  # square",
    "<html><b>bold</b></html>",
    "https://example.org/a?b=c&d=%20e",
    "🙂 👩‍👩‍👧 🇰🇷 fine",
    "x = 3.14159; y = 1_000_000",
    "ALL CAPS AND camelCase and snake_case",
    "½ ² ① ﬁne Ⅷ",
    "全角ＡＢＣ　１２３",
]
EDGES = [
    "",
    " ",
    "a",
    "가",
    "  two spaces before",
    "two after  ",
    "tab\tand\nnew line\r\nand more",
    "many     spaces",
    "...!?!?",
    "'quoted' \"twice\" `thrice`",
    "null\u200bwidth\u00a0space",
    "\u2581already marked",
    "##not a piece",
    "a" * 120,
    "가나다" * 30,
]


def varied_texts() -> list[str]:
    """200 of them, always the same."""
    rng = random.Random(11)
    texts = [*SEEDS, *EDGES]
    while len(texts) < 200:
        first, second = rng.choice(SEEDS), rng.choice(SEEDS)
        cut, join = rng.randrange(len(first) + 1), rng.choice([" ", "", "\n", ", "])
        text = first[:cut] + join + second
        texts.append(rng.choice([text, text, text.upper(), text.lower(), text[::-1]]))
    return texts


def corpus() -> list[str]:
    """What the tokenizers learn from: plain sentences, so that some characters stay unknown."""
    return [text for text in SEEDS[:24] for _ in range(3)]
