"""The model clients, the ReAct loop (Eq. 4) and PersonaAgent.

A model is anything with `chat(messages, stop=None, max_tokens=512) -> Reply` and `embed(texts, query=False) -> array`.
The loop keeps one append-only message list: system = persona + tool protocol, user = question, then assistant and user in
turn, always ending with a user turn; `Answer.steps` is what is kept of it. What it does not do: enforce the paper's two-tools rule.
"""
import json
import logging
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from urllib.parse import quote

import numpy as np

from memory import Episode
from tools import LOCAL, RAG, ContextOverflow, Http, ServiceError, Wiki, sigv4

LOG = logging.getLogger(__name__)


@dataclass
class Usage:
    """What calls cost: input (cached included), cached and output in tokens; seconds until the answers, with back-off and the
    wait for a free slot."""
    calls: int = 0
    input: int = 0
    cached: int = 0
    output: int = 0
    seconds: float = 0.0

    def __add__(self, other):
        return Usage(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))


@dataclass
class Reply:
    """finish: 'stop', 'length' (cut by max_tokens) or 'content_filter' (refused; the text is then empty)."""
    text: str
    finish: str = "stop"
    usage: Usage = field(default_factory=lambda: Usage(calls=1))


HINTS = {401: "Check the key (OPENAI_API_KEY, or for Bedrock AWS_*).",
         403: "Check the key, and that it may use the model '{model}'.",
         404: "Does the server have the model '{model}' (Ollama: ollama pull {model}), and is the base URL right (.../v1)?",
         None: "Is the server running, and is the base URL right?",
         "profile": "Use an inference profile's id or ARN, such as us.{model}."}


class Client:
    """What the two clients share. One serves all threads, with at most `workers` requests in flight; `embed_usage` adds up the
    embedding calls. `options` maps temperature, stop and max_tokens to the server's names (None: the model refuses it)."""
    options = {}
    most, room = 64, 200_000  # texts and characters of one embedding request
    longest = 30_000          # characters of one text

    def __init__(self, model, embed_model, temperature, workers):
        self.model, self.embed_model, self.temperature, self.workers = model, embed_model, temperature, workers
        self.http, self.embed_usage, self._lock = Http(workers), Usage(), threading.Lock()
        self.options, self._headers, self._sign = dict(self.options), {}, None

    def _call(self, method, url, body, read, model=None, tries=None):
        """The answer as `read` makes it; a failure gets a line of advice (HINTS)."""
        try:
            return self.http.send(method, url, body, self._headers, self._sign, read, tries=tries)
        except ServiceError as e:
            key = "profile" if "on-demand throughput" in str(e) else e.status if model or e.status != 404 else None
            hint = "" if e.code == LOCAL else HINTS.get(key, "")
            raise type(e)(f"{e}. {hint.format(model=model)}" if hint else str(e), e.status, e.code) from None

    def chat(self, messages, stop=None, max_tokens=512, tries=None):
        """One completion. Raises ContextOverflow, or ServiceError where the wire or the server failed."""
        start = time.monotonic()
        values = {"temperature": self.temperature, "stop": [s for s in stop or [] if s.strip()], "max_tokens": max_tokens}
        while True:
            options = {self.options[k]: v for k, v in values.items() if self.options[k] and v not in (None, [])}
            try:
                reply = self._chat(messages, options, tries)
                break
            except ServiceError as e:
                if not self._learn(e, options):
                    raise
        if not reply.text and reply.finish == "stop" and options.pop(self.options["stop"], None):
            again = self._chat(messages, options, tries)  # the stop string may have fired inside the hidden reasoning
            reply = Reply(again.text, again.finish, reply.usage + again.usage)
        reply.usage.seconds = time.monotonic() - start
        return reply

    def _learn(self, e, sent):
        """Whether error `e` refuses one of the options sent; that one is then renamed or left out from now on."""
        refused = re.search(r"unsupported|not support|n't support|deprecated|not (allowed|permitted)|unrecognized|unexpected",
                            f"{e.code} {e}", re.I)
        names = {wire: name for name, wire in type(self).options.items()} | {"max_completion_tokens": "max_tokens"}
        for wire in sent:  # not what the options are now: another thread may have learned the same meanwhile
            if e.status == 400 and refused and re.search(rf"(?i)\b({wire}|{names[wire]})\b", str(e)):
                with self._lock:
                    if self.options[names[wire]] == wire:
                        other = self.options[names[wire]] = "max_completion_tokens" if wire == "max_tokens" else None
                        LOG.warning("%s refuses '%s': %s", self.model, wire, f"sent as '{other}'" if other else "left out")
                return True
        return False

    def embed(self, texts, query=False, tries=None):
        """Embeddings of n texts in their order: float32 (n, d). A blank text is embedded as '(empty)', one that is too long
        for the model is cut, which is said once."""
        texts = [t[:self.longest] if t.strip() else "(empty)" for t in texts]
        batches, size = [], 0
        for text in texts:
            size += len(text)
            if not batches or len(batches[-1]) == self.most or size > self.room:
                batches, size = [*batches, []], len(text)
            batches[-1].append(text)
        with ThreadPoolExecutor(min(self.workers, len(batches)) or 1) as pool:
            rows = [row for batch in pool.map(lambda b: self._fit(b, query, tries), batches) for row in batch]
        return np.array(rows, np.float32).reshape(len(texts), -1 if texts else 0)

    def _fit(self, batch, query, tries):
        """Embed one batch; where it is too long for the model, halve the batch, and in the end the text."""
        def read(answer):
            rows, tokens = self._rows(answer)
            array = np.array(rows, np.float32)
            if array.ndim != 2 or len(array) != len(batch) or not array.size or not np.isfinite(array).all():
                raise ValueError  # Http makes a ServiceError of it that shows the answer
            return rows, tokens

        start, half = time.monotonic(), len(batch) // 2
        try:
            rows, tokens = self._call("POST", *self._embed_request(batch, query), read, self.embed_model, tries)
        except ContextOverflow:
            if half:
                return self._fit(batch[:half], query, tries) + self._fit(batch[half:], query, tries)
            if len(batch[0]) < 100:
                raise
            with self._lock:
                if len(batch[0]) // 2 < self.longest:  # else another thread has said it
                    LOG.warning("%s takes no text of %d characters: long ones are cut", self.embed_model, len(batch[0]))
                    self.longest = len(batch[0]) // 2
            return self._fit([batch[0][:self.longest]], query, tries)
        with self._lock:
            self.embed_usage += Usage(1, tokens, 0, 0, time.monotonic() - start)
        return rows


def visible(text):
    """The part of a reply that is not hidden reasoning: '<think>..</think>x' or '..</think>x' -> 'x'; an unclosed
    '<think>..' -> ''."""
    text = re.split(r"</(?:think|thinking|reasoning)>", text)[-1]
    return re.split(r"<(?:think|thinking|reasoning)>", text)[0].strip()


class OpenAICompatible(Client):
    """Chat and embeddings of any server that speaks OpenAI's /v1, over raw HTTP.

    Defaults from the environment when constructed: base_url from OPENAI_BASE_URL, api_key from OPENAI_API_KEY.
    embed_base_url: where the embedding model is served, if elsewhere."""
    options = {"temperature": "temperature", "stop": "stop", "max_tokens": "max_tokens"}

    def __init__(self, model, embed_model=None, base_url=None, api_key=None, temperature=0.1, workers=8, embed_base_url=None):
        super().__init__(model, embed_model, temperature, workers)
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
        self.embed_base_url = (embed_base_url or self.base_url).rstrip("/")
        key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def models(self):
        """Names of the models that the server lists."""
        def read(answer):
            return [m["id"] for m in answer["data"] if "id" in m]

        return self._call("GET", self.base_url + "/models", None, read, tries=2)

    def _chat(self, messages, options, tries):
        body = {"model": self.model, "messages": messages, **options}
        return self._call("POST", self.base_url + "/chat/completions", body, self._read, self.model, tries)

    def _read(self, answer):
        choice, used = answer["choices"][0], answer.get("usage") or {}
        message, finish = choice.get("message") or {}, choice.get("finish_reason")
        text = message.get("content") or ""
        if isinstance(text, list):  # some servers send a list of parts
            text = "".join(part.get("text") or "" for part in text)
        cached = (used.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        usage = Usage(1, int(used.get("prompt_tokens") or 0), int(cached), int(used.get("completion_tokens") or 0))
        if message.get("refusal") or finish == "content_filter":
            return Reply("", "content_filter", usage)
        return Reply(visible(text), "length" if finish == "length" else "stop", usage)

    def _embed_request(self, batch, query):
        return self.embed_base_url + "/embeddings", {"model": self.embed_model, "input": batch}

    def _rows(self, answer):
        rows = {d.get("index", i): d["embedding"] for i, d in enumerate(answer["data"])}
        return [rows[i] for i in range(len(rows))], int((answer.get("usage") or {}).get("prompt_tokens") or 0)


class Bedrock(Client):
    """Amazon Bedrock: Converse for chat, InvokeModel for Titan Text Embeddings V2 and Cohere Embed v3 and v4.

    model: id, inference profile or ARN; embed_model: its id. Read when constructed: AWS_BEARER_TOKEN_BEDROCK, else
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (SigV4); AWS_REGION, AWS_DEFAULT_REGION (`region` comes first);
    AWS_ENDPOINT_URL_BEDROCK_RUNTIME. Cohere tells no token counts."""
    options = {"temperature": "temperature", "stop": "stopSequences", "max_tokens": "maxTokens"}
    finishes = {"max_tokens": "length", "guardrail_intervened": "content_filter", "content_filtered": "content_filter"}

    def __init__(self, model, embed_model=None, region=None, temperature=0.1, workers=8):
        super().__init__(model, embed_model, temperature, workers)
        def aws(name):
            return os.environ.get(f"AWS_{name}", "").strip()

        region, bearer = region or aws("REGION") or aws("DEFAULT_REGION"), aws("BEARER_TOKEN_BEDROCK")
        access, secret, session = aws("ACCESS_KEY_ID"), aws("SECRET_ACCESS_KEY"), aws("SESSION_TOKEN")
        if not region or not (bearer or access and secret):
            raise ServiceError("Bedrock needs a region (AWS_REGION) and a key (AWS_BEARER_TOKEN_BEDROCK, or AWS_ACCESS_KEY_ID "
                               "and AWS_SECRET_ACCESS_KEY)")
        self.base_url = (aws("ENDPOINT_URL_BEDROCK_RUNTIME") or f"https://bedrock-runtime.{region}.amazonaws.com").rstrip("/")
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        self._sign = None if bearer else lambda *request: sigv4(*request, region, access, secret, session)
        self.cohere, v4 = "cohere.embed" in (embed_model or ""), "embed-v4" in (embed_model or "")
        self.most, self.longest = (96, 100_000 if v4 else 2048) if self.cohere else (1, 50_000)
        self.cut = "RIGHT" if v4 else "END"

    def _url(self, model, operation):
        return f"{self.base_url}/model/{quote(model, safe='')}/{operation}"

    def _chat(self, messages, options, tries):
        kept = [m for m in messages if m["content"].strip()]  # blank blocks, and at times two turns of a role, are refused
        system = [{"text": m["content"]} for m in kept if m["role"] == "system"]
        turns = groupby((m for m in kept if m["role"] != "system"), key=lambda m: m["role"])
        body = {"messages": [{"role": role, "content": [{"text": m["content"]} for m in turn]} for role, turn in turns],
                "inferenceConfig": options, **({"system": system} if system else {})}
        return self._call("POST", self._url(self.model, "converse"), body, self._read, self.model, tries)

    def _read(self, answer):
        content = ((answer.get("output") or {}).get("message") or {}).get("content") or []
        text, used = "".join(block.get("text") or "" for block in content), answer["usage"]
        cached = int(used.get("cacheReadInputTokens") or 0)
        fresh = int(used["inputTokens"]) + int(used.get("cacheWriteInputTokens") or 0)
        if answer["stopReason"] == "model_context_window_exceeded":
            raise ContextOverflow(f"'{self.model}' stopped: the conversation exceeds its context window", 200)
        finish = self.finishes.get(answer["stopReason"], "stop")
        return Reply("" if finish == "content_filter" else visible(text), finish,
                     Usage(1, fresh + cached, cached, int(used["outputTokens"])))

    def _embed_request(self, batch, query):
        kind = "search_query" if query else "search_document"
        body = {"texts": batch, "input_type": kind, "truncate": self.cut} if self.cohere else {"inputText": batch[0]}
        return self._url(self.embed_model, "invoke"), body

    def _rows(self, answer):
        rows = answer["embeddings"] if self.cohere else [answer.get("embedding") or answer["embeddingsByType"]["float"]]
        return rows["float"] if isinstance(rows, dict) else rows, int(answer.get("inputTextTokenCount") or 0)


class Meter:
    """A model that counts the chat calls that go through it: the cost of one stage."""

    def __init__(self, llm):
        self.llm, self.usage, self._lock = llm, Usage(), threading.Lock()

    def chat(self, *args, **kwargs):
        reply = self.llm.chat(*args, **kwargs)
        with self._lock:
            self.usage = self.usage + reply.usage
        return reply


class Cached:
    """A model whose answers are kept in a Cache: what was asked before is answered from there, with the usage it had then.

    kind: what speaks to the model ('openai', 'bedrock'), a part of each request. Everything else is the model's own."""

    def __init__(self, llm, cache, kind="openai"):
        self.llm, self.cache, self.kind = llm, cache, kind
        if cache.offline:
            self.base_url = f"{cache.path} alone"  # nothing is sent anywhere

    def __getattr__(self, name):
        return getattr(self.llm, name)

    def chat(self, messages, stop=None, max_tokens=512):
        """As the model's. The request is the messages and every parameter, as asked for."""
        request = {"messages": messages, "temperature": self.llm.temperature, "stop": stop, "max_tokens": max_tokens}
        found, = self.cache.answers(f"{self.kind}/{self.llm.model}", [request], lambda _: [
            json.dumps(asdict(self.llm.chat(messages, stop, max_tokens)))])
        reply = json.loads(found)
        return Reply(reply["text"], reply["finish"], Usage(**reply["usage"]))

    def embed(self, texts, query=False):
        """As the model's, each text a request of its own; kept in half precision (cosines move by less than 1e-4)."""
        rows = self.cache.answers(f"{self.kind}/{self.llm.embed_model}", [[text, query] for text in texts], lambda new: [
            np.asarray(row, np.float16).tobytes() for row in self.llm.embed([text for text, _ in new], query)])
        return np.array([np.frombuffer(row, np.float16) for row in rows], np.float32).reshape(len(rows), -1 if rows else 0)


@dataclass
class Step:
    """One turn of the loop. A badly formatted reply has no action, and stands whole in `thought`."""
    thought: str
    action: str | None = None
    input: str | None = None
    observation: str | None = None


@dataclass
class Answer:
    """status: 'answered'; 'forced' (asked for its answer at the step limit or after three idle replies; no answer then
    is an empty text); 'refused' or 'overflow' (the method's own failures, empty text)."""
    text: str
    steps: list
    status: str
    usage: Usage


MARKS = r"[ \t>#*_`\-]*"
# 'Action: x', '### Action' above x; not a line that is only 'action', or '**action**' at the end: that is LaMP-2M's tag
LABEL = re.compile(rf"^(?![ \t]*action[ \t]*$|{MARKS}action{MARKS}\s*\Z){MARKS}(thought|action input|action|final answer|answer)"
                   rf"[ \t]*\d*{MARKS}(?::{MARKS}|$)", re.I | re.M)
MADE_UP = re.compile(rf"^{MARKS}observations?\b", re.I | re.M)
# 'RAG(x)', 'RAG[x]', 'RAG: x', 'RAG {..}'
INPUT_INSIDE = re.compile(r"([\w ]+?)\s*(?:\[(.+?)\]?|\((.+?)\)?|:?\s*(\{.+\})|:\s*(.+))$", re.S)
INLINE = re.compile(r"(?<=\S)[ \t]+(?=(?:Action|Action Input|Final Answer)[ \t]*\d*:)")


def parse_reply(text):
    """Read one ReAct reply: (thought, action, input, answer).

    action is the tool's name as written, input its text; each None where it is missing, as is the answer. Of several actions
    the first counts, of several answers the last; an action beats an answer that follows it. Everything
    from a made-up Observation on is dropped.
    """
    text = visible(text).replace("\r\n", "\n").replace("：", ":")
    text = re.sub(r"^[ \t]*```\w*[ \t]*$", "", text, flags=re.M)  # code fences round the whole or parts of it
    text = MADE_UP.split(INLINE.sub("\n", text))[0]  # 'Thought: .. Action: RAG Action Input: x' on one line
    before, *parts = LABEL.split(text)  # label, content, label, content ..
    sections = [(label.lower(), content.strip()) for label, content in zip(parts[::2], parts[1::2])]
    thought, action, given, answer = before.strip(), None, None, None
    for (label, content), (follows, after) in zip(sections, [*sections[1:], ("", "")]):
        if label == "thought":
            thought = thought or content
        elif label in ("answer", "final answer"):
            answer = content
        elif label == "action" and not answer:
            action, given = _read_action(content, after if follows == "action input" else None)
            break
    if answer:  # an explanation after a blank line is not part of the answer
        answer = re.split(r"\n\s*\n", answer)[0].strip().strip("*_`").strip()
    return thought, action, given, answer or None


def _read_action(action, given):
    """('RAG("war films")', None) -> ('RAG', 'war films'); the input as text whether quoted, JSON or in brackets."""
    action = re.sub(r"^\[([^\[\]]+)\]$", r"\1", action.strip("*_`\"' "))
    if given is None and (inline := INPUT_INSIDE.match(action)):
        action, given = inline[1], inline[inline.lastindex]
    action = re.split(r"[\[(:\n]", action)[0]
    try:
        data = json.loads(given)
        values = data.values() if isinstance(data, dict) else data if isinstance(data, list) else [given]
        given = data if isinstance(data, str) else " ".join(str(v) for v in values)
    except (TypeError, ValueError):
        pass
    given = " ".join(given.strip().strip("`").split()) if given else ""
    if given[-1:] == {"\"": "\"", "'": "'", "[": "]"}.get(given[:1]):
        given = given[1:-1].strip()
    return action.strip("*_`\"'[]. "), given or None


def find_tool(name, tools):
    """The tool that a model means by `name` ('wikipedia', 'RAG API', 'the rag tool'), or None."""
    exact = [t for t in tools if t.name.lower() == name.lower()]
    named = exact or [t for t in tools if re.search(rf"(?<![a-z]){re.escape(t.name)}", name, re.I)]
    return named[0] if len(named) == 1 else None


# ours: stands after the persona in the system prompt; alignment never rewrites it. {tools}: name and description each.
PROTOCOL = """\
You have these tools:

{tools}

Work in turns. In each turn write either one action:
Thought: what you need to know and where to find it
Action: the name of one tool ({names})
Action Input: the input for that tool
and stop there; you are then given its result as an Observation. Or, once you know enough, your answer:
Thought: why this is the answer
Final Answer: only the answer, in the form that the question asks for

Where the question says to just answer, that concerns the Final Answer: use the tools first.{rule}"""
NO_TOOLS = """\
No tools are available, so the rules about using tools do not apply. Reply in this form:
Thought: why this is the answer
Final Answer: only the answer, in the form that the question asks for"""  # ours, where there is no tool
ONE_TOOL = " There is only one tool here, so a rule to use two tools does not apply."  # ours
BAD_REPLY = """\
That reply has neither an action nor an answer in the right form{why}. Write a line that begins with 'Action:' and names a \
tool ({names}), and below it a line that begins with 'Action Input:'. Or, once you know enough, a line that begins with \
'Final Answer:'."""  # ours: the observation after a reply that does not parse; no lines in it that a model could copy
# ours, where there is no tool
NO_ANSWER = "That reply has no answer in the right form{why}. Write one line that begins with 'Final Answer:'."
UNKNOWN_TOOL = "There is no tool '{name}'. The tools are: {names}."  # ours
REPEATED = "You have already done exactly this, and its result stands above. Do not repeat it: {instead}."  # ours
FORCED = "No more actions are possible. Reply now with one line: 'Final Answer:' and only the answer."  # ours


def protocol(tools):
    """The part of the system prompt that explains the tools and the format."""
    if not tools:
        return NO_TOOLS
    described = "\n\n".join(f"{t.name}: {t.description}" for t in tools)
    return PROTOCOL.format(tools=described, names=" or ".join(t.name for t in tools), rule="" if len(tools) > 1 else ONE_TOOL)


def react(llm, system, question, tools, max_steps=8, eager=False):
    """Answer `question` in a ReAct loop (a_t ~ pi_P(. | c_t), Eq. 4).

    The answer is forced after `max_steps` replies, or three in a row that lead nowhere (badly formatted, an unknown tool,
    an action already done). eager: a bare label without 'Final Answer:' is an answer even before a tool was used. A tool's
    failure is an observation. Raises ServiceError where the model cannot be reached."""
    messages = [{"role": "system", "content": "\n\n".join(filter(None, [system, protocol(tools)]))},
                {"role": "user", "content": question}]
    steps, usage, stuck, done, forced = [], Usage(), 0, set(), False
    while True:
        try:
            reply = llm.chat(messages, stop=["\nObservation"])
        except ContextOverflow as e:
            steps.append(Step(f"(no reply: {e})"))
            return Answer("", steps, "overflow", usage)
        usage = usage + reply.usage
        if reply.finish == "content_filter":
            return Answer("", steps, "refused", usage)
        text = MADE_UP.split(visible(reply.text))[0].strip()
        messages.append({"role": "assistant", "content": text or "(no reply)"})
        thought, action, given, answer = parse_reply(text)
        if not answer and not LABEL.search(text) and (done or forced or not tools or eager):
            first = re.split(r"\n\s*\n", text)[0].strip()  # a bare label; what follows a blank line explains it
            answer = first if 0 < len(first.split()) <= (30 if forced else 8) else None
        if answer or forced:
            steps.append(Step(thought if answer else text))
            return Answer(answer or "", steps, "forced" if forced else "answered", usage)
        step = Step(thought if action and given else text, action, given)
        step.observation, ok = _observe(step, tools, done, reply.finish)
        steps.append(step)
        stuck = 0 if ok else stuck + 1
        forced = stuck == 3 or len(steps) >= max_steps
        messages.append({"role": "user", "content": f"Observation: {step.observation}" + (f"\n\n{FORCED}" if forced else "")})


def _observe(step, tools, done, finish):
    """(observation, whether the step led on) of one step; runs the tool unless that was done before."""
    names = " or ".join(t.name for t in tools)
    if not step.action or not step.input:
        missing = ": Action Input is missing" if step.action and tools else ""
        step.action = None
        return (BAD_REPLY if tools else NO_ANSWER).format(why=": it was cut off for its length" if finish == "length" else missing,
                                                          names=names), False
    tool = find_tool(step.action, tools)
    if not tool:
        return UNKNOWN_TOOL.format(name=step.action, names=names or "none"), False
    step.action = tool.name
    if (tool.name, step.input.lower()) in done:
        fresh = [t.name for t in tools if t.name not in {name for name, _ in done}]
        return REPEATED.format(instead=f"use {' or '.join(fresh)} now" if fresh else "write your Final Answer now"), False
    done.add((tool.name, step.input.lower()))
    return tool(step.input), True


def complete(llm, prompt):
    """One call without tools or system prompt, as an Answer; the baselines without an agent."""
    reply = llm.chat([{"role": "user", "content": prompt}])
    return Answer(reply.text, [], "refused" if reply.finish == "content_filter" else "answered", reply.usage)


# paper, Appendix B, word for word; {profile} is [Initial Semantic Memory]
PERSONA = """\
You are a helpful personalized assistant. Take more than two actions to infer the user preference and answer the \
question. User summary: {profile}

STRICT RULES: when using tools, always:

1. Think step-by-step about what information you need.
2. MUST use at least TWO tools to answer the question.
3. Use tools precisely and deliberately and try to get the most accurate information from different tools.
4. Provide clear, concise responses. Do not give explanation in the final answer."""


def initial_persona(profile):
    """Appendix B's prompt with the profile P^u filled in."""
    return PERSONA.replace("{profile}", profile)


class PersonaAgent:
    """One user's agent. persona: the user's part of the system prompt; tools default to Wiki and RAG over `memory`."""

    def __init__(self, llm, memory, persona, tools=None, max_steps=8):
        self.llm, self.memory, self.persona, self.max_steps = llm, memory, persona, max_steps
        self.tools = [Wiki(), RAG(memory)] if tools is None else tools

    def answer(self, question):
        """Answer one question under the current persona."""
        return react(self.llm, self.persona, question, self.tools, self.max_steps)

    def observe(self, query, response, **metadata):
        """Remember what the user really answered: appends to the memory. Evaluation never calls this."""
        self.memory.add([Episode(query, response, metadata)])
