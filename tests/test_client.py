"""The model client against a server that misbehaves: what it sends, reads and tries again, and how it fails."""
import re
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import numpy as np
import pytest

from persona_agent import ContextOverflow, OpenAICompatible
from tests.faults import Answer, Faults, dead_address
import tools
from tools import Http, ServiceError

KEY = "sk-secret-0123456789"
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No settings of the machine, and no back-off except what a server asks for."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tools.random.uniform", lambda low, high: 0)


@pytest.fixture
def server():
    with Faults() as faults:
        yield faults


@pytest.fixture
def pauses(monkeypatch):
    """The seconds of every pause between two tries, none of which is waited for."""
    seconds = []
    monkeypatch.setattr("tools.time.sleep", seconds.append)
    return seconds


def client(server, key=KEY, **options):
    return OpenAICompatible("chat-1", "embed-1", server.url + "/v1", key, **options)


def said(content="hello", finish="stop", usage=None, **message):
    message = {"role": "assistant", "content": content, **message}
    return Answer({"choices": [{"message": message, "finish_reason": finish}], "usage": usage})


def vectors(*rows, indices=None, tokens=0):
    data = [{"index": i, "embedding": row} for i, row in zip(indices or range(len(rows)), rows)]
    return Answer({"data": data, "usage": {"prompt_tokens": tokens}})


def refused(message, status=400, **more):
    return Answer({"error": {"message": message, **more}}, status)


def failure(server, key=KEY, tries=2):
    """The error of a chat that fails."""
    with pytest.raises(ServiceError) as raised:
        client(server, key).chat(USER, tries=tries)
    return raised.value


# what is sent

def test_chat_sends_model_messages_temperature_and_max_tokens(server):
    server.script(said())
    client(server, temperature=0.3).chat(USER, max_tokens=7)
    sent = server.requests[0]
    assert (sent.method, sent.path) == ("POST", "/v1/chat/completions")
    assert sent.body == {"model": "chat-1", "messages": USER, "temperature": 0.3, "max_tokens": 7}


def test_stop_is_sent_when_given(server):
    server.script(said())
    client(server).chat(USER, stop=["\nObservation"])
    assert server.requests[0].body["stop"] == ["\nObservation"]


@pytest.mark.parametrize("stop", [None, []])
def test_stop_is_absent_when_empty(server, stop):
    server.script(said())
    client(server).chat(USER, stop=stop)
    assert "stop" not in server.requests[0].body


@pytest.mark.parametrize("key", [KEY, f" {KEY}\n"])
def test_key_is_sent_without_blanks_around_it(server, key):
    server.script(said())
    client(server, key).chat(USER)
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_key_and_address_come_from_the_environment(server, monkeypatch):
    server.script(said())
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/v1/")
    OpenAICompatible("chat-1").chat(USER)
    sent = server.requests[0]
    assert (sent.path, sent.headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")


def test_without_key_no_authorization_is_sent(server):
    server.script(said())
    client(server, key=None).chat(USER)
    assert "Authorization" not in server.requests[0].headers


@pytest.mark.parametrize("key, expected", [(KEY, f"Bearer {KEY}"), (None, None)])
def test_netrc_does_not_replace_the_authorization(server, monkeypatch, tmp_path, key, expected):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.script(said())
    client(server, key).chat(USER)
    assert server.requests[0].headers["Authorization"] == expected


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_proxy_does_not_catch_loopback(server, monkeypatch, variable):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, dead_address())
    server.script(said("direct"))
    assert client(server).chat(USER, tries=1).text == "direct"


def test_cookies_are_not_sent_back(server):
    server.script(Answer(said().body, headers={"Set-Cookie": "session=1; Path=/"}))
    kept = client(server)
    kept.chat(USER)
    kept.chat(USER)
    assert "Cookie" not in server.requests[1].headers


def test_lone_surrogates_arrive_as_replacement_characters(server):
    server.script(said())
    client(server).chat([{"role": "user", "content": "a\ud83db"}])
    assert server.requests[0].body["messages"][0]["content"] == "a\ufffdb"


def test_split_surrogate_pairs_arrive_joined(server):
    server.script(said())
    client(server).chat([{"role": "user", "content": "\ud83d\ude00"}])
    assert server.requests[0].body["messages"][0]["content"] == "\U0001f600"


def test_workers_bound_the_requests_in_flight(server):
    server.script(Answer(said().body, delay=0.05))
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(client(server, workers=3).chat, [USER] * 9))
    assert (len(server.requests), server.most) == (9, 3)


# what is read

@pytest.mark.parametrize("content, text", [
    (" hello \n", "hello"),
    ("", ""),
    (None, ""),
    ([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "hello"),
    ([{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "hello"}], "hello"),
    ("<think>hm</think>hello", "hello"),
    ("<thinking>hm</thinking>\n\nhello", "hello"),
    ("<reasoning>hm</reasoning>hello", "hello"),
    ("<think>a</think>b<think>c</think>hello", "hello"),
    ("hm</think>\nhello", "hello"),
    ("<think>hm, cut off", ""),
])
def test_text_of_a_reply(server, content, text):
    server.script(said(content))
    assert client(server).chat(USER).text == text


@pytest.mark.parametrize("answer, finish, text", [
    (said("x", "stop"), "stop", "x"),
    (said("x", None), "stop", "x"),
    (said("x", "length"), "length", "x"),
    (said("x", "content_filter"), "content_filter", ""),
    (said(None, "stop", refusal="I cannot"), "content_filter", ""),
])
def test_finish_of_a_reply(server, answer, finish, text):
    server.script(answer)
    reply = client(server).chat(USER)
    assert (reply.finish, reply.text) == (finish, text)


@pytest.mark.parametrize("usage, counted", [
    ({"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}, (1, 11, 4, 3)),
    ({"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": None}, (1, 11, 0, 3)),
    ({"prompt_tokens": None}, (1, 0, 0, 0)),
    (None, (1, 0, 0, 0)),
])
def test_usage_is_counted(server, usage, counted):
    server.script(said(usage=usage))
    used = client(server).chat(USER).usage
    assert (used.calls, used.input, used.cached, used.output) == counted


def test_waiting_time_is_counted(server):
    server.script(Answer(said().body, delay=0.05))
    assert 0.05 <= client(server).chat(USER).usage.seconds < 5


def test_an_answer_that_drips_is_read_whole(server):
    server.script(Answer(said("drop by drop").body, action="drip"))
    assert client(server).chat(USER, tries=1).text == "drop by drop"


@pytest.mark.parametrize("body", [
    {"choices": []}, {"choices": {}}, {"choices": None}, {"choices": "x"}, {"choices": [None]},
    {"choices": [{"message": "x"}]}, {"choices": [{"message": {"content": [1]}}]},
    {"error": {"message": "overloaded"}}, {}, [], "x", 1, None,
])
def test_an_answer_without_a_usable_choice_is_a_service_error(server, body):
    server.script(Answer(body))
    assert "did not answer as expected" in str(failure(server))


def test_html_with_status_200_is_a_service_error(server):
    server.script(Answer(b"<html>Welcome</html>", headers={"Content-Type": "text/html"}))
    assert "not JSON: '<html>Welcome" in str(failure(server))


@pytest.mark.parametrize("stop, requests", [(["\nObservation"], 2), ([], 1), (None, 1)])
def test_empty_answer_is_asked_for_once_more_without_the_stop(server, stop, requests):
    server.script(said(""), said("hello"))
    assert client(server).chat(USER, stop=stop).text == ("hello" if requests == 2 else "")
    assert ["stop" in r.body for r in server.requests] == [bool(stop), False][:requests]


def test_answer_that_is_empty_without_the_stop_too_stays_empty(server):
    server.script(said(""))
    reply = client(server).chat(USER, stop=["\nObservation"])
    assert (reply.text, reply.finish, len(server.requests)) == ("", "stop", 2)


@pytest.mark.parametrize("answer", [said("", "length"), said("", "content_filter"), said("x")])
def test_answer_of_another_kind_is_not_asked_for_again(server, answer):
    server.script(answer)
    client(server).chat(USER, stop=["\nObservation"])
    assert len(server.requests) == 1


def test_usage_of_both_answers_is_counted(server):
    server.script(said("", usage={"prompt_tokens": 10, "completion_tokens": 7}),
                  said("hello", usage={"prompt_tokens": 11, "completion_tokens": 3}))
    used = client(server).chat(USER, stop=["\nObservation"]).usage
    assert (used.calls, used.input, used.output) == (2, 21, 10)


# options that a model refuses

STOP_REFUSED = refused("Unsupported parameter: 'stop' is not supported with this model.", type="invalid_request_error",
                       param="stop", code="unsupported_parameter")


@pytest.mark.parametrize("refusal, name, instead", [
    (STOP_REFUSED, "stop", None),
    (refused("Unsupported value: 'temperature' does not support 0.1 with this model. Only the default (1) value is "
             "supported.", param="temperature", code="unsupported_value"), "temperature", None),
    (refused("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
             "instead.", param="max_tokens", code="unsupported_parameter"), "max_tokens", "max_completion_tokens"),
    (refused("`temperature` is deprecated for this model."), "temperature", None),
], ids=["stop", "temperature", "max_tokens", "without a code"])
def test_refused_option_costs_one_request_and_is_remembered(server, caplog, refusal, name, instead):
    server.script(refusal, said())
    learner = client(server)
    assert [learner.chat(USER, stop=["\nObservation"]).text for _ in range(2)] == ["hello"] * 2
    first, *later = [r.body for r in server.requests]
    assert later == [{instead if k == name else k: v for k, v in first.items() if instead or k != name}] * 2
    assert len(caplog.records) == 1 and f"'{name}'" in caplog.text


def test_option_refused_to_several_threads_at_once_fails_none_of_them(server):
    busy = client(server)
    server.script(*[Answer({"error": {"message": "Unsupported parameter: 'stop' is not supported with this model.", "param": "stop",
                                      "code": "unsupported_parameter"}}, 400, delay=0.4)] * 3, said("fine"))
    with ThreadPoolExecutor(3) as pool:
        assert [r.text for r in pool.map(lambda _: busy.chat(USER, stop=["\nObservation"]), range(3))] == ["fine"] * 3


def test_waiting_for_a_free_slot_is_not_the_servers_time(server):
    server.script(Answer(said("late").body, delay=0.15))
    slow = Http(workers=1, tries=1, deadline=0.4)
    with ThreadPoolExecutor(5) as pool:
        assert len(list(pool.map(lambda _: slow.send("POST", server.url, {}), range(5)))) == 5


def test_nothing_is_sent_any_more_once_stopped_and_no_advice_is_given(server):
    stopped = client(server)
    stopped.http.stopped = True
    with pytest.raises(ServiceError, match="^stopped$"):
        stopped.chat(USER)
    assert not server.requests


def test_no_texts_give_no_embeddings(server):
    assert client(server).embed([]).shape == (0, 0) and not server.requests


def test_two_refused_options_are_learned_one_after_the_other(server):
    server.script(STOP_REFUSED, refused("Unsupported value: 'temperature'", code="unsupported_value"), said())
    client(server).chat(USER, stop=["\nObservation"])
    assert set(server.requests[-1].body) == {"model", "messages", "max_tokens"} and len(server.requests) == 3


@pytest.mark.parametrize("answer", [
    refused("Invalid 'temperature': it must be at most 2"), refused("This model does not support images"),
    refused("'top_p' is not supported"), refused("'stop' is unsupported", 422), refused("'stop' is unsupported", 404)])
def test_another_refusal_is_not_swallowed(server, answer):
    server.script(answer, said())
    with pytest.raises(ServiceError, match=re.escape(answer.body["error"]["message"])):
        client(server).chat(USER, stop=["\nObservation"])
    assert len(server.requests) == 1


def test_refusal_of_an_option_that_was_not_sent_is_not_swallowed(server):
    server.script(STOP_REFUSED, said())
    assert "'stop' is not supported" in str(failure(server))


# what is tried again

@pytest.mark.parametrize("first", [
    *[Answer({"error": {"message": "busy"}}, status) for status in (408, 409, 429, 500, 502, 503, 529)],
    Answer({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429, {"Retry-After": "0.01"}),
    Answer(b'{"choices": [', headers={"X-What": "half a JSON"}), Answer(b"", headers={"X-What": "nothing"}),
    Answer({"error": {"message": "Rate limit reached for requests per min (RPM): Limit 3. You can raise it by adding a "
                                 "payment method at https://platform.openai.com/account/billing.", "type": "requests",
                      "code": "rate_limit_exceeded"}}, 429, {"X-What": "billing"}),
    Answer({"error": "bad"}, 400, {"x-should-retry": "true"}),
    Answer(action="reset"), Answer(action="close"), Answer(action="truncate"),
    Answer(b"no gzip", headers={"Content-Encoding": "gzip"}),
], ids=lambda answer: f"{answer.status} {answer.action or ''} {[*answer.headers]}")
def test_a_passing_fault_is_tried_again(server, first):
    server.script(first, said("at last"))
    assert client(server).chat(USER, tries=2).text == "at last"
    assert len(server.requests) == 2


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(server):
    server.script(said(), Answer(action="close"), said("again"))
    kept = client(server)
    kept.chat(USER)
    assert kept.chat(USER).text == "again"


@pytest.mark.parametrize("status, error", [
    (400, {"message": "bad"}), (401, {"message": "who"}), (402, {"message": "pay"}), (403, {"message": "no"}),
    (404, {"message": "what"}), (422, {"message": "bad"}),
    (429, {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}),
    (429, {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}),
    (429, {"message": "stop", "type": "insufficient_quota", "code": "organization_spend_limit_exceeded"}),
    (429, {"message": "stop", "type": "insufficient_quota", "code": "organization_usage_limit_exceeded"}),
    *[(429, {"message": "stop", "code": code}) for code in (
        "credit_balance_exhausted", "project_spend_limit_exceeded", "organization_spend_limit_exceeded",
        "organization_usage_limit_exceeded", "billing_hard_limit_reached")],
    (429, {"message": "Too many tokens per day, please wait before trying again."}),
    (429, {"message": "Rate limit reached on requests per day (RPD): Limit 200", "code": "rate_limit_exceeded"}),
])
def test_a_lasting_fault_is_not_tried_again(server, status, error):
    server.script(Answer({"error": error}, status), said())
    assert failure(server).status == status
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirected_post_is_not_followed(server, status):
    server.script(Answer(b"", status, {"Location": "/v1/elsewhere"}), said())
    error = failure(server)
    assert error.status == status and "/v1/elsewhere" in str(error)
    assert len(server.requests) == 1


def test_a_fault_that_the_server_calls_lasting_is_not_tried_again(server):
    server.script(Answer(status=503, headers={"x-should-retry": "false"}), said())
    assert failure(server).status == 503
    assert len(server.requests) == 1


def test_the_wait_that_a_server_asks_for_passes_before_the_next_try(server):
    server.script(Answer(status=429, headers={"Retry-After": "0.1"}), said())
    client(server).chat(USER)
    assert server.requests[1].time - server.requests[0].time >= 0.1


@pytest.mark.parametrize("headers, least, most", [
    ({"Retry-After": "7"}, 7, 7), ({"Retry-After": "1.5"}, 1.5, 1.5), ({"retry-after-ms": "250"}, 0.25, 0.25),
    ({"x-amz-retry-after": "250"}, 0.25, 0.25), ({"retry-after-ms": "250", "Retry-After": "7"}, 0.25, 0.25),
    ({"Retry-After": lambda: formatdate(time.time() + 60, usegmt=True)}, 57, 60),
    ({"Retry-After": lambda: formatdate(time.time() - 60, usegmt=True)}, 0, 0),
    ({"Retry-After": "-1"}, 0, 0), ({"Retry-After": "soon"}, 0, 0), ({"Retry-After": "nan"}, 0, 0), ({}, 0, 0)])
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_a_server_asks_for(server, pauses, status, headers, least, most):
    headers = {k: v() if callable(v) else v for k, v in headers.items()}
    server.script(Answer(status=status, headers=headers), said())
    client(server).chat(USER)
    assert len(pauses) == 1 and least <= pauses[0] <= most


@pytest.mark.parametrize("wait, said_so", [("121", "121 s"), ("inf", "inf s"), ("Fri, 31 Dec 9999 23:59:59 GMT", " s")])
def test_a_server_that_asks_for_over_two_minutes_is_not_tried_again_and_that_is_said(server, pauses, wait, said_so):
    server.script(Answer({"error": "come back later"}, 429, {"Retry-After": wait}), said())
    assert re.search(rf"come back later.*it asks to wait \w*{said_so}", str(failure(server)))
    assert len(server.requests) == 1 and not pauses


def test_back_off_doubles_up_to_half_a_minute(server, monkeypatch, pauses):
    monkeypatch.setattr("tools.random.uniform", lambda low, high: high)
    server.script(Answer(status=500))
    failure(server, tries=8)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_no_try_starts_after_the_deadline(server, monkeypatch):
    monkeypatch.setattr("tools.random.uniform", lambda low, high: 0.1)
    server.script(Answer(status=500))
    with pytest.raises(ServiceError):
        Http(tries=50, deadline=0.25).send("GET", server.url)
    assert 2 <= len(server.requests) <= 3


@pytest.mark.parametrize("action", ["chunks", "drip"])
def test_an_answer_that_never_ends_is_given_up_at_the_deadline(server, action):
    server.script(Answer(said("drop by drop").body, action=action, pause=0.02))
    dripping, start = client(server), time.monotonic()
    dripping.http = Http(deadline=0.15)
    with pytest.raises(ServiceError, match="timed out"):
        dripping.chat(USER)
    assert 0.1 < time.monotonic() - start < 1


def test_a_host_that_gave_no_answer_is_tried_again_after_a_minute(server, pauses, monkeypatch):
    server.script(*[Answer(action="close")] * 8, said("back"))
    talker, now = client(server), time.monotonic
    with pytest.raises(ServiceError):
        talker.chat(USER)
    monkeypatch.setattr(tools.time, "monotonic", lambda: now() + 61)
    assert talker.chat(USER).text == "back"


def test_after_a_whole_round_without_any_answer_nothing_more_is_sent(server, pauses):
    server.script(Answer(action="close"))
    cut_off = client(server)
    cut_off.http = Http(tries=3)
    for _ in range(2):
        with pytest.raises(ServiceError, match="closed without an answer.*tried 3 times"):
            cut_off.chat(USER)
    assert len(server.requests) == 3


@pytest.mark.parametrize("answer, tries", [(Answer(action="close"), 2), (Answer(status=503), None)],
                         ids=["fewer tries than a round", "an answer, though a bad one"])
def test_after_less_than_that_the_next_request_is_sent(server, pauses, answer, tries):
    server.script(*[answer] * (tries or 3), said("back"))
    cut_off = client(server)
    cut_off.http = Http(tries=3)
    with pytest.raises(ServiceError):
        cut_off.chat(USER, tries=tries)
    assert cut_off.chat(USER).text == "back"


# how it fails

def test_the_last_error_says_what_the_server_said_and_how_often_it_was_tried(server):
    server.script(Answer({"error": {"message": "all shards are down", "code": "shards"}}, 503))
    error = failure(server, tries=3)
    assert "all shards are down" in str(error) and "tried 3 times" in str(error)
    assert (error.status, error.code, len(server.requests)) == (503, "shards", 3)


@pytest.mark.parametrize("body, message", [
    ({"error": {"message": "the cause", "type": "invalid_request_error", "param": None, "code": None}},
     "the cause [invalid_request_error]"),
    ({"error": {"message": "the cause", "type": "BadRequest", "param": None, "code": 400}}, "the cause [BadRequest]"),
    ({"error": {"message": "the cause", "type": "t", "code": "a_code"}}, "the cause [a_code]"),
    ({"error": "the cause"}, "the cause"),
    ({"message": "the cause"}, "the cause"),
    ({"detail": "the cause"}, "the cause"),
    ({"detail": [{"loc": ["body"], "msg": "the cause"}]}, "[{'loc': ['body'], 'msg': 'the cause'}]"),
    ({"object": "error", "message": "the cause", "type": "BadRequest", "code": 400}, "the cause [BadRequest]"),
    ("the cause", "the cause"),
    (b"the cause", "the cause"),
    (b"<html><h1>the</h1>\n<p>cause</html>", "the cause"),
    (b"", "no message"),
    (b"\xff the cause", "\ufffd the cause"),
])
def test_the_message_of_every_error_shape_is_shown(server, body, message):
    server.script(Answer(body, 400))
    assert f"/chat/completions: {message}" in str(failure(server))


@pytest.mark.parametrize("status, body", [
    (401, {"error": {"message": f"Incorrect API key provided: {KEY}."}}),
    (500, {"detail": f"header was 'Bearer {KEY}'"}),
    (403, f"<p>{KEY}</p>".encode()),
    (400, f"no key {KEY} here".encode()),
    (401, {"error": {"message": "no", "code": KEY}}),
    (401, {"error": {"message": "no", "type": KEY}}),
    (401, {"error": {"message": "x" * 590 + KEY}}),
    (401, {"error": {"message": f"{KEY} " * 200}}),
    (200, f"no key {KEY} here".encode()),
    (200, f"<p>no key {KEY} here".encode()),
    (200, {"choices": [], "debug": {"Authorization": f"Bearer {KEY}"}}),
])
def test_a_key_that_the_server_echoes_is_hidden(server, status, body):
    server.script(Answer(body, status))
    message = str(failure(server))
    assert "***" in message and KEY not in message


def test_a_key_with_a_line_break_inside_is_refused_and_hidden(server):
    server.script(said())
    message = str(failure(server, key="sk-first\nsk-second"))
    assert "line breaks" in message and "first" not in message and "second" not in message
    assert not server.requests


def test_a_key_beyond_ascii_is_refused_and_hidden(server):
    message = str(failure(server, key="sk-schlüssel-€"))
    assert "outside ASCII" in message and "schl" not in message
    assert not server.requests


def test_a_password_in_the_address_is_hidden(server):
    address = server.url.replace("//", "//user:password@")
    server.script(refused("no"))
    for url in (address, dead_address().replace("//", "//user:password@")):
        with pytest.raises(ServiceError) as raised:
            OpenAICompatible("chat-1", base_url=url).chat(USER, tries=1)
        assert "//127.0.0.1:" in str(raised.value) and "password" not in str(raised.value)


@pytest.mark.parametrize("address", [
    "localhost:8000/v1", "127.0.0.1:8000", "/v1", "ftp://localhost/v1", "http://", "https//x/v1", "http:///v1",
    "http://localhost:port/v1", "http://localhost:99999/v1", "http://.x/v1"])
def test_an_address_that_is_none_fails_at_once(pauses, address):
    with pytest.raises(ServiceError, match="cannot be requested: .*is the base URL right"):
        OpenAICompatible("chat-1", base_url=address).chat(USER)
    assert not pauses


@pytest.mark.parametrize("error", [
    {"message": "Your messages are too long", "type": "invalid_request_error", "param": "messages",
     "code": "context_length_exceeded"},
    {"message": "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens."},
    {"message": "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 300000 tokens."},
    {"message": "request (9000 tokens) is too large", "type": "exceed_context_size_error", "code": 400},
    {"message": "request (9000 tokens) exceeds the available context size (4096 tokens), try increasing it"},
    "the input length exceeds the context length",
    {"message": "Input is too long for requested model."},
    {"message": "prompt is too long: 210000 tokens > 200000 maximum"},
])
@pytest.mark.parametrize("status", [400, 413])
def test_a_conversation_over_the_context_is_an_overflow(server, status, error):
    server.script(Answer({"error": error}, status))
    assert isinstance(failure(server), ContextOverflow)
    assert len(server.requests) == 1


def test_another_bad_request_is_no_overflow(server):
    server.script(Answer({"error": {"message": "messages: text content blocks must be non-empty"}}, 400))
    assert not isinstance(failure(server), ContextOverflow)


def test_nothing_listening_is_said_soon():
    start = time.monotonic()
    with pytest.raises(ServiceError, match="nothing listens there.*tried 2 times.*Is the server running") as raised:
        OpenAICompatible("chat-1", base_url=dead_address()).chat(USER, tries=2)
    assert raised.value.status is None and time.monotonic() - start < 2


@pytest.mark.parametrize("answer, words", [
    (Answer(action="reset"), "the connection was reset"), (Answer(action="truncate"), "the answer was cut off"),
])
def test_a_broken_connection_is_said_in_words(server, answer, words):
    server.script(answer)
    message = str(failure(server))
    assert words in message and not re.search(r"Error|Exception|\(\'", message)


def test_a_late_answer_is_said_to_have_timed_out(server):
    server.script(Answer(delay=0.3))
    with pytest.raises(ServiceError, match=": timed out"):
        Http(tries=1).send("POST", server.url, {}, timeout=0.05)


@pytest.mark.parametrize("status, advice", [(401, "OPENAI_API_KEY"), (404, "does the server have the model 'chat-1'")])
def test_an_error_advises(server, status, advice):
    server.script(Answer({"error": "no"}, status))
    assert advice.lower() in str(failure(server)).lower()


# embeddings and models

TOO_LONG = Answer({"error": "the input length exceeds the context length"}, 400)


def test_embeddings_are_asked_for_in_batches_of_64_in_order(server):
    texts = [f"text {i}" for i in range(130)]
    batches = [range(64), range(64, 128), range(128, 130)]
    server.script(*[vectors(*[[i, -i] for i in batch], indices=range(len(batch))) for batch in batches])
    rows = client(server, workers=1).embed(texts)
    assert [r.body for r in server.requests] == [{"model": "embed-1", "input": [texts[i] for i in b]} for b in batches]
    assert rows[:, 0].tolist() == list(range(130))


def test_embeddings_are_asked_for_in_batches_by_size_too(server):
    server.script(vectors([1], [2]), vectors([3]), vectors([4]), vectors([5], [6]))
    embedder = client(server, workers=1)
    embedder.room = 10
    assert embedder.embed(["aaaa", "bbbbbb", "c" * 9, "d" * 20, "e", "f"])[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert [[len(t) for t in r.body["input"]] for r in server.requests] == [[4, 6], [9], [20], [1, 1]]


def test_a_batch_that_is_too_long_is_halved(server):
    server.script(TOO_LONG, vectors([1], [2]), TOO_LONG, vectors([3]), vectors([4], [5]))
    rows = client(server, workers=1).embed([*"abcde"])
    assert ["".join(r.body["input"]) for r in server.requests] == ["abcde", "ab", "cde", "c", "de"]
    assert rows[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_text_that_is_too_long_is_halved_until_it_fits(server):
    server.script(TOO_LONG, TOO_LONG, vectors([1]))
    assert client(server).embed(["x" * 400]).tolist() == [[1]]
    assert [len(r.body["input"][0]) for r in server.requests] == [400, 200, 100]


def test_later_texts_are_cut_at_once_and_that_is_said_once(server, caplog):
    server.script(TOO_LONG, vectors([1]))
    embedder = client(server)
    for length in (400, 500, 600):
        embedder.embed(["x" * length])
    assert [len(r.body["input"][0]) for r in server.requests] == [400, 200, 200, 200]
    assert [r.getMessage() for r in caplog.records] == ["embed-1 takes no text of 400 characters: long ones are cut"]


def test_a_short_text_that_is_still_too_long_is_an_overflow(server):
    server.script(TOO_LONG)
    with pytest.raises(ContextOverflow):
        client(server).embed(["x" * 99])
    assert len(server.requests) == 1


def test_embeddings_are_float32_one_row_a_text(server):
    server.script(vectors([1, 2, 3], [4, 5, 6]))
    rows = client(server).embed(["a", "b"])
    assert (rows.shape, rows.dtype) == ((2, 3), np.float32)


def test_embeddings_out_of_order_are_sorted_by_index(server):
    server.script(vectors([2], [0], [1], indices=[2, 0, 1]))
    assert client(server).embed(["a", "b", "c"]).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("rows", [[], [[1]], [[1], [2], [3]]])
def test_another_number_of_embeddings_than_texts_is_a_service_error(server, rows):
    server.script(vectors(*rows))
    with pytest.raises(ServiceError, match="did not answer as expected|3 embeddings for 2 texts"):
        client(server).embed(["a", "b"])


def test_a_blank_text_is_embedded_as_empty(server):
    server.script(vectors([1], [2]))
    client(server).embed([" \n", "a"])
    assert server.requests[0].body["input"] == ["(empty)", "a"]


def test_embedding_calls_are_counted_apart(server):
    server.script(vectors(*[[1]] * 64, tokens=100), vectors([1], tokens=5))
    embedder = client(server, workers=1)
    embedder.embed(["a"] * 65)
    used = embedder.embed_usage
    assert (used.calls, used.input, used.cached, used.output) == (2, 105, 0, 0) and used.seconds > 0


def test_embeddings_may_come_from_another_server(server):
    server.script(vectors([1]), prefix="/elsewhere/")
    client(server, embed_base_url=server.url + "/elsewhere/").embed(["a"])
    assert server.requests[0].path == "/elsewhere/embeddings"


def test_models_lists_names(server):
    server.script(Answer({"object": "list", "data": [{"id": "a"}, {"object": "model"}, {"id": "b"}]}))
    assert client(server).models() == ["a", "b"]
    assert (server.requests[0].method, server.requests[0].path) == ("GET", "/v1/models")
