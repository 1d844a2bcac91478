from __future__ import annotations

import copy
import functools
import itertools
import json
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from ppg_env import Persona, Transcript, Turn
from ppg_env.chat_judge import transcript_flaw
from ppg_env.nli_judge import NLIJudge, first_person, premises, sentences
from ppg_env.verdict_cache import CachedJudge

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = "i am a nurse cook have cat dog no pets live in oslo rome hello there what ? .".split()
TOPICS = [
    ["I am a nurse.", "I am a cook."],
    ["I have a cat.", "I have a dog.", "I have no pets."],
    ["I live in Oslo.", "I live in Rome."],
]
SMALL_TALK = ["Hello there.", "Glorp wib flanter snood.", "What?", "a a a a"]
NAMES = {"contradiction": 0, "entailment": 1, "neutral": 2}
NURSE = Persona("nurse", "chatting", "You are a nurse. You have a cat. You live in Oslo.")


# ---- tiny models ---------------------------------------------------------------------------------


def tokenizer():
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, "[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def sizes(labels=NAMES, **changes):
    return {
        "vocab_size": len(SPECIAL + WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "id2label": {index: name for name, index in labels.items()},
        "label2id": dict(labels),
        **changes,
    }


def bart_sizes():
    width = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.5}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    inner = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    return {**sizes(), **width, **heads, **inner, **ends}


def xlnet_sizes():
    shared = {name: sizes()[name] for name in ("vocab_size", "pad_token_id", "id2label")}
    width = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    return {**shared, **width, "label2id": dict(NAMES), "initializer_range": 0.5}


ARCHITECTURES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**sizes(initializer_range=0.5))),
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**sizes(initializer_range=0.5, type_vocab_size=1))
    ),
    "bart": lambda: BartForSequenceClassification(BartConfig(**bart_sizes())),
    "llama": lambda: LlamaForSequenceClassification(
        LlamaConfig(**sizes(initializer_range=0.5, num_key_value_heads=2))
    ),
    "llama without padding": lambda: LlamaForSequenceClassification(
        LlamaConfig(**sizes(initializer_range=0.5, num_key_value_heads=2, pad_token_id=None))
    ),
    "xlnet": lambda: XLNetForSequenceClassification(XLNetConfig(**xlnet_sizes())),
}


def saved(folder, model, **settings):
    model.save_pretrained(folder)
    words = tokenizer()
    if not isinstance(model, BertForSequenceClassification | BartForSequenceClassification):
        words.model_input_names = ["input_ids", "attention_mask"]
    words.save_pretrained(folder)
    return folder


def relation(premise, hypothesis):
    if premise == hypothesis:
        return "entailment"
    related = any(premise in topic and hypothesis in topic for topic in TOPICS)
    return "contradiction" if related else "neutral"


@functools.cache
def trained():
    """Return a BERT that knows of all sentences above what follows and what contradicts."""
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**sizes(initializer_range=0.5, **no_dropout)))
    facts = [sentence for topic in TOPICS for sentence in topic]
    pairs = list(itertools.product(facts, facts + SMALL_TALK))
    inputs = tokenizer()(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    target = torch.tensor([NAMES[relation(*pair)] for pair in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(500):
        optimizer.zero_grad()
        loss = model(**inputs, labels=target).loss
        loss.backward()
        optimizer.step()
        if loss < 0.005:
            break
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("nli") / "model", trained())


@pytest.fixture(scope="module")
def judge(folder):
    return NLIJudge(folder, device="cpu")


def said(*lines, persona=NURSE):
    return Transcript(persona, persona.text, tuple(Turn("What?", line) for line in lines), None, 8)


def verdict(judge, *lines, persona=NURSE):
    (found,) = judge([said(*lines, persona=persona)])
    return found


# ---- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reward", "fits", "reason"),
    [
        ("I am a nurse.", 1.0, 1.0, "consistent: follows from 'I am a nurse.'"),
        ("I live in Oslo.", 1.0, 1.0, "consistent: follows from 'I live in Oslo.'"),
        ("I am a cook.", 0.0, 0.0, "contradicts 'I am a nurse.'"),
        ("I have no pets.", 0.0, 0.0, "contradicts 'I have a cat.'"),
        ("Hello there.", 0.0, None, "neutral: neither follows"),
        ("Glorp wib flanter snood.", 0.0, None, "neutral: neither follows"),
        ("a a a a", 0.0, None, "neutral: neither follows"),
    ],
)
def test_a_line_is_consistent_contradicts_or_is_neutral(judge, line, reward, fits, reason):
    """A judge that took all that does not contradict for consistent gave gibberish full marks."""
    found = verdict(judge, line)
    assert found.reward == reward and found.reason.startswith(reason)
    assert found.parts == {"prompt_to_line": fits, "well_formed": 1.0}


@pytest.mark.parametrize("neutral", [0.25, None])
def test_what_a_neutral_line_earns_can_be_chosen(folder, neutral):
    judge = NLIJudge(folder, device="cpu", neutral=neutral)
    lines = ["Hello there.", "I am a nurse.", "I am a cook."]
    assert [verdict(judge, line).reward for line in lines] == [neutral, 1.0, 0.0]


def test_only_the_latest_line_is_judged(judge):
    assert verdict(judge, "I am a cook.", "I am a nurse.").reward == 1.0
    assert verdict(judge, "I am a nurse.", "I am a cook.").reward == 0.0


@pytest.mark.parametrize(
    ("scores", "fits"),
    [
        ([(0.5, 0.0), (0.0, 0.4)], 0.0),
        ([(0.4999, 0.0), (0.0, 0.4)], None),
        ([(0.0, 0.4), (0.0, 0.5)], 1.0),
        ([(0.0, 0.4999), (0.4999, 0.0)], None),
        ([(0.6, 0.0), (0.0, 0.7)], 1.0),
        ([(0.7, 0.0), (0.0, 0.6)], 0.0),
        ([(0.9, 0.0), (0.0, 0.9)], 0.0),  # equally sure of both: no reward
    ],
)
def test_the_surest_premises_decide(folder, monkeypatch, scores, fits):
    judge = NLIJudge(folder, device="cpu", threshold=0.5)
    monkeypatch.setattr(judge, "probabilities", lambda pairs: scores)
    persona = Persona("two", "chatting", "You are a nurse. You have a cat.")
    assert verdict(judge, "Well.", persona=persona).parts["prompt_to_line"] == fits


def test_a_higher_threshold_believes_less(folder):
    lines = ["I am a nurse.", "I am a cook."]
    strict = NLIJudge(folder, device="cpu", threshold=1.0)
    assert [verdict(strict, line).parts["prompt_to_line"] for line in lines] == [None, None]


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)))
def test_the_order_and_case_of_the_labels_do_not_matter(tmp_path, judge, order):
    model = copy.deepcopy(trained())
    rows = [NAMES[name] for name in order]
    for weight in (model.classifier.weight, model.classifier.bias):
        weight.data = weight.data[rows]
    model.config.id2label = {index: name.upper() for index, name in enumerate(order)}
    permuted = NLIJudge(saved(tmp_path, model), device="cpu")
    batch = [said(line) for line in ("I am a cook.", "I have a cat.", "Hello there.")]
    assert permuted(batch) == judge(batch)


def test_labels_without_names_are_told_by_the_caller(tmp_path, judge):
    model = copy.deepcopy(trained())
    model.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    told = NLIJudge(saved(tmp_path, model), device="cpu", labels=NAMES)
    batch = [said(line) for line in ("I am a cook.", "I have a cat.", "Hello there.")]
    assert told(batch) == judge(batch)


# ---- earlier lines, degenerate lines -------------------------------------------------------------


def test_earlier_lines_are_compared_but_not_charged(folder):
    judge = NLIJudge(folder, device="cpu", line_to_line=True)
    cases = {
        ("I have a cat.",): (1.0, None),
        ("I have a dog.", "I have a cat."): (1.0, 0.0),
        ("I have a cat.", "Hello there.", "I have a cat."): (1.0, 1.0),
        ("I am a nurse.", "I have a dog."): (0.0, None),
        ("!!!", "I have a cat."): (1.0, None),
    }
    for lines, (reward, agrees) in cases.items():
        found = verdict(judge, *lines)
        assert (found.reward, found.parts["line_to_line"]) == (reward, agrees), lines
        assert ("; conflicts with the earlier line" in found.reason) == (agrees == 0.0)


@pytest.mark.parametrize("line", ["", "   ", "...", "?!", "🙂🙂", "—"])
def test_a_line_without_words_is_never_shown_to_the_model(folder, monkeypatch, line):
    judge = NLIJudge(folder, device="cpu", neutral=1.0, line_to_line=True)
    monkeypatch.setattr(judge, "network", None)
    found = verdict(judge, "I have a cat.", line)
    assert found.reward == 0.0 and found.reason == "degenerate: the line holds no words"
    assert found.parts == {"prompt_to_line": None, "well_formed": 0.0, "line_to_line": None}


def test_a_line_with_a_flaw_earns_nothing_though_the_model_would_like_it(folder, monkeypatch):
    judge = NLIJudge(folder, device="cpu", flaw=transcript_flaw)
    assert verdict(judge, "I am a nurse.").reward == 1.0
    asked = []
    probabilities = judge.probabilities
    monkeypatch.setattr(
        judge, "probabilities", lambda pairs: asked.extend(pairs) or probabilities(pairs)
    )
    repeated, fine = judge([said("I am a nurse.", "I am a nurse."), said("I have a cat.")])
    assert repeated.reward == 0.0 and repeated.parts["well_formed"] == 0.0
    assert repeated.reason.startswith("degenerate: the line ")
    assert fine.reward == 1.0 and {line for _, line in asked} == {"I have a cat."}


def test_a_persona_without_a_sentence_is_named(judge):
    empty = Persona("empty", "chatting", " -- 7.")
    with pytest.raises(ValueError, match=r"cannot judge persona 'empty': its text ' -- 7.' holds"):
        verdict(judge, "I am a nurse.", persona=empty)


# ---- batches, threads, copies --------------------------------------------------------------------


def pairs_of_all_lengths():
    texts = [" ".join(WORDS[i : i + n]) for i, n in ((0, 1), (3, 4), (5, 9), (2, 15), (0, 19))]
    return [*itertools.product(texts, texts), (" ".join(WORDS * 3), " ".join(WORDS * 4))]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_batching_does_not_change_a_probability(tmp_path, kind):
    torch.manual_seed(1)
    judge = NLIJudge(saved(tmp_path, ARCHITECTURES[kind]()), device="cpu", batch_size=7)
    pairs = pairs_of_all_lengths()
    together = torch.tensor(judge.probabilities(pairs))
    alone = torch.tensor([judge.probabilities([pair])[0] for pair in pairs])
    assert together.std(0).min() > 0.01
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_probabilities_are_those_of_the_model(judge):
    pairs = [("I am a nurse.", "I am a cook."), ("I have a cat.", "I have a cat. Hello there.")]
    for pair, found in zip(pairs, judge.probabilities(pairs), strict=True):
        with torch.no_grad():
            logits = trained()(**tokenizer()(*pair, return_tensors="pt")).logits
        expected = logits.softmax(-1)[0, [NAMES["contradiction"], NAMES["entailment"]]]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    assert judge.probabilities([]) == []


def test_two_sure_opinions_are_told_apart(tmp_path):
    model = copy.deepcopy(trained())
    model.classifier.weight.data *= 0
    model.classifier.bias.data[:] = torch.tensor([0.0, 30.0, 10.0])
    ((_, entailment),) = NLIJudge(saved(tmp_path, model), device="cpu").probabilities([("a", "i")])
    assert 0.99999 < entailment < 1.0


def test_a_batch_of_transcripts_is_judged_like_each_of_them(judge):
    lines = ["I am a cook.", "Hello there.", "", "I have a cat.", "I am a cook.", "I live in Rome."]
    batch = [said(line) for line in lines]
    assert judge(batch) == [judge([transcript])[0] for transcript in batch]
    assert judge([]) == []


def test_equal_questions_are_asked_once_and_empty_ones_never(folder, monkeypatch):
    judge = NLIJudge(folder, device="cpu", line_to_line=True)
    probabilities, asked = judge.probabilities, []
    monkeypatch.setattr(
        judge, "probabilities", lambda pairs: asked.append(len(pairs)) or probabilities(pairs)
    )
    cat = "I have a cat."
    judge([said(cat), said("I have a dog.", cat), said(cat), said("...", cat)])
    assert asked == [3 + 1]


def test_short_pairs_are_not_padded_to_the_length_of_long_ones(folder):
    judge, shapes = NLIJudge(folder, device="cpu", batch_size=2), []
    judge.network.register_forward_pre_hook(
        lambda network, given, named: shapes.append(tuple(named["input_ids"].shape)),
        with_kwargs=True,
    )
    short, long = ("a", "nurse"), ("i live in oslo", "i have no pets")
    judge.probabilities([short, long, short, long])
    assert shapes == [(2, 5), (2, 11)]


def test_a_line_longer_than_the_context_is_cut(judge):
    found = verdict(judge, "I am a nurse. " * 60)
    assert found.parts["well_formed"] == 1.0 and found.reward in (0.0, 1.0)


def test_threads_get_the_same_verdicts_one_after_the_other(folder):
    judge, busy, met = NLIJudge(folder, device="cpu"), threading.Lock(), []
    judge.network.register_forward_pre_hook(lambda *_: met.append(not busy.acquire(timeout=0)))
    judge.network.register_forward_hook(lambda *_: busy.release())
    batch = [said(line) for line in ("I am a cook.", "I have a cat.", "Hello there. " * 5)]
    expected, found = judge(batch), []
    threads = [
        threading.Thread(target=lambda: found.extend(judge(batch) for _ in range(10)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 40 and not any(met)


def test_a_pickled_judge_judges_the_same_and_a_deep_copy_is_the_judge_itself(judge):
    """Gymnasium copies what an environment was made with, each time its spec is looked at."""
    batch = [said("I am a cook."), said("I have a cat.")]
    assert pickle.loads(pickle.dumps(judge))(batch) == judge(batch)
    assert copy.deepcopy(judge) is judge


# ---- the cache key -------------------------------------------------------------------------------


def no_flaw(transcript):
    return ""


def test_settings_and_weights_are_in_the_cache_key(folder, tmp_path):
    other = copy.deepcopy(trained())
    other.classifier.bias.data[0] += 1
    keys = [
        NLIJudge(folder, device="cpu", **settings).cache_key
        for settings in (
            {},
            {"threshold": 0.6},
            {"neutral": None},
            {"neutral": 0.5},
            {"line_to_line": True},
            {"labels": {"contradiction": 1, "entailment": 0}},
            {"flaw": no_flaw},
            {"flaw": transcript_flaw},
        )
    ]
    keys.append(NLIJudge(saved(tmp_path / "model", other), device="cpu").cache_key)
    assert len(set(keys)) == len(keys)
    assert keys[0] == NLIJudge(str(folder), device="cpu", batch_size=1).cache_key


def test_another_tokenizer_is_another_judge_and_another_place_is_not(folder, judge, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    assert NLIJudge(tmp_path / "model", device="cpu").cache_key == judge.cache_key
    settings = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    settings["normalizer"] = None
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(settings))
    assert NLIJudge(tmp_path / "model", device="cpu").cache_key != judge.cache_key


def test_verdicts_can_be_kept_in_a_file(judge, tmp_path):
    batch = [said("I am a cook."), said("Hello there.")]
    for misses in (2, 0):
        cached = CachedJudge(judge, tmp_path / "verdicts.sqlite")
        assert cached(batch) == judge(batch) and cached.misses == misses


def test_a_flaw_finder_of_unknown_origin_is_not_cached(folder, tmp_path):
    for flaw in (lambda transcript: "", functools.partial(no_flaw)):
        judge = NLIJudge(folder, device="cpu", flaw=flaw)
        assert verdict(judge, "I am a nurse.").reward == 1.0
        with pytest.raises(ValueError, match=r"flaw=.* is no plain function and has no cache_key"):
            CachedJudge(judge, tmp_path / "verdicts.sqlite")
    flaw.cache_key = "mine/1"
    assert NLIJudge(folder, device="cpu", flaw=flaw).cache_key.endswith("flaw=mine/1")


# ---- models that will not do ---------------------------------------------------------------------


def with_labels(*names):
    labels = {name: index for index, name in enumerate(names)}
    return lambda folder: saved(folder, BertForSequenceClassification(BertConfig(**sizes(labels))))


def no_classifier(folder):
    saved(folder, BertModel(BertConfig(**sizes())))


def no_tokenizer(folder):
    trained().save_pretrained(folder)


def pickled(folder):
    saved(folder, trained())
    (folder / "model.safetensors").unlink()
    torch.save(trained().state_dict(), folder / "pytorch_model.bin")


def damaged(folder):
    saved(folder, trained())
    (folder / "model.safetensors").write_bytes(b"weights")


WRONG_MODELS = {
    "no such folder": (lambda folder: None, "There is no folder"),
    "empty": (lambda folder: folder.mkdir(), "cannot be loaded as a model for sequence"),
    "damaged": (damaged, "cannot be loaded.*safetensors format"),
    "pickled": (pickled, "cannot be loaded.*safetensors format"),
    "no classifier": (no_classifier, r"\(BertModel\): it has no weights for classifier\.bias"),
    "no tokenizer": (no_tokenizer, "tokenizer of .* knows no words"),
    "no names": (with_labels("LABEL_0", "LABEL_1", "LABEL_2"), "LABEL_1.*hand in labels={"),
    "two labels": (with_labels("not_entailment", "entailment"), "'contradict'.*hand in labels={"),
    "other task": (with_labels("negative", "positive"), "'contradict', but.*'positive'"),
    "ambiguous": (with_labels("contradiction", "entailment", "entailed"), "'entail', but"),
}


@pytest.mark.parametrize("kind", WRONG_MODELS)
def test_a_model_that_will_not_do_is_refused(tmp_path, kind):
    make, message = WRONG_MODELS[kind]
    make(tmp_path / "wrong")
    with pytest.raises(ValueError, match=rf"(?s){message}") as refused:
        NLIJudge(tmp_path / "wrong", device="cpu")
    assert str(tmp_path / "wrong") in str(refused.value)


def test_a_language_model_is_no_judge():
    """Loaded as a classifier it would get random weights and judge at random."""
    nano = Path(__file__).parent.parent / "agents" / "nano"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\): it has no weights for score.weight"):
        NLIJudge(nano, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"threshold": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"threshold": 1.1}, r"in \(0, 1\], got 1.1"),
        ({"neutral": -0.1}, r"in \[0, 1\] or None, got -0.1"),
        ({"neutral": 2}, r"in \[0, 1\] or None, got 2"),
        ({"labels": {}}, "labels={} does not tell"),
        ({"labels": {"contradiction": 0}}, "does not tell contradiction and entailment"),
        ({"labels": {"contradiction": 0, "entailment": 3}}, "of the 3 labels"),
        ({"labels": {"contradiction": 0, "entailment": 0}}, "does not tell"),
        ({"labels": {"contradiction": 0, "entailment": 1, "other": 2}}, "does not tell"),
    ],
)
def test_settings_out_of_range_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        NLIJudge(folder, device="cpu", **settings)


# ---- premises ------------------------------------------------------------------------------------

FIRST_PERSON = {
    "You are a nurse.": "I am a nurse.",
    "you were born in Oslo": "I was born in Oslo",
    "You're a nurse and you've two cats.": "I'm a nurse and I've two cats.",
    "You’re rich, you'll see, you'd know.": "I'm rich, I'll see, I'd know.",
    "You have a cat.": "I have a cat.",
    "You aren't shy and weren't rich.": "I am not shy and wasn't rich.",
    "Are you shy? Aren't you?": "Am I shy? Am I not?",
    "Were you tired?": "Was I tired?",
    "Your hobby is chess and the cat is yours.": "My hobby is chess and the cat is mine.",
    "You keep it to yourself.": "I keep it to myself.",
    "YOUR SECRET: YOU ARE RICH.": "MY SECRET: I AM RICH.",
    # the verb may stand apart
    "You often are tired.": "I often am tired.",
    "You really never were ill.": "I really never was ill.",
    "You live in Oslo, are married and were rich.": "I live in Oslo, am married and was rich.",
    "You have two brothers who are nurses.": "I have two brothers who are nurses.",
    "You know that they left and are rich.": "I know that they left and are rich.",
    "Your parents are nurses.": "My parents are nurses.",
    "You think your parents are rich.": "I think my parents are rich.",
    "The friends around you are kind.": "The friends around me are kind.",
    # subject or object
    "Your wife left you.": "My wife left me.",
    "Your friends call you Bob.": "My friends call me Bob.",
    "Someone close to you died before you came.": "Someone close to me died before I came.",
    "Nightmares wake you, so you read.": "Nightmares wake me, so I read.",
    "Everything you do is for others.": "Everything I do is for others.",
    "The music you listen to is jazz.": "The music I listen to is jazz.",
    "People like you; you feel like you never belong.": (
        "People like me; I feel like I never belong."
    ),
    "This week you study physics.": "This week I study physics.",
    "Deep down you fear poverty.": "Deep down I fear poverty.",
    "When you were ten, you moved.": "When I was ten, I moved.",
    "If asked, you joke.": "If asked, I joke.",
    "You feel they look down on you.": "I feel they look down on me.",
    # what is left alone
    "I am a nurse and you like me.": "I am a nurse and you like me.",
    "i have a cat, do you": "i have a cat, do you",
    "My cat likes you.": "My cat likes you.",
    "You study World War I.": "I study World War I.",
    "Mia is a nurse.": "Mia is a nurse.",
    'You say "you are late" and “your turn” a lot.': 'I say "you are late" and “your turn” a lot.',
    "Youth and yours truly are young.": "Youth and mine truly are young.",
}


@pytest.mark.parametrize("sentence", FIRST_PERSON)
def test_second_person_becomes_first_person(sentence):
    assert first_person(sentence) == FIRST_PERSON[sentence]


SENTENCES = {
    "You are Mia. You ski! Do you? Yes…  No": ["You are Mia.", "You ski!", "Do you?", "Yes…", "No"],
    "i like tea. i have dogs . ok": ["i like tea.", "i have dogs .", "ok"],
    "You are Dr. J. Smith of St. Ives. You ski.": ["You are Dr. J. Smith of St. Ives.", "You ski."],
    "You rise at 5 a.m. each day. You ski.": ["You rise at 5 a.m. each day.", "You ski."],
    "You rise at 5 a.m. You ski.": ["You rise at 5 a.m.", "You ski."],
    "You eat eggs, etc. and more.": ["You eat eggs, etc. and more."],
    "You like 3.5 stars.": ["You like 3.5 stars."],
    'You say "no." You leave.': ['You say "no."', "You leave."],
    "- You ski\n\n * You sing\n2) a cat\n3.5 stars": ["You ski", "You sing", "a cat", "3.5 stars"],
    "你是护士。你住在奥斯陆。": ["你是护士。", "你住在奥斯陆。"],
    " \n...\n 7. ": [],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_texts_are_cut_into_sentences(text):
    assert sentences(text) == SENTENCES[text]


def test_premises_are_different_sentences_in_the_first_person():
    assert premises("You ski. You ski. Your cat is old.") == ("I ski.", "My cat is old.")


def test_in_a_text_about_somebody_else_you_is_the_reader():
    assert premises("Alex is 30. On Sundays you find him here.") == (
        *("Alex is 30.", "On Sundays you find him here."),
    )
    assert premises("Deep down you fear poverty.") == ("Deep down I fear poverty.",)
    assert premises("On Sundays you see her. You’re kind.") == (
        "On Sundays I see her.",
        "I'm kind.",
    )
