"""Which language a text is in."""

import pytest

from app.languages import detect_language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("나는 집에 간다", "ko"),
        ("iPhone을 샀다", "ko"),
        ("ㅋㅋㅋ", "ko"),
        ("한글과 中文", "ko"),
        ("", "en"),
        ("123 !", "en"),
        ("ok", "en"),
        ("i go home", "en"),
        ("no problem", "en"),
        ("Tom", "en"),
        ("cafe latte", "en"),
        ("la la la", "en"),
        ("Mario Rossi", "en"),
        ("I love 김치 very much", "en"),
        ("The Seine flows through Paris, Rouen and Le Havre.", "en"),
        ("Je vais à la maison avec mes amis.", "fr"),
        ("Où est la gare, s'il vous plaît ?", "fr"),
        ("Ich gehe jetzt nach Hause.", "de"),
        ("¿Dónde está la estación de tren?", "es"),
        ("Dove si trova la stazione?", "it"),
        ("Tôi đi về nhà.", "vi"),
        ("今日は天気がいい", "ja"),
        ("Куда идёт этот поезд?", "ru"),
        ("привет", "ru"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert detect_language(text).code == language


def test_probability_and_name() -> None:
    french = detect_language("Je vais à la maison avec mes amis.")
    assert (french.name, french.probability > 0.9) == ("French", True)
    assert detect_language("집 ab").probability == 0.5
    assert detect_language("한글").probability == 1.0
    assert detect_language("!").probability == 0.0


def test_a_long_text_is_known_by_its_beginning() -> None:
    assert detect_language("Je vais à la maison. " * 5000).code == "fr"
