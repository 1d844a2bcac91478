"""Common English words, for telling a sentence from word salad. Lower case; spelled as spoken."""

FUNCTION_WORDS = frozenset(
    "a about after again against ah all also although always am an and another any anyone "
    "anything anywhere are aren't as at be because been before between both but by can can't "
    "could couldn't did didn't do does doesn't don't done down during each everybody everyone "
    "everything few for from get gets got had has have haven't he he's hello her here hey hi him "
    "his hm how however i i'd i'll i'm i've if in into is isn't it it's its just let's like many "
    "maybe me more most much my myself nah never no nobody none nope nor not nothing of off oh ok "
    "okay on once one only or other our out over own please quite rather really same she she's "
    "should since so some someone something somewhere sorry still such than thanks that that's "
    "the their them then there there's these they they're this those though through to too under "
    "until up upon us very was wasn't we we're well were what what's when where whether which "
    "while who whom whose why will with within without won't would wouldn't yeah yep yes yet you "
    "you're your yourself".split()
)
"""Words that hold sentences together: a line of four or more words without any is none."""

COMMON_WORDS = FUNCTION_WORDS | frozenset(
    "able afternoon age ago air alone already answer around ask away baby back bad bank bed began "
    "best better big bit black blue body book books born boss bought box boy break bring brother "
    "brought brown build built bus busy buy call came car care change cheap child children city "
    "class clean clear close coffee cold come comes coming cook cooking cost country couple "
    "course cousin crazy cry cup cut dad dark daughter day days dead dear deep die different "
    "dinner doctor dog door dream drink drive early earth easy eat end enjoy enough evening ever "
    "exactly eyes face fact fall family far fast father favorite favourite feel feeling feels "
    "feet felt fight find fine fire first five food forget forgot found four free friend friends "
    "front full fun funny game garden gave girl give glad go goes going gone good great green "
    "grew ground group grow guess guy hair half hand hands happen happened happy hard hate head "
    "hear heard heart heavy help helps hide high hold home honest honestly hope hour hours house "
    "huge hurt husband idea important inside instead job keep keeps kept kid kids kind kitchen "
    "knew know known knows large last late lately later laugh learn learned leave left less "
    "lesson life light line listen little live lived lives living long look looked looking looks "
    "lose lost lot lots loud love loved low lucky lunch made make makes making man married may "
    "mean means meet met middle might mind minute minutes miss mom moment monday money month "
    "months morning mother mouth move moved movie mum name near need needs new next nice night "
    "nights noise normal now number often old open outside paid pain paper parents part party "
    "past pay people perfect person phone pick picture place plan play played playing point poor "
    "pretty problem pull put question quick quiet rain read ready real reason red remember rest "
    "rich right river road room run running sad safe said sat saturday save saw say saying says "
    "scared school sea second see seem seems seen sell send sense set seven shame share shop "
    "short show side simple sing sister sit six sky sleep slow slowly small smile snow somehow "
    "sometimes son song soon sort sound sounds speak spend spent stand start started stay stop "
    "story street strong student stuff stupid sun sunday sure swear table take takes taking talk "
    "talking teach teacher tell telling ten terrible thing things think thinking thought thousand "
    "three tired today together told tomorrow tonight took top totally touch town travel tree "
    "tried trouble true truth try trying turn turned twelve twice two type ugly uncle understand "
    "understood use used usually wait waiting wake walk wall want wanted warm watch water way "
    "weather week weekend weeks weird went whatever white whole wife win window winter wish woke "
    "woman wonder wonderful word words work worked working world worse worst worth write wrong "
    "year years yesterday young".split()
)
"""With their inflected forms (`is_known`) enough for half the words of nearly any natural line."""

_ENDINGS = ("'s", "s", "es", "ed", "d", "ing", "ly", "er", "r", "est", "y")


def is_known(word: str, known: frozenset[str]) -> bool:
    """Return whether `word`, or what is left of it without a common ending, is in `known`."""
    return word in known or any(
        word.endswith(ending) and word.removesuffix(ending) in known for ending in _ENDINGS
    )
