"""Bedrock over a scripted server: signatures, Converse, Titan and Cohere embeddings, its errors and its limits."""
import json
from pathlib import Path

import numpy as np
import pytest

from persona_agent import Bedrock, react
from tests import standin
from tests.faults import Answer, Faults
from tools import ContextOverflow, ServiceError, Tool, sigv4

VECTORS = json.loads((Path(__file__).parent / "sigv4_vectors.json").read_text(encoding="utf-8"))
ACCESS, SECRET = VECTORS["access_key"], VECTORS["secret_key"]
TOKEN = next(v["session_token"] for v in VECTORS["vectors"] if v["session_token"])
BEARER = "bedrock-api-key-0123456789"
CLAUDE = "us.anthropic.claude-3-5-sonnet-20241022-v2:0"
TITAN, COHERE_3, COHERE_4 = "amazon.titan-embed-text-v2:0", "cohere.embed-english-v3", "us.cohere.embed-v4:0"
USER = [{"role": "user", "content": "hello"}]
VARIABLES = ("BEARER_TOKEN_BEDROCK", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "REGION", "DEFAULT_REGION",
             "ENDPOINT_URL_BEDROCK_RUNTIME")


@pytest.fixture
def aws(monkeypatch):
    """A function that sets AWS_* variables; none is set before."""
    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"AWS_{name}", value)

    for name in VARIABLES:
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    return put


@pytest.fixture
def server(aws, monkeypatch):
    """A server in place of the service, used with a bearer key and without back-off."""
    monkeypatch.setattr("tools.random.uniform", lambda low, high: 0)
    with Faults() as faults:
        aws(BEARER_TOKEN_BEDROCK=BEARER, REGION="us-east-1", ENDPOINT_URL_BEDROCK_RUNTIME=faults.url)
        faults.script(converse({"text": "hello"}))
        yield faults


@pytest.fixture
def signing(server, aws):
    """That server, used with AWS's example keys."""
    aws(BEARER_TOKEN_BEDROCK="", ACCESS_KEY_ID=ACCESS, SECRET_ACCESS_KEY=SECRET)
    return server


def converse(*content, stop="end_turn", **usage):
    return Answer({"output": {"message": {"role": "assistant", "content": list(content)}}, "stopReason": stop,
                   "usage": {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2, **usage}})


def thinking(text):
    return {"reasoningContent": {"reasoningText": {"text": text, "signature": "s"}}}


def refusal(message, status=400, code="ValidationException"):
    return Answer({"message": message}, status, {"x-amzn-ErrorType": f"{code}:http://internal.amazon.com/coral/"})


def failure(tries=2):
    """The error of a chat that fails."""
    with pytest.raises(ServiceError) as raised:
        Bedrock(CLAUDE).chat(USER, tries=tries)
    return raised.value


def sent(server, messages=USER, **options):
    """The body of a chat of these messages."""
    Bedrock(CLAUDE).chat(messages, **options)
    return server.requests[0].body


# signatures and keys

@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: v["name"])
def test_signature_is_that_of_aws_own_client(vector):
    headers, token = {"Content-Type": "application/json"}, vector["session_token"]
    signed = sigv4("POST", vector["url"], headers, vector["body"].encode(), vector["region"], ACCESS, SECRET, token,
                   now=VECTORS["amz_date"])
    assert signed == {**headers, "X-Amz-Date": VECTORS["amz_date"], "Authorization": vector["authorization"],
                      **({"X-Amz-Security-Token": token} if token else {})}


@pytest.mark.parametrize("secret, right", [(SECRET, True), ("another", False)])
def test_request_is_signed_over_the_bytes_and_the_path_that_arrive(signing, aws, secret, right):
    aws(SECRET_ACCESS_KEY=secret)
    Bedrock(CLAUDE).chat([{"role": "user", "content": "é 世界 \ud83d"}])
    request = signing.requests[0]
    assert request.headers["Authorization"].startswith(f"AWS4-HMAC-SHA256 Credential={ACCESS}/")
    assert standin.Handler.signed(request) == right


def test_session_token_is_sent_and_signed(signing, aws):
    aws(SESSION_TOKEN=TOKEN)
    Bedrock(CLAUDE).chat(USER)
    request = signing.requests[0]
    assert request.headers["X-Amz-Security-Token"] == TOKEN
    assert "SignedHeaders=content-type;host;x-amz-date;x-amz-security-token," in request.headers["Authorization"]
    assert standin.Handler.signed(request)


def test_each_try_is_signed_anew(signing, monkeypatch):
    dates = ["20150830T123600Z", "20150830T123601Z", "20150831T000000Z"]
    monkeypatch.setattr("tools.time.strftime", lambda *now, left=iter(dates): next(left))
    signing.script(Answer(status=503), Answer(action="reset"), converse({"text": "hello"}))
    Bedrock(CLAUDE).chat(USER)
    assert [r.headers["X-Amz-Date"] for r in signing.requests] == dates
    assert all(standin.Handler.signed(r) for r in signing.requests)


def test_bearer_key_goes_before_the_access_key(server, aws):
    aws(ACCESS_KEY_ID=ACCESS, SECRET_ACCESS_KEY=SECRET, SESSION_TOKEN=TOKEN, BEARER_TOKEN_BEDROCK=f" {BEARER}\n")
    Bedrock(CLAUDE).chat(USER)
    headers = server.requests[0].headers
    assert headers["Authorization"] == f"Bearer {BEARER}"
    assert not {"X-Amz-Date", "X-Amz-Security-Token"} & set(headers)


@pytest.mark.parametrize("region, variables, expected", [
    ("eu-west-1", {"REGION": "us-west-2", "DEFAULT_REGION": "us-east-1"}, "eu-west-1"),
    (None, {"REGION": "us-west-2", "DEFAULT_REGION": "us-east-1"}, "us-west-2"),
    (None, {"DEFAULT_REGION": "us-east-1"}, "us-east-1")])
def test_region_of_the_argument_then_of_the_environment(aws, region, variables, expected):
    aws(BEARER_TOKEN_BEDROCK=BEARER, **variables)
    assert Bedrock(CLAUDE, region=region).base_url == f"https://bedrock-runtime.{expected}.amazonaws.com"


def test_region_stands_in_the_signature(signing):
    Bedrock(CLAUDE, region="eu-west-1").chat(USER)
    assert "/eu-west-1/bedrock/aws4_request," in signing.requests[0].headers["Authorization"]


def test_endpoint_may_lie_below_a_path(signing, aws):
    aws(ENDPOINT_URL_BEDROCK_RUNTIME=signing.url + "/gateway/")
    Bedrock("m").chat(USER)
    assert signing.requests[0].path == "/gateway/model/m/converse" and standin.Handler.signed(signing.requests[0])


@pytest.mark.parametrize("variables", [
    {}, {"REGION": "us-east-1"}, {"BEARER_TOKEN_BEDROCK": BEARER}, {"REGION": " ", "BEARER_TOKEN_BEDROCK": BEARER},
    {"REGION": "us-east-1", "ACCESS_KEY_ID": ACCESS}, {"REGION": "us-east-1", "SECRET_ACCESS_KEY": SECRET}])
def test_missing_region_or_key_names_the_variables(aws, variables):
    aws(**variables)
    with pytest.raises(ServiceError) as raised:
        Bedrock(CLAUDE)
    for name in ("AWS_REGION", "AWS_BEARER_TOKEN_BEDROCK", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert name in str(raised.value)


# Converse: what is sent

@pytest.mark.parametrize("model, segment", [
    (CLAUDE, "us.anthropic.claude-3-5-sonnet-20241022-v2%3A0"),
    ("arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.x-v2:0",
     "arn%3Aaws%3Abedrock%3Aus-east-1%3A123456789012%3Ainference-profile%2Fus.x-v2%3A0")])
def test_model_id_is_one_encoded_segment_of_the_path(server, model, segment):
    Bedrock(model).chat(USER)
    assert (server.requests[0].method, server.requests[0].path) == ("POST", f"/model/{segment}/converse")


def test_body_holds_system_messages_and_inference_config(server):
    messages = [{"role": "system", "content": "be brief"}, *USER]
    Bedrock(CLAUDE, temperature=0.3).chat(messages, stop=["\nObservation", " "], max_tokens=7)
    assert server.requests[0].headers["Content-Type"] == "application/json"
    assert server.requests[0].body == {
        "system": [{"text": "be brief"}], "messages": [{"role": "user", "content": [{"text": "hello"}]}],
        "inferenceConfig": {"temperature": 0.3, "maxTokens": 7, "stopSequences": ["\nObservation"]}}


@pytest.mark.parametrize("messages", [USER, [{"role": "system", "content": " \n"}, *USER]])
def test_system_is_absent_where_there_is_none(server, messages):
    assert set(sent(server, messages)) == {"messages", "inferenceConfig"}


@pytest.mark.parametrize("stop", [None, [], [" \n"]])
def test_stop_sequences_are_absent_where_there_are_none(server, stop):
    assert set(sent(server, stop=stop)["inferenceConfig"]) == {"temperature", "maxTokens"}


def test_blank_turns_are_left_out_and_neighbours_of_one_role_merged(server):
    turns = [("user", "a"), ("user", "b"), ("assistant", "c"), ("user", ""), ("assistant", "d"), ("user", "e"),
             ("assistant", "\n"), ("user", "f")]
    merged = [("user", ["a", "b"]), ("assistant", ["c", "d"]), ("user", ["e", "f"])]
    assert sent(server, [{"role": role, "content": text} for role, text in turns])["messages"] == [
        {"role": role, "content": [{"text": text} for text in texts]} for role, texts in merged]


def test_reasoning_is_never_sent_back(server):
    server.script(converse(thinking("SECRET"), {"text": "Action: Echo\nAction Input: x"}),
                  converse({"text": "Final Answer: y"}))
    assert react(Bedrock(CLAUDE), "", "q", [Tool("Echo", "", str)]).text == "y"
    assert [m["role"] for m in server.requests[1].body["messages"]] == ["user", "assistant", "user"]
    assert b"SECRET" not in server.requests[1].raw and b"reasoningContent" not in server.requests[1].raw


# Converse: what is read

@pytest.mark.parametrize("content", [
    [{"text": "hello"}], [{"text": "hel"}, {"text": "lo"}], [thinking("hm"), {"text": "hel"}, {"text": "lo"}],
    [{"text": "hel"}, thinking("hm"), {"text": "lo"}], [{"text": "hello"}, thinking("hm")],
    [{"reasoningContent": {"redactedContent": "x"}}, {"text": "hello"}], [{"text": "<thinking>hm</thinking> hello"}]])
def test_text_blocks_are_joined_wherever_reasoning_stands(server, content):
    server.script(converse(*content))
    assert Bedrock(CLAUDE).chat(USER).text == "hello"


@pytest.mark.parametrize("reason, finish, text", [
    ("end_turn", "stop", "x"), ("stop_sequence", "stop", "x"), ("tool_use", "stop", "x"), ("max_tokens", "length", "x"),
    ("malformed_model_output", "stop", "x"), ("malformed_tool_use", "stop", "x"),
    ("guardrail_intervened", "content_filter", ""), ("content_filtered", "content_filter", "")])
def test_stop_reason_tells_the_finish(server, reason, finish, text):
    server.script(converse({"text": "x"}, stop=reason))
    reply = Bedrock(CLAUDE).chat(USER)
    assert (reply.finish, reply.text, len(server.requests)) == (finish, text, 1)


def test_full_context_window_is_an_overflow(server):
    server.script(converse({"text": "x"}, stop="model_context_window_exceeded"))
    assert isinstance(failure(), ContextOverflow)
    assert len(server.requests) == 1


@pytest.mark.parametrize("output", [{"message": {"role": "assistant", "content": []}}, {"message": None}, {}, None])
def test_answer_without_content_is_an_empty_reply(server, output):
    server.script(Answer({**converse().body, "output": output}))
    reply = Bedrock(CLAUDE).chat(USER)
    assert (reply.text, reply.finish) == ("", "stop")


@pytest.mark.parametrize("usage, counted", [
    ({"inputTokens": 10, "outputTokens": 2}, (1, 10, 0, 2)),
    ({"inputTokens": 10, "outputTokens": 2, "cacheReadInputTokens": 4, "cacheWriteInputTokens": 3}, (1, 17, 4, 2))])
def test_usage_counts_cached_tokens(server, usage, counted):
    server.script(converse({"text": "x"}, **usage))
    used = Bedrock(CLAUDE).chat(USER).usage
    assert (used.calls, used.input, used.cached, used.output) == counted


@pytest.mark.parametrize("body", [{}, [], {"usage": {}, "stopReason": "end_turn"}, {"message": "no"}, {"Output": {}}])
def test_answer_of_another_shape_is_a_service_error(server, body):
    server.script(Answer(body))
    assert "did not answer as expected" in str(failure())


# errors

@pytest.mark.parametrize("headers, body", [
    ({"x-amzn-ErrorType": "ThrottlingException:http://internal.amazon.com/coral/"}, {"message": "slow"}),
    ({"x-amzn-ErrorType": "com.amazon.coral#ThrottlingException"}, {"Message": "slow"}),
    ({"x-amzn-ErrorType": "ThrottlingException"}, {"message": "slow", "code": "Another"}),
    ({}, {"code": "ThrottlingException", "message": "slow"}),
    ({}, {"Code": "ThrottlingException", "Message": "slow"}),
    ({}, {"__type": "com.amazon.coral#ThrottlingException", "message": "slow"})])
def test_code_and_message_of_every_error_shape(server, headers, body):
    server.script(Answer(body, 429, headers))
    error = failure(tries=1)
    assert (error.status, error.code) == (429, "ThrottlingException")
    assert "/converse: slow [ThrottlingException]" in str(error)


def test_request_id_is_told(server):
    server.script(Answer({"message": "no"}, 400, {"x-amzn-RequestId": "1234-abcd"}))
    assert "(request 1234-abcd)" in str(failure())


@pytest.mark.parametrize("status, code, message", [
    (429, "ThrottlingException", "Too many requests, please wait before trying again."),
    (429, "ThrottlingException", "Too many tokens, please wait before trying again."),
    (429, "ModelNotReadyException", "The model is not ready."), (408, "ModelTimeoutException", "The model timed out."),
    (424, "ModelErrorException", "The model failed."), (500, "InternalServerException", "Try again."),
    (503, "ServiceUnavailableException", "Try again.")])
def test_passing_fault_is_tried_again(server, status, code, message):
    server.script(refusal(message, status, code), converse({"text": "at last"}))
    assert Bedrock(CLAUDE).chat(USER, tries=2).text == "at last"


@pytest.mark.parametrize("status, code, message", [
    (400, "ValidationException", "The provided model identifier is invalid."),
    (403, "AccessDeniedException", "You don't have access to the model with the specified model ID."),
    (404, "ResourceNotFoundException", "Model use case details have not been submitted for this account."),
    (400, "ServiceQuotaExceededException", "Your account has no quota."),
    (429, "ThrottlingException", "Too many tokens per day, please wait before trying again.")])
def test_lasting_fault_is_not_tried_again(server, status, code, message):
    server.script(refusal(message, status, code), converse({"text": "never"}))
    error = failure()
    assert (error.status, error.code, len(server.requests)) == (status, code, 1) and message in str(error)


def test_missing_throughput_hints_at_an_inference_profile(server):
    server.script(refusal("Invocation of model ID x with on-demand throughput isn't supported. Retry your request with "
                          "the ID or ARN of an inference profile that contains this model."))
    with pytest.raises(ServiceError, match="Use an inference profile's id or ARN, such as us.anthropic.claude-opus."):
        Bedrock("anthropic.claude-opus").chat(USER)


@pytest.mark.parametrize("echo", ["x-amz-security-token:{}\n\nhost", "X-Amz-Security-Token: {:.60}", "'{}' is expired"])
def test_echoed_session_token_is_hidden(signing, aws, echo):
    aws(SESSION_TOKEN=TOKEN)
    signing.script(refusal("should have been\nhost:h\n" + echo.format(TOKEN), 403, "InvalidSignatureException"))
    message = str(failure())
    assert "should have been" in message and "***" in message and TOKEN[:20] not in message


@pytest.mark.parametrize("echo", ["Bearer {}", "the key '{}' is expired"])
def test_echoed_bearer_key_is_hidden(server, echo):
    server.script(refusal(echo.format(BEARER), 403, "AccessDeniedException"))
    message = str(failure())
    assert "***" in message and BEARER not in message


def test_secret_key_is_never_sent(signing):
    Bedrock(CLAUDE).chat(USER)
    request = signing.requests[0]
    assert ACCESS in request.headers["Authorization"]
    assert SECRET not in f"{request.path} {request.headers} {request.raw}"


@pytest.mark.parametrize("message", [
    "Input is too long for requested model.", "prompt is too long: 210000 tokens > 200000 maximum",
    "The model returned the following errors: too many tokens",
    "Too many input tokens. Max input tokens: 8192, request input token count: 9000 ",
    "Malformed input request: expected maxLength: 2048, actual: 3000, please reformat your input and try again."])
def test_input_over_the_limit_is_an_overflow(server, message):
    server.script(refusal(message))
    assert isinstance(failure(), ContextOverflow)
    assert len(server.requests) == 1


@pytest.mark.parametrize("message", ["Too many tokens, please wait before trying again.",
                                     "Too many tokens per day, please wait before trying again."])
@pytest.mark.parametrize("status", [400, 429, 500])
def test_limit_on_tokens_over_time_is_no_overflow(server, status, message):
    server.script(refusal(message, status, "ThrottlingException"))
    assert not isinstance(failure(tries=1), ContextOverflow)


@pytest.mark.parametrize("message, field", [
    ("`temperature` is deprecated for this model.", "temperature"),
    ("The model returned the following errors: `temperature` is deprecated for this model.", "temperature"),
    ("This model doesn't support the stopSequences field. Remove stopSequences and try again.", "stopSequences")])
def test_refused_field_is_left_out_from_then_on(server, caplog, message, field):
    server.script(refusal(message), converse({"text": "x"}))
    llm = Bedrock(CLAUDE)
    assert [llm.chat(USER, stop=["\nObservation"]).text for _ in range(2)] == ["x", "x"]
    assert [field in r.body["inferenceConfig"] for r in server.requests] == [True, False, False]
    assert len(caplog.records) == 1 and field in caplog.text


# embeddings

def test_titan_takes_one_text_a_call_side_by_side(server):
    server.script(Answer({"embedding": [1, 2], "inputTextTokenCount": 3}, delay=0.03))
    llm = Bedrock(CLAUDE, TITAN, workers=4)
    assert llm.embed(["a", "b", "c", "d"]).tolist() == [[1, 2]] * 4
    assert sorted(r.body["inputText"] for r in server.requests) == ["a", "b", "c", "d"]
    assert {r.path for r in server.requests} == {"/model/amazon.titan-embed-text-v2%3A0/invoke"} and server.most > 1
    assert (llm.embed_usage.calls, llm.embed_usage.input) == (4, 12)


def test_titan_rows_stand_in_the_order_of_the_texts(server, aws):
    running = standin.start()
    aws(ENDPOINT_URL_BEDROCK_RUNTIME=f"http://127.0.0.1:{running.server_port}")
    texts = [f"{word} story" for word in ("winter", "summer", "harbour", "mountain", "soldier", "kitchen")]
    rows = Bedrock(CLAUDE, TITAN).embed(texts)
    running.shutdown()
    assert np.allclose(rows, [standin.embed(text) for text in texts])


def test_titan_answer_by_type_is_read(server):
    server.script(Answer({"embeddingsByType": {"float": [1, 2]}}))
    assert Bedrock(CLAUDE, TITAN).embed(["a"]).tolist() == [[1, 2]]


@pytest.mark.parametrize("model, cut", [
    (COHERE_3, "END"), ("cohere.embed-multilingual-v3", "END"), (COHERE_4, "RIGHT")])
@pytest.mark.parametrize("query, kind", [(False, "search_document"), (True, "search_query")])
def test_cohere_is_told_the_purpose_and_where_to_cut(server, model, cut, query, kind):
    server.script(Answer({"embeddings": [[1], [2]]}))
    Bedrock(CLAUDE, model).embed(["a", "b"], query=query)
    assert server.requests[0].body == {"texts": ["a", "b"], "input_type": kind, "truncate": cut}


@pytest.mark.parametrize("model", [COHERE_3, COHERE_4])
@pytest.mark.parametrize("shape", [lambda rows: rows, lambda rows: {"float": rows}], ids=["list", "by type"])
def test_cohere_takes_96_texts_a_call(server, model, shape):
    server.script(*[Answer({"embeddings": shape([[i] for i in part])}) for part in (range(96), range(96, 100))])
    rows = Bedrock(CLAUDE, model, workers=1).embed([f"text {i}" for i in range(100)])
    assert rows[:, 0].tolist() == list(range(100))
    assert [len(r.body["texts"]) for r in server.requests] == [96, 4]


@pytest.mark.parametrize("model, most", [(COHERE_3, 2048), (TITAN, 50_000)])
def test_text_is_cut_to_what_the_embedding_model_documents(server, model, most):
    server.script(Answer({"embeddings": [[1]], "embedding": [1]}))
    Bedrock(CLAUDE, model).embed(["x" * 60_000])
    body = server.requests[0].body
    assert len(body["texts"][0] if "texts" in body else body["inputText"]) == most
