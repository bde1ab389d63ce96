"""A stand-in for a language model, an embedding model and Wikipedia: NOT a model, a few lexical rules behind real sockets.

It speaks the wire formats that the clients use (OpenAI's /v1 chat, embeddings and models; Bedrock's Converse, and InvokeModel
for Titan and Cohere; Wikipedia's search and summary) and answers each request by deterministic rules from that request alone:
hashed word vectors, and a reader that counts shared words. It accepts any key and any model name; a SigV4 signature is checked
where the access key is AWS's documentation example. It makes a first run possible without a key, and the tests run over it.
Its scores say nothing about the method.

    python -m tests.standin --port 8000
"""
import argparse
import hashlib
import hmac
import json
import math
import re
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

STOP = set("about after again also been before both could does down each even from have having here into just more most much "
           "only other over same some such than that their them then there these they this those through under until very were "
           "what when where which while whom will with would your answer following without explanation further".split())
GOOD = set("best love loved excellent great perfect wonderful favorite amazing superb recommend happy pleased beautiful".split())
BAD = set("broke broken bad worst terrible waste refund returned disappointed poor cheap late damaged awful useless".split())


def words(text):
    """Content words, lower case, a plural s taken off."""
    return [w.rstrip("s") for w in re.findall(r"[a-z]{3,}", text.lower()) if w not in STOP and len(w) > 3]


def embed(text, size=256):
    """A hashed bag of words as a unit vector; a text without words has a vector of its own."""
    row = [0.0] * size
    for word, n in Counter(words(text) or ["(none)"]).items():
        row[zlib.crc32(word.encode()) % size] += 1 + math.log(n)
    norm = math.sqrt(sum(x * x for x in row))
    return [x / norm for x in row]


def ask_of(question):
    """(options, content) of a LaMP question, from its own words."""
    pair = re.search(r'\[1\]: "(.*)" \[2\]: "(.*)"', question, re.S)
    if pair:
        return {"[1]": pair[1], "[2]": pair[2]}, f"{pair[1]} {pair[2]}"
    listed = re.search(r"(?:tags|categories): \[([^\]]*)\] \w+: (.*)", question, re.S)
    if listed:
        return {label: label for label in listed[1].split(", ")}, listed[2]
    review = re.search(r"review: (.*)", question, re.S)
    return {n: "" for n in "12345"}, review[1] if review else question


def evidence_in(text):
    """[(text, label)]: labelled items as the memory tool, a profile, an aligned persona or LaMP's prompts show them."""
    found = [(t, label) for label, t in re.findall(r"^(?:\[\d+\] |- )?(?:[\d-]+ \| )?\w+: (.+?) \| (.+)$", text, re.M)]
    found += [(t, label) for t, label in re.findall(r'for the (?:movie|article): "(.*?)" is "(.*?)"', text, re.S)]
    found += [(t, label) for label, t in re.findall(r'(\d) is the score for "(.*?)"', text, re.S)]
    found += [(t, t) for t in re.findall(r'"(.*?)"(?=,| ")', text.split("which reference")[0]) if "which reference" in text]
    return found + [(t, label) for label, t in re.findall(r"answers '(.+?)' for texts about (.+?)\.", text)]


def read(question, shown):
    """The option with most shared words in the evidence of `shown`; the option's own words where there is none."""
    options, content = ask_of(question)
    mine, evidence = set(words(content)), evidence_in(shown)
    score = Counter()
    for label, meaning in options.items():
        own = set(words(meaning))
        score[label] = len(own & mine) if len(options) != 2 else 0
        for text, answer in evidence:
            if len(options) == 2:
                score[label] += len(own & set(words(text + " " + answer)))
            elif answer == label:
                score[label] += 0.3 + len(mine & set(words(text)))
    if set(options) == set("12345"):
        mood = sum(w in GOOD for w in mine) - sum(w in BAD for w in mine)
        score[str(max(1, min(5, 4 + mood)))] += 0.5
    return max(options, key=lambda o: score[o])


def react(messages):
    """One turn of the loop: memory first, then Wikipedia, then an answer from what has been observed."""
    system, question, past = messages[0]["content"], messages[1]["content"], messages[2:]
    options, content = ask_of(question)
    topic = " ".join(list(dict.fromkeys(words(content)))[:12]) or "history"
    said = " ".join(m["content"] for m in past if m["role"] == "assistant")
    if past and "No more actions" in past[-1]["content"]:
        pass
    elif re.search(r"^RAG: ", system, re.M) and "Action: RAG" not in said:
        return f"Thought: I look at how this user answered similar questions.\nAction: RAG\nAction Input: {topic}"
    elif re.search(r"^Wiki: ", system, re.M) and "Action: Wiki" not in said:
        return f"Thought: I look up the subject.\nAction: Wiki\nAction Input: {max(words(content) or ['topic'], key=len)}"
    shown = "\n".join(m["content"].removeprefix("Observation: ") for m in past if m["role"] == "user") + "\n" + system
    return f"Thought: I compare with what the user did.\nFinal Answer: {read(question, shown)}"


def summary(prompt):
    """A profile by counting: the most frequent answers and words."""
    history = prompt.split("User history, oldest first:\n")[-1]
    labels = Counter(label for _, label in evidence_in(history))
    often = ", ".join(f"{label} ({n})" for label, n in labels.most_common(3) if n > 1)
    topics = ", ".join(w for w, _ in Counter(words(history)).most_common(8))
    return f"Most frequent answers: {often or 'none twice'}. Frequent subjects: {topics}."


def gradient(prompt):
    """Feedback: what the user answered, where the agent differed, and which words to search for."""
    part = re.search(r"Question: (.*)\n\nExpected Answer: (.*?)\n\nAgent Response: (.*?)\n\nYour feedback", prompt, re.S)
    topics = ", ".join(sorted(set(words(ask_of(part[1])[1])), key=len)[-5:])
    verdict = "agrees with" if part[2].strip() == part[3].strip() else "differs from"
    return f"The response {verdict} the user. The user answers '{part[2]}' for texts about {topics}. Search memory for: {topics}."


def update(prompt):
    """The current persona with what the feedback says of the user added to it."""
    part = re.search(r"Current system prompt: (.*)\n\nProvided Feedback: (.*)\n\nBased on the feedback", prompt, re.S)
    notes = re.findall(r"The user answers .+? for texts about .+?\.", part[2])
    return "\n".join([part[1], "", "User preferences:", *(f"- {n}" for n in notes if n not in part[1])])


def reply_to(messages):
    """The stand-in's whole mind: which rule answers which request."""
    first, last = messages[0]["content"], messages[-1]["content"]
    if first.startswith("You are a meticulous and critical evaluator"):
        return gradient(last)
    if first.startswith("You are a prompt engineering assistant"):
        return update(last)
    if "oldest first:" in last or last.startswith(("Summarize these", "Describe the personality", "Merge these")):
        return summary(last)
    if messages[0]["role"] == "system":
        return react(messages)
    return read(last, last)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: headers and body apart would wait 40 ms for each other

    def log_message(self, *args):
        pass

    def send(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path.endswith("/models"):
            return self.send({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})
        if url.path.endswith("/search/page"):
            title = parse_qs(url.query).get("q", [""])[0].strip().capitalize()
            return self.send({"pages": [{"id": 1, "key": title.replace(" ", "_"), "title": title, "excerpt": ""}] if title else []})
        if "/page/summary/" in url.path:
            title = unquote(url.path.rsplit("/", 1)[1]).replace("_", " ")
            return self.send({"type": "standard", "title": title, "extract": f"{title} is a topic. (The stand-in holds no encyclopedia.)"})
        self.send({"error": {"message": f"no such path {url.path}", "type": "not_found_error"}}, 404)

    def do_POST(self):
        self.raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(json.loads(self.raw))

    def answer(self, body):
        if self.path.startswith("/model/"):
            return self.bedrock(body)
        if self.path.endswith("/embeddings"):
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            data = [{"object": "embedding", "index": i, "embedding": embed(t)} for i, t in enumerate(texts)]
            return self.send({"object": "list", "data": data, "usage": {"prompt_tokens": sum(len(t) // 4 + 1 for t in texts)}})
        text, size = self.reply(body["messages"], body.get("stop"))
        self.send({"object": "chat.completion", "model": body.get("model"),
                   "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                   "usage": {"prompt_tokens": size, "completion_tokens": len(text) // 4 + 1}})


    @staticmethod
    def reply(messages, stops):
        text = reply_to(messages)
        for stop in stops or []:
            text = text.split(stop)[0]
        return text, sum(len(m["content"]) for m in messages) // 4

    def bedrock(self, body):
        if not self.signed():
            return self.send({"message": "The request signature we calculated does not match the signature you provided."}, 403)
        if self.path.endswith("/invoke"):
            texts = body.get("texts") or [body["inputText"]]
            return self.send({"embeddings": [embed(t) for t in texts]} if "texts" in body else
                             {"embedding": embed(texts[0]), "inputTextTokenCount": len(texts[0]) // 4 + 1})
        messages = [{"role": m["role"], "content": "".join(b["text"] for b in m["content"])} for m in body["messages"]]
        if body.get("system"):
            messages.insert(0, {"role": "system", "content": "".join(b["text"] for b in body["system"])})
        text, size = self.reply(messages, body["inferenceConfig"].get("stopSequences"))
        self.send({"output": {"message": {"role": "assistant", "content": [{"text": text}]}}, "stopReason": "end_turn",
                   "usage": {"inputTokens": size, "outputTokens": len(text) // 4 + 1, "totalTokens": size + len(text) // 4 + 1}})

    def signed(self):
        """Whether a request of the example key is signed right (AWS Signature Version 4), from what arrived on the wire."""
        match = re.match(r"AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/(\S+), SignedHeaders=(\S+), Signature=(\w+)",
                         self.headers.get("Authorization", ""))
        if not match:
            return True
        scope, names, signature = match.groups()
        listed = "".join(f"{name}:{self.headers[name].strip()}\n" for name in names.split(";"))
        request = f"POST\n{quote(self.path, safe='/-_.~')}\n\n{listed}\n{names}\n{hashlib.sha256(self.raw).hexdigest()}"
        text = f"AWS4-HMAC-SHA256\n{self.headers['X-Amz-Date']}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        key = b"AWS4wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
        for part in [*scope.split("/"), text]:
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        return hmac.compare_digest(key.hex(), signature)


def start(port=0, handler=Handler):
    """A running server on loopback; its address is `http://127.0.0.1:{server.server_port}`. `server.shutdown()` ends it."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    running = start(parser.parse_args().port)
    print(f"stand-in, no language model: http://127.0.0.1:{running.server_port}/v1", flush=True)
    threading.Event().wait()
