"""POST /translate on the lane that shouts."""

import unicodedata
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.translation import _AFTER_SENTENCE
from app.casing import in_small_letters, reads_badly
from app.endings import is_unmarked, set_apart, without_full_stop
from app.engine.sequence import Hypothesis
from app.protection import replace_runs, without_parts
from app.spelling import narrow, plain_signs, respelt
from model.examples import Examples
from model.sampling import BeamParams
from tests.app.fakes import FakeDecodeLane, byte_tokenizer

Client = httpx.AsyncClient


async def translate(client: Client, inputs: object, **parameters: object) -> Any:
    answer = await client.post("/translate", json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refusal(client: Client, inputs: object, **parameters: object) -> str:
    answer = await client.post("/translate", json={"inputs": inputs, "parameters": parameters})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), answer.text
    error: str = answer.json()["error"]
    return error


async def test_a_string_gives_a_list(client: Client) -> None:
    assert await translate(client, "I go home") == [{"translation_text": "I GO HOME"}]


async def test_a_list_gives_a_list(client: Client) -> None:
    answer = await translate(client, ["one", "two"])
    assert answer == [{"translation_text": "ONE"}, {"translation_text": "TWO"}]


async def test_n_best(client: Client) -> None:
    one = await translate(client, "a", num_return_sequences=2)
    assert [entry["translation_text"] for entry in one] == ["A", "A!"]
    two = await translate(client, ["a", "Bb. Cc."], num_return_sequences=2)
    assert [[entry["translation_text"] for entry in text] for text in two] == [
        ["A", "A!"],
        ["BB. CC.", "BB.! CC.!"],
    ]


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "\t \u3000\r\n", "a", "Go home.  See you!\n\n\n - e?\r\n", "🙂 x"]
)
async def test_white_space_is_kept(client: Client, translate_lane: FakeDecodeLane, text: str) -> None:
    assert await translate(client, text) == [{"translation_text": text.upper()}]
    assert text.strip() or not translate_lane.submitted


async def test_all_sentences_are_submitted_at_once(client: Client, translate_lane: FakeDecodeLane) -> None:
    answer = await translate(client, ["One here. Two here.\nThree here.", "Four here."])
    assert [entry["translation_text"] for entry in answer] == [
        "ONE HERE. TWO HERE.\nTHREE HERE.",
        "FOUR HERE.",
    ]
    assert len(translate_lane.submitted) == 4


async def test_a_sentence_over_the_limit_is_not_cut(client: Client, translate_lane: FakeDecodeLane) -> None:
    text = "word " * 30 + "x" * 100 + ", and a clause, and another"
    assert await translate(client, text) == [{"translation_text": text.upper()}]
    assert len(translate_lane.submitted) > 4
    assert all(len(sequence.prompt_ids) <= 64 for sequence in translate_lane.submitted)


@pytest.mark.parametrize(
    ("text", "parameters", "target"),
    [
        ("I go home", {}, "ko"),
        ("나는 집에 간다", {}, "en"),
        ("ok", {}, "ko"),
        ("집 home", {"src_lang": "en"}, "ko"),
        ("나는 집에 간다", {"tgt_lang": "en"}, "en"),
        ("집 home", {"src_lang": "ko", "tgt_lang": "en"}, "en"),
        ("I go home", {"src_lang": None, "tgt_lang": None}, "ko"),
    ],
)
async def test_languages(
    client: Client, translate_lane: FakeDecodeLane, text: str, parameters: dict[str, object], target: str
) -> None:
    await translate(client, text, **parameters)
    tokenizer = byte_tokenizer()
    assert translate_lane.submitted[-1].prompt_ids == tokenizer.source_ids(tokenizer.encode(text), target)


@pytest.mark.parametrize(("text", "target"), [("나는 집에 간다.", "ko"), ("I go home.", "en")])
async def test_what_is_in_the_target_stays(
    client: Client, translate_lane: FakeDecodeLane, text: str, target: str
) -> None:
    """Whatever language is named: of a sentence in other letters the model would make anything."""
    for more in ({}, {"src_lang": "en" if target == "ko" else "ko"}):
        assert await translate(client, text, tgt_lang=target, **more) == [{"translation_text": text}]
    assert not translate_lane.submitted


@pytest.mark.parametrize("space", ["\u00a0", "\t", "\u2009", "\u3000", "\x00", "\x1b"])
async def test_other_spaces_are_spaces_to_the_model(
    client: Client, translate_lane: FakeDecodeLane, space: str
) -> None:
    await translate(client, f"She bought a red{space}car.", src_lang="en")
    tokenizer = byte_tokenizer()
    wanted = tokenizer.source_ids(tokenizer.encode("She bought a red car."), "ko")
    assert translate_lane.submitted[-1].prompt_ids == wanted


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("PLEASE CLOSE THE DOOR!", "Please close the door!"),
        ("SORRY, I'M LATE AND I LOST MY TV.", "Sorry, I'm late and I lost my TV."),
        ("WHO ARE YOU?", "Who are you?"),
        ("THANK YOU", "Thank you"),
        ("NASA AND MR. KIM", "NASA and Mr. kim"),
        ("THE CEO OF IBM TOOK FLIGHT KE123.", "The CEO of IBM took flight KE123."),
        ("USA GDP", "USA GDP"),
        ("THE U.S. ARMY SAT ON NASA'S SHIP AT 9 A.M.", "The U.S. army sat on NASA's ship at 9 A.M."),
        ("5 MILLION PEOPLE CAME", "5 million people came"),
        ("STOP!", "STOP!"),
        ("WRITE TO ME, please.", "WRITE TO ME, please."),
        ("I Want To Go Home.", "I want to go home."),
        (
            "Mr. Kim Isn't In The NASA Building With McDonald.",
            "Mr. kim isn't in the NASA building with McDonald.",
        ),
        ("The Old Man And The Sea", "The old man and the sea"),
        ("President Signs New Trade Deal with Canada", "President signs new trade deal with canada"),
        ("Lee Min Ho and Kim Soo Hyun, Samsung and LG", "Lee Min Ho and Kim Soo Hyun, Samsung and LG"),
        ("She will be here in May.", "She will be here in May."),
        ("Where is Will from in The Hague?", "Where is Will from in The Hague?"),
        ("We are from South Korea, not North Korea.", "We are from South Korea, not North Korea."),
        ("Bank of Korea Raises Rates", "Bank of Korea Raises Rates"),  # may be a name as a whole
        ("Mina and Jisu met Mr. Kim in New York", "Mina and Jisu met Mr. Kim in New York"),
        ("Kim Min Ho Park", "Kim Min Ho Park"),
        ("Bank Of Korea", "Bank Of Korea"),
        ("U.S. Army Sees NASA", "U.S. Army Sees NASA"),
        ("I Saw A TV", "I saw a TV"),
        ("", ""),
    ],
)
def test_shouting_is_read_calmly(text: str, read: str) -> None:
    """And so is a sentence whose words all begin with a capital."""
    assert (in_small_letters(text) if reads_badly(text) else text) == read


@pytest.mark.parametrize(
    ("text", "language", "read"),
    [
        ("I don’t know, it‘s Mina’s.", "en", "I don't know, it's Mina's."),
        ("Dont worry, im fine and youre late.", "en", "Don't worry, I'm fine and you're late."),
        ("The dogs’ house, ‘yes’.", "en", "The dogs’ house, ‘yes’."),
        (
            "IM and DONT.COM, dont.txt, @im, im-1, were ill",
            "en",
            "IM and DONT.COM, dont.txt, @im, im-1, were ill",
        ),
        ("Ｈｉ！ Ａｒｅ you ok？", "en", "Hi! Are you ok?"),
        ("네，좋아요。 dont", "ko", "네, 좋아요. dont"),
        ("１，０００원、좋아요。", "ko", "1,000원, 좋아요."),
        ("a b	c", "ko", "a b c"),
    ],
)
def test_what_is_typed_otherwise_is_read_in_its_usual_form(text: str, language: str, read: str) -> None:
    plain = plain_signs(narrow(text), language)
    assert replace_runs(plain, respelt(plain, language)).text == read


@pytest.mark.parametrize(
    ("text", "read", "answer"),
    [
        ("Go home!!!! Now??!", ["Go home!", "Now?"], "GO HOME!!!! NOW??!"),
        ("Thanks :) #travel #봄", ["Thanks"], "THANKS :) #travel #봄"),
        ("Thanks!! ^^", ["Thanks!"], "THANKS!! ^^"),
        ("See you:) ;-)", ["See you"], "SEE YOU:) ;-)"),
        ("Go (now) and C:D", ["Go (now) and C:D"], "GO (NOW) AND C:D"),
        ("These (and why:)", ["These (and why:)"], "THESE (AND WHY:)"),
        ("#travel #봄", [], "#travel #봄"),
        ("T_T", [], "T_T"),
        ("Yes.Good.See you", ["Yes.", "Good.", "See you"], "YES. GOOD. SEE YOU"),
        ("cafe\u0301 now", ["caf\u00e9 now"], "CAF\u00c9 NOW"),
    ],
)
async def test_what_stands_behind_a_sentence(
    client: Client, translate_lane: FakeDecodeLane, text: str, read: list[str], answer: str
) -> None:
    assert await translate(client, text, src_lang="en") == [{"translation_text": answer}]
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(each.prompt_ids).strip() for each in translate_lane.submitted] == read


async def test_pictures_end_a_korean_sentence(client: Client, translate_lane: FakeDecodeLane) -> None:
    (answer,) = await translate(
        client, "고마워요❤️ 사랑해요^^ 바다 \U0001f30a 좋다", src_lang="ko", tgt_lang="en"
    )
    tokenizer = byte_tokenizer()
    read = [tokenizer.decode(each.prompt_ids).strip() for each in translate_lane.submitted]
    assert read == ["고마워요", "사랑해요", "바다 좋다"]
    assert answer["translation_text"] == "고마워요❤️ 사랑해요^^ 바다 좋다 \U0001f30a"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Settings → Privacy→Place.", ["Settings", "Privacy", "Place."]),
        ("Home | About us || Contact", ["Home", "About us", "Contact"]),
        ("| Name | Age |", ["Name", "Age"]),
        ("File -> Save => Close », open", ["File", "Save", "Close », open"]),
        ("▶ More ※ read this", ["More ※ read this"]),
        ("※ Note: ① see ②", ["Note: (1) see (2)"]),
        ("① Open it, ② close it", ["Open it, (2) close it"]),
        ("x → y", ["x → y"]),
        ("From 5,000 → 6,000 now, $3 -> $4", ["From 5,000 → 6,000 now, $3 -> $4"]),
        ("P(A | B) is big", ["P(A | B) is big"]),
        ("○○ is here", ["○○ is here"]),
        ("(1) and (2) are one", ["(1) and (2) are one"]),
        ("a|b or c->d", ["a|b or c->d"]),
    ],
)
async def test_what_arrows_and_bars_part_is_translated_by_itself(
    client: Client, translate_lane: FakeDecodeLane, text: str, read: list[str]
) -> None:
    (answer,) = await translate(client, text, src_lang="en")
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(each.prompt_ids).strip() for each in translate_lane.submitted] == read
    as_read = text.replace("① see ②", "(1) see (2)").replace(", ②", ", (2)")
    assert answer["translation_text"] == as_read.upper()


@pytest.mark.parametrize(
    ("text", "read", "answer"),
    [
        ("떨어졌어ㅠㅠ", ["떨어졌어"], "떨어졌어 :("),
        ("좋아 ㅋㅋㅋ 가자ㅎㅎ", ["좋아", "가자"], "좋아 haha 가자 haha"),
        ("ㅋㅋㅋ 진짜?", ["진짜?"], "haha 진짜?"),
        ("ㅠㅠ", [], ":("),
        ("ㅇㅇ ㄱㄱ", ["응 가자"], "응 가자"),
        ("ㅇㅇㅇ이다", ["ㅇㅇㅇ이다"], "ㅇㅇㅇ이다"),
    ],
)
async def test_laughing_and_weeping_are_said_in_the_readers_letters(
    client: Client, translate_lane: FakeDecodeLane, text: str, read: list[str], answer: str
) -> None:
    (found,) = await translate(client, text, src_lang="ko", tgt_lang="en")
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(each.prompt_ids).strip() for each in translate_lane.submitted] == read
    assert found["translation_text"].strip() == answer


@pytest.mark.parametrize(
    ("text", "read", "answer"),
    [
        ("Where is it!?", ["Where is it?"], "WHERE IS IT?!"),
        ("My city is #Seoul", ["My city is #Seoul"], "MY CITY IS #SEOUL"),
        ("My city is Seoul. #Seoul", ["My city is Seoul."], "MY CITY IS SEOUL. #Seoul"),
        ("#travel \U0001f30a #beach", [], "#travel \U0001f30a #beach"),
        ("Stay (see :)", ["Stay (see :)"], "STAY (SEE :)"),
        ("Booking.Com is great", None, "BOOKING.COM IS GREAT"),
        ("He said no. 3 people left.", ["He said no. 3 people left."], "HE SAID NO. 3 PEOPLE LEFT."),
        ("It is 30 min. he left", ["It is 30 min. he left"], "IT IS 30 MIN. HE LEFT"),
        ("A 30 min. walk", ["A 30 minute walk"], "A 30 MINUTE WALK"),
        ("Do you\u200b  know", ["Do you know?"], "DO YOU KNOW?"),
    ],
)
async def test_what_only_looks_like_an_ending(
    client: Client, translate_lane: FakeDecodeLane, text: str, read: list[str] | None, answer: str
) -> None:
    assert await translate(client, text, src_lang="en") == [{"translation_text": answer}]
    tokenizer = byte_tokenizer()
    submitted = [tokenizer.decode(each.prompt_ids).strip() for each in translate_lane.submitted]
    assert read is None or submitted == read


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("가자.  그래.\n    - 나무\n        - 돌", "가자.  그래.\n    - 나무\n        - 돌"),
        ("1  2    3", "1  2    3"),
        ("ㅋㅋ", "haha"),
        ("가자.\nㅠㅠ", "가자.\n:("),
        ("ㅋㅋ \U0001f44d ㅋㅋ", "haha \U0001f44d haha"),
        ("좋아 ㅎㅎ~ 내일 봐", "좋아 haha~ 내일 봐"),
        ("가자ㅠㅠ!!", "가자 :(!!"),
    ],
)
async def test_white_space_stays_into_english(client: Client, text: str, answer: str) -> None:
    assert await translate(client, text, src_lang="ko", tgt_lang="en") == [{"translation_text": answer}]


async def test_letters_in_parts_where_things_are_kept(client: Client, translate_lane: FakeDecodeLane) -> None:
    tree = unicodedata.normalize("NFD", "나무")
    kept = f"이것은 https://x.com/{tree} 와 `{tree}` 이다."
    assert without_parts(f"{tree} {kept}").text == f"나무 {kept}"
    html = '<img src="x">\u0338 onerror=alert(1) <b>hi you</b>'
    (answer,) = await translate(client, html, src_lang="en", format="html")
    assert answer["translation_text"].startswith('<img src="x">\u0338')
    for term in ("카카오", unicodedata.normalize("NFD", "카카오")):
        for text in ("나는 카카오를 쓴다.", unicodedata.normalize("NFD", "나는 카카오를 쓴다.")):
            glossary = {term: "Kakao"}
            (answer,) = await translate(client, text, src_lang="ko", tgt_lang="en", glossary=glossary)
            assert "Kakao" in answer["translation_text"]


@pytest.mark.parametrize(
    ("text", "glossary"),
    [("정거장 ABC", {"정거장": "station"}), ("KT report", {"KT": "KT Corp."}), ("5만 USD", {})],
)
async def test_a_sentence_with_something_to_translate_is_not_foreign(
    client: Client, translate_lane: FakeDecodeLane, text: str, glossary: dict[str, str]
) -> None:
    await translate(client, text, src_lang="ko", tgt_lang="en", glossary=glossary)
    assert translate_lane.submitted


@pytest.mark.parametrize(
    "text", ["ㅋ" * 19_999 + "a", "^" * 19_999 + "a", "a " + ":)" * 9_990, "#a " * 6_000]
)
def test_endings_are_found_in_little_time(text: str) -> None:
    """Not one after the other: a run is looked through once."""
    words, behind = set_apart(text)
    assert words + behind == text
    assert not _AFTER_SENTENCE.search(text)


@pytest.mark.parametrize(
    ("translated", "bare"),
    [
        ("안녕하세요.", "안녕하세요"),
        ("It's me.", "It's me"),
        ("Well...", "Well..."),
        ("The price (with tax).", "The price (with tax)."),
        ("", ""),
        *(
            (short, short)
            for short in ("He lives in the U.S.", "Books, notebooks, etc.", "Ph.D.", "Wed.", "ETC.")
        ),
    ],
)
def test_a_translation_may_lose_its_full_stop(translated: str, bare: str) -> None:
    assert without_full_stop(translated) == bare


@pytest.mark.parametrize(
    ("source", "unmarked"),
    [
        ("Hello", True),
        ("메뉴", True),
        ("Room 3", True),
        ("Hello.", False),
        ("안녕하세요!", False),
        ("Dear Sir,", False),
        ("`make`", True),
        ("`make.`", False),
        ('<span translate="no">Acme Corp.</span>', False),
        ("", False),
    ],
)
def test_what_ends_in_a_word_is_unmarked(source: str, unmarked: bool) -> None:
    assert is_unmarked(source) == unmarked


async def test_a_label_becomes_a_label(
    client: Client, translate_lane: FakeDecodeLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    shout = translate_lane._hypothesis
    monkeypatch.setattr(
        translate_lane, "_hypothesis", lambda text, *rest: shout(text.rstrip(".") + ".", *rest)
    )

    async def said(text: str, **parameters: object) -> str:
        (answer,) = await translate(client, text, src_lang="en", tgt_lang="ko", **parameters)
        found: str = answer["translation_text"]
        return found

    assert await said("Menu") == "MENU"
    assert await said("Menu.") == "MENU."
    assert await said("Yes. Home") == "YES. HOME"
    assert await said("Home | About us") == "HOME | ABOUT US"
    assert await said("One\nTwo\nThree") == "ONE\nTWO\nTHREE"
    assert await said("I ate ㅋㅋ I went home") == "I ATE. ㅋㅋ I WENT HOME"
    assert await said("<p><b>Menu</b></p>", format="html") == "<p><b>MENU</b></p>"
    assert await said("Ask Acme", do_not_translate=["Acme"]) == "ASK Acme"
    assert (await said("Ask Acme Corp.", do_not_translate=["Acme Corp."])).endswith("Acme Corp..")


async def test_hangul_in_parts_is_read_as_whole(client: Client, translate_lane: FakeDecodeLane) -> None:
    await translate(client, unicodedata.normalize("NFD", "나는 집에 간다."))
    tokenizer = byte_tokenizer()
    wanted = tokenizer.source_ids(tokenizer.encode("나는 집에 간다."), "en")
    assert translate_lane.submitted[-1].prompt_ids == wanted


async def test_a_sentence_reaches_the_model_in_its_usual_form(
    client: Client, translate_lane: FakeDecodeLane
) -> None:
    await translate(client, "Mina doesn’t know, but I dont.", src_lang="en")
    text = byte_tokenizer().decode(translate_lane.submitted[0].prompt_ids)
    assert text.strip() == "Mina doesn't know, but I don't."


async def test_a_sentence_of_the_other_language_stays(client: Client, translate_lane: FakeDecodeLane) -> None:
    text = "나는 집에 간다. How are you? 그래요."
    (answer,) = await translate(client, text, src_lang="ko", tgt_lang="en")
    assert len(translate_lane.submitted) == 2
    assert " How are you? " in answer["translation_text"]


async def test_pictures_around_a_sentence_stay(client: Client, translate_lane: FakeDecodeLane) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    (answer,) = await translate(
        client, f"{family} I go home. \U0001f44d\U0001f3fd\u2764\ufe0f", src_lang="en"
    )
    assert answer["translation_text"].startswith(f"{family} ")
    assert answer["translation_text"].endswith(" \U0001f44d\U0001f3fd\u2764\ufe0f")
    (sequence,) = translate_lane.submitted
    assert byte_tokenizer().decode(sequence.prompt_ids).strip() == "I go home."
    assert await translate(client, family, src_lang="en") == [{"translation_text": family}]


@pytest.mark.parametrize(
    ("text", "read", "behind"),
    [
        (
            "I love pizza \U0001f355 and beer\U0001f37a, you know.",
            "I love pizza and beer, you know.",
            "\U0001f355 \U0001f37a",
        ),
        (
            "Meet \U0001f44d\U0001f3fd\U0001f468\u200d\u2764\ufe0f\u200d\U0001f468 me!",
            "Meet me!",
            "\U0001f44d\U0001f3fd\U0001f468\u200d\u2764\ufe0f\u200d\U0001f468",
        ),
        ("We\U0001f600go home \u2728 now \U0001f389", "We go home now", "\u2728 \U0001f389"),
        ("I \u2764\ufe0f Seoul, my \U0001f499 city.", "I love Seoul, my city.", "\u2764\ufe0f \U0001f499"),
        ("Thank you \u2764\ufe0f see you.", "Thank you see you.", "\u2764\ufe0f"),
        ("I \U0001f494 you all.", "I you all.", "\U0001f494"),
        ("A \u27a1 B is done.", "A \u27a1 B is done.", ""),
        ("Look \U0001f449https://example.org now.", "Look Firefox now.", "\U0001f449"),
    ],
)
async def test_pictures_within_a_sentence_stand_behind_it(
    client: Client, translate_lane: FakeDecodeLane, text: str, read: str, behind: str
) -> None:
    (answer,) = await translate(client, text, src_lang="en")
    (sequence,) = translate_lane.submitted
    assert byte_tokenizer().decode(sequence.prompt_ids).strip() == read
    assert answer["translation_text"].endswith(f" {behind}" if behind else read[-3:].upper())


@pytest.mark.parametrize(
    ("text", "read", "answer"),
    [
        ("<p>It’s a <b>red</b> car.</p>", "It's a red car.", None),
        ("<p>Hello&nbsp;<b>world</b>.</p>", "Hello world.", None),
        ("<p>\U0001f44b Hello <b>Kim</b> \U0001f389 see.</p>", "Hello Kim see.", "\U0001f389</p>"),
        ("<p>Hello <b>\U0001f44b</b> Kim.</p>", "Hello \U0001f44b Kim.", None),
        ("<p>\U0001f44b  \U0001f389 Hi <b>Kim</b> \U0001f3e0 so.</p>", "Hi Kim so.", "\U0001f3e0</p>"),
        ("<i>I</i> <b>dont</b> know １２，though.", "I don't know 12, though.", None),
        (
            "<p>The <b>dog \U0001f436</b> ran home\U0001f3e0.</p>",
            "The dog ran home.",
            "\U0001f436 \U0001f3e0</p>",
        ),
    ],
)
async def test_tags_in_a_sentence_that_is_read_in_its_usual_form(
    client: Client, translate_lane: FakeDecodeLane, text: str, read: str, answer: str | None
) -> None:
    (found,) = await translate(client, text, src_lang="en", format="html")
    (sequence,) = translate_lane.submitted
    assert byte_tokenizer().decode(sequence.prompt_ids).strip() == read
    assert found["translation_text"].count("<") == text.count("<")
    assert answer is None or found["translation_text"].endswith(answer)


async def test_prices_keep_their_signs_where_nothing_is_translated(client: Client) -> None:
    for text, kept in (("£5", "£5"), ("₩50,000", "₩50,000"), ("$5만", "$50,000")):
        assert await translate(client, text, src_lang="ko", tgt_lang="en") == [{"translation_text": kept}]
    (answer,) = await translate(client, "값이다. It costs £5. 그래.", src_lang="ko", tgt_lang="en")
    assert " It costs £5. " in answer["translation_text"]


async def test_shouted_sentences_reach_the_model_in_small_letters(
    client: Client, translate_lane: FakeDecodeLane
) -> None:
    await translate(client, "WRITE TO ANN@EXAMPLE.ORG TODAY. I will.", src_lang="en")
    tokenizer = byte_tokenizer()
    first, second = (tokenizer.decode(sequence.prompt_ids) for sequence in translate_lane.submitted)
    assert first.startswith("Write to ")
    assert first.rstrip().endswith(" today.")
    assert "example" not in first.lower()
    assert "I will." in second


async def test_each_text_has_its_own_language(client: Client, translate_lane: FakeDecodeLane) -> None:
    await translate(client, ["home", "집"])
    targets = [sequence.prompt_ids[1] for sequence in translate_lane.submitted]
    assert targets == [byte_tokenizer().languages[code] for code in ("ko", "en")]


async def test_a_language_that_nobody_here_knows_is_named(client: Client) -> None:
    text = "Je vais à la maison avec mes amis."
    message = "is in French (fr), as it seems, and there is no such direction: the languages are en, ko."
    assert message in await refusal(client, text)
    assert (await refusal(client, ["hello", text], tgt_lang="ko")).startswith(f"inputs[1] {message}")
    assert await translate(client, text, src_lang="en") == [{"translation_text": text.upper()}]


async def test_parameters_reach_the_lane_from_both_places(
    client: Client, translate_lane: FakeDecodeLane
) -> None:
    await translate(
        client,
        "abc",
        generate_parameters={"num_beams": 2, "length_penalty": 0.5},
        max_new_tokens=7,
        num_beams=2,
        no_repeat_ngram_size=3,
        repetition_penalty=1.5,
        clean_up_tokenization_spaces=None,
        truncation=None,
    )
    beams: Any = translate_lane.submitted[-1].params
    assert (beams.num_beams, beams.length_penalty, beams.max_new_tokens) == (2, 0.5, 7)
    assert (beams.no_repeat_ngram_size, beams.repetition_penalty, beams.num_return_sequences) == (3, 1.5, 1)


async def test_the_length_penalty_is_the_models_own_unless_one_is_asked_for(
    client: Client, app: FastAPI, translate_lane: FakeDecodeLane
) -> None:
    task = app.state.services.tasks["translate"]
    task.config = replace(task.config, length_penalty=1.5)
    await translate(client, "abc")
    await translate(client, "abc", length_penalty=1.0)
    await client.post("/translate", json={"q": "abc", "source": "en", "target": "ko"})
    asked: list[Any] = [sequence.params for sequence in translate_lane.submitted]
    assert [params.length_penalty for params in asked] == [1.5, 1.0, 1.5]


async def test_the_way_back_counts_as_the_model_has_it_unless_something_is_asked_for(
    client: Client, app: FastAPI, translate_lane: FakeDecodeLane
) -> None:
    task = app.state.services.tasks["translate"]
    task.config = replace(task.config, round_trip=0.5, languages={"en": 6, "ko": 7})
    await translate(client, "abc")
    await translate(client, "abc", round_trip=0)
    await translate(client, "abc", round_trip=2.5)
    await client.post("/translate", json={"q": "abc", "source": "en", "target": "ko"})
    asked: list[Any] = [sequence.params for sequence in translate_lane.submitted]
    assert [params.round_trip for params in asked] == [0.5, 0, 2.5, 0.5]
    task.config = replace(task.config, round_trip=0.0, languages={"en": 6, "ko": 7, "fr": 8})
    assert "knows no way back" in await refusal(client, "abc", round_trip=1)


EXAMPLES = [
    ("Close the door.", "문을 닫아라."),
    ("Close the window.", "창문을 닫아라."),
    ("Close the window.", "창문 닫아."),
    ("Buy 3 apples.", "사과 3개를 사라."),
]


@pytest.fixture
def with_examples(app: FastAPI) -> None:
    task = app.state.services.tasks["translate"]
    task.examples = Examples.build({("en", "ko"): EXAMPLES})
    task.config = replace(task.config, example_weight=0.6)


@pytest.mark.usefixtures("with_examples")
async def test_each_sentence_has_its_examples(client: Client, translate_lane: FakeDecodeLane) -> None:
    (answer,) = await translate(client, "Close the big window. Buy 4 apples. Zzz.", return_examples=True)
    first, second, third = answer["examples"]
    assert {(e["source"], e["target"]) for e in first} == set(EXAMPLES[1:3])
    assert [e["likeness"] for e in first] == sorted((e["likeness"] for e in first), reverse=True)
    assert [e["target"] for e in second] == ["사과 3개를 사라."]
    assert third == []
    sequences = translate_lane.submitted
    assert [len(sequence.examples) for sequence in sequences] == [2, 1, 0]
    assert [s.params.example_weight for s in sequences] == [0.6] * 3  # type: ignore[union-attr]
    (apples,) = sequences[1].examples
    assert apples.has_other_numbers
    assert byte_tokenizer().decode(apples.target) == "사과 3개를 사라."
    # The other way round.
    (answer,) = await translate(client, "창문 닫아", return_examples=True)
    assert [e["target"] for e in answer["examples"][0]] == ["Close the window."]
    (answer,) = await translate(client, "Close the door.")
    assert "examples" not in answer


@pytest.mark.usefixtures("with_examples")
async def test_examples_can_be_turned_off_and_up(client: Client, translate_lane: FakeDecodeLane) -> None:
    for asked in (0, 0.95, None):
        await translate(client, "Close the door.", examples=asked)
    await client.post("/translate", json={"q": "Close the door.", "source": "en", "target": "ko"})
    found = [(s.params.example_weight, len(s.examples)) for s in translate_lane.submitted]  # type: ignore[union-attr]
    assert found == [(0.0, 0), (0.95, 1), (0.6, 1), (0.6, 1)]
    (answer,) = await translate(client, "Close the door.", examples=0, return_examples=True)
    assert answer["examples"] == [[]]
    for wrong in (-0.1, 0.96):
        assert f"examples is {wrong}, the limit is 0 to 0.95" in await refusal(client, "a", examples=wrong)


async def test_without_examples_none_can_be_asked_for(client: Client) -> None:
    assert "started without any" in await refusal(client, "a", examples=0.5)
    assert (await translate(client, "a", examples=0, return_examples=True))[0]["examples"] == [[]]


@pytest.mark.parametrize(
    ("text", "translated"),
    [
        ("Go home. Now!", "GO HOME. NOW"),
        ("Go home! Now!", "GO HOME! NOW"),
        ("Go home.\nNow!", "GO HOME\nNOW"),
        ("Go home.", "GO HOME"),
    ],
)
async def test_no_sentence_runs_into_the_next(
    client: Client,
    translate_lane: FakeDecodeLane,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    translated: str,
) -> None:
    """Though a translation ends without a mark, as one that is known may."""
    shout = translate_lane._translate

    def without_marks(source_ids: list[int], params: BeamParams) -> list[Hypothesis]:
        said = byte_tokenizer().decode(source_ids).rstrip(".!")
        return shout(byte_tokenizer().encode(said), params)

    monkeypatch.setattr(translate_lane, "_translate", without_marks)
    assert await translate(client, text) == [{"translation_text": translated}]


async def test_default_beams_and_length(client: Client, translate_lane: FakeDecodeLane) -> None:
    await translate(client, "abc. " + "d" * 40)
    params: list[Any] = [sequence.params for sequence in translate_lane.submitted]
    assert [p.num_beams for p in params] == [4, 4]
    assert [p.max_new_tokens for p in params] == [3 * 7 + 20, 100]  # tag, language and end are tokens too


async def test_what_ended_for_its_length_says_so(client: Client) -> None:
    answer = await translate(client, ["abcdef", "ab"], max_new_tokens=3)
    assert answer == [{"translation_text": "ABC", "finish_reason": "length"}, {"translation_text": "AB"}]


async def test_scores(client: Client) -> None:
    answer = await translate(client, "One here. Two here.", return_scores=True, num_return_sequences=2)
    assert [entry["score"] for entry in answer] == [-0.5, -1.5]
    assert (await translate(client, " ", return_scores=True))[0]["score"] == 0


async def test_alignment_of_each_sentence(client: Client) -> None:
    first, second = (await translate(client, "ab. Cd.", return_alignment=True))[0]["alignment"]
    assert first["source_tokens"] == ["<tag:everyday>", "<2ko>", "a", "b", ".", "</s>"]
    assert first["target_tokens"] == ["A", "B", "."]
    assert len(first["weights"]) == 3
    assert second["target_tokens"] == ["C", "D", "."]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"src_lang": "xx"}, "src_lang: no language 'xx'; there are en, ko"),
        ({"src_lang": "en", "tgt_lang": "fr"}, "tgt_lang: no language 'fr'; there are en, ko"),
        ({"src_lang": "ko", "tgt_lang": "ko"}, "src_lang and tgt_lang are both 'ko'; they must differ"),
        ({"num_beams": 0}, "num_beams is 0, the limit is 1 to 8"),
        ({"num_beams": 9}, "num_beams is 9, the limit is 1 to 8"),
        ({"num_return_sequences": 5}, "num_return_sequences is 5, the limit is num_beams, which is 4"),
        (
            {"num_beams": 2, "num_return_sequences": 3},
            "num_return_sequences is 3, the limit is num_beams, which is 2",
        ),
        ({"length_penalty": 6.0}, "length_penalty is 6, the limit is -5 to 5"),
        ({"round_trip": -0.5}, "round_trip is -0.5, the limit is 0 to 10"),
        ({"max_new_tokens": 101}, "max_new_tokens is 101, the limit is 1 to 100"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, the limit is 1 to 100"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1, the limit is 0 to 16"),
        ({"repetition_penalty": 11}, "repetition_penalty is 11, the limit is 0.1 to 10"),
        ({"nope": 1}, "unknown parameter: parameters.nope"),
        ({"generate_parameters": {"nope": 1}}, "unknown parameter: parameters.generate_parameters.nope"),
        (
            {"num_beams": 2, "generate_parameters": {"num_beams": 3}},
            "num_beams is 2 in parameters but 3 in generate_parameters",
        ),
    ],
)
async def test_refusals(client: Client, parameters: dict[str, object], message: str) -> None:
    assert await refusal(client, "a", **parameters) == message


async def test_what_has_no_letters_needs_no_model(client: Client, translate_lane: FakeDecodeLane) -> None:
    text = "3.14, 2026-11-26!\n\u2764 https://example.org/a?b=c (:\n"
    assert await translate(client, text, num_return_sequences=2) == [{"translation_text": text}]
    assert not translate_lane.submitted


async def test_signs_of_lists_stay(client: Client, translate_lane: FakeDecodeLane) -> None:
    text = "# a\n\n- b\n* - c\n> d - e\n-f\n(1) g\nA) h\n12) i"
    assert (await translate(client, text))[0]["translation_text"] == text.upper()
    sources = [translate_lane.tokenizer.decode(s.prompt_ids) for s in translate_lane.submitted]
    assert sources == ["a", "b", "c", "d - e", "-f", "g", "h", "i"]


async def test_several_translations_differ(client: Client, translate_lane: FakeDecodeLane) -> None:
    answer = await translate(client, ["a", " ", "a\nb"], num_return_sequences=3)
    assert [[each["translation_text"] for each in text] for text in answer] == [
        ["A", "A!", "A!!"],
        [" "],
        ["A\nB", "A!\nB!", "A!!\nB!!"],
    ]
    params: Any = translate_lane.submitted[0].params
    assert (params.num_beams, params.num_return_sequences) == (4, 4)


async def test_what_is_missing_is_reported(client: Client, translate_lane: FakeDecodeLane) -> None:
    """This lane shouts whatever it was asked to say: "CPU" comes out as it should, "Firefox" does not."""
    (answer,) = await translate(
        client, "Go to www.a.org from gate 27. No.", glossary={"gate": "문"}, num_beams=1, src_lang="en"
    )
    assert answer == {"translation_text": "GO TO FIREFOX FROM 문 27. NO.", "unmet": ["www.a.org"]}
    bound, free = translate_lane.submitted
    params: Any = bound.params
    assert [phrase.once for phrase in params.required] == [True, True, False]
    assert (params.num_beams, free.params.num_beams) == (4, 1)  # type: ignore[union-attr]


async def test_markup_stays_around_its_words(client: Client, translate_lane: FakeDecodeLane) -> None:
    text = "<p title='&lt;'>one &amp; <b>two</b>.</p><!-- no --><script>a<b</script> three<br>4 &lt;<i>5</i>"
    (answer,) = await translate(client, text, format="html", src_lang="en")
    assert answer["translation_text"].replace("<B>", "<b>") == (
        "<p title='&lt;'><b>ONE</b> &amp; TWO.</p><!-- no --><script>a<b</script> THREE<br>4 &lt;<i>5</i>"
    )
    assert [s.params.return_alignment for s in translate_lane.submitted] == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"glossary": {"a": ""}}, "glossary '' has 0 characters, the limit is 1 to 100"),
        ({"glossary": {"": "a"}}, "glossary '' has 0 characters, the limit is 1 to 100"),
        ({"glossary": {"-": "a"}}, "glossary: '-' has no letter"),
        ({"glossary": {"a" * 101: "b"}}, "has 101 characters, the limit is 1 to 100"),
        ({"glossary": {f"a{i}": "b" for i in range(65)}}, "glossary has 65 terms, the limit is 64"),
        ({"do_not_translate": ["a"] * 65}, "do_not_translate has 65 terms, the limit is 64"),
        (
            {"glossary": {"Ab": "c"}, "do_not_translate": ["aB"]},
            "glossary: 'ab' is among do_not_translate, too",
        ),
        ({"format": "xml"}, "parameters.format: Input should be 'text' or 'html'"),
        ({"glossary": {"a": "b", "c": 1}}, "glossary: the value of 'c' must be a string"),
        ({"glossary": dict.fromkeys(map(str, range(90_000)))}, "glossary: the value of '0' must be a string"),
    ],
)
async def test_refusals_of_terms(client: Client, parameters: dict[str, object], message: str) -> None:
    assert message in await refusal(client, "a", **parameters)


async def test_a_long_number_is_not_sent_back(client: Client) -> None:
    error = await refusal(client, "a", num_beams=10**1000, generate_parameters={"num_beams": 10**1000 + 1})
    assert len(error) < 250


async def test_headers(client: Client) -> None:
    answer = await client.post("/translate", json={"inputs": ["ab", " "]})
    assert (answer.headers["x-prompt-tokens"], answer.headers["x-generated-tokens"]) == ("5", "2")


async def test_no_more_is_split_than_a_queue_takes(client: Client, translate_lane: FakeDecodeLane) -> None:
    """The lane takes 16: the texts after the one that goes beyond are not looked at."""
    sixteen = await translate(client, ["a\n" * 8, "a\n" * 8])
    assert [each["translation_text"] for each in sixteen] == ["A\n" * 8] * 2
    submitted = len(translate_lane.submitted)
    message = await refusal(client, ["a\n" * 10, "a\n" * 10, "a", "a"])
    assert message == "the first 2 of 4 texts hold 20 sentences, the limit is 16 in one request"
    assert len(translate_lane.submitted) == submitted
