"""The two clients against a server that misbehaves; the faults of the field: tests/tables/."""

import html
import json
import os
import re
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from persona_agent import Bedrock, OpenAICompatible, ServiceError, Usage, parse_reply, sigv4
from tests.faults import Answer, Faults, dead_address

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "sigv4_vectors.json").read_text(encoding="utf-8"))
ACCESS, SECRET = VECTORS["access_key"], VECTORS["secret_key"]
KEY = "sk/a+b=c&example"
URLS = "OPENAI_BASE_URL", "AWS_ENDPOINT_URL_BEDROCK_RUNTIME"
KEYS = "OPENAI_API_KEY", "AWS_BEARER_TOKEN_BEDROCK"
QUESTION = (  # with all that the tables' servers quote
    "Which tag does this movie relate to? A man who cannot stop the system before the temperature "
    "falls; no help is allowed, and flight is not supported. stop is not supported. He shouts "
    "'stop' at the temperature of the system. What does max_tokens do where it is not supported? "
    "Inappropriate content, a context window, a rate limit. \ud83d\ude00 \ud83d"
)
USER = [{"role": "user", "content": QUESTION}]
ASKED = [{"role": "system", "content": "be brief"}, *USER]
ARRIVED = QUESTION.replace("\ud83d\ude00 \ud83d", "😀 \ufffd")  # no lone surrogate
STOP = ["\nObservation"]
MODEL = "arn:x/chat:0"
connect = {"openai": partial(OpenAICompatible, MODEL, "embed:0")}
connect["bedrock"] = partial(Bedrock, MODEL, "embed:0")
WIRE = {"openai": {}, "bedrock": {"max_tokens": "maxTokens", "stop": "stopSequences"}}
OUTPUT = {"message": {"role": "assistant", "content": [{"text": "hello"}]}}
USED = {"inputTokens": 1, "outputTokens": 1}
SAID = {"openai": Answer({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})}
SAID["bedrock"] = Answer({"output": OUTPUT, "stopReason": "end_turn", "usage": USED})
NO_STOP = {"error": "Unsupported parameter: 'stop' is not supported."}
TOO_LONG = Answer({"error": "the input length exceeds the context length"}, 400)
NO_URLS = "http://u:example@h http://h/v1?key=example http://h#example h:80/v1 ftp://h/v1 "
NO_URLS += "http://localhost:port/v1 http://[::1/v1"
NO_HOSTS = "http://localhost:99999/v1 http://a..b/v1"
SPELT = [KEY, "x" * 590 + KEY, quote(KEY, safe=""), quote(quote(KEY, safe=""), safe="").lower()]
SPELT += [html.escape(KEY).replace("/", "&#x2F;"), "".join(f"\\u{ord(c):04x}" for c in KEY)]
SPELT += [KEY.replace("/", r"\/").replace("&", r"\u0026"), KEY.replace("/", r"\\\/")]
REPLIES = {"retried": ("hello", "stop", 2), "overflow": ("", "overflow", 1)}
REPLIES["refused"] = ("", "content_filter", 1)
ODD = [{"data": [{"embedding": row}]} for row in ([], [1e39, 0], ["a"], {"0": 1}, [[1]], 1, "AA==")]
ODD = [{"texts": 1, "outcome": "named", "body": body} for body in ODD]
ODD += [{**ODD[0], "body": TOO_LONG.body, "status": 400}]
ODD += [{"texts": 2, "outcome": "final", "body": "lasting rate limit", "status": 429}]
PEM = """\
-----BEGIN CERTIFICATE-----
MIIBOjCB4aADAgECAgEBMAoGCCqGSM49BAMCMAwxCjAIBgNVBAMMAXQwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAw
MDBaMAwxCjAIBgNVBAMMAXQwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATxTUIo8tVbPt9jD/a78x1phLd8Om6bBxCaf6n7
XkT4k8/2+Dy5rys2p2QtuosrZY2CLuwhMo7ZAQU6ei8c/dkMozIwMDAPBgNVHREECDAGhwR/AAABMB0GA1UdDgQWBBTiN/tp
TDMNiIzPGSCipnrU/HAwFzAKBggqhkjOPQQDAgNIADBFAiEAzhOHAeDzZHvpYHdXWEr8wovYTzUvqG6ImF0gcF0CZbMCICta
1ccziN39PFYU0UUq1iNKq7fbjwAazDIcYfTpOXnV
-----END CERTIFICATE-----
-----BEGIN EC PRIVATE KEY-----
MDECAQEEIMBXq802VQck6OypfgX7f8PjhgKS6D5JKlNn+ueYcptCoAoGCCqGSM49AwEH
-----END EC PRIVATE KEY-----"""


def answer(case):
    body = case["body"].encode() if isinstance(case["body"], str) else case["body"]
    return Answer(body, **{k: case[k] for k in ("status", "headers", "action") if k in case})


def table(file, *outcomes, more=()):
    """Run a test once for each row of a table whose outcome begins with one of these."""
    found = json.loads((HERE / "tables" / f"{file}.json").read_text(encoding="utf-8"))
    cases = [row for row in found if row.get("outcome", "").startswith(outcomes or "")]
    cases += [{"name": str(row["body"])[:60], "client": "openai", **row} for row in more]
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


@pytest.fixture(params=connect)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def server(monkeypatch):
    """A server in place of both services; pauses are noted, not waited for; no settings of ours."""
    with Faults() as faults:
        faults.pauses = []
        monkeypatch.setattr("persona_agent.time.sleep", faults.pauses.append)
        monkeypatch.setattr("persona_agent.random.uniform", lambda low, high: 0)
        ours = {"AWS_REGION": "a", "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
        ours |= {**dict.fromkeys(URLS, f"{faults.url}/v1/"), **dict.fromkeys(KEYS, f" {KEY}\n")}
        monkeypatch.setattr("os.environ", ours)
        yield faults


def vectors(*rows):
    return Answer({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]})


def failure(call, *arguments):
    with pytest.raises(ServiceError) as raised:
        call(*arguments)
    assert raised.value.fatal == (raised.value.status in (401, 403, None))
    return raised.value


@pytest.mark.parametrize("stop, tokens", [(STOP, 7), ([], None), (None, None)])
def test_a_chat_as_sent(server, name, stop, tokens):
    server.script(SAID[name])
    connect[name](**{"temperature": 0.3} if stop else {}).chat(ASKED, stop, tokens)
    values = {"temperature": 0.3 if stop else 0.1, "max_tokens": tokens or 1024, "stop": stop}
    options = {WIRE[name].get(option, option): value for option, value in values.items() if value}
    turns = [{"role": "user", "content": ARRIVED if name == "openai" else [{"text": ARRIVED}]}]
    path, body = "chat/completions", {"messages": [ASKED[0], *turns], "model": MODEL, **options}
    if name == "bedrock":
        path = "model/arn%3Ax%2Fchat%3A0/converse"
        body = {"system": [{"text": "be brief"}], "messages": turns, "inferenceConfig": options}
    sent = server.requests[0]
    assert (sent.method, sent.path, sent.body) == ("POST", f"/v1/{path}", body)


@pytest.mark.parametrize("name, key", [("openai", KEY), ("bedrock", KEY), ("openai", "")])
def test_the_key_alone_is_sent_whatever_netrc_and_proxies_say(server, tmp_path, name, key):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    os.environ |= {"NETRC": str(tmp_path / "netrc"), "HTTP_PROXY": dead_address()}
    os.environ |= {"ALL_PROXY": dead_address(), "OPENAI_API_KEY": f" {key}\n"}
    server.script(SAID[name])
    connect[name]().chat(USER)
    assert server.requests[0].headers["Authorization"] == (f"Bearer {key}" if key else None)


def test_workers_bound_the_requests_in_flight_and_waiting_for_a_slot_is_no_fault(server, name):
    server.script(Answer(SAID[name].body, delay=0.06))
    llm = connect[name](workers=2)
    llm.tries, llm.deadline = 1, 0.2
    with ThreadPoolExecutor(8) as pool:
        seconds = [reply.usage.seconds for reply in pool.map(llm.chat, [USER] * 8)]
    assert (len(server.requests), server.most, max(seconds) > 0.2) == (8, 2, True)


def test_a_clock_that_jumps_changes_no_duration(server, monkeypatch):
    server.script(Answer(status=503), SAID["openai"])
    monkeypatch.setattr("time.time", iter(range(1000, 0, -1)).__next__)
    assert 0 < connect["openai"]().chat(USER).usage.seconds < 1


def test_a_pause_leaves_its_slot_to_others(server, monkeypatch):
    llm, other = connect["openai"](workers=1), ThreadPoolExecutor(1)
    server.script(Answer(status=503), SAID["openai"])
    during = []
    monkeypatch.setattr("persona_agent.time.sleep", lambda pause: during.append(ask()))

    def ask():
        return other.submit(llm.chat, USER).result(timeout=5).text

    assert llm.chat(USER).text == "hello" and during == ["hello"]


@pytest.mark.parametrize("v", VECTORS["vectors"], ids=lambda v: v["name"])
def test_a_signature_is_that_of_aws_own_client(v):
    keys = v["region"], ACCESS, SECRET, v["session_token"] or "", VECTORS["amz_date"]
    assert sigv4(v["url"], v["body"].encode(), *keys)["Authorization"] == v["authorization"]


@pytest.mark.parametrize("token", ["", "token/+="])
def test_each_try_is_signed_anew_over_what_arrives(server, monkeypatch, token):
    dates = ["20150830T123600Z", "20150830T123601Z", "20150831T000000Z"]
    monkeypatch.setattr("persona_agent.time.strftime", lambda *now: dates[len(server.requests)])
    os.environ |= {"AWS_BEARER_TOKEN_BEDROCK": "", "AWS_SESSION_TOKEN": token}
    server.script(Answer(status=503), Answer(action="reset"), SAID["bedrock"])
    connect["bedrock"]().chat([{"role": "user", "content": "é 世界 \ud83d"}])
    for sent, date in zip(server.requests, dates, strict=True):
        url = f"http://{sent.headers['Host']}{sent.path}"
        signed = sigv4(url, sent.raw, "a", ACCESS, SECRET, token, date)
        assert signed.items() <= dict(sent.headers).items()
        assert SECRET not in f"{sent.path} {sent.headers} {sent.raw}"


@pytest.mark.parametrize("given, first, used", [("a", "b", "a"), (None, "b", "b"), (None, "", "c")])
def test_the_region_is_the_argument_or_of_the_environment(given, first, used):
    os.environ |= {"AWS_REGION": first, "AWS_DEFAULT_REGION": "c", URLS[1]: ""}
    del os.environ["AWS_ACCESS_KEY_ID"]  # a bearer key is enough
    assert f"//bedrock-runtime.{used}.amazonaws.com" in connect["bedrock"](region=given).base_url


@pytest.mark.parametrize("lacking", ["REGION", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"])
def test_a_missing_region_or_key_names_the_variables(lacking):
    os.environ |= {"AWS_BEARER_TOKEN_BEDROCK": "", f"AWS_{lacking}": " "}
    assert f"AWS_{lacking}" in str(failure(connect["bedrock"]))


@table("contents")
def test_what_a_reply_says(server, case):
    server.script(answer(case))
    reply = connect[case["client"]]().chat(ASKED)
    read = {"text": reply.text, "finish": reply.finish, **parse_reply(reply.text)._asdict()}
    assert {key: read[key] for key in read if key in case}.items() <= case.items()


@pytest.mark.parametrize(
    "name, usage, tokens",
    [
        ("openai", {"prompt_tokens": None}, (0, 0)),
        ("openai", {"prompt_tokens": 11, "completion_tokens": 3}, (11, 3)),
        ("bedrock", {**USED, "cacheReadInputTokens": 4, "cacheWriteInputTokens": 3}, (8, 1)),
    ],
)
def test_usage_is_counted_and_adds_up(server, name, usage, tokens):
    server.script(Answer({**SAID[name].body, "usage": usage}))
    used = Usage(2, 0, 0, seconds=5)
    used += connect[name]().chat(USER).usage
    assert (used.calls, used.input, used.output, int(used.seconds)) == (3, *tokens, 5)


@table("faults", "final", more=[{"status": 400, "body": {"message": f"Bad text: '{ARRIVED}'"}}])
def test_a_lasting_fault_is_told_at_once(server, case):
    server.script(answer(case), SAID[case["client"]])
    error = failure(connect[case["client"]]().chat, ASKED, STOP)
    assert (error.status, len(server.requests), server.pauses) == (case["status"], 1, [])
    shown = [words for words in ("the cause", "/v1/elsewhere") if words in str(case)]
    assert all(words in str(error) for words in [f"HTTP {case['status']}", *shown])


@table("faults", *REPLIES, more=[{"body": "[" * 100_000}, {"body": "9" * 5000}])
def test_another_fault_is_tried_again_when_it_asks_or_is_an_empty_reply(server, case):
    server.script(answer(case), SAID[case["client"]])
    reply = connect[case["client"]]().chat(ASKED, STOP)
    outcome = case.get("outcome", "retried")
    assert (reply.text, reply.finish, len(server.requests)) == REPLIES[outcome]
    asked = case.get("headers", {}).get("Retry-After", "")
    wait = float(asked) if re.fullmatch(r"[\d.]+", asked) else 0
    assert server.pauses == ([wait] if outcome == "retried" else [])


@table("faults", "learned")
def test_a_refused_option_costs_one_request_and_is_remembered(server, caplog, case):
    server.script(answer(case), SAID[case["client"]])
    llm = connect[case["client"]]()
    assert [llm.chat(ASKED, STOP).text for _ in range(2)] == ["hello", "hello"]
    sent, *later = [{**r.body.pop("inferenceConfig", {}), **r.body} for r in server.requests]
    option = WIRE[case["client"]].get(case["outcome"][8:], case["outcome"][8:])
    sent |= {"max_completion_tokens": sent["max_tokens"]} if option == "max_tokens" else {}
    sent.pop(option, None)
    if option == "system":
        merged = json.dumps(sent["messages"][-1:]).replace("Which", r"be brief\n\nWhich")
        sent["messages"] = json.loads(merged)
    assert later == [sent] * 2
    assert len(caplog.records) == 1 and f"'{option}'" in caplog.text


def test_what_is_refused_to_several_threads_at_once_is_learned_once_each(server, caplog, name):
    then = [SAID[name]] * 3 + [Answer("`temperature` is deprecated", 400), SAID[name]]
    server.script(*[Answer(NO_STOP, 400, delay=0.05)] * 3, *then)
    llm = connect[name]()
    with ThreadPoolExecutor(3) as pool:
        texts = [reply.text for reply in pool.map(llm.chat, [USER] * 3, [STOP] * 3)]
    assert [*texts, llm.chat(USER, STOP).text] == ["hello"] * 4
    assert (len(server.requests), len(caplog.records)) == (8, 2)


@pytest.mark.parametrize("deadline, seconds", [(900, [1, 2, 4, 8, 16, 30, 30]), (5, [1, 2, 4])])
def test_pauses_double_to_half_a_minute(server, monkeypatch, deadline, seconds):
    monkeypatch.setattr("persona_agent.random.uniform", lambda low, high: high)
    server.script(Answer(status=500))
    monkeypatch.setattr("persona_agent.Client.deadline", deadline)
    assert failure(connect["openai"]().chat, USER).status == 500 and server.pauses == seconds


@pytest.mark.parametrize("head, delay", [({}, 0), ({"Transfer-Encoding": "chunked"}, 0), ({}, 3)])
def test_an_answer_that_does_not_end_is_given_up_at_the_deadline(server, head, delay):
    server.script(Answer(b"1\r\n \r\n" * 500, 200, head, delay, "drip", 0.01))
    llm, start = connect["openai"](), time.monotonic()
    llm.deadline = 0.15
    assert "timed out" in str(failure(llm.chat, USER))
    assert 0.1 < time.monotonic() - start < 1 and len(server.requests) == 1


@pytest.mark.parametrize(
    "cause, words",
    [
        (Answer("who", 401), r"HTTP 401 .*who.*\(1 tries\).*OPENAI_API_KEY"),
        (Answer(NO_STOP, 400), "'stop' is not supported"),
        (Answer("what", 404), "Does the server have this model"),
        (Answer("all shards are down", 503), r"all shards are down.*\(2 tries\)"),
        (Answer(b"Welcome"), "did not answer as expected: .*Welcome"),
        (Answer("later", 429, {"Retry-After": "121"}), "it asks to wait 121 s"),
        (Answer(action="reset"), r"the connection was reset \(2 tries\).*Is the server running"),
        (Answer(action="close"), "closed without an answer"),
        (Answer(action="truncate"), "the answer was cut off"),
        *[(f"URL {url}", "URL.*look like http://.*, without") for url in NO_URLS.split()],
        *[(f"URL {url}", "is the base URL right") for url in NO_HOSTS.split()],
        ("URL http://127.0.0.1:1", "nothing listens there.*Is the server running"),
        ("KEY sk-example\nsecond", "the key holds characters"),
        ("KEY sk-example-€", "the key holds characters"),
        ("HTTPS_PROXY http:/host:1", "proxy.*HTTPS_PROXY"),
        ("HTTPS_PROXY http://u:example@127.0.0.1:9", "proxy.*HTTPS_PROXY"),
        ("ALL_PROXY socks5://u:example@127.0.0.1:9", r"requests\[socks\]"),
        ("REQUESTS_CA_BUNDLE /no/file", "REQUESTS_CA_BUNDLE.*names no file"),
    ],
    ids=str,
)
def test_a_failure_says_what_to_do_in_words_and_no_secret(server, monkeypatch, name, cause, words):
    if isinstance(cause, Answer):
        server.script(cause)
    else:
        variable, value = cause.split(" ", 1)
        os.environ |= {} if len(variable) == 3 else dict.fromkeys(URLS, "https://host.invalid")
        os.environ |= dict.fromkeys({"URL": URLS, "KEY": KEYS}.get(variable, [variable]), value)
    monkeypatch.setattr("persona_agent.Client.tries", 2)
    message = str(failure(lambda: connect[name]().chat(USER)))
    assert re.search(words, message) and not re.search(r"example|Connection\w*Error|\('", message)


def test_a_self_signed_certificate_is_told_with_the_variable_that_helps(server, tmp_path):
    (tmp_path / "pem").write_text(PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    server.script(SAID["openai"])
    os.environ["OPENAI_BASE_URL"] = server.url.replace("http", "https")
    assert "is not trusted; REQUESTS_CA_BUNDLE" in str(failure(connect["openai"]().chat, USER))
    os.environ["REQUESTS_CA_BUNDLE"] = str(tmp_path / "pem")
    assert connect["openai"]().chat(USER).text == "hello"


@pytest.mark.parametrize("key", SPELT)
def test_a_secret_that_the_server_echoes_is_hidden(server, name, key):
    os.environ |= {"AWS_BEARER_TOKEN_BEDROCK": "", "AWS_SESSION_TOKEN": KEY}
    for fault in (
        Answer({"error": {"message": f"no {key}.", "code": key}}, 401),
        Answer(f"<p>{key}</p>".encode(), 500),
        Answer({"choices": [], "debug": [f"Bearer {key}"]}),
        Answer(b"", 302, {"Location": f"//user:example@host?key={key}"}),
    ):
        server.script(fault)
        message = str(failure(connect[name]().chat, USER))
        assert "***" in message or key.startswith("xxx")
        assert not re.search(r"sk.{0,5}a|example|e.x.a.m|u0061", message)


@table("embeddings", "rows", "halved", "retried", "cut")
def test_a_batch_is_read_tried_again_or_halved_and_a_text_cut(server, case):
    twice = case["outcome"] == "halved" and case["status"] in (200, 500)
    one, two, four = (vectors(*[[1, 0], [0, 1]][:n] * (n // 2 or 1)) for n in (1, 2, 4))
    later = {"rows": [], "halved": [two, two], "retried": [four], "cut": [one]}[case["outcome"]]
    server.script(*[answer(case)] * (2 if twice else 1), *later)
    rows = connect["openai"](workers=1).embed(["x" * 400] * case["texts"]).tolist()
    expected = sorted(rows) if case["name"] == "out of order" else [[1, 0], [0, 1]] * 2
    assert rows == expected[: case["texts"]]
    assert len(server.requests) == len(later) + (2 if twice else 1)


@table("embeddings", "final", "named", more=ODD)
def test_a_failing_text_is_named_and_a_failing_service_not_asked_again(server, case):
    server.script(answer(case))
    error = failure(connect["openai"]().embed, [QUESTION[:80]] * case["texts"])
    assert (f"the text {QUESTION[:80]!r} cannot" in str(error)) == (case["outcome"] == "named")
    assert {len(r.body["input"]) for r in server.requests} == {case["texts"]}  # not halved


def test_a_row_of_another_length_is_asked_for_once_more_then_its_text_is_named(server, name):
    bodies = [{"embedding": row, "data": [{"embedding": row}]} for row in ([1, 2], [1])]
    server.script(*map(Answer, bodies * 2))
    llm = connect[name]()
    assert llm.embed(["a"]).tolist() == llm.embed(["b"]).tolist() == [[1, 2]]
    assert "the text 'c' cannot" in str(failure(llm.embed, ["c"])) and len(server.requests) == 5


def test_later_texts_are_cut_at_once_and_that_is_said_once(server, caplog):
    server.script(TOO_LONG, vectors([1]))
    llm = connect["openai"]()
    for length in (400, 500, 600):
        llm.embed(["x" * length])
    assert [len(r.body["input"][0]) for r in server.requests] == [400, 200, 200, 200]
    assert len(caplog.records) == 1 and "no text of 400 characters: cut" in caplog.text


def test_texts_go_in_batches_of_64_in_order_blank_ones_as_empty_and_long_ones_cut(server):
    texts = [" \n", "x" * 60_000, *map(str, range(2, 130))]
    batches = [range(64), range(64, 128), range(128, 130)]
    server.script(*[vectors(*[[i, 0] for i in b]) for b in batches], prefix="/elsewhere/embeddings")
    llm = connect["openai"](workers=1, embed_base_url=f"{server.url}/elsewhere/")
    assert llm.embed(texts)[:, 0].tolist() == [*range(130)] and len(llm.embed([])) == 0
    texts[:2] = ["(empty)", "x" * 30_000]
    bodies = [{"model": "embed:0", "input": [texts[i] for i in b]} for b in batches]
    assert [r.body for r in server.requests] == bodies


def test_titan_takes_one_text_a_request(server):
    server.script(Answer({"embedding": [1, 0]}), Answer({"embeddingsByType": {"float": [0, 1]}}))
    rows = connect["bedrock"]().embed(["a", "x" * 60_000])
    assert (rows.tolist(), rows.dtype) == ([[1, 0], [0, 1]], "float32")
    assert [r.body for r in server.requests] == [{"inputText": "a"}, {"inputText": "x" * 50_000}]
    assert {r.path for r in server.requests} == {"/v1/model/embed%3A0/invoke"}


def test_a_long_wait_for_a_slot_before_another_try_is_no_fault(server, monkeypatch):
    llm, other = connect["openai"](workers=1), ThreadPoolExecutor(1)
    llm.deadline, held = 0.2, Answer(SAID["openai"].body, delay=0.4)
    server.script(Answer(status=503), held, SAID["openai"])
    monkeypatch.setattr("persona_agent.time.sleep", lambda pause: wait_for(other))

    def wait_for(other):
        busy = other.submit(connect["openai"](workers=1).chat, USER)
        llm._slots.acquire()
        busy.add_done_callback(lambda done: llm._slots.release())

    assert llm.chat(USER).text == "hello"
