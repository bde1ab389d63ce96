"""From a question to its answer: the model clients, the ReAct loop (Eq. 4) and PersonaAgent.

A line belongs here if it happens between a question and its answer. A model is anything with
`chat(messages, stop, max_tokens) -> Reply` and `embed(texts) -> array`; a tool anything with
`name`, `description` and a call from text to text. PERSONA asks for two tools; the loop does not
enforce it.
"""

import hmac
import html
import json
import logging
import os
import random
import re
import threading
import time
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import requests

LOG = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------- replies


@dataclass
class Usage:
    """What calls cost: input and output in tokens.

    seconds: until the answers, with back-off and the wait for a free slot. Of the calls, kept came
    from a cache of ours, cut ended at the token limit, lost were refused or too long."""

    calls: int = 0
    input: int = 0
    output: int = 0
    seconds: float = 0.0
    kept: int = 0
    cut: int = 0
    lost: int = 0

    def __iadd__(self, other: "Usage") -> "Usage":
        for name, value in vars(other).items():
            vars(self)[name] += value
        return self


# What is not for the reader: all up to the last end of hidden reasoning, all from an open beginning
# of it or from a made-up next turn on, and special tokens.
HIDDEN = r"""(?xs)
    # </think> </seed:think> [/THINK] ◁/think▷ <|END_THINKING|> <|channel|>final<|message|>
    ^.* (?i: [<\[◁] / (?:\w+:)? (?:think|thinking|thought|reasoning) [ ]? [>\]▷]
        | <\|end_(?:of_)?(?:thought|thinking)\|>
        | <\|channel\|>final [ ]? (?:<\|constrain\|>\w+)? <\|message\|> )
    # <think> <|START_THINKING|> <|channel|>analysis
    | (?i: [<\[◁] (?:\w+:)? (?:think|thinking|thought|reasoning) [ ]? [>\]▷]
        | <\|(?:start|begin)_(?:of_)?(?:thought|thinking)\|>
        | <\|channel\|>(?!final) ) .*
    # <|im_start|>user <start_of_turn>user <|user|>
    | (?:<\|(?:im_start|start_header_id|start)\|>|<start_of_turn>)(?:user|system|human)\b .*
    | <\|user\|> .*
    # <|im_start|>assistant </s> <end_of_turn> <｜end▁of▁sentence｜> [/INST]
    | <\|(?:im_start|start_header_id|start)\|>assistant | <[|｜][^<>|｜\s]{1,40}[|｜]> | </?s>
    | <start_of_turn>model | <(?:start|end)_of_\w{1,20}> | <\w{1,9}\|>
    | <(?:\w{1,9}:)?(?:eos|bos|pad|unk|eot|EOT|eod)> | \[(?:/?INST|EOS)\]"""


@dataclass
class Reply:
    """What a model sent. finish: 'stop', 'length' (cut by max_tokens), or the method's own failures
    'content_filter' (refused) and 'overflow' (the input is longer than the model takes)."""

    raw: str
    finish: str = "stop"
    usage: Usage = field(default_factory=lambda: Usage(calls=1))

    @property
    def text(self) -> str:
        """`raw` without hidden reasoning and special tokens; '' of a refusal.

        '<think>hm</think>comedy<|im_end|>' -> 'comedy'."""
        if self.finish in FAILURES:
            return ""
        return re.sub(HIDDEN, "", self.raw).strip()


# How servers say why a reply ended: OpenAI's finish_reason, Bedrock's stopReason and relatives.
FINISHES = {
    "context_window": "overflow",
    "filter|guardrail|safety|sensitive|refus|recitation|prohibited": "content_filter",
    "length|max_tokens": "length",
    "error|insufficient|malformed_(?:model|func)|abort|timeout|overloaded": "fault",
    "": "stop",
}


def _meaning(text, table):
    """The meaning of the first pattern of a table that is in the text, or ''."""
    for pattern, meaning in table.items():
        if re.search(pattern, text, re.I):
            return meaning
    return ""


def _reply(content, reason, taken, given):
    """A reply from its text or its parts with texts, why it ended, and the tokens in and out.

    Raises ValueError where the reason is a server's fault."""
    finish = _meaning(reason or "", FINISHES)
    if finish == "fault":
        raise ValueError(reason)
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return Reply(content or "", finish, Usage(1, taken or 0, given or 0))


# ------------------------------------------------------------------------------------- errors


class ServiceError(RuntimeError):
    """A request that failed.

    status: of the last answer, None where there was none, 0 where nothing was asked. kind: see
    KINDS; '' of anything else. wait: seconds that the server asks for. fatal: no other request can
    succeed either, because the key is refused or nobody answers."""

    def __init__(self, message, status=None, kind="", wait=0.0):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.wait = wait
        self.fatal = status in (401, 403, None)


# "Unsupported parameter: 'stop'", "`temperature` is deprecated", "System role not supported",
# "This model doesn't support the stopSequences field"
NOT_SUPPORTED = r"""(?:unsupported|not\ support(?:ed)?|n't\ support|deprecated|unrecognized
    |unexpected|unknown|not\ (?:be\ )?(?:allowed|permitted|enabled)|only\ \S+\ is\ allowed
    |must\ be\ 1\b|may\ only\ be\ set|roles\ are\ supported)"""
BETWEEN = r"""(?:\W+(?:the|this|is|are|does|on|by|for|with|model|request|keyword|argument
    |parameters?|property|field|value|role|messages?|prompts?|instruction|supplied|msg|extra|inputs
    ))*\W+"""
OPTIONS = {
    "temperature": "temperature",
    "stop": "(?:stop|stopSequences|stop_sequences)",
    "max_tokens": "(?:max_tokens|max_completion_tokens|maxTokens)",
    "system": r"(?:system|developer|only\ user(?:,|\ and)\ assistant)",
}
# What an error answer means: the first pattern found in 'STATUS words' (wordings are of servers'
# sources and issue threads). 'passing' (worth another try), 'spent' (a quota), 'overflow',
# 'content_filter', or an option of OPTIONS that the model refuses.
KINDS = {
    r"insufficient_quota|credit_balance|(?:spend|usage|hard)_limit|per[ _]?day": "spent",
    r"^429|rate.?limit|(?:tokens|requests) per min|please wait|throttl": "passing",
    r"""(?x) ^413 | ^(?:400|422|500) .* (?:
        context_length_exceeded | exceed_context_size | context\ the\ overflows
        | expected\ maxLength | (?:maximum|available|model's)\ context | context\ (?:length|window)
        | maximum\ model\ length | reduce\ the\ length\ of
        | (?:prompt|input)(?:\ length)?(?:\ \(\d+\ tokens\))?(?:\ is)?\ too\ (?:long|large)
        | exceeded\ model\ token\ limit | input\ length\ \d+\ exceeds
        | max_tokens\ must\ be\ at\ least\ 1,
        | too\ many\ (?:input\ )?tokens | input\ token(?:s|\ count)\ .{0,20}exceed
        | max_new_tokens`?\ must\ be | context\ limit | must\ have\ less\ than
        | maximum\ prompt\ length | range\ of\ input\ length)""": "overflow",
    "^(?:2|408|409|424|5)": "passing",
    r"""(?x) content.?(?:filter|policy|management) | invalid_prompt | inappropriate\ content
        | content\ exists\ risk | \bflagged\b | sensitive[ _](?:content|words) | safety\ system
        | moderation_ | violates\ our\ usage | prohibited_content""": "content_filter",
}
# last, so that any other meaning goes first
for name, option in OPTIONS.items():
    forms = rf"\b{option}\b{BETWEEN}{NOT_SUPPORTED}|{NOT_SUPPORTED}{BETWEEN}{option}\b"
    KINDS[f"(?x)^4(?:00|22).*(?:{forms})"] = name
HINTS = {
    401: "Check the key (OPENAI_API_KEY, or for Bedrock AWS_*).",
    403: "Check the key, and that it may use this model.",
    404: "Does the server have this model, and is the base URL right (.../v1)?",
    None: "Is the server running, and is the base URL right?",
}
# What an exception of `requests` means, by a word in it. That of a bad header quotes the key.
REASONS = {
    "invalid ?header|unicode": "the key holds characters that no HTTP header may have",
    "socks": "a SOCKS proxy is set (HTTPS_PROXY, ALL_PROXY): pip install 'requests[socks]'",
    "proxy": "the proxy (HTTP_PROXY, HTTPS_PROXY) cannot be used",
    "certificate bundle": "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file",
    "certificate": "its certificate is not trusted; REQUESTS_CA_BUNDLE may name its issuer's",
    "refused": "nothing listens there (connection refused)",
    "timed out": "timed out",
    "resol": "the host name is unknown or the network is down",
    "reset": "the connection was reset",
    "incompleteread": "the answer was cut off",
    "aborted": "the connection was closed without an answer",
}


def _without_quotations(words, request):
    """An error's words without the long phrases of the request, which it may quote."""
    for phrase in re.findall(r'(?:\\n)?([^".?!\\]{12,})', request):
        if " " in phrase.strip():  # no name of an option
            words = words.replace(phrase.strip(), " ")
    return words


def check_address(url: str, name: str) -> str:
    """`url` without a last '/'. Raises ServiceError where it is no address, or holds a secret."""
    if not re.fullmatch(r"https?://(?:\[[\da-f:.]+\]|[^][:/@?#\s]+)(?::\d+)?(?:/[^@?#\s]*)?", url):
        advice = "it must look like http://localhost:11434/v1, without user, password or query"
        raise ServiceError(f"{name} is no usable address: {advice} (a key: OPENAI_API_KEY)")
    return url.rstrip("/")


# ------------------------------------------------------------------------------------- clients


@dataclass
class Client:
    """What the two clients share: one session for all threads, at most `workers` requests in
    flight, one retry loop, and what was learned of the model.

    Tried again, up to `tries` times within `deadline` seconds, with full jitter on top of what the
    server asks for (up to two minutes): no answer, a broken one, 408, 409, 424, 429 and 5xx. Never:
    other 4xx, redirects, used-up quotas. `wire` holds the server's name of each option, '' for one
    that the model refuses. A provider adds requests (`_chat_request`, `_embed_request`) and how to
    read the answers (`_read_reply`, `_rows`)."""

    model: str
    embed_model: str = ""  # or None
    _: KW_ONLY
    temperature: float = 0.1
    max_tokens: int = 1024
    workers: int = 8

    wire = {name: name for name in OPTIONS}
    most = 64  # texts of one embedding request
    longest = 30_000  # characters of one text
    tries = 8
    hasty = False  # until an address has answered once: two tries, and then a failure is fatal
    deadline = 900.0
    dimension = 0  # of an embedding; 0: not known yet

    def __post_init__(self):
        self.wire = dict(self.wire)
        self._answered = set()
        self._slots = threading.BoundedSemaphore(self.workers)
        session = requests.Session()
        session.headers["Content-Type"] = "application/json"
        session.auth = self._sign  # which keeps ~/.netrc from replacing our key, too
        session.adapters = {"http": requests.adapters.HTTPAdapter(pool_maxsize=self.workers)}
        self._session = session

    def chat(self: Any, messages: list, stop: list | None = None, max_tokens: int = 0) -> Reply:
        """One completion; messages have 'role' and 'content'. Raises ServiceError where the wire or
        the server failed."""
        start = time.monotonic()
        wire = dict(self.wire)
        options = {wire["temperature"]: self.temperature}
        options[wire["max_tokens"]] = max_tokens or self.max_tokens
        if stop:
            options[wire["stop"]] = stop
        options.pop("", None)  # what the model refuses
        asked = messages if wire["system"] else _without_system(messages)
        try:
            reply = self._send(self._read_reply, *self._chat_request(asked, options))
        except ServiceError as e:
            sent = wire.get(e.kind)
            if e.kind in FAILURES:
                reply = Reply("", e.kind)
            elif sent:  # an option that is refused: it is renamed or left out for good
                instead = "max_completion_tokens" if sent == "max_tokens" else ""
                if self.wire[e.kind] == sent:  # else another thread has learned it
                    self.wire[e.kind] = instead
                    LOG.warning("%s refuses '%s'; sent instead: '%s'", self.model, sent, instead)
                reply = self.chat(messages, stop, max_tokens)
            else:
                raise
        reply.usage.seconds = time.monotonic() - start
        return reply

    def embed(self, texts: list) -> np.ndarray:
        """Embeddings of n texts, float32 (n, d). A blank text is embedded as '(empty)'. One of
        more than `longest` characters is cut; `longest` is halved, and that logged, where the model
        takes less. A batch that is refused is halved, for the rest of the call, too; a single text
        that is refused is named in the error."""
        rows: list = []
        size = self.most
        while len(rows) < len(texts):
            batch = texts[len(rows) :][:size]
            batch = [text[: self.longest].strip() or "(empty)" for text in batch]
            text = batch[0]
            try:
                rows += self._embed(batch)
            except ServiceError as e:
                if e.kind == "spent" or e.status in (None, 401, 403, 404, 429):
                    raise
                if len(batch) > 1:  # one of them, or their number, may be the cause
                    size = len(batch) // 2
                elif e.kind == "overflow" and len(text) >= 100:
                    LOG.warning(
                        "%s takes no text of %d characters: cut", self.embed_model, len(text)
                    )
                    self.longest = len(text) // 2
                else:
                    e.args = (f"the text {text[:80]!r} cannot be embedded: {e}",)
                    raise
        return np.array(rows, np.float32)

    def _embed(self, batch):
        """The rows of one batch."""

        def _read(answer):
            rows = np.array(self._rows(answer), float)
            wanted = (len(batch), self.dimension or rows.shape[-1])
            if rows.shape != wanted or not abs(rows).max() < 1e38:
                raise ValueError
            self.dimension = rows.shape[1]
            return list(rows)

        return self._send(_read, *self._embed_request(batch), len(batch))

    def _send(self, read, url, body, batch_size=0):
        """read(JSON of the answer): the one retry loop. Raises ServiceError.

        batch_size: texts of an embedding request, 0 of a chat. On 5xx a batch of several, on an
        unreadable answer any, gets two tries only: `embed` then halves it or gives up."""
        text = json.dumps(body, ensure_ascii=False)
        # Lone surrogates, which strict servers refuse, become U+FFFD.
        data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        end = time.monotonic() + self.deadline
        attempt = 0
        while True:
            attempt += 1
            try:
                waiting = time.monotonic()
                with self._slots:
                    end += time.monotonic() - waiting  # which is no server's fault
                    found = self._try(url, data, read, end)
                self._answered.add(url)
                return found
            except ServiceError as e:
                first = self.hasty and url not in self._answered
                unreadable = batch_size and e.status == 200
                failing = batch_size > 1 and (e.status or 0) >= 500
                tries = 2 if first or unreadable or failing else self.tries
                pause = e.wait + random.uniform(0, min(30, 0.5 * 2**attempt))
                late = time.monotonic() + pause > end
                if e.kind != "passing" or attempt >= tries or late:
                    # An unreadable batch is no dead server: one of its texts may be at fault.
                    e.fatal |= first and not unreadable and (e.kind == "passing" or e.status == 404)
                    e.args = (f"{e} ({attempt} tries). {HINTS.get(e.status, '')}",)
                    raise
            time.sleep(pause)

    def _try(self, url, data, read, end):
        """One request; read(JSON) of its answer, which must be whole by the time `end`. Raises
        ServiceError."""
        left = max(end - time.monotonic(), 0.1)
        local = re.match(r"https?://(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])[:/]", url)
        proxies = {"http": "", "https": ""} if local else None
        content = bytearray()
        try:
            with self._session.post(
                url,
                data=data,
                stream=True,
                timeout=(min(10, left), left),
                allow_redirects=False,
                proxies=proxies,
            ) as response:
                # 32 bytes at a time, so that an answer that drips meets the deadline, too
                for chunk in response.iter_content(32):
                    content += chunk
                    if time.monotonic() > end:
                        raise requests.Timeout("timed out: the answer does not end")
        except (OSError, ValueError) as e:
            text = self._safe(f"{type(e).__name__}: {e}")
            reason = _meaning(text, REASONS) or text
            # an address, a header: not tried again
            kind = "" if isinstance(e, ValueError) else "passing"
            raise ServiceError(f"no answer from {url}: {reason}", None, kind) from None
        status = response.status_code
        body = content[:20_000].decode("utf-8", "replace")
        said = self._safe(f"{response.headers.get('Location', '')} {body}")
        if status < 300:
            with suppress(Exception):  # it may have any shape
                return read(json.loads(content))
            said = f"the server did not answer as expected: {said}"
        words = _without_quotations(said, self._safe(data.decode()))
        kind = _meaning(f"{status} {words}", KINDS)
        wait = 0.0
        with suppress(ValueError):
            wait = max(0.0, float(response.headers.get("Retry-After", "")))
        if wait > 120:
            kind = "spent"
            said = f"it asks to wait {wait:.0f} s: {said}"
        message = f"HTTP {status} from {url}: {said[:600]}"
        raise ServiceError(message, status, kind, wait)

    def _sign(self, request):
        """Put the key into the headers of a request."""
        if self._secrets[0]:
            request.headers["Authorization"] = f"Bearer {self._secrets[0]}"
        return request

    def _safe(self, text):
        """`text` on one line, without markup and without a secret, however the server wrote it."""
        for _ in range(2):  # an escape may be escaped itself
            # Of a character's number with 99 digits only '&#x;' is left: it would raise ValueError.
            text = re.sub(r"\\+u([0-9a-fA-F]{4})|&#\d{99,}", r"&#x\1;", text)
            text = html.unescape(unquote(text.replace("\\", "")))
        for secret in filter(None, self._secrets):
            text = text.replace(secret, "***")
        text = re.sub(r"<[^<>]*>|(?<=//)[^/@\s]*@", " ", text)
        return " ".join(text.split())


def _without_system(messages):
    """The system message merged into the first user turn, for a model that refuses one."""
    if messages[0]["role"] != "system":
        return messages
    merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": merged}, *messages[2:]]


@dataclass
class OpenAICompatible(Client):
    """Chat and embeddings of any server that speaks OpenAI's /v1.

    Defaults when constructed: base_url from OPENAI_BASE_URL, api_key from OPENAI_API_KEY.
    embed_base_url: where the embedding model is served, if elsewhere."""

    base_url: str = ""
    api_key: str = field(default="", repr=False)
    embed_base_url: str = ""

    def __post_init__(self):
        super().__post_init__()
        given = self.base_url or _setting("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self.base_url = check_address(given, "the base URL (OPENAI_BASE_URL)")
        given = self.embed_base_url or self.base_url
        self.embed_base_url = check_address(given, "the embedding URL")
        self._secrets = [(self.api_key or _setting("OPENAI_API_KEY")).strip()]

    def _chat_request(self, messages, options):
        body = {"model": self.model, "messages": messages, **options}
        return f"{self.base_url}/chat/completions", body

    def _read_reply(self, answer):
        choice = answer["choices"][0]
        reason = choice.get("finish_reason")
        if answer.get("error") or choice.get("error"):
            raise ValueError
        message = {} if reason == "content_filter" else choice["message"]
        if message.get("refusal"):
            reason = "refusal"
        content = message.get("content")
        if not content and message.get("tool_calls"):
            content = json.dumps(message["tool_calls"][0]["function"])
        used = answer.get("usage") or {}
        return _reply(content, reason, used.get("prompt_tokens"), used.get("completion_tokens"))

    def _embed_request(self, batch):
        return f"{self.embed_base_url}/embeddings", {"model": self.embed_model, "input": batch}

    def _rows(self, answer):
        data = sorted(answer["data"], key=lambda item: item.get("index") or 0)
        return [item["embedding"] for item in data]


@dataclass
class Bedrock(Client):
    """Amazon Bedrock: Converse for chat, InvokeModel for Titan Text Embeddings V2.

    model, embed_model: an id, inference profile or ARN. Read when constructed: the key,
    AWS_BEARER_TOKEN_BEDROCK or else AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN
    (SigV4); AWS_REGION or AWS_DEFAULT_REGION; AWS_ENDPOINT_URL_BEDROCK_RUNTIME."""

    region: str = ""

    wire = Client.wire | {"stop": "stopSequences", "max_tokens": "maxTokens"}
    most = 1
    longest = 50_000

    def __post_init__(self):
        super().__post_init__()
        self.region = self.region or _setting("AWS_REGION") or _setting("AWS_DEFAULT_REGION")
        names = ("BEARER_TOKEN_BEDROCK", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")
        self._secrets = [_setting(f"AWS_{name}") for name in names]
        bearer, access, secret, _ = self._secrets
        if not self.region or not (bearer or (access and secret)):
            raise ServiceError(
                "Bedrock needs a region (AWS_REGION) and a key (AWS_BEARER_TOKEN_BEDROCK, or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
        name = "AWS_ENDPOINT_URL_BEDROCK_RUNTIME"
        usual = f"https://bedrock-runtime.{self.region}.amazonaws.com"
        self.base_url = check_address(_setting(name) or usual, name)

    def _sign(self, request):
        bearer, *keys = self._secrets
        if not bearer:
            signed = sigv4(request.url, request.body, self.region, *keys)
            request.headers.update(signed)
        return super()._sign(request)

    def _chat_request(self, messages, options):
        turns = [{"role": m["role"], "content": [{"text": m["content"]}]} for m in messages]
        body = {"messages": turns, "inferenceConfig": options}
        if turns[0]["role"] == "system":
            body["system"] = turns.pop(0)["content"]
        return f"{self.base_url}/model/{quote(self.model, safe='')}/converse", body

    def _read_reply(self, answer):
        output = answer.get("output") or {}
        message = output.get("message") or {}
        used = answer["usage"]
        names = ("inputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")
        taken = sum(used.get(name) or 0 for name in names)
        return _reply(message.get("content"), answer["stopReason"], taken, used["outputTokens"])

    def _embed_request(self, batch):
        url = f"{self.base_url}/model/{quote(self.embed_model, safe='')}/invoke"
        return url, {"inputText": batch[0]}

    def _rows(self, answer):
        return [answer.get("embedding") or answer["embeddingsByType"]["float"]]


def _setting(name):
    return os.environ.get(name, "").strip()


def sigv4(
    url: str, data: bytes, region: str, access: str, secret: str, token: str = "", now: str = ""
) -> dict:
    """The headers of a JSON POST to Bedrock, signed with AWS Signature Version 4.

    Signed are content-type, host, x-amz-date and the session token, over the very bytes and the
    very path that are sent. now: 'YYYYMMDDTHHMMSSZ', for tests."""
    now = now or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    parts = urlsplit(url)
    headers = {
        "content-type": "application/json",
        "host": parts.netloc.removesuffix(":443"),
        "x-amz-date": now,
    }
    if token:
        headers["x-amz-security-token"] = token
    names = ";".join(headers)
    scope = f"{now[:8]}/{region}/bedrock/aws4_request"
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    # AWS percent-encodes the path once more, as it stands on the wire.
    request = f"POST\n{quote(parts.path)}\n\n{lines}\n{names}\n{sha256(data).hexdigest()}"
    signed = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{sha256(request.encode()).hexdigest()}"
    key = f"AWS4{secret}".encode()
    for part in [*scope.split("/"), signed]:
        key = hmac.digest(key, part.encode(), "sha256")
    credential = f"Credential={access}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
    return {**headers, "Authorization": f"AWS4-HMAC-SHA256 {credential}"}


# -------------------------------------------------------------------------- reading one reply


class Parsed(NamedTuple):
    """One ReAct reply: the tool's name as written and its input, or the answer; None: missing."""

    thought: str
    action: str | None
    input: str | None
    answer: str | None


# 'Action: x', '**Final Answer:** x', '2. action_input : x'; or a heading that something follows,
# '### Action' or '**Action**'. A line 'action' is no heading: it may be LaMP-2M's tag.
# A line 'Finish[x]' is an action without its label.
LABEL = r"""(?xim) ^ (?: (?=.*:) [ \t>#*_`-]* | (?=[ \t]*[#*_][^:\n]*$\s*\S) [ \t#*_]* )
    (thought|action[ _-]?input|action|final[ _-]?answer|answer|question|human|user)
    (?:[ \t]*\d+)? [*_` \t]* (?: : [*_` \t]* | $ )
    | ^(?=Finish\[)"""
# a made-up Observation, or the half of the word where a stop string was cut
MADE_UP = r"(?im)^[ \t>#*_`-]*observations?\b|^[ \t]*obs(?:er?|erv\w*)?[ \t]*\Z"
# 'Thought: .. Action: RAG Action Input: x' on one line
INLINE = r"(?<=\S)[ \t]+(?=(?:Action|Action[ _-]?Input|Final ?Answer)[ \t]*\d*:)"
LOOK_ALIKES = str.maketrans("\uff1a\u00a0\u202f\u2007\u2009\u3000", ":     ", "\r\u200b")
# A tool call that is written as JSON: {"action": "RAG", "action_input": {"query": "war films"}}
CALL_KEYS = "action|tool|tool_name|name|action_input|tool_input|arguments|parameters|input|args"
JSON_CALL = rf'\{{\s*"(?:thought|type|{CALL_KEYS})"|\Z'  # or the end, where no JSON begins
# 'RAG("war films")', 'RAG[war films]', 'RAG: war films', 'RAG {"query": "war films"}'; groups: the
# name, what stands in brackets, what follows ':' or is JSON
CALL = r"(?s)([\[({:][^\n]*|[^\[({:\n]*)(?:[\[(](.*)|(?::|(?=\{))(.*))?"
NO_ACTION = "(?i)none|null|n/?a|-|not?(?:hing| action| tool)?(?: needed| required)?"
# query="war films", {'query': 'war films'}; 'war films', [war films]
WRAPPED = r"""(?xs) ^ (?: \{?\s* ["']?\w+["']? \s*[:=]\s* (["'])(.*)\1 \s*\}?
    | \[?["'\u201c]{0,2}\ ? ([^"\u201c\u201d\[\]]*?) \ ?["'\u201d]{0,2}\]? ) $"""


def parse_reply(text: str, answer_first: bool = False) -> Parsed:
    """Read one ReAct reply.

    The first action counts, unless an answer stands before it, or stands below it and the action
    has no input; of several answers the last one before a made-up next question. Everything from a
    made-up Observation on is dropped. answer_first: an answer beats an action wherever it stands.
    """
    text = _spell_out(Reply(text).text.translate(LOOK_ALIKES))
    text = re.split(MADE_UP, re.sub(INLINE, "\n", text))[0]
    parts = iter(re.split(LABEL, text))  # what stands before, label, content, label ..
    thought = next(parts).strip()
    action = given = answer = ""
    for label, content in zip(parts, parts):
        label = (label or "action").lower()
        content = content.strip()
        if label == "thought":
            thought = thought or content
        elif "answer" in label:
            answer = content or answer
        elif label == "action" and not given and not answer:
            action, given = _read_call(content)
        elif "input" in label and action and not given:
            given = content
        elif label in ("question", "human", "user") and (given or answer):
            break
        if given and re.fullmatch("(?i)finish|(?:final[ _-]?)?answer", action):
            answer = given.strip("\"'` ")
            action = given = ""
    given = _plain_input(given)
    if re.fullmatch(NO_ACTION, action) or (answer and (answer_first or not given)):
        action = given = ""
    else:
        answer = ""
    answer = re.split(r"\n\s*\n", answer)[0].strip("*_` \n")  # an explanation may follow
    return Parsed(thought, action or None, given or None, answer or None)


def _spell_out(text):
    """A tool call that is written as JSON becomes labelled lines; code fences go."""
    text = re.sub(r"(?m)^[ \t]*```\w*[ \t]*$|</?tool_call>", "\n", text)
    try:
        start = re.search(JSON_CALL, text).start()
        call, end = json.JSONDecoder(strict=False).raw_decode(text, start)
        name, given, *_ = [call[key] for key in CALL_KEYS.split("|") if key in call]
    except (ValueError, RecursionError):
        return text
    given = json.dumps(given, ensure_ascii=False)
    lines = f"Action: {name}\nAction Input: {given}\nThought:"
    return f"{text[:start].rstrip(' [')}\n{lines}{text[end:].lstrip(' ]')}"


def _read_call(text):
    """'RAG("war films")' -> ('RAG', '"war films"'), 'RAG' or '[RAG]' -> ('RAG', '')."""
    text = re.sub(r"^\[([^\]]*)\]$", r"\1", text.strip("*_`\"' "))
    name, bracketed, rest = re.match(CALL, text).groups("")
    inside = re.sub(r"\]?\)?$", "", bracketed)
    return name.strip("*_`\"'[]. "), inside or rest


def _plain_input(text):
    """The text of an input that is quoted, keyed or JSON: '{"query": "war"}' -> 'war'."""
    text = " ".join(text.strip("*`").split())
    data = text
    with suppress(ValueError, RecursionError):
        while isinstance(data, str):  # which may hold JSON itself
            data = json.loads(data)
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        text = " ".join(map(str, data))
    elif isinstance(data, str):
        text = data
    return " ".join(re.sub(WRAPPED, r"\2\3", text).split())


# ----------------------------------------------------------------------------------- the loop


@dataclass
class Step:
    """One turn of the loop. A badly formatted reply has no action and stands whole in `thought`."""

    thought: str
    action: str | None = None
    input: str | None = None
    observation: str | None = None


@dataclass
class Answer:
    """status: 'answered'; 'forced' (asked for its answer at the step limit or after three idle
    replies; where it gave none, the text is empty); 'refused' or 'overflow' (the method's own
    failures, empty text)."""

    text: str
    steps: list  # of Step
    status: str
    usage: Usage


# ours: stands after the persona in the system prompt; alignment never rewrites it. {tools}: name
# and description each.
PROTOCOL = """\
You have these tools:

{tools}

Work in turns. In each turn write either one action:
Thought: what you need to know and where to find it
Action: the name of one tool ({names})
Action Input: the input for that tool
and stop there; you are then given its result as an Observation. Or, once you know enough, your \
answer:
Thought: why this is the answer
Final Answer: only the answer, in the form that the question asks for

Where the question says to just answer, that concerns the Final Answer: use the tools \
first.{rule}"""
# ours, where there is no tool
NO_TOOLS = """\
No tools are available, so the rules about using tools do not apply. Reply in this form:
Thought: why this is the answer
Final Answer: only the answer, in the form that the question asks for"""
# ours
ONE_TOOL = " There is only one tool here, so a rule to use two tools does not apply."
# ours: the observation after a reply that does not parse; no lines in it that a model could copy
BAD_REPLY = """\
That reply has neither an action nor an answer in the right form{why}. Write a line that begins \
with 'Action:' and names a tool ({names}), and below it a line that begins with 'Action Input:'. \
Or, once you know enough, a line that begins with 'Final Answer:'."""
# ours, where there is no tool
NO_ANSWER = """\
That reply has no answer in the right form{why}. Write one line that begins with 'Final Answer:'."""
# ours
UNKNOWN_TOOL = "There is no tool '{name}'. The tools are: {names}."
REPEATED = """\
You have already done exactly this, and its result stands above. Do not repeat it: {instead}."""
FAILED = "{name} failed ({why}). Try another input or another tool."
FORCED = """\
No more actions are possible. Reply now with one line: 'Final Answer:' and only the answer."""
FAILURES = {"overflow": "overflow", "content_filter": "refused"}  # a reply's finish -> status


def protocol(tools: list) -> str:
    """The part of the system prompt that explains the tools and the format."""
    if not tools:
        return NO_TOOLS
    described = "\n\n".join(f"{tool.name}: {tool.description}" for tool in tools)
    rule = ONE_TOOL if len(tools) == 1 else ""
    return PROTOCOL.format(tools=described, names=_names(tools), rule=rule)


def _names(tools):
    return " or ".join(tool.name for tool in tools) or "none"


def react(
    llm: Any, system: str, question: str, tools: list, max_steps: int = 8, eager: bool = False
) -> Answer:
    """Answer `question` in a ReAct loop (a_t ~ pi_P(. | c_t), Eq. 4).

    The messages only grow and always end with a user turn. The answer is forced after `max_steps`
    replies, or three in a row that lead nowhere (badly formatted, an unknown tool, an action
    already done). eager: a bare label without 'Final Answer:' is an answer even before a tool was
    used. Raises ServiceError where the model cannot be reached.
    """
    prompt = f"{system}\n\n{protocol(tools)}".strip()
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": question}]
    steps: list = []
    usage = Usage()
    done: set = set()
    idle = 0
    forced = False
    while True:
        reply = llm.chat(messages, stop=["\nObservation"])
        usage += reply.usage
        if reply.finish in FAILURES:
            return Answer("", steps, FAILURES[reply.finish], usage)
        text = re.split(MADE_UP, reply.text)[0].strip()
        messages.append({"role": "assistant", "content": text or "(no reply)"})
        thought, action, given, answer = parse_reply(text, forced)
        if not answer and (forced or done or eager or not tools):
            answer = _bare_answer(text, forced)
        if answer or forced:
            steps.append(Step(thought if answer else text))
            status = "forced" if forced else "answered"
            return Answer(answer or "", steps, status, usage)
        known = len(done)
        if action and given:
            step = Step(thought, action, given)
            step.observation = _act(step, tools, done)
        else:
            step = Step(text, observation=_correction(action, tools, reply.finish))
        steps.append(step)
        idle = 0 if len(done) > known else idle + 1
        forced = idle == 3 or len(steps) >= max_steps
        observation = f"Observation: {step.observation}"
        if forced:
            observation += f"\n\n{FORCED}"
        messages.append({"role": "user", "content": observation})


def _bare_answer(text, forced):
    """The first paragraph of a reply without any label, if it is short: 'comedy'."""
    first = re.split(r"\n\s*\n", text)[0]
    words = 30 if forced else 8
    if re.search(LABEL, text) or len(first.split()) > words:
        return ""
    return first.strip()


def _correction(action, tools, finish):
    """What a reply is told that has neither a whole action nor an answer."""
    why = ""
    if finish == "length":
        why = ": it was cut off for its length"
    elif action and tools:
        why = ": Action Input is missing"
    wording = BAD_REPLY if tools else NO_ANSWER
    return wording.format(why=why, names=_names(tools))


def _act(step, tools, done):
    """The observation of a step's action; done gains the tool and the input of a new one.

    A tool's failure is an observation, too, but for an outage of the embedding model: a question
    asked without its memory would score the outage as an answer."""
    tool = find_tool(step.action, tools)
    if tool is None:
        return UNKNOWN_TOOL.format(name=step.action, names=_names(tools))
    step.action = tool.name
    call = (tool.name, step.input.lower())
    if call in done:
        fresh = [other for other in tools if other.name not in dict(done)]
        instead = f"use {_names(fresh)} now" if fresh else "write your Final Answer now"
        return REPEATED.format(instead=instead)
    done.add(call)
    try:
        return tool(step.input)
    except ServiceError:
        raise
    except Exception as e:
        return FAILED.format(name=tool.name, why=f"{type(e).__name__}: {e}")


def find_tool(name: str, tools: list) -> Any:
    """The tool that a model means by `name` ('wikipedia', 'RAG API', 'the rag tool'), or None."""
    same = [tool for tool in tools if tool.name.lower() == name.lower()]
    close = [t for t in tools if re.search(rf"(?i)(?<![a-z]){re.escape(t.name)}", name)]
    first, *others = same or close or [None]
    return None if others else first


# ---------------------------------------------------------------------------------- the agent

# paper, Appendix B, word for word; {profile} is [Initial Semantic Memory]
PERSONA = """\
You are a helpful personalized assistant. Take more than two actions to infer the user preference \
and answer the question. User summary: {profile}

STRICT RULES: when using tools, always:

1. Think step-by-step about what information you need.
2. MUST use at least TWO tools to answer the question.
3. Use tools precisely and deliberately and try to get the most accurate information from \
different tools.
4. Provide clear, concise responses. Do not give explanation in the final answer."""


@dataclass
class PersonaAgent:
    """One user's agent. persona: the user's part of the system prompt. memory: what alignment
    reads; `memory.remember` adds what the user really answered."""

    llm: Any
    memory: Any
    persona: str
    tools: list
    max_steps: int = 8
    eager: bool = False

    def answer(self, question: str) -> Answer:
        """Answer one question under the current persona."""
        return react(self.llm, self.persona, question, self.tools, self.max_steps, self.eager)
