"""A natural language inference model as the judge: small, in process, and without prompts.

    judge = NLIJudge("path/to/model", flaw=transcript_flaw)
    env = gym.make("PersonaDialogue-v0", domain="therapy", judge=judge)

Each sentence of the persona is a premise, the agent's line the hypothesis. A line that merely does
not contradict is neutral and by default earns nothing: so is gibberish.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

from .dialogue import Transcript, Verdict

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
"""Part of the cache key; goes up when the same model's verdicts may come out otherwise."""

Pair = tuple[str, str]
"""Premise and hypothesis."""


class NLIJudge:
    """Asks a sequence classification model whether the latest line fits the persona.

    With c and e the largest probabilities of contradiction and of entailment over all premises:

        contradicts  if c >= threshold and c >= e:   reward 0
        consistent   else if e >= threshold:         reward 1
        neutral      else:                           reward `neutral`

    Premises are the sentences of the persona's text, turned into the first person in which the
    agent speaks (`first_person`); the line is the hypothesis as it stands. What is longer than the
    model's context is cut.

    Parts of the verdict:
        prompt_to_line: 1 consistent, 0 contradicts, None neutral.
        line_to_line: the same with the earlier own lines as premises; shown, not charged, and only
            there if `line_to_line` is set.
        well_formed: 0 for a line without words and for one that `flaw` objects to; it earns 0, and
            the model is not asked. Else 1.

    Args:
        model: a folder, or a name on the hub; weights in the safetensors format.
        device: "auto" (a GPU if there is one), "cpu", "cuda:1", ...
        batch_size: pairs in one forward pass.
        threshold: probability from which on the model is believed, in (0, 1].
        neutral: reward of a neutral line, in [0, 1]; None = unscorable.
        labels: where the model's labels have other names: the index of each, as in
            {"contradiction": 0, "neutral": 1, "entailment": 2}.
        flaw: returns why the latest line is degenerate, "" if it is not. To be cached, it is a
            plain function or has a `cache_key`.
        line_to_line: also compare with the earlier own lines.

    Raises:
        ValueError: there is no such model, it is none for natural language inference, its labels
            are unclear, or a setting is out of range.
    """

    remote = False
    nondeterministic = False

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        batch_size: int = 32,
        threshold: float = 0.5,
        neutral: float | None = 0.0,
        labels: Mapping[str, int] | None = None,
        flaw: Callable[[Transcript], str] | None = None,
        line_to_line: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold is a probability in (0, 1], got {threshold}.")
        if neutral is not None and not 0.0 <= neutral <= 1.0:
            raise ValueError(f"neutral is a reward in [0, 1] or None, got {neutral}.")
        self.tokenizer, self.network = _load(model, device)
        self.contradiction, self.entailment = _label_indices(self.network.config, labels, model)
        self.batch_size, self.threshold, self.neutral = batch_size, threshold, neutral
        self.flaw, self.line_to_line = flaw, line_to_line
        self.name = _identity(model, self.network.config)
        self._inputs = set(signature(self.network.forward).parameters)
        self._pad = _padding(self.network.config)
        self._longest = _context(self.tokenizer, self.network.config)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __deepcopy__(self, memo: object) -> NLIJudge:
        """Return the judge itself: Gymnasium copies what an environment was made with."""
        return self

    @property
    def cache_key(self) -> str:
        """Everything but the transcript that determines a verdict, the weights included.

        Raises:
            AttributeError: it cannot be told what `flaw` depends on.
        """
        return (
            f"NLIJudge/{VERSION}/{self.name}/labels={self.contradiction},{self.entailment}/"
            f"threshold={self.threshold}/neutral={self.neutral}/"
            f"line_to_line={self.line_to_line}/flaw={_key_of(self.flaw)}"
        )

    def __call__(self, transcripts: Sequence[Transcript]) -> list[Verdict]:
        """Return one verdict for each transcript.

        Raises:
            ValueError: a persona's text holds no sentence.
        """
        flaws = [self._flaw(transcript) for transcript in transcripts]
        sound = [t for t, flaw in zip(transcripts, flaws, strict=True) if not flaw]
        asked = [pair for t in sound for pair in _persona_pairs(t)]
        if self.line_to_line:
            asked += [pair for t in sound for pair in _line_pairs(t)]
        asked = list(dict.fromkeys(asked))
        scores = dict(zip(asked, self.probabilities(asked), strict=True))
        return [
            self._verdict(transcript, flaw, scores)
            for transcript, flaw in zip(transcripts, flaws, strict=True)
        ]

    def probabilities(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Return the probabilities (of contradiction, of entailment) of (premise, hypothesis)s."""
        if not pairs:
            return []
        with self._lock:
            encoded = self.tokenizer(
                [premise for premise, _ in pairs],
                [hypothesis for _, hypothesis in pairs],
                truncation="longest_first",
                max_length=self._longest,
                return_attention_mask=True,
            )
            lengths = [len(tokens) for tokens in encoded["input_ids"]]
            by_length = sorted(range(len(pairs)), key=lambda i: lengths[i])
            size = 1 if self._pad is None else self.batch_size
            found: dict[int, tuple[float, float]] = {}
            for start in range(0, len(pairs), size):
                batch = by_length[start : start + size]
                found.update(zip(batch, self._classify(encoded, batch), strict=True))
        return [found[i] for i in range(len(pairs))]

    def _classify(
        self, encoded: Mapping[str, list[list[int]]], batch: Sequence[int]
    ) -> list[tuple[float, float]]:
        """Return the two probabilities of the pairs numbered `batch`."""
        import torch

        longest = max(len(encoded["input_ids"][i]) for i in batch)
        inputs = {}
        for name in self._inputs & set(encoded):
            blank = (self._pad or 0) if name == "input_ids" else 0
            rows = [encoded[name][i] for i in batch]
            padded = [row + [blank] * (longest - len(row)) for row in rows]
            inputs[name] = torch.tensor(padded, device=self.network.device)
        with torch.inference_mode():
            logit_BC = self.network(**inputs).logits
        # In float32 two sure opinions both round to 1, and which is larger could not be told.
        prob_BC = logit_BC.double().softmax(-1)
        chosen: list[list[float]] = prob_BC[:, [self.contradiction, self.entailment]].tolist()
        return [(against, for_it) for against, for_it in chosen]

    def _flaw(self, transcript: Transcript) -> str:
        if not any(map(str.isalnum, transcript.turns[-1].agent)):
            return "holds no words"
        return self.flaw(transcript) if self.flaw else ""

    def _verdict(
        self, transcript: Transcript, flaw: str, scores: Mapping[Pair, tuple[float, float]]
    ) -> Verdict:
        parts: dict[str, float | None] = {"prompt_to_line": None, "well_formed": float(not flaw)}
        if self.line_to_line:
            parts["line_to_line"] = None
        if flaw:
            return Verdict(0.0, parts, f"degenerate: the line {flaw}")
        fits, premise = self._opinion(_persona_pairs(transcript), scores)
        parts["prompt_to_line"] = fits
        if fits is None:
            reason = "neutral: neither follows from the persona nor contradicts it"
        else:
            reason = f"consistent: follows from {premise!r}" if fits else f"contradicts {premise!r}"
        if self.line_to_line:
            agrees, earlier = self._opinion(_line_pairs(transcript), scores)
            parts["line_to_line"] = agrees
            if agrees == 0.0:
                reason += f"; conflicts with the earlier line {earlier!r}"
        return Verdict(self.neutral if fits is None else fits, parts, reason)

    def _opinion(
        self, pairs: Sequence[Pair], scores: Mapping[Pair, tuple[float, float]]
    ) -> tuple[float | None, str]:
        """Return 1, 0 or None for consistent, contradicts, neutral, and the premise that says so.

        Without a premise it is neutral.
        """
        if not pairs:
            return None, ""
        denied = max(pairs, key=lambda pair: scores[pair][0])
        implied = max(pairs, key=lambda pair: scores[pair][1])
        contradiction, entailment = scores[denied][0], scores[implied][1]
        if contradiction >= max(self.threshold, entailment):
            return 0.0, denied[0]
        if entailment >= self.threshold:
            return 1.0, implied[0]
        return None, ""


# -- premises --------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|\w+(?:['’]\w+)*|\s+|.", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+|\s*\n\s*")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Jr|Sr|vs|e\.g|i\.e|[A-HJ-Z])$")
_SHORT_FORM = re.compile(r"(?:\.\w|\b(?:etc|approx|dept|est))$")
_BULLET = re.compile(r"^(?:[-*•–]|\d+[.)]\s)\s*")
_ADDRESSED = re.compile(r"(?:^|[.!?…\n])\W*you(?:r|['’](?:re|ve|ll|d))?\b", re.IGNORECASE)
_SOMEBODY_ELSE = re.compile(r"\b(?:he|she|his|him|her)\b", re.IGNORECASE)
_FIRST_PERSON = re.compile(r"\b(?:[Ii](?:['’](?:m|ve|ll|d)\b|\s+[a-z])|[Mm]y\b|me\b|[Mm]yself\b)")

_OWN = {"your": "my", "yours": "mine", "yourself": "myself"}
_SUBJECT = {"you": "I", "you're": "I'm", "you've": "I've", "you'll": "I'll", "you'd": "I'd"}
_BE = {"are": "am", "were": "was", "aren't": "am not", "weren't": "wasn't"}
_ASKED = {**_BE, "aren't": "am"}
_AUXILIARIES = frozenset(
    "are were have had do did will would can could shall should may might must aren't weren't "
    "haven't hadn't don't didn't won't wouldn't can't cannot couldn't shouldn't mustn't".split()
)
_VERBS = _AUXILIARIES | frozenset(
    "avoid bought build built buy call care come cook do dream drink drive eat enjoy enjoyed fear "
    "feel felt find found gave get give go got grew hate hated have hear heard help hope keep kept "
    "knew know lead learn learned left like liked listen live lived look lost love loved made make "
    "meet met move moved need needed own paint play played prefer raise read remember run said say "
    "see sell sing speak spend spent start started struggle studied study suffer take talk taught "
    "teach think thought took travel trust try use used visit want wanted watch wear went work "
    "worked worry write wrote".split()
)
_ADVERBS = frozenset(
    "also always never often still now just once sometimes seldom ever already almost not both "
    "all yourself".split()
)
_PREPOSITIONS = frozenset(
    "about above against among around at behind beside besides between by for from in into near of "
    "off on onto over through to towards toward under upon with without".split()
)
_CONJUNCTIONS = frozenset(
    "after although and as because before but how if nor once or since so than that though unless "
    "until what whatever when whenever where wherever whether which while who whom whose why "
    "yet".split()
)
_OTHERS = frozenset("he she it they we who which that there this these those".split())


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; lines of a list are sentences of their own.

    A full stop ends none after a title, an initial or a short form such as "p.m." within one.
    """
    found, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        before, after = text[start : end.start()], text[end.end() : end.end() + 1]
        goes_on = _TITLE.search(before) or (after.islower() and _SHORT_FORM.search(before))
        if goes_on and end[0].rstrip() == "." and "\n" not in end[0]:
            continue
        found.append(text[start : end.end()])
        start = end.end()
    found.append(text[start:])
    found = [_BULLET.sub("", sentence.strip(), count=1) for sentence in found]
    return [sentence for sentence in found if any(map(str.isalpha, sentence))]


def first_person(sentence: str) -> str:
    """Return a sentence about "you" as the one spoken to would say it.

    "You are a nurse and your cat likes you." becomes "I am a nurse and my cat likes me." Of the
    verbs only "be" changes. Whether "you" is subject or object is read from its neighbours, which
    goes wrong now and then. Sentences in the first or third person and what stands in double quotes
    stay as they are.
    """
    if _FIRST_PERSON.search(sentence):
        return sentence
    tokens = _TOKEN.findall(sentence)
    places = [i for i, token in enumerate(tokens) if not token.isspace()]
    words = [tokens[i].lower().replace("’", "'") for i in places]
    turned: dict[int, str] = {}
    mine = False  # whether the subject of the clause is "you"
    for k, word in enumerate(words):
        before = words[k - 1] if k else ""
        if word in _OWN:
            turned[k] = _OWN[word]
        elif word in _SUBJECT and (word != "you" or _is_subject(words, k)):
            turned[k], mine = _SUBJECT[word], True
            if before in _ASKED:
                turned[k - 1] = _ASKED[before]
                turned[k] += " not" if before == "aren't" else ""
        elif word == "you":
            turned[k] = "me"
        elif word in _OTHERS:
            mine = False
        elif word in _BE and mine and _continues(words, k):
            turned[k] = _BE[word]
    for k, new in turned.items():
        tokens[places[k]] = _in_case_of(tokens[places[k]], new)
    return "".join(tokens)


def _is_subject(words: Sequence[str], k: int) -> bool:
    """Return whether the "you" at `k` is a subject, going by the words around it."""
    before = words[k - 1] if k else ""
    first_after = verb = k + 1
    while verb < len(words) and _is_adverb(words[verb]):
        verb += 1
    after = words[verb] if verb < len(words) else ""
    if before in _AUXILIARIES or not before:
        return True
    if not after[:1].isalnum() or before in _PREPOSITIONS:
        return False
    if before in _CONJUNCTIONS or not before[0].isalnum() or after in _VERBS:
        return True
    return before == "like" and verb > first_after


def _continues(words: Sequence[str], k: int) -> bool:
    """Return whether the verb at `k` belongs to a "you" right before it or before "and"."""
    first = k
    while first and _is_adverb(words[first - 1]):
        first -= 1
    before = words[first - 1] if first else ""
    return before == "you" or before in ("and", "but", "or", ",")


def _is_adverb(word: str) -> bool:
    return word in _ADVERBS or (word.endswith("ly") and len(word) > 4)


def _in_case_of(old: str, new: str) -> str:
    """Return the new word in capitals, or beginning with one, where the old one does."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    if old[0].isupper() and new != "me":
        return new[0].upper() + new[1:]
    return new


@lru_cache(maxsize=4096)
def premises(text: str) -> tuple[str, ...]:
    """Return what a persona's text says, sentence by sentence, as the persona would say it.

    In a text about him or her, "you" is the reader ("On Sundays you can find him ..."), and stays.
    """
    found = sentences(text)
    if _ADDRESSED.search(text) or not _SOMEBODY_ELSE.search(text):
        found = [first_person(sentence) for sentence in found]
    return tuple(dict.fromkeys(found))


def _persona_pairs(transcript: Transcript) -> list[Pair]:
    """Return the premises of the persona, each with the latest line.

    Raises:
        ValueError: there are none.
    """
    found = premises(transcript.persona.text)
    if not found:
        raise ValueError(
            f"NLIJudge cannot judge persona {transcript.persona.id!r}: its text "
            f"{transcript.persona.text!r:.80} holds no sentence."
        )
    return [(premise, transcript.turns[-1].agent) for premise in found]


def _line_pairs(transcript: Transcript) -> list[Pair]:
    """Return the earlier own lines, each with the latest one."""
    *earlier, latest = [turn.agent for turn in transcript.turns]
    return [(line, latest) for line in earlier if any(map(str.isalnum, line))]


# -- the model -------------------------------------------------------------------------------------


def _load(model: str | Path, device: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return tokenizer and network, in float32 and without dropout.

    Raises:
        ValueError: there is no such model, or it is none for sequence classification.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    remedy = "Hand in the folder or the hub's name of a model for natural language inference"
    where = Path(model).expanduser()
    is_path = isinstance(model, Path) or model.startswith((".", "/", "~")) or model.count("/") > 1
    if is_path and not where.is_dir():
        raise ValueError(f"There is no folder {str(model)!r}. {remedy}.")
    source = str(where) if where.is_dir() else str(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,  # pickled weights run code when they are loaded
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # many kinds, from several packages
        raise ValueError(
            f"{str(model)!r} cannot be loaded as a model for sequence classification "
            f"({type(error).__name__}: {' '.join(str(error).split()):.300}). {remedy}, with its "
            "tokenizer and its weights in the safetensors format."
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(  # transformers makes an empty one where the files are missing
            f"The tokenizer of {str(model)!r} knows no words: are its files missing? {remedy}, "
            "with its tokenizer."
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        built = ", ".join(network.config.architectures or ["unknown architecture"])
        raise ValueError(
            f"{str(model)!r} is no model for sequence classification ({built}): it has no weights "
            f"for {', '.join(missing[:4])}, which would be random. {remedy}."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenizer, network.eval().to(device)


def _label_indices(
    config: PretrainedConfig, labels: Mapping[str, int] | None, model: str | Path
) -> tuple[int, int]:
    """Return the indices of contradiction and entailment among the model's labels.

    Raises:
        ValueError: they are not told clearly.
    """
    named = {int(index): str(label) for index, label in (config.id2label or {}).items()}
    remedy = 'hand in labels={"contradiction": 0, "neutral": 1, "entailment": 2} with the indices'
    if labels is None:
        chosen = []
        for stem in ("contradict", "entail"):
            fitting = [index for index, label in named.items() if label.lower().startswith(stem)]
            if len(fitting) != 1:
                raise ValueError(
                    f"{str(model)!r} has not one label that begins with {stem!r}, but {named}. If "
                    "it is a model for natural language inference under other names, "
                    f"{remedy} that its card tells; else use one that is."
                )
            chosen += fitting
        return chosen[0], chosen[1]
    known = {"contradiction", "neutral", "entailment"}
    indices = [labels.get("contradiction"), labels.get("entailment")]
    if (
        not set(labels) <= known
        or None in indices
        or len(set(labels.values())) < len(labels)
        or not all(type(i) is int and i in named for i in labels.values())
    ):
        raise ValueError(
            f"labels={dict(labels)!r} does not tell contradiction and entailment of the "
            f"{len(named)} labels {named}; {remedy} of the labels meant."
        )
    return labels["contradiction"], labels["entailment"]


def _padding(config: PretrainedConfig) -> int | None:
    """Return the token to fill rows up with on the right; None = the model takes one row a time.

    The model's own, not the tokenizer's: decoders find the end of a text by it.
    """
    if getattr(config, "summary_type", "") == "last":  # reads the last position, be it padding
        return None
    token = config.pad_token_id
    return token if isinstance(token, int) and token >= 0 else None


def _context(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Return how many tokens a pair may have."""
    said = int(tokenizer.model_max_length)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return min(said, 512)
    if said > positions:  # the tokenizer does not know; some models begin to count at 2
        return max(1, positions - 2)
    return said


def _identity(model: str | Path, config: PretrainedConfig) -> str:
    """Return the model's name with what tells its weights from others of the same name."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return f"{model}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".txt", ".model"):
            with file.open("rb") as content:
                digest.update(file.name.encode() + b"\0")
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{folder.resolve().name}@{digest.hexdigest()[:16]}"


def _key_of(flaw: Callable[[Transcript], str] | None) -> str:
    """Return what identifies a flaw finder.

    Raises:
        AttributeError: nothing does.
    """
    if flaw is None:
        return ""
    key = getattr(flaw, "cache_key", "")
    if isinstance(key, str) and key:
        return key
    if isinstance(flaw, FunctionType) and not flaw.__closure__ and flaw.__name__ != "<lambda>":
        return f"{flaw.__module__}.{flaw.__qualname__}"
    raise AttributeError(f"flaw={flaw!r:.100} is no plain function and has no cache_key")
