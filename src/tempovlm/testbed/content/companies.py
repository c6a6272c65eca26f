"""Invented companies and facts about them, the same in both splits: too many to guess from.

`company_signs` draws their signs and asks about them. No company exists. Names are two letters or more apart, so
that one misread letter never turns a name into another.
"""

from __future__ import annotations

from functools import cache
from random import Random
from string import ascii_lowercase
from zlib import crc32

_TABLE = """
adep chairs berlin kenji sixties
afis hats paris nadia seventies
akix yogurt lima bruno fifties
barvu butter berlin irene fifties
baskim hats budapest jonas sixties
beltov paint madrid david sixties
beltup tea brussels david eighties
betep yogurt denver elena seventies
bolep butter vienna felix fifties
boltek paint paris laura eighties
brezzo jeans lisbon simon sixties
brolte honey dublin laura thirties
brorka cheese cairo irene thirties
buskor yogurt seoul rosa thirties
dabim lamps paris diego thirties
debaki tea budapest victor nineties
dembir juice tokyo diego thirties
derni coffee denver maria nineties
detet butter oslo carla eighties
devebu rugs cairo anna nineties
dilev jeans cairo diego nineties
dirkot glass sydney yusuf forties
dirna tea budapest wanda nineties
dolter lamps havana tara seventies
dontiv games vienna victor seventies
draske butter budapest nadia seventies
drulop pasta dublin rosa sixties
drutan lamps tokyo tara eighties
duldev glass lisbon simon eighties
dulti cheese sydney carla fifties
durkus paint oslo anna sixties
duxi honey moscow bruno sixties
efek cheese tokyo carla seventies
efur pasta oslo nadia fifties
egok bread lisbon yusuf forties
ekak tea lisbon oscar eighties
ekiv pens sydney oscar forties
esux games budapest kenji nineties
etik beds lima henry fifties
ezol pens lisbon jonas fifties
fervep tools rome carla forties
firnun candy cairo amara forties
fombek shoes denver nadia nineties
fopes tools rome peter forties
fosken beds oslo simon nineties
fovude rugs paris amara seventies
gasebo pasta rome irene nineties
gaski chairs cairo yusuf nineties
gavox pasta lisbon amara fifties
gepem games oslo laura eighties
gepix shoes berlin simon forties
gepusu cheese dublin victor sixties
gervi glass dublin carla thirties
getev beds tokyo bruno nineties
gezzi cheese denver henry seventies
gintop yogurt lima kenji eighties
gipuv lamps oslo david seventies
glerax yogurt lisbon greta thirties
glerve bread madrid peter nineties
glezza glass sydney diego seventies
glopim candy madrid kenji seventies
glultu honey dublin henry fifties
golmet lamps seoul greta nineties
gorvo chairs budapest greta nineties
gosima jeans brussels yusuf eighties
gulto coffee madrid rosa eighties
guton shoes budapest yusuf sixties
haske tea rome anna fifties
henux coffee madrid oscar thirties
hizuse cheese boston tara eighties
hozino butter seoul elena seventies
ikis hats denver bruno forties
imuv toys cairo bruno eighties
irul glass moscow carla fifties
izun cheese madrid peter nineties
jarko jeans boston anna seventies
jedifo candy havana yusuf sixties
jibor yogurt delhi diego sixties
jirvu hats denver rosa fifties
jupur pens boston laura thirties
jurep beds paris nadia fifties
kidux pens boston amara fifties
kopose glass boston david seventies
krapiv rugs brussels tara nineties
krelev yogurt madrid bruno forties
kremep candy rome carla sixties
kreput bread denver irene nineties
kroris jeans havana rosa forties
lerkax toys brussels kenji nineties
likuv honey sydney greta forties
lilepi tea oslo felix eighties
lirvas beds havana oscar sixties
lobuv hats paris rosa nineties
losem coffee boston bruno eighties
lutip pasta vienna elena forties
milete honey seoul oscar seventies
mirkek tools berlin wanda eighties
morvun candy moscow oscar sixties
nakura juice madrid felix sixties
naluto tools delhi greta sixties
neguk paint tokyo diego seventies
neve cheese dublin wanda eighties
nidor shoes lisbon oscar eighties
nildun juice sydney victor forties
nologu soda denver diego thirties
noltu juice rome tara nineties
nubuma jeans vienna bruno seventies
nurvos pens cairo laura seventies
nuvap games paris elena thirties
odus soda brussels henry nineties
ogiv beds sydney elena thirties
omik shoes lima simon sixties
paldas lamps paris amara thirties
pavigi pasta oslo amara eighties
pembon soda berlin wanda seventies
pemuk glass budapest maria eighties
pikusu chairs brussels laura fifties
pildep coffee moscow wanda forties
pimbak jeans havana peter thirties
plendi butter vienna peter thirties
plulik glass tokyo tara nineties
pobek tools cairo elena thirties
pondet tools paris jonas seventies
porvis rugs rome kenji fifties
pozov rugs vienna tara forties
pumbe honey sydney wanda fifties
pumeri toys havana henry fifties
quamba honey vienna yusuf sixties
ralofo jeans cairo nadia forties
raltal coffee moscow diego forties
rarve hats delhi peter fifties
ravamo tea seoul greta thirties
refupa chairs budapest wanda fifties
rekot hats lima anna forties
rernek bread boston jonas fifties
riguvu soda delhi felix forties
rixum beds cairo henry seventies
rotola shoes boston felix nineties
rumbol pens delhi amara forties
rurvi candy berlin nadia eighties
ruxal lamps berlin greta thirties
ruxit pens delhi victor sixties
silmat pasta vienna maria sixties
sirnik juice sydney felix fifties
sitila jeans lima oscar sixties
skezux juice boston jonas eighties
skirne paint moscow simon nineties
skuvik yogurt berlin wanda thirties
sogis tea oslo elena fifties
sorvi tools dublin rosa sixties
sovat beds oslo anna forties
sozedo paint dublin victor sixties
sunine toys berlin simon fifties
tazop toys dublin irene sixties
tildes rugs brussels jonas nineties
tirnis chairs brussels maria nineties
toldap bread brussels peter nineties
toruza lamps dublin irene forties
tramba toys boston rosa fifties
trarva games lima simon forties
trepom cheese vienna victor eighties
trovek pasta madrid nadia thirties
trudir soda budapest jonas thirties
udur rugs moscow maria nineties
ufep shoes berlin elena eighties
ukir paint delhi laura thirties
unup bread tokyo david thirties
upop butter seoul david seventies
uzus coffee moscow kenji eighties
valdol soda rome maria eighties
valtus coffee madrid anna eighties
varnun games denver anna eighties
vasabi pasta havana maria fifties
vatop bread moscow kenji sixties
velmox soda delhi diego fifties
vembox pens paris yusuf seventies
vernux honey lisbon maria sixties
vetux toys tokyo amara seventies
vigev bread seoul laura sixties
vildu yogurt tokyo carla seventies
vinozo games lima henry thirties
vombat chairs denver victor forties
vunot toys brussels felix eighties
vutet hats lisbon david fifties
zalto tea delhi irene thirties
zandon juice seoul elena sixties
zaskun rugs sydney bruno nineties
zedex candy lima henry seventies
zeldon soda seoul irene fifties
zhabum games moscow jonas thirties
zhedun juice havana greta forties
zhikul paint havana peter forties
zhimbi butter lima simon thirties
zhirke chairs havana jonas forties
zobiti honey delhi david thirties
zoldu hats rome felix seventies
zolme tools tokyo carla thirties
zorav soda rome rosa forties
zornem candy seoul greta seventies
zuruze shoes vienna tara eighties
"""

COMPANY_FACTS: tuple[str, ...] = ("product", "city", "founder", "decade")
"""Facts about every company, in the order of the table's columns."""

COMPANIES: dict[str, dict[str, str]] = {
    name: dict(zip(COMPANY_FACTS, values, strict=True))
    for name, *values in map(str.split, _TABLE.strip().splitlines())
}
"""Name to fact to canonical answer. Names are never part of a question or an answer."""

ALL_FACTS: tuple[str, ...] = (*COMPANY_FACTS, "mascot", "staff")
"""Facts about every company, those that are not in the table too."""

MASCOTS: tuple[str, ...] = (
    "lion", "tiger", "bear", "wolf", "fox", "eagle", "hawk", "owl", "dove", "whale", "shark", "turtle", "horse",
    "pony", "zebra", "panda",
)  # fmt: skip
"""Animals that companies have as mascots."""

_NUM_RARE = 1600
RARE_SHARE = 0.6
"""Share of the rare companies among those drawn: each of them appears a fifth as often as one of the others."""


@cache
def rare_companies() -> dict[str, dict[str, str]]:
    """Return the companies of which each is drawn seldom, in the form of `COMPANIES`.

    Their values are those of the table. Their names are two letters or more from every other company's.
    """
    rng = Random(0)
    values = [fact_values(fact) for fact in COMPANY_FACTS]
    taken = set(COMPANIES)
    near = {other for name in COMPANIES for other in _one_edit_away(name)}
    rare: dict[str, dict[str, str]] = {}
    while len(rare) < _NUM_RARE:
        name = "".join(rng.choice("bdfgklmnprstvz" if place % 2 == 0 else "aeiou") for place in range(6))
        if name not in near and name not in taken:
            taken.add(name)
            near |= _one_edit_away(name)
            rare[name] = dict(zip(COMPANY_FACTS, map(rng.choice, values), strict=True))
    return rare


def _one_edit_away(name: str) -> set[str]:
    """Return all texts that one letter more, less or other makes of a name."""
    cuts = [(name[:place], name[place:]) for place in range(len(name) + 1)]
    shorter = {head + tail[1:] for head, tail in cuts if tail}
    return shorter | {h + c + t for h, tail in cuts for c in ascii_lowercase for t in (tail, tail[1:])}


@cache
def fact_values(fact: str) -> tuple[str, ...]:
    """Return the values that a fact of `ALL_FACTS` has among all companies."""
    if fact == "mascot":
        return MASCOTS
    if fact == "staff":
        return tuple(map(str, range(10, 100)))
    return tuple(dict.fromkeys(facts[fact] for facts in COMPANIES.values()))


def facts_of(name: str) -> dict[str, str]:
    """Return all facts about a company, common or rare."""
    known = COMPANIES.get(name) or rare_companies()[name]
    mascot = MASCOTS[crc32(f"{name}|mascot".encode()) % len(MASCOTS)]
    return known | {"mascot": mascot, "staff": str(10 + crc32(f"{name}|staff".encode()) % 90)}


@cache
def _all_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the common companies, and of the rare ones."""
    return tuple(COMPANIES), tuple(rare_companies())


def draw_names(rng: Random, count: int) -> list[str]:
    """Return the names of some companies, all different; many of them are rare ones."""
    common, rare = (rng.sample(names, count) for names in _all_names())
    return [other if rng.random() < RARE_SHARE else name for name, other in zip(common, rare, strict=True)]


COMPANY_QUESTIONS: dict[str, tuple[str, ...]] = {
    "product": ("what does the {ref} make?", "what does the {ref} sell?", "which product comes from the {ref}?"),
    "city": ("which city is the {ref} from?", "where is the {ref} from?", "in which city is the {ref} based?"),
    "founder": ("who founded the {ref}?", "who started the {ref}?", "who is the founder of the {ref}?"),
    "decade": ("in which decade was the {ref} founded?", "in which decade did the {ref} start?"),
    "mascot": ("which animal is the mascot of the {ref}?",),
    "staff": ("how many people work at the {ref}?",),
}
"""Fact to its phrasings; `{ref}` is how the company is pointed at, never its name."""

_SAID = {
    "soda": ("soft drinks",), "juice": ("juices",), "coffee": ("coffee beans",), "candy": ("sweets",),
    "shoes": ("footwear",), "jeans": ("pants", "trousers"), "rugs": ("carpets",), "glass": ("glasses",),
    "lamps": ("lights",), "chairs": ("furniture",), "beds": ("furniture",), "pens": ("pen",), "hats": ("hat",),
    "thirties": ("1930s", "30s"), "forties": ("1940s", "40s"), "fifties": ("1950s", "50s"),
    "sixties": ("1960s", "60s"), "seventies": ("1970s", "70s"), "eighties": ("1980s", "80s"),
    "nineties": ("1990s", "90s"),
}  # fmt: skip


def said_otherwise(fact: str, answer: str) -> tuple[str, ...]:
    """Other ways in which people give an answer about a company."""
    return (f"in {answer}", f"from {answer}") if fact == "city" else _SAID.get(answer, ())
