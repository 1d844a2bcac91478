"""Chat models: an endpoint over HTTP, and a Hugging Face model in this process.

The endpoints here answer what a test tells them; real servers and random faults are in
test_chat_server.py and test_chat_faults.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import threading
import traceback

import numpy as np
import pytest
import torch
from chat_models import endpoint, refusal
from fault_proxy import Reply
from tiny_models import CHATML, PLAIN, letter_tokenizer, tiny_model, tiny_tokenizer

from ppg_env import PersonaDialogueEnv
from ppg_env.chat import (
    ChatError,
    Completion,
    OpenAIChat,
    TransformersChat,
    open_chat,
    side_by_side,
    without_system,
    without_thoughts,
)
from ppg_env.chat_judge import ChatJudge
from ppg_env.partners import ChatPartner

HELLO = [
    {"role": "system", "content": "You are a waiter."},
    {"role": "user", "content": "Hello!"},
]
KEYS = ["sk-proj-abcdefghijklmnop1234567890", "Open.Sesame+42/plain=key", "kEy"]


def ask(chat, number=1, messages=HELLO, temperature=0.5, max_tokens=20):
    return chat([messages] * number, range(number), temperature=temperature, max_tokens=max_tokens)


def failure(chat, **how):
    """Return the text of the error in which a question ends."""
    with pytest.raises(ChatError) as caught:
        ask(chat, **how)
    return str(caught.value)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Pauses before a question is asked again, where the server asks for none."""
    monkeypatch.setattr("ppg_env.chat._LONGEST_PAUSE", 0.01)


@pytest.fixture
def impatient(monkeypatch):
    """An endpoint that has never answered is soon given up, however slow this computer is."""
    monkeypatch.setattr("ppg_env.chat._UNREACHABLE_PATIENCE", 0.02)


@pytest.fixture
def key(monkeypatch):
    """A function that sets the key."""
    return lambda value: monkeypatch.setenv("OPENAI_API_KEY", value)


# ---- where to ask --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://example.org/api/openai", "https://example.org/api/openai"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_a_bare_host_gets_the_usual_path(url, root):
    assert OpenAIChat("m", url).url == root
    assert OpenAIChat("m", url).name == f"openai:m@{root}"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "localhost",
        "//localhost:8000/v1",
        "ftp://localhost/v1",
        "http://",
        "http:///v1",
        "http://localhost:port/v1",
        "http://[::1/v1",
        "http//localhost:8000",
    ],
)
def test_what_is_no_http_url_is_refused_with_an_example(url):
    with pytest.raises(ValueError, match=r"no http url; write e\.g\. http://localhost:8000/v1"):
        OpenAIChat("m", url)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@localhost:8000/v1",
        "http://hunter2@localhost:8000/v1",
        "https://localhost/v1?api_key=hunter2",
        "https://localhost/v1#hunter2",
        "user:hunter2@localhost:8000/v1",
        "ftp://user:hunter2@localhost/v1",
        "http//user:hunter2@localhost",
        "http://user:hunter2@localhost:port/v1",
        "localhost:8000/v1?key=hunter2",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_and_the_secret_not_repeated(url):
    for make in (lambda: OpenAIChat("m", url), lambda: open_chat(f"openai:m@{url}")):
        with pytest.raises(ValueError, match=r"environment variable|http") as caught:
            make()
        assert "hunter2" not in traceback.format_exc() + str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": ""}, "no name"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"timeout": 0}, "seconds > 0, got 0"),
        ({"budget": -1}, "seconds > 0.*-1"),
        ({"timeout": float("nan")}, "nan"),
    ],
)
def test_impossible_settings_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        OpenAIChat(**{"model": "m", "url": "http://localhost:8000", **arguments})


# ---- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "model", "url"),
    [
        ("openai:m@http://h:1/v1", "m", "http://h:1/v1"),
        ("openai:Qwen/Qwen3-8B@http://h:1", "Qwen/Qwen3-8B", "http://h:1/v1"),
        ("openai:qwen3:8b-q4_K_M@http://h:11434/v1", "qwen3:8b-q4_K_M", "http://h:11434/v1"),
        ("openai:@cf/meta/llama-3@https://h/v1", "@cf/meta/llama-3", "https://h/v1"),
        ("openai:claude@20240620@https://h/v1", "claude@20240620", "https://h/v1"),
        ("openai:m@httpd@http://h/v1", "m@httpd", "http://h/v1"),
        ("openai:gpt-5", "gpt-5", "https://api.openai.com/v1"),
        ("openai:ft:gpt-5:org::id", "ft:gpt-5:org::id", "https://api.openai.com/v1"),
        ("openai:claude@20240620", "claude@20240620", "https://api.openai.com/v1"),
        ("openai:m@1.0.2", "m@1.0.2", "https://api.openai.com/v1"),
    ],
)
def test_a_spec_names_model_and_url(spec, model, url):
    chat = open_chat(spec)
    assert (chat.model, chat.url) == (model, url)
    assert open_chat(spec) is chat


def test_partner_and_judge_of_one_spec_share_the_model():
    env = PersonaDialogueEnv(partner="openai:m@http://h:1", judge="openai:m@http://h:1")
    assert env.world.partner.chat is env.world.judge.chat


@pytest.mark.parametrize("spec", ["", "gpt-5", "OPENAI:m", "openai", "http://h/v1", "rules", None])
def test_other_texts_are_no_specs(spec):
    with pytest.raises(ValueError, match=r"names no chat model; write openai:MODEL@URL"):
        open_chat(spec)


@pytest.mark.parametrize("spec", ["openai:", "openai:@http://localhost:8000/v1"])
def test_a_spec_without_a_model_is_refused(spec):
    with pytest.raises(ValueError, match="no name"):
        open_chat(spec)


@pytest.mark.parametrize(
    "address",
    [
        *("localhost", "localhost:8000", "localhost:8000/v1", "gpu-7:8000", "h.org/v1/"),
        *("10.0.0.7", "10.0.0.7/v1", "//h/v1", "ftp://h/v1", "u:hunter2@localhost:8000/v1"),
    ],
)
def test_a_url_without_http_is_not_taken_for_a_model_of_openais(address):
    """It would send the dialogues, and the key, to somebody they are not meant for."""
    with pytest.raises(ValueError, match=r"'m' and '@' must begin with http://") as caught:
        open_chat(f"openai:m@{address}")
    assert "hunter2" not in str(caught.value)


# ---- a question and its answer -------------------------------------------------------------------


def test_a_question_is_asked_as_the_protocol_wants_it(key):
    key("a-key")
    with endpoint(lambda request: "Good evening!") as server:
        chat = OpenAIChat("some/model", server.url)
        answers = chat([HELLO, HELLO[1:]], [7, 8], temperature=0.3, max_tokens=11)
    assert answers == [Completion("Good evening!", True)] * 2
    requests = sorted(server.requests, key=lambda request: request.json["seed"])
    assert [request.json for request in requests] == [
        {
            "model": "some/model",
            "messages": messages,
            "seed": seed,
            "temperature": 0.3,
            "max_tokens": 11,
        }
        for messages, seed in ((HELLO, 7), (HELLO[1:], 8))
    ]
    assert {request.path for request in requests} == {"/v1/chat/completions"}
    assert {request.headers["authorization"] for request in requests} == {"Bearer a-key"}


def test_answers_come_in_the_order_of_the_questions():
    with endpoint(lambda request: f"seed {request.json['seed']}") as server:
        answers = ask(OpenAIChat("m", server.url), 100)
    assert [answer.text for answer in answers] == [f"seed {i}" for i in range(100)]


def test_no_question_is_no_request():
    assert OpenAIChat("m", "http://127.0.0.1:1")([], [], temperature=0.0, max_tokens=1) == []


def test_a_seed_for_each_question_is_needed():
    with pytest.raises(ValueError, match="shorter"):
        OpenAIChat("m", "http://127.0.0.1:1")([HELLO], [], temperature=0.0, max_tokens=1)


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_no_more_requests_are_under_way_than_allowed(limit):
    async def answer(request):
        while server.most_in_flight < limit:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.01)  # time for one too many
        return "Hm."

    with endpoint(answer) as server:
        ask(OpenAIChat("m", server.url, concurrency=limit), 24)
    assert server.most_in_flight == limit


def said(body, finish_reason="stop", **message):
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"content": body, **message}}
    return Reply(200, json.dumps({"choices": [choice]}).encode())


@pytest.mark.parametrize(
    ("reply", "text", "finished"),
    [
        (said("Hm."), "Hm.", True),
        (said("  Hm.\n"), "Hm.", True),
        (said(""), "", True),
        (said("Hm.", None), "Hm.", True),
        (said("Hm.", "eos"), "Hm.", True),
        (said("Hm.", "eos_token"), "Hm.", True),
        (said("Hm", "length"), "Hm", False),
        (said("Hm", "content_filter"), "Hm", False),
        (said("Hm", "tool_calls"), "Hm", False),
        (said("nul\0 and \ud800."), "nul and .", True),
        # thoughts
        (said("<think>Is it?</think>\nYes."), "Yes.", True),
        (said("It is not opened.</think>Yes."), "Yes.", True),
        (said("<think>a</think>b<think>c</think>d"), "d", True),
        (said("<think>Is it? And th", "length"), "", False),
        (said("<think>Is it? And then."), "", False),
        (said("Well. <think>Is it"), "Well.", False),
        (said("<think></think>"), "", True),
        # nothing said, and why
        (said(None, "length", reasoning_content="Is it? And th"), "", False),
        (said(None, "stop", reasoning="Is it?"), "", False),
        (said(None, "length"), "", False),
        (said(None, "content_filter"), "", False),
        (said(None, "stop", refusal="I cannot."), "", False),
    ],
)
def test_an_answer_is_its_text_without_thoughts_and_whether_it_ended(reply, text, finished):
    """What was not said by itself must not be asked for again until the budget is used up."""
    with endpoint(lambda request: reply) as server:
        assert ask(OpenAIChat("m", server.url)) == [Completion(text, finished)]
    assert len(server.requests) == 1


def test_thoughts_are_taken_off_alike_for_all_models():
    assert without_thoughts("<think>\0</think> a\ud800b ", True) == Completion("ab", True)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSONDecodeError"),
        (b"<html>Please log in.</html>", "<html>Please log in"),
        (b"null", "TypeError"),
        (b"[]", "TypeError"),
        (b"{}", "KeyError"),
        (b'{"choices": []}', "IndexError"),
        (b'{"choices": {}}', "KeyError"),
        (b'{"choices": [null]}', "TypeError"),
        (b'{"choices": [{"message": null}]}', "AttributeError"),
        (b'{"choices": [{"message": "hi"}]}', "AttributeError"),
        (b'{"choices": [{"message": {}}]}', "content is None"),
        (b'{"choices": [{"message": {"content": null, "refusal": null}}]}', "content is None"),
        (b'{"choices": [{"message": {"content": 5}}]}', "content is 5"),
        (b'{"choices": [{"message": {"content": ["a", "long list of parts"]}}]}', "of parts"),
        (b'{"error": "busy"}', "KeyError"),
        (b"[" * 100_000, "RecursionError"),
        (b"\xff\xfe\x00", "no chat completion"),
        (b'data: {"choices": [{"delta": {"content": "Hm."}}]}', "JSONDecodeError"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_chat_completion_is_asked_for_again_and_never_taken_for_one(
    body, named, monkeypatch
):
    answers = [Reply(200, body), Reply(200, body), "Hm."]
    with endpoint(lambda request: answers.pop(0) if answers else Reply(200, body)) as server:
        chat = OpenAIChat("m", server.url)
        assert ask(chat) == [("Hm.", True)]
        assert chat.retries == {"UnusableAnswerError": 2}
        monkeypatch.setattr("ppg_env.chat._UNREACHABLE_PATIENCE", 0.02)
        message = failure(OpenAIChat("m", server.url))
    assert named in message and "no chat endpoint" in message and "/v1" in message


def test_a_page_that_never_was_an_endpoint_is_given_up_before_the_budget_is_used(impatient):
    with endpoint(lambda request: Reply(200, b"<html>A start page</html>")) as server:
        assert "A start page" in failure(OpenAIChat("m", server.url, budget=1.60))


def test_an_endpoint_that_answered_once_has_the_whole_budget(monkeypatch):
    monkeypatch.setattr("ppg_env.chat._UNREACHABLE_PATIENCE", 0.01)
    answers = ["Hm.", Reply(200, b"<html>"), Reply(200, b"<html>"), "Again!"]
    with endpoint(lambda request: answers.pop(0)) as server:
        chat = OpenAIChat("m", server.url)
        assert [ask(chat)[0].text for _ in range(2)] == ["Hm.", "Again!"]
    assert chat.retries == {"UnusableAnswerError": 2}


# ---- keys ----------------------------------------------------------------------------------------


def test_a_missing_key_is_told_with_the_variable_that_is_to_hold_it(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("MY_KEY", raising=False)
    with endpoint(lambda request: refusal(401, "no key given")) as server:
        message = failure(OpenAIChat("m", server.url))
        assert "there is no key: set the environment variable OPENAI_API_KEY" in message
        message = failure(OpenAIChat("m", server.url, api_key_env="MY_KEY"))
        assert "set the environment variable MY_KEY" in message
        assert "no key given" in message and server.url in message and "'m'" in message
    assert len(server.requests) == 2


def test_a_server_of_ones_own_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with endpoint(lambda request: "Hm.") as server:
        assert ask(OpenAIChat("m", server.url)) == [("Hm.", True)]


def echoes_the_key(status, before):
    """Return an endpoint that repeats the key it is sent."""

    def answer(request):
        sent = request.headers["authorization"]
        secret = sent.removeprefix("Bearer ")
        message = (
            f"{'x' * before} Incorrect API key provided: {secret}. You sent {sent!r}. {secret}"
        )
        body = json.dumps({"error": {"message": message, "code": secret, "param": secret}})
        return Reply(status, body.encode())

    return endpoint(answer)


@pytest.mark.parametrize("secret", KEYS)
@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
@pytest.mark.parametrize("before", [0, 15, 320])  # 320: cut in two
def test_a_key_that_the_server_repeats_is_nowhere_in_the_error(
    status, secret, before, key, caplog, impatient
):
    """Neither in its text, nor behind it, nor in what a traceback with local variables shows."""
    key(secret)
    caplog.set_level(logging.DEBUG)
    with echoes_the_key(status, before) as server:
        chat = OpenAIChat("m", server.url)
        try:
            ask(chat, 2)
        except ChatError as error:
            assert error.__cause__ is None and error.__context__ is None
            shown = traceback.format_exc() + repr(error) + str(error)
            error.__traceback__ = error.__traceback__.tb_next.tb_next  # this test's own locals
            locals_too = traceback.TracebackException.from_exception(error, capture_locals=True)
            shown += "".join(locals_too.format())
            dumped = pickle.dumps(error)
        else:
            raise AssertionError("no error")
    assert secret not in shown
    if len(secret) > 8:  # not a piece of it either
        assert secret[:8] not in shown and secret[-8:] not in shown
    assert secret.encode() not in dumped
    assert caplog.records and secret not in caplog.text
    assert not any(secret in str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize("secret", KEYS)
def test_a_key_is_in_no_repr_name_pickle_or_cache_key(secret, key):
    key(secret)
    with endpoint(lambda request: "VERDICT: CONSISTENT") as server:
        chat = OpenAIChat("m", server.url)
        ask(chat)
        judge, partner = ChatJudge(chat, "chatting"), ChatPartner(chat, "chatting")
        for shown in (repr(chat), chat.name, judge.cache_key, str(vars(chat)), str(vars(judge))):
            assert secret not in shown
        for kept in (chat, judge, partner):
            assert secret.encode() not in pickle.dumps(kept)


def test_a_key_that_was_changed_meanwhile_is_not_shown_either(key):
    key("the-first-key")
    answers = ["Hm."]
    with endpoint(
        lambda request: answers.pop() if answers else refusal(401, "wrong key: the-first-key")
    ) as server:
        chat = OpenAIChat("m", server.url)
        ask(chat)
        key("the-second-key")
        assert "the-first-key" not in failure(chat)


@pytest.mark.parametrize("secret", ["my-key\n", "  my-key", "my-key\r\n"])
def test_blanks_around_a_key_are_not_part_of_it(secret, key):
    key(secret)
    with endpoint(lambda request: "Hm.") as server:
        ask(OpenAIChat("m", server.url))
    assert server.requests[0].headers["authorization"] == "Bearer my-key"


@pytest.mark.parametrize("secret", ["schlüssel-geheim", "two\nlines-geheim", "nul\x7f-geheim"])
def test_a_key_that_no_header_can_hold_is_a_final_error_without_the_key(secret, key):
    key(secret)
    with endpoint(lambda request: refusal(401, "no")) as server:
        message = failure(OpenAIChat("m", server.url))
    assert "geheim" not in message and server.url in message
    assert "the key in OPENAI_API_KEY holds more than ASCII letters" in message
    assert server.requests == []


# ---- what a server refuses -----------------------------------------------------------------------

OPENAI_400 = "Unsupported parameter: '{0}' is not supported with this model."
REFUSALS = [
    ("seed", 400, "Unsupported parameter: 'seed'", {}),
    ("seed", 400, "Unrecognized request argument supplied: seed", {}),
    ("seed", 400, 'Invalid JSON payload received. Unknown name "seed": Cannot find field.', {}),
    ("seed", 400, "nothing to see", {"param": "seed", "code": "unsupported_parameter"}),
    ("seed", 422, "[{'type': 'extra_forbidden', 'loc': ['body', 'seed']}]", {}),
    ("seed", 422, None, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}),
    (
        "max_tokens",
        400,
        OPENAI_400.format("max_tokens") + " Use 'max_completion_tokens' instead.",
        {"param": "max_tokens"},
    ),
    (
        "max_tokens",
        400,
        OPENAI_400.format("max_tokens") + " Use 'max_completion_tokens' instead.",
        {},
    ),
    (
        "temperature",
        400,
        "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default "
        "(1) value is supported.",
        {"param": "temperature"},
    ),
    ("system", 400, "System role not supported", {}),
    ("system", 400, "Unsupported role: system", {"param": "messages[0].role"}),
]


def refuses(field, status, message, more):
    """Return what answers only requests without the field."""

    def answer(request):
        sent = request.json
        roles = [entry["role"] for entry in sent["messages"]]
        if field in sent or field in roles:
            other_format = Reply(status, json.dumps(more).encode())
            return refusal(status, message, **more) if message else other_format
        return "Hm."

    return answer


@pytest.mark.parametrize(("field", "status", "message", "more"), REFUSALS)
def test_what_the_server_does_not_take_is_left_out_from_then_on(field, status, message, more):
    with endpoint(refuses(field, status, message, more)) as server:
        chat = OpenAIChat("m", server.url)
        assert not chat.nondeterministic
        for _ in range(3):
            assert ask(chat) == [("Hm.", True)]
    assert len(server.requests) == 4  # one more than asked: the first was refused
    assert chat.nondeterministic == (field == "seed")
    first, *others = [request.json for request in server.requests]
    for sent in others:
        expected = {name: value for name, value in first.items() if name != field}
        if field == "max_tokens":
            expected["max_completion_tokens"] = first["max_tokens"]
        if field == "system":
            expected["messages"] = [{"role": "user", "content": "You are a waiter.\n\nHello!"}]
        assert sent == expected


def test_a_server_may_refuse_several_fields_one_after_the_other():
    def answer(request):
        for field in ("max_tokens", "seed", "temperature"):
            if field in request.json:
                return refusal(400, OPENAI_400.format(field), param=field)
        return "Hm."

    with endpoint(answer) as server:
        assert ask(OpenAIChat("m", server.url)) == [("Hm.", True)]
    assert len(server.requests) == 4
    assert server.requests[-1].json["max_completion_tokens"] == 20


def test_all_questions_that_were_under_way_when_the_first_was_refused_are_asked_again():
    """Once only the first of them was, and the others were final errors."""
    refused = []

    async def answer(request):
        if "seed" not in request.json:
            return "Hm."
        refused.append(request)
        while len(refused) < 8:
            await asyncio.sleep(0.002)
        return refusal(400, OPENAI_400.format("seed"))

    with endpoint(answer) as server:
        assert ask(OpenAIChat("m", server.url, concurrency=8), 8) == [("Hm.", True)] * 8
    assert len(server.requests) == 16


def test_the_length_of_an_answer_is_never_left_unlimited():
    """A server that takes neither name for it is an error."""

    def answer(request):
        for field in ("max_tokens", "max_completion_tokens"):
            if field in request.json:
                return refusal(400, OPENAI_400.format(field), param=field)
        raise AssertionError("no limit was sent")

    with endpoint(answer) as server:
        assert "max_completion_tokens" in failure(OpenAIChat("m", server.url))
    assert len(server.requests) == 2


def test_a_nondeterministic_endpoint_makes_the_environment_say_so():
    with endpoint(refuses("seed", 400, OPENAI_400.format("seed"), {})) as server:
        chat = OpenAIChat("m", server.url)
        env = PersonaDialogueEnv(partner=ChatPartner(chat, "chatting"))
        env.reset(seed=0)
        assert env.world.nondeterministic


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "This model's maximum context length is 4096 tokens, you sent 5000."),
        (400, "messages: at least one is needed"),
        (400, "seed"),
        (400, "The model `m` is not supported in this region."),
        (402, "Your credit is used up."),
        (403, "Not for you."),
        (413, "Too long."),
        (418, "I am a teapot."),
        (422, "messages.0.content: a text is expected"),
    ],
)
def test_any_other_refusal_is_final_at_once(status, message):
    with endpoint(lambda request: refusal(status, message)) as server:
        text = failure(OpenAIChat("m", server.url))
    assert message in text and "'m'" in text and server.url in text
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body", [b'{"detail": "Too warm."}', b'{"error": "Too warm."}', b"Too warm."]
)
def test_a_refusal_in_another_format_is_told_in_the_servers_words(body):
    with endpoint(lambda request: Reply(400, body)) as server:
        assert "Too warm." in failure(OpenAIChat("m", server.url))


def test_a_field_in_the_models_name_is_no_refused_field():
    with endpoint(lambda request: refusal(400, "Unknown model: org/seed-oss-36b")) as server:
        chat = OpenAIChat("org/seed-oss-36b", server.url)
        assert "Unknown model" in failure(chat)
    assert len(server.requests) == 1 and not chat.nondeterministic


def test_a_refused_question_among_many_is_the_error_of_all():
    def answer(request):
        return refusal(413, "Too long.") if request.json["seed"] == 3 else "Hm."

    with endpoint(answer) as server:
        assert "Too long." in failure(OpenAIChat("m", server.url, concurrency=2), number=50)
    assert len(server.requests) < 50


def test_a_wrong_model_name_is_told_with_those_that_there_are():
    def answer(request):
        if request.path == "/v1/models":
            models = [{"id": name, "object": "model"} for name in ("org/one", "org/two")]
            return Reply(200, json.dumps({"object": "list", "data": models}).encode())
        return refusal(404, "The model `m` does not exist.")

    with endpoint(answer) as server:
        text = failure(OpenAIChat("m", server.url))
    assert "does not exist" in text and "org/one, org/two" in text
    assert [request.path for request in server.requests].count("/v1/chat/completions") == 1


@pytest.mark.parametrize("listing", [Reply(404, b""), Reply(200, b"<html>"), Reply(200, b"{}")])
def test_a_wrong_path_is_told_with_what_is_usual(listing):
    def answer(request):
        return listing if request.path.endswith("/models") else Reply(404, b"Not Found")

    with endpoint(answer) as server:
        text = failure(OpenAIChat("m", server.url))
    assert "was not found" in text and ("/v1" in text or "lists: none" in text)


def test_a_redirect_within_the_server_is_followed():
    def answer(request):
        if request.path.startswith("/v2"):
            return "Hm."
        return Reply(307, b"", {"location": "/v2/chat/completions"})

    with endpoint(answer) as server:
        assert ask(OpenAIChat("m", server.url)) == [("Hm.", True)]


def test_a_redirect_to_somebody_else_does_not_take_the_key_along(key):
    key("my-own-key")
    with endpoint(lambda request: "Hm.") as other:
        location = f"{other.url}/chat/completions".replace("127.0.0.1", "localhost")
        with endpoint(lambda request: Reply(307, b"", {"location": location})) as server:
            assert ask(OpenAIChat("m", server.url)) == [("Hm.", True)]
    assert "my-own-key" in str(server.requests) and "my-own-key" not in str(other.requests)


def test_redirects_in_a_circle_are_a_final_error(impatient):
    with endpoint(lambda request: Reply(307, b"", {"location": request.path})) as server:
        assert server.url in failure(OpenAIChat("m", server.url))


# ---- waiting -------------------------------------------------------------------------------------


def test_a_pause_longer_than_the_budget_is_an_error_at_once():
    with endpoint(lambda request: Reply(429, b"{}", {"retry-after": "86400"})) as server:
        text = failure(OpenAIChat("m", server.url))
    assert len(server.requests) == 1
    assert "it asks to wait 86400 s" in text and "budget 900 s" in text


@pytest.mark.parametrize(
    "asked", ["-5", "nan", "inf", "soon", "0", "Wed, 21 Oct 2015 07:28:00 GMT"]
)
def test_a_pause_that_cannot_be_understood_is_ones_own(asked):
    answers = [Reply(429, b"{}", {"retry-after": asked}), "Hm."]
    with endpoint(lambda request: answers.pop(0)) as server:
        chat = OpenAIChat("m", server.url)
        assert ask(chat) == [("Hm.", True)]
    assert chat.retries == {"status 429": 1}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_what_passes_is_tried_again(status):
    answers = [refusal(status, "busy"), refusal(status, "busy"), "Hm."]
    with endpoint(lambda request: answers.pop(0)) as server:
        chat = OpenAIChat("m", server.url)
        assert ask(chat) == [("Hm.", True)]
    assert chat.retries == {f"status {status}": 2}


def test_what_does_not_pass_within_the_budget_is_an_error_that_tells_how_often_it_was_tried():
    busy = Reply(503, b'{"error": {"message": "busy"}}', {"retry-after": "1"})
    with endpoint(lambda request: busy) as server:
        text = failure(OpenAIChat("m", server.url, budget=1.6))
    assert len(server.requests) > 1
    assert f"in {len(server.requests)} attempts" in text and "(budget 2 s)" in text
    assert "busy" in text and "Nothing was lost" in text


def test_nobody_there_is_told_as_such(impatient):
    text = failure(OpenAIChat("m", "http://127.0.0.1:9"))
    assert "Nothing answers for 'm' at http://127.0.0.1:9/v1" in text
    assert "is the server running" in text


def test_a_long_error_page_is_told_in_a_line(impatient):
    page = b"<html>\n" + b"<p>broken</p>\n" * 100_000
    with endpoint(lambda request: Reply(500, page)) as server:
        text = failure(OpenAIChat("m", server.url))
    assert len(text) < 1000 and "\n" not in text


# ---- processes and threads -----------------------------------------------------------------------


def test_a_chat_model_goes_through_pickle_with_what_it_learned():
    with endpoint(refuses("seed", 400, OPENAI_400.format("seed"), {})) as server:
        chat = OpenAIChat("m", server.url, concurrency=3, timeout=4.0, budget=5.0)
        ask(chat)
        twin = pickle.loads(pickle.dumps(chat))
        assert ask(twin) == [("Hm.", True)]
    assert (twin.name, twin.concurrency, twin.timeout, twin.budget) == (chat.name, 3, 4.0, 5.0)
    assert twin.nondeterministic and len(server.requests) == 3
    assert repr(twin) == repr(chat) == f"OpenAIChat('m', '{server.url}')"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_connection_of_its_own():
    """Two processes on one connection would read each other's answers."""

    def talk(chat, who):
        return [
            ask(chat, messages=[{"role": "user", "content": f"{who} {i}"}])[0].text == f"{who} {i}"
            for i in range(40)
        ]

    with endpoint(lambda request: request.json["messages"][0]["content"]) as server:
        chat = OpenAIChat("m", server.url)
        ask(chat)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if all(talk(chat, "child")) else 1)
        assert all(talk(chat, "parent"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_many_threads_may_share_a_chat_model():
    with endpoint(lambda request: f"seed {request.json['seed']}") as server:
        chat = OpenAIChat("m", server.url)
        found = side_by_side(lambda _: [a.text for a in ask(chat, 5)], range(8), 8)
    assert found == [[f"seed {i}" for i in range(5)]] * 8


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
@pytest.mark.parametrize("number", [0, 1, 2, 30])
def test_results_come_in_order_however_many_go_side_by_side(limit, number):
    assert side_by_side(lambda i: i * i, range(number), limit) == [i * i for i in range(number)]


@pytest.mark.parametrize("limit", [1, 2, 8])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_nothing_further_is_begun_and_the_first_one_is_raised(limit, error):
    begun = []

    def work(i):
        begun.append(i)
        if i >= 5:
            raise error(f"item {i}")

    with pytest.raises(error, match="item 5"):
        side_by_side(work, range(10_000), limit)
    assert len(begun) <= 5 + 2 * limit


def test_of_several_errors_the_first_items_is_raised():
    together = threading.Barrier(2)

    def work(i):
        together.wait(20)
        raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match="item 0"):
        side_by_side(work, range(2), 2)


def test_the_error_waits_for_those_that_are_under_way():
    begun, finished = threading.Event(), threading.Event()

    def work(i):
        if i == 0:
            begun.wait(20)
            raise ValueError("first")
        begun.set()
        finished.wait(0.05)
        finished.set()

    with pytest.raises(ValueError, match="first"):
        side_by_side(work, range(2), 2)
    assert finished.is_set()


def test_ctrl_c_waits_for_nobody_and_nothing_further_is_begun(heeds_ctrl_c):
    begun, both, release = [], threading.Barrier(2), threading.Event()
    main = threading.main_thread().ident

    def work(i):
        begun.append(i)
        if len(begun) <= 2:
            both.wait(20)
            if i == 1:  # a true signal: it wakes a main thread that waits already
                signal.pthread_kill(main, signal.SIGINT)
        release.wait(20)

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(6), 2)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    release.set()
    for worker in workers:
        worker.join(20)
    assert sorted(begun) == [0, 1]


def test_a_chat_without_system_message_is_left_as_it_is():
    assert without_system(HELLO[1:]) == HELLO[1:] and without_system([]) == []
    answer = {"role": "assistant", "content": "Good evening!"}
    assert without_system([*HELLO, answer]) == [
        {"role": "user", "content": "You are a waiter.\n\nHello!"},
        answer,
    ]


# ---- a model in this process ---------------------------------------------------------------------

LETTERS = "abcdefg"
BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    return save(folder, tiny_model("llama"), tiny_tokenizer(CHATML))


@pytest.fixture(scope="module")
def model(bytes_folder):
    return TransformersChat(bytes_folder, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def letters_folder(tmp_path_factory):
    """A vocabulary of seven letters and an end; its own settings ask for anything but sampling."""
    network = tiny_model("llama", vocab_size=8, eos_token_id=0)
    network.generation_config.update(eos_token_id=0, repetition_penalty=5.0)
    network.generation_config.update(do_sample=True, top_k=2, temperature=0.1)
    tokenizer = letter_tokenizer(LETTERS, BARE)
    return save(tmp_path_factory.mktemp("letters"), network, tokenizer)


def questions(number):
    """Return chats of different lengths."""
    return [
        [HELLO[0], {"role": "user", "content": "Do you like the rain? " * (1 + i % 4) + str(i)}]
        for i in range(number)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_batched_answers_are_those_given_one_by_one(temperature, kind, tmp_path):
    """Also sampled: each chat has its own noise, whatever rides along."""
    folder = save(tmp_path, tiny_model(kind), tiny_tokenizer(CHATML))
    chat = TransformersChat(folder, device="cpu", batch_size=4)
    chats, seeds = questions(9), [11 * i for i in range(9)]
    how = {"temperature": temperature, "max_tokens": 12}
    together = chat(chats, seeds, **how)
    assert together == [chat([c], [s], **how)[0] for c, s in zip(chats, seeds, strict=True)]
    backwards = chat(chats[::-1], seeds[::-1], **how)
    assert together == backwards[::-1]
    assert len({answer.text for answer in together}) > 1


def test_another_seed_gives_another_answer_unless_nothing_is_drawn(model):
    chats = questions(1) * 8
    how = {"temperature": 1.0, "max_tokens": 12}
    drawn = model(chats, range(8), **how)
    assert len({answer.text for answer in drawn}) >= 7
    assert model(chats, range(8), **how) == drawn
    greedy = model(chats, range(8), temperature=0.0, max_tokens=12)
    assert len(set(greedy)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_answers_are_drawn_from_the_softmax_whatever_the_models_own_settings(
    letters_folder, temperature
):
    """Pearson's chi-square over all answers of one token, 8000 of them, against the logits."""
    chat = TransformersChat(letters_folder, device="cpu", batch_size=500)
    number, message = 8000, [{"role": "user", "content": "abcab"}]
    answers = chat([message] * number, range(number), temperature=temperature, max_tokens=1)
    with torch.no_grad():
        logit_V = chat.network(torch.tensor([[1, 2, 3, 1, 2]])).logits[0, -1].double()
    expected_V = number * (logit_V / temperature).softmax(-1).numpy()
    said = [answer.text for answer in answers]
    count_V = np.array([said.count(token) for token in ("", *LETTERS)])
    likely_V = expected_V >= 5
    assert likely_V.sum() >= 4
    rest = (count_V[~likely_V].sum(), expected_V[~likely_V].sum())
    distance = ((count_V - expected_V) ** 2 / expected_V)[likely_V].sum()
    assert distance < 24.3  # exceeded once in a thousand, with 7 degrees of freedom
    assert rest[0] <= rest[1] + 5 * np.sqrt(rest[1]) + 1


def test_an_answer_ends_before_its_end_token_or_is_unfinished(letters_folder):
    chat = TransformersChat(letters_folder, device="cpu", batch_size=64)
    message = [{"role": "user", "content": "ab"}]
    answers = chat([message] * 64, range(64), temperature=3.0, max_tokens=12)
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert set(answer.text) <= set(LETTERS)
        assert (len(answer.text) < 12) if answer.finished else (len(answer.text) == 12)


def test_any_of_several_end_tokens_ends_an_answer(letters_folder, tmp_path):
    network = tiny_model("llama", vocab_size=8, eos_token_id=0)
    network.generation_config.eos_token_id = [0, 3]  # 3 is the letter c
    chat = TransformersChat(save(tmp_path, network, letter_tokenizer(LETTERS, BARE)), device="cpu")
    message = [{"role": "user", "content": "ab"}]
    answers = chat([message] * 32, range(32), temperature=3.0, max_tokens=12)
    assert not any("c" in answer.text for answer in answers)
    plain = TransformersChat(letters_folder, device="cpu")
    others = plain([message] * 32, range(32), temperature=3.0, max_tokens=12)
    assert any("c" in other.text for other in others)
    assert [a.text for a in answers] == [other.text.partition("c")[0] for other in others]


def test_a_template_without_system_role_gets_it_in_the_first_message(tmp_path):
    folder = save(tmp_path, tiny_model("llama"), tiny_tokenizer(PLAIN))
    chat = TransformersChat(folder, device="cpu")
    merged = [{"role": "user", "content": "You are a waiter.\n\nHello!"}]
    assert ask(chat, messages=HELLO) == ask(chat, messages=merged)
    assert ask(chat, messages=HELLO) != ask(chat, messages=HELLO[1:])


def test_a_question_longer_than_the_context_is_an_error_with_the_numbers(model):
    long = [HELLO[0], {"role": "user", "content": "rain " * 1000}]
    with pytest.raises(ChatError, match=r"context of 1024 tokens; .* max_tokens=20"):
        ask(model, messages=long)
    with pytest.raises(ChatError, match=r"max_tokens=1020"):
        ask(model, max_tokens=1020)


def test_no_chats_are_no_answers(model):
    assert model([], [], temperature=0.0, max_tokens=5) == []


def test_a_folder_without_a_model_is_refused_and_named(tmp_path):
    with pytest.raises(ValueError, match=f"Cannot load a language model from .*{tmp_path.name}"):
        TransformersChat(str(tmp_path))
    with pytest.raises(ValueError, match="/nowhere/at/all"):
        open_chat("hf:/nowhere/at/all")


def test_a_folder_with_a_tokenizer_alone_is_refused(tmp_path):
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot load a language model"):
        TransformersChat(str(tmp_path))


def test_a_model_without_chat_template_is_refused_with_the_remedy(tmp_path):
    folder = save(tmp_path, tiny_model("llama"), tiny_tokenizer(None))
    with pytest.raises(ValueError, match=r"no chat template; use an instruction-tuned model"):
        TransformersChat(folder)


def test_a_batch_has_at_least_one_chat(bytes_folder):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TransformersChat(bytes_folder, batch_size=0)


def test_a_tokenizer_without_padding_token_pads_all_the_same(tmp_path):
    folder = save(tmp_path, tiny_model("llama"), tiny_tokenizer(CHATML, pad_token=None))
    assert (
        len(
            TransformersChat(folder, device="cpu")(
                questions(3), range(3), temperature=0.0, max_tokens=3
            )
        )
        == 3
    )


def test_a_spec_of_a_folder_gives_the_same_model_to_partner_and_judge(bytes_folder):
    env = PersonaDialogueEnv(partner=f"hf:{bytes_folder}", judge=f"hf:{bytes_folder}")
    assert env.world.partner.chat is env.world.judge.chat
    assert not env.world.nondeterministic
    assert env.world.partner.chat.name == f"hf:{bytes_folder}"


def test_a_tiny_model_plays_partner_and_judge_and_its_babble_is_no_reward(model):
    def play():
        env = PersonaDialogueEnv(
            partner=ChatPartner(model, "chatting", max_tokens=12),
            judge=ChatJudge(model, "chatting", max_tokens=12, min_parse_rate=0.0),
            max_turns=2,
        )
        observation, _ = env.reset(seed=3)
        steps = [env.step(f"In year {turn} I lived in Oslo.") for turn in range(2)]
        return observation, [step[0] for step in steps], [step[1] for step in steps]

    network = model.network.config
    before, network.max_position_embeddings = network.max_position_embeddings, 4096
    try:
        first, again = play(), play()
    finally:
        network.max_position_embeddings = before
    assert first[:2] == again[:2]
    assert all(np.isnan(reward) for reward in first[2])
