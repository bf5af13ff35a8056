"""Codes of languages: ISO 639-1 beside ISO 639-3, and the codes that models go by."""

from __future__ import annotations

from collections.abc import Iterable

UNDETERMINED, UNCODED = "und", "mis"  # the languages of a translator that does not name them, by ISO 639-3

# Two letters, three letters (several where a model names a variety), English name.
_TABLE = """
    af afr Afrikaans | am amh Amharic | ar ara,arb Arabic | as asm Assamese | ay aym,ayr Aymara
    az aze,azj Azerbaijani | ba bak Bashkir | be bel Belarusian | bg bul Bulgarian | bm bam Bambara
    bn ben Bengali | bo bod Tibetan | br bre Breton | bs bos Bosnian | ca cat Catalan | cs ces Czech
    cy cym Welsh | da dan Danish | de deu German | dz dzo Dzongkha | ee ewe Ewe | el ell Greek
    en eng English | eo epo Esperanto | es spa Spanish | et est,ekk Estonian | eu eus Basque
    fa fas,pes Persian | ff ful,fuv Fulah | fi fin Finnish | fj fij Fijian | fo fao Faroese
    fr fra French | fy fry Frisian | ga gle Irish | gd gla Scottish Gaelic | gl glg Galician
    gn grn Guarani | gu guj Gujarati | ha hau Hausa | he heb Hebrew | hi hin Hindi | hr hrv Croatian
    ht hat Haitian Creole | hu hun Hungarian | hy hye Armenian | id ind Indonesian | ig ibo Igbo
    is isl Icelandic | it ita Italian | ja jpn Japanese | jv jav Javanese | ka kat Georgian
    kg kon Kongo | ki kik Kikuyu | kk kaz Kazakh | km khm Khmer | kn kan Kannada | ko kor Korean
    kr kau,knc Kanuri | ks kas Kashmiri | ku kur,kmr Kurdish | ky kir Kyrgyz | lb ltz Luxembourgish
    lg lug Ganda | li lim Limburgish | ln lin Lingala | lo lao Lao | lt lit Lithuanian
    lv lav,lvs Latvian | mg mlg,plt Malagasy | mi mri Maori | mk mkd Macedonian | ml mal Malayalam
    mn mon,khk Mongolian | mr mar Marathi | ms msa,zsm Malay | mt mlt Maltese | my mya Burmese
    nb nob Norwegian Bokmål | ne nep,npi Nepali | nl nld Dutch | nn nno Norwegian Nynorsk
    no nor Norwegian | ny nya Chichewa | oc oci Occitan | om orm,gaz Oromo | or ori,ory Odia
    pa pan Punjabi | pl pol Polish | ps pus,pbt Pashto | pt por Portuguese | qu que,quy Quechua
    rn run Rundi | ro ron Romanian | ru rus Russian | rw kin Kinyarwanda | sa san Sanskrit
    sc srd Sardinian | sd snd Sindhi | sg sag Sango | si sin Sinhala | sk slk Slovak | sl slv Slovenian
    sm smo Samoan | sn sna Shona | so som Somali | sq sqi,als Albanian | sr srp Serbian | ss ssw Swati
    st sot Southern Sotho | su sun Sundanese | sv swe Swedish | sw swa,swh Swahili | ta tam Tamil
    te tel Telugu | tg tgk Tajik | th tha Thai | ti tir Tigrinya | tk tuk Turkmen | tl tgl Tagalog
    tn tsn Tswana | tr tur Turkish | ts tso Tsonga | tt tat Tatar | tw twi Twi | ug uig Uyghur
    uk ukr Ukrainian | ur urd Urdu | uz uzb,uzn Uzbek | vi vie Vietnamese | wo wol Wolof | xh xho Xhosa
    yi yid,ydd Yiddish | yo yor Yoruba | zh zho,cmn Chinese | zu zul Zulu
"""


def _read() -> tuple[dict[str, str], dict[str, str]]:
    """Two letters by three, and names by two letters."""
    shorter: dict[str, str] = {}
    names: dict[str, str] = {}
    for entry in _TABLE.replace("\n", "|").split("|"):
        if entry.strip():
            two, three, name = entry.strip().split(" ", 2)
            names[two] = name
            shorter |= dict.fromkeys(three.split(","), two)
    return shorter, names


_SHORTER, _NAMES = _read()


def iso_code(code: str) -> str:
    """ISO 639-1 of a model's code, as "ko" of kor_Hang, ko_KR and kor; its first part where there is none."""
    first = _parts(code)[0]
    return _SHORTER.get(first, first)


def language_name(code: str) -> str:
    """The English name, with the script where the code has one; the code where it is not known."""
    name, rest = _NAMES.get(iso_code(code)), _parts(code)[1:]
    if name is None:
        return code
    return f"{name} ({rest[0].title()})" if rest and len(rest[0]) == 4 else name


def find_language(code: str, known: Iterable[str]) -> str | None:
    """What a model calls a language: by its own code, in any spelling, or by ISO's, the first that fits."""
    codes = list(known)
    if code in codes:
        return code
    spelt = _parts(code)
    for same in (_parts, iso_code):
        for own in codes:
            if same(own) == same(code) and (same is _parts or len(spelt) == 1 or _near(spelt, _parts(own))):
                return own
    return None


def _near(asked: list[str], own: list[str]) -> bool:
    """A code with a script or a country fits one that has none, or the same."""
    return len(own) == 1 or asked[1:] == own[1:]


def _parts(code: str) -> list[str]:
    return code.lower().replace("_", "-").split("-")
