"""A stand-in for a language model, an embedding model and Wikipedia: NOT a model, a few lexical
rules behind real sockets, for a first run without a key and for the tests.

It answers each request by rules from that request alone (hashed word vectors, and a reader that
counts shared words), in the wire formats that the clients use: OpenAI's /v1 chat and embeddings,
Bedrock's Converse and Titan, Wikipedia's search and summary. Its scores say nothing of the method.

    python tests/standin.py --port 8000
"""

import argparse
import json
import math
import re
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# what says nothing | what praises | what blames
LISTS = """\
about after again also been before both could does down each even from have having here into just
more most much only other over same some such than that their them then there these they this those
through under until very were what when where which while whom will with would your answer following
without explanation further |
best love loved excellent great perfect wonderful favorite amazing superb recommend happy pleased
beautiful |
broke broken worst terrible waste refund returned disappointed poor cheap late damaged awful useless
"""
STOP, GOOD, BAD = (set(part.split()) for part in LISTS.split("|"))


def words(text):
    """Content words, lower case, a plural s taken off."""
    return [w.rstrip("s") for w in re.findall("[a-z]{4,}", text.lower()) if w not in STOP]


def embed(text, size=256):
    """A hashed bag of words as a unit vector; a text without words has a vector of its own."""
    row = [0.0] * size
    for word, n in Counter(words(text) or ["(none)"]).items():
        row[zlib.crc32(word.encode()) % size] += 1 + math.log(n)
    norm = math.hypot(*row)
    return [x / norm for x in row]


def ask_of(question):
    """({option: what it says of itself}, content) of a LaMP question, from its own words; a free
    question has no options."""
    pair = re.search(r'\[1\]: "(.*)" \[2\]: "(.*)"', question, re.S)
    if pair:
        return {"[1]": pair[1], "[2]": pair[2]}, f"{pair[1]} {pair[2]}"
    listed = re.search(r"(?:tags|categories): \[([^\]]*)\] \w+: (.*)", question, re.S)
    if listed:
        return {label: label for label in listed[1].split(", ")}, listed[2]
    review = re.search(r"review: (.*)", question, re.S)
    if review:
        return dict.fromkeys("12345", ""), review[1]
    return {}, question  # a free one


# (label, text) of the items of a memory tool or a profile, and of LaMP's prompts; the last is what
# `gradient` writes, which `update` puts into the persona.
EVIDENCE = [
    re.compile(r"^(?:\[\d+\] |- )?(?:[\d-]+ \| )?\w+: (?P<label>.+?) \| (?P<text>.+)$", re.M),
    re.compile(r'for the (?:movie|article): "(?P<text>.*?)" is "(?P<label>.*?)"', re.S),
    re.compile(r'(?P<label>\d) is the score for "(?P<text>.*?)"', re.S),
    re.compile(r"answers '(?P<label>.+?)' for texts about (?P<text>.+?)\."),
]


def evidence_in(text):
    """[(label, text)]: the labelled items that a prompt shows."""
    found = []
    for form in EVIDENCE:
        found += [(match["label"], match["text"]) for match in form.finditer(text)]
    before, asked, _ = text.partition("which reference")
    if asked:  # LaMP-1's retrieved titles have no label
        found += [("", title) for title in re.findall(r'"(.*?)"(?=,| ")', before)]
    return found


def read(question, shown):
    """The option with most shared words in the evidence of `shown`, or in itself without any; to
    a free question the answer of the first memory shown, which is the most similar one."""
    options, content = ask_of(question)
    if not options:
        recalled = EVIDENCE[0].search(shown)
        return recalled["label"] if recalled else "I do not know yet."
    mine, evidence = set(words(content)), evidence_in(shown)
    score = Counter()
    for option, meaning in options.items():
        own = set(words(meaning))
        if len(options) == 2:
            score[option] = sum(len(own & set(words(" ".join(item)))) for item in evidence)
            continue
        score[option] = len(own & mine)
        for label, text in evidence:
            if label == option:
                score[option] += 0.3 + len(mine & set(words(text)))
    if "5" in options:
        mood = 4 + len(mine & GOOD) - len(mine & BAD)
        score[str(max(1, min(5, mood)))] += 0.5
    return max(options, key=lambda option: score[option])


def react(messages):
    """One turn of the loop: the memory first, then Wikipedia, then an answer from what was seen."""
    system, question, past = messages[0]["content"], messages[1]["content"], messages[2:]
    content = words(ask_of(question)[1])
    done = [m["content"] for m in past if m["role"] == "assistant"]
    seen = [m["content"].removeprefix("Observation: ") for m in past if m["role"] == "user"]
    forced = bool(seen) and "No more actions" in seen[-1]
    topics = " ".join(list(dict.fromkeys(content))[:12]) or "history"
    rag = "RAG", "I look at how this user answered similar questions.", topics
    wiki = "Wiki", "I look up the subject.", max(content or ["topic"], key=len)
    for tool, thought, topic in (rag, wiki):
        offered = re.search(rf"^{tool}: ", system, re.M)
        if offered and not forced and not any(f"Action: {tool}" in turn for turn in done):
            return f"Thought: {thought}\nAction: {tool}\nAction Input: {topic}"
    answer = read(question, "\n".join([*seen, system]))
    return f"Thought: I compare with what the user did.\nFinal Answer: {answer}"


def summary(prompt):
    """A profile by counting: the most frequent answers and words."""
    history = prompt.split("User history, oldest first:\n")[-1]
    labels = Counter(label or text for label, text in evidence_in(history))
    often = ", ".join(f"{label} ({n})" for label, n in labels.most_common(3) if n > 1)
    topics = ", ".join(word for word, _ in Counter(words(history)).most_common(8))
    return f"Most frequent answers: {often or 'none twice'}. Frequent subjects: {topics}."


def gradient(prompt):
    """Feedback: what the user answered, where the agent differed, which words to search for."""
    form = r"<question>\n(.*)\n</q.*<expected_answer>\n(.*)\n</e.*<agent_response>\n(.*)\n</a"
    question, expected, response = re.search(form, prompt, re.S).groups()
    content = set(words(ask_of(question)[1]))
    topics = ", ".join(sorted(content, key=lambda word: (len(word), word))[-5:])
    verdict = "agrees with" if expected.strip() == response.strip() else "differs from"
    note = f"The user answers '{expected}' for texts about {topics}."
    return f"The response {verdict} the user. {note} Search memory for: {topics}."


def update(prompt):
    """The current persona with what the feedback says of the user added to it."""
    form = r"Current system prompt: (.*)\n\nProvided Feedback: (.*)\n\nBased on the feedback"
    persona, feedback = re.search(form, prompt, re.S).groups()
    notes = re.findall(r"The user answers .+? for texts about .+?\.", feedback)
    new = [f"- {note}" for note in notes if note not in persona]
    return "\n".join([persona, "", "User preferences:", *new])


def reply_to(messages):
    """The stand-in's whole mind: which rule answers which request."""
    first, last = messages[0]["content"], messages[-1]["content"]
    if first.startswith("You are a meticulous and critical evaluator"):
        return gradient(last)
    if first.startswith("You are a prompt engineering assistant"):
        return update(last)
    if "oldest first:" in last or re.match("Summarize these|Describe the|Merge these", last):
        return summary(last)
    if messages[0]["role"] == "system":
        return react(messages)
    return read(last, last)


def said(messages, stops):
    """(text, tokens read, tokens written), four characters to a token."""
    text = reply_to(messages)
    for stop in stops or []:
        text = text.split(stop)[0]
    return text, sum(len(m["content"]) for m in messages) // 4, len(text) // 4 + 1


def chat(body):
    text, read, written = said(body["messages"], body.get("stop"))
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": read, "completion_tokens": written}}


def converse(body):
    system = [{"role": "system", "content": body["system"]}] if "system" in body else []
    messages = []
    for message in [*system, *body["messages"]]:
        text = "".join(block["text"] for block in message["content"])
        messages.append({"role": message["role"], "content": text})
    text, read, written = said(messages, body["inferenceConfig"].get("stopSequences"))
    output = {"message": {"role": "assistant", "content": [{"text": text}]}}
    usage = {"inputTokens": read, "outputTokens": written}
    return {"output": output, "stopReason": "end_turn", "usage": usage}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: headers and body apart would wait 40 ms for each other
    log_message = staticmethod(lambda *args: None)

    def send(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path.endswith("/search/page"):
            title = parse_qs(url.query).get("q", [""])[0].strip().capitalize()
            page = {"id": 1, "key": title.replace(" ", "_"), "title": title, "excerpt": ""}
            return self.send({"pages": [page] if title else []})
        title = unquote(url.path.rsplit("/", 1)[1]).replace("_", " ")
        extract = f"{title} is a topic. (The stand-in holds no encyclopedia.)"
        self.send({"type": "standard", "title": title, "extract": extract})

    def do_POST(self):
        self.raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(json.loads(self.raw))

    def answer(self, body):
        if self.path.endswith("/invoke"):
            self.send({"embedding": embed(body["inputText"])})
        elif self.path.endswith("/embeddings"):
            rows = [{"index": i, "embedding": embed(t)} for i, t in enumerate(body["input"])]
            self.send({"data": rows})
        else:
            self.send(converse(body) if self.path.endswith("/converse") else chat(body))


def start(port=0, handler=Handler):
    """A running server on loopback, at port `server.server_port`; `server.shutdown()` ends it."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.socket.listen(128)  # that many workers may connect at once
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    running = start(parser.parse_args().port)
    print(f"stand-in, no language model: http://127.0.0.1:{running.server_port}/v1", flush=True)
    threading.Event().wait()
