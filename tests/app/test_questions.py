"""Questions that somebody typed without their mark, and what may be none."""

import pytest

from app.questions import asks

ENGLISH = (
    "do you want to eat something",
    "hey are you there now",
    "Is the store open",
    "what r u doing tonight",
    "so what's your name",
    "How much is this",
    "where are you going",
    "is it raining",
    "can i help you",
    "how old are you",
    "did your brother call",
    "why is the sky blue",
    "are u ok",
    "isn't it cold",
    "should i go",
    "how about tomorrow",
    "what time is it",
    "have you ever been there",
    "will you marry me",
    "who are you",
    "how many people are coming",
    "where is the bathroom",
    "is there a bank near here",
    "could you help me",
    "does she know",
    "nice weather today isn't it",
    "You like it, don't you",
    "they can come, won't they",
)
KOREAN = (
    "뭐 해요",
    "지금 어디 가",
    "이거 얼마예요",
    "밥 먹을까",
    "식사하셨습니까",
    "집에 갈까요",
    "예약할 수 있나요",
    "언제 와요",
    "뭐 먹고 싶어",
    "무슨 일이야",
    "왜 안 와",
    "너 지금 어디야",
    "몇 시에 만나요",
    "괜찮은가요",
    "이건 뭐예요",
    "지금 뭐 해",
    "왜 그래요",
    "누구세요",
    "어떻게 지내요",
    "어떻게 가면 돼요",
    "얼마나 걸려요",
    "화장실이 어디예요",
    "이름이 뭐예요",
    "공부하나요",
    "왜",
    "어디 있어",
    "언제 도착해",
    "오늘 뭐 먹을래",
    "누구랑 가",
    "몇 명이 와요",
)
NO_ENGLISH = (
    "I think that isn't it",
    "Go there if he won't they",
    "we know who they are and who isn't you",
    "My keys weren't there",
    "Call me if Mom isn't there",
    "the answer wasn't it",
    "Should you have any questions please let me know",
    "Which is why I left early",
    "Which was nice",
    "Were it not for you I would be lost",
    "Would that it were so",
    "How far we have come",
    "How much I love you",
    "What is done is done",
    "What does not kill me makes me stronger",
    "What will be will be",
    "Who is the best will win",
    "What time I get home depends on traffic",
    "So did the rest of us",
    "What's new in version 2",
    "do the dishes",
    "have a nice day",
    "what a day",
    "when I get home I sleep",
    "can you",
    "and is the best",
    "I know where you are",
    "Do not touch",
    "Can openers are useful",
    "Will was here",
    "How nice of you",
    "Why I left",
    "May I",
    "Is",
    "Have fun",
    "Does",
    "so do i",
    "Where there is smoke there is fire",
    "Whatever you do is fine",
)
NO_KOREAN = (
    "제 친구예요",
    "그게 문제야",
    "우리 엄마야",
    "숙제야",
    "어제야",
    "이제야",
    "축구야",
    "대구예요",
    "드라마야",
    "바쁘니까요",
    "그러니까요",
    "사실이니까요",
    "커피 하나요",
    "무슨 말인지 모르겠어요",
    "어떻게 해야 할지 모르겠어요",
    "어느 날 그를 만났어요",
    "왜 왔냐고 물었어요",
    "얼마나 예쁜지 몰라요",
    "뭐 어쩔 수 없지",
    "뭐 괜찮아",
    "어떻게 되겠지",
    "누가 왔나 봐요",
    "무슨 일 있으면 연락해요",
    "어디 좀 다녀올게요",
    "언제 밥 한번 먹어요",
    "누가 봐도 예뻐요",
    "어느 정도 알아요",
    "무슨 일이 있어도 갈 거야",
    "비가 오니까",
    "내일 만나요",
    "소리가 나요",
    "어떻게 하는지 알아요",
    "언제 한번 밥 먹어요",
    "나는 뭐든지 먹어",
    "집에 가요",
    "왜냐하면 바빠요",
    "뭐라도 먹어요",
    "언제나 고마워요",
    "나도 그래요",
    "아무도 없어요",
    "얼마나 좋았는지 몰라",
    "그냥 그래요",
    "어디서 본 것 같아요",
    "누구나 할 수 있어요",
)


@pytest.mark.parametrize(
    ("text", "language"), [(text, "en") for text in ENGLISH] + [(text, "ko") for text in KOREAN]
)
def test_questions_without_their_mark(text: str, language: str) -> None:
    assert asks(text, language)
    assert not asks(f"{text}?", language)
    assert not asks(f"{text}.", language)
    assert not asks(text, "fr")


@pytest.mark.parametrize(
    ("text", "language"), [(text, "en") for text in NO_ENGLISH] + [(text, "ko") for text in NO_KOREAN]
)
def test_what_may_be_no_question(text: str, language: str) -> None:
    assert not asks(text, language)


def test_what_is_long_is_not_looked_through() -> None:
    assert not asks("what is " + "is " * 10_000 + "it", "en")
    assert not asks("", "ko")
