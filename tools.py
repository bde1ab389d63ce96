"""The agent's tools (Appendix C), and the one HTTP client with a retry policy that everything here uses.

A tool is a name, a description for the model and a function from text to text. What goes wrong inside a tool comes back
as its observation, in words that the model can use. One exception: where the embedding model cannot be reached,
`ServiceError` passes through, because a question asked without its memory would score an outage as an answer.
"""
import hashlib
import hmac
import html
import json
import os
import random
import re
import sqlite3
import threading
import time
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import quote, urlsplit

import requests
import urllib3

LOCAL = "local"  # `code` of a ServiceError that is not the server's
LIMIT = 2000  # characters of an observation; cut when it is made, so that a conversation only ever grows


class ServiceError(RuntimeError):
    """A request that finally failed. `status`: HTTP status, None where no answer came. `code`: the server's own.
    `wait`: seconds until it is worth another try, None for the usual back-off, False where it never is."""

    def __init__(self, message, status=None, code=None, wait=False):
        super().__init__(message)
        self.status, self.code, self.wait = status, code, wait


class ContextOverflow(ServiceError):
    """The input is longer than the model takes: the method's own failure, not the wire's."""


# servers' wordings, from their sources and issue threads
OVERFLOW = re.compile(r"context_length_exceeded|exceed_context_size|(maximum|available|exceeds? the|model'?s?) context|"
                      r"input tokens exceed|(prompt|input)( \(\d+ tokens\))? is too (long|large)|"
                      r"too many (input )?tokens(?!.*(wait|per day))|expected maxLength", re.I)
SPENT = re.compile(r"insufficient_quota|credit_balance|spend_limit|usage_limit|billing_hard_limit|tokens per day|"
                   r"(requests|tokens)_per_day", re.I)


class Http:
    """One `requests` session for all threads, at most `workers` requests in flight, and the one retry policy.

    Tried again, up to `tries` times and `deadline` seconds in all, after a full-jitter back-off or as long as the server
    asks (up to two minutes): connections refused, reset or cut off, time-outs, bodies that are no JSON, and the statuses
    408, 409, 424, 429 and 5xx. Never: other 4xx, redirects of a POST, inputs too long for the model, and quotas, credits and
    daily limits that are used up. After a whole round without any answer nothing is sent to that host for a minute, so that a
    run over a dead server ends. Redirects of a GET are followed; cookies, ~/.netrc and, for loopback, proxies are ignored.
    """

    def __init__(self, workers=8, tries=8, deadline=900, polite=0):
        self.tries, self.deadline = tries, deadline
        self.polite = polite  # least seconds to wait after a 429
        self.stopped = False  # nothing is sent any more
        self._dead = {}  # host -> (until when nothing is sent there, what a whole round of tries without any answer said)
        self.slots, self.session = threading.BoundedSemaphore(workers), requests.Session()
        self.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=workers))

    def send(self, method, url, body=None, headers=None, sign=None, read=lambda answer: answer, timeout=600, tries=None):
        """read(JSON of a 2xx answer) to `body` (JSON-able or None). Raises ServiceError with the server's own words.

        sign(method, url, headers, data) -> headers, called anew for each try with the very bytes that are sent."""
        data, host = None if body is None else _utf8(body), "/".join(url.split("/")[:3])
        start, tries, n = None, tries or self.tries, 0
        until, why = self._dead.get(host, (0, ""))
        if time.monotonic() < until:
            raise ServiceError(why)
        while True:
            n += 1
            try:
                with self.slots:
                    start = start or time.monotonic()  # waiting for a free slot is no fault of the server
                    if self.stopped:
                        raise ServiceError("stopped", code=LOCAL)
                    left = max(self.deadline + start - time.monotonic(), 0.1)
                    sent = {"Content-Type": "application/json", **(headers or {})}
                    sent = sign(method, url, sent, data) if sign else sent
                    return self._once(method, url, data, sent, read, min(timeout, left))
            except ServiceError as e:
                least = e.wait or (self.polite if e.status == 429 else 0)
                pause = least + random.uniform(0, min(30, 0.5 * 2 ** n))
                late = time.monotonic() - start + pause > self.deadline
                if e.wait is False or n >= tries or late:
                    message = f"{e} (tried {n} times in {time.monotonic() - start:.0f} s)" if n > 1 else str(e)
                    if e.status is None and e.wait is None and (late or n >= self.tries):
                        self._dead[host] = time.monotonic() + 60, message
                    raise type(e)(message, e.status, e.code) from None
            time.sleep(pause)

    def _once(self, method, url, data, headers, read, seconds):
        where, end, content = re.sub(r"//[^/]*@", "//", url).split("?")[0], time.monotonic() + seconds, b""
        try:
            local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1", "0.0.0.0")
            with self.session.request(
                    method, url, data=data, headers=headers, stream=True, timeout=(min(10, seconds), seconds),
                    auth=lambda request: request,  # any callable keeps ~/.netrc from replacing our Authorization
                    allow_redirects=method == "GET", proxies={"http": "", "https": ""} if local else None) as r:
                receive = getattr(r.raw, "read1", r.raw.read)  # what has come, so that a dripping server meets the deadline
                while chunk := receive(1 << 16, decode_content=True):
                    content += chunk
                    if time.monotonic() > end:
                        raise requests.Timeout("timed out")
        except (requests.exceptions.InvalidHeader, UnicodeError):  # the message would print the header, and the key in it
            raise ServiceError("a request header holds characters that HTTP does not allow: check the key for line breaks "
                               "and for characters outside ASCII", code=LOCAL) from None
        except (ValueError, requests.TooManyRedirects) as e:  # requests' errors about addresses are ValueErrors
            why = "it redirects for ever" if isinstance(e, requests.TooManyRedirects) else "it is no http or https address"
            raise ServiceError(f"'{where}' cannot be requested: {why}") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
            raise ServiceError(f"no answer from {where}: {_reason(e)}", wait=None) from None
        said = _redact(content.decode("utf-8", "replace"), headers)
        if r.status_code // 100 != 2:
            raise _failure(r, said, where)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            web = said.lstrip().startswith("<")  # a web page: another server, or not its API
            raise ServiceError(f"{where} answered with {'a web page' if web else 'something'} that is not JSON: {said[:200]!r}",
                               r.status_code, wait=False if web else None) from None
        try:
            return read(answer)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            again = None if '"error"' in said[:100] else False  # some servers send passing faults with status 200
            raise ServiceError(f"{where} did not answer as expected: {said[:600]}", r.status_code, wait=again) from None


def _failure(r, said, where):
    """The ServiceError of an error answer with the body `said`."""
    code, kind, message = fault(said)
    code = r.headers.get("x-amzn-errortype", code or "").split(":")[0].split("#")[-1] or kind
    everything, request_id = f"{code} {kind} {message}", r.headers.get("x-request-id") or r.headers.get("x-amzn-requestid")
    text = (f"HTTP {r.status_code} from {where}: {message[:600] or 'no message'}" + (f" [{code}]" if code else "")
            + (f" (it points to {r.headers['location']})" if "location" in r.headers else "")
            + (f" (request {request_id})" if request_id else ""))
    if r.status_code in (400, 413, 500) and OVERFLOW.search(everything) or r.status_code == 413:
        return ContextOverflow(text, r.status_code, code)
    again = r.status_code in (408, 409, 424, 429) or r.status_code >= 500
    again = {"true": True, "false": False}.get(r.headers.get("x-should-retry"), again)
    if not again or SPENT.search(everything) or r.status_code == 429 and "per day" in message:
        return ServiceError(text, r.status_code, code)
    wait = _asked_wait(r.headers)
    asked = f" (it asks to wait {wait:.0f} s)" if wait and wait > 120 else ""
    return ServiceError(text + asked, r.status_code, code, False if asked else wait)


def fault(said):
    """(code, type, message) of an error body, in any of the shapes that servers use.

    {"error": {"message", "code", "type"}} | {"error": text} | {"message" | "Message" | "detail": text} | text | HTML"""
    try:
        data = json.loads(said)
    except (ValueError, RecursionError):
        return None, None, " ".join(re.sub(r"(?s)<(style|script).*?</\1>|<[^>]+>", " ", said).split())
    data = (data.get("error") or data) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        return None, None, str(data)
    code, kind = (str(v).split(":")[0].split("#")[-1] if isinstance(v, str) else None
                  for v in (data.get("code") or data.get("Code") or data.get("__type"), data.get("type")))
    return code, kind, str(data.get("message") or data.get("Message") or data.get("detail") or data)


def _asked_wait(headers):
    """Seconds that the server asks us to wait, or None."""
    for name, unit in (("retry-after-ms", 1000), ("x-amz-retry-after", 1000), ("retry-after", 1)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if seconds > 0:
            return seconds
    return None


def _redact(text, headers):
    """A message without any secret of the request in it, whatever the server echoed."""
    value = headers.get("Authorization", "")
    secrets = [value.partition(" ")[2], headers.get("X-Amz-Security-Token", "")] + value.split()[1:]
    for secret in sorted((s for s in secrets if len(s) > 5), key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"(?i)(x-amz-security-token[:=]\s*)\S+", r"\1***", text)


def _utf8(body):
    """JSON bytes of `body`. Lone surrogates, which strict servers refuse, become U+FFFD."""
    text = json.dumps(body, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _reason(e):
    """What a `requests` exception means, in a few words."""
    text = f"{type(e).__name__} {e}".lower()
    for sign, words in (("proxy", "the proxy (HTTP_PROXY, HTTPS_PROXY) cannot be reached"),
                        ("refused", "nothing listens there (connection refused)"), ("timed out", "timed out"),
                        ("resol", "the host name is unknown or the network is down"),
                        ("reset", "the connection was reset"), ("incompleteread", "the answer was cut off"),
                        ("aborted", "the connection was closed without an answer"), ("ssl", "the TLS handshake failed")):
        if sign in text:
            return words
    return f"{type(e).__name__}: {str(e)[:200]}"


def sigv4(method, url, headers, data, region, access_key, secret_key, token=None, service="bedrock", now=None):
    """`headers` signed with AWS Signature Version 4: content-type, host, x-amz-date and the session token, over the very
    bytes and the very path that are sent (the path as it stands on the wire is percent-encoded once more).

    now: 'YYYYMMDDTHHMMSSZ', for tests."""
    now, parts = now or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), urlsplit(url)
    port = f":{parts.port}" if parts.port and parts.port != {"http": 80, "https": 443}.get(parts.scheme) else ""
    signed = {"content-type": headers["Content-Type"], "host": parts.hostname + port, "x-amz-date": now}
    signed |= {"x-amz-security-token": token} if token else {}
    names, scope = ";".join(signed), f"{now[:8]}/{region}/{service}/aws4_request"
    canonical = "\n".join([method, quote(parts.path, safe="/-_.~"), "", *(f"{k}:{v}" for k, v in signed.items()), "", names,
                           hashlib.sha256(data).hexdigest()])
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = ("AWS4" + secret_key).encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    return {**headers, "X-Amz-Date": now, **({"X-Amz-Security-Token": token} if token else {}), "Authorization":
            f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"}


class Cache:
    """Answers by their complete requests in one SQLite file, which threads and processes share, on a network file system
    too (no write-ahead log). What is stored first stays. offline: the file is opened read-only, and a request that it does
    not hold is a ServiceError. `found` and `asked` count the requests."""

    def __init__(self, path, offline=False):
        self.path, self.offline, self.found, self.asked = path, offline, 0, 0
        self._lock, self._full = threading.Lock(), ""  # why nothing more can be stored
        uri = f"file:{quote(os.path.abspath(path))}?mode={'ro' if offline else 'rwc'}"
        with self._database(lambda: sqlite3.connect(uri, 60, check_same_thread=False, uri=True)) as db:
            if {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")} - {"answers"}:
                raise sqlite3.DatabaseError("it is another program's database")
            if not offline:
                db.execute("CREATE TABLE IF NOT EXISTS answers (request BLOB PRIMARY KEY, model TEXT, answer)")
            db.execute("SELECT request, model, answer FROM answers LIMIT 1").fetchone()

    @contextmanager
    def _database(self, connect=None):
        """The connection, for one thread and one transaction at a time."""
        try:
            with self._lock:
                self._db = connect() if connect else self._db
                with self._db:
                    yield self._db
        except sqlite3.Error as e:
            why = f"the cache {self.path} cannot be used: {e}. Free what it needs, or name another file."
            self._full = self._full if "locked" in str(e) else why
            raise ServiceError(why) from None

    def answers(self, model, requests_, ask):
        """The stored answer, text or bytes, to each of `requests_` (JSON-able); ask(those not stored) gives theirs.

        model: who answers; a part of the request. What `ask` raises is stored nowhere."""
        keys = [hashlib.sha256(_utf8([model, request])).digest() for request in requests_]
        stored = self._stored(keys)
        new = {key: request for key, request in zip(keys, requests_) if key not in stored}
        if new and self.offline:
            with self._database() as db:
                models = ", ".join(name for name, in db.execute("SELECT DISTINCT model FROM answers"))
            request = _utf8(next(iter(new.values()))).decode()
            raise ServiceError(f"{self.path} has answers of {models or 'nobody'}, but none of {model} to: {request[:100]} ... "
                               f"{request[-200:]}. Run it without --offline.")
        if new and self._full:  # nothing is paid for that cannot be kept
            raise ServiceError(self._full)
        if new:
            rows = [(key, model, answer) for key, answer in zip(new, ask(list(new.values())))]
            with self._database() as db:
                db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", rows)
            stored |= self._stored(new)
        with self._lock:
            self.found, self.asked = self.found + len(keys) - len(new), self.asked + len(new)
        return [stored[key] for key in keys]

    def _stored(self, keys):
        with self._database() as db:
            found = ((key, db.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()) for key in keys)
            return {key: row[0] for key, row in found if row}


class Tool:
    """A tool that the agent can call: `tool(text)` -> observation of at most LIMIT characters."""

    def __init__(self, name, description, run):
        self.name, self.description, self.run = name, description, run

    def __call__(self, text):
        try:
            observation = str(self.run(text))
        except ContextOverflow as e:
            observation = f"{self.name} failed: the input is too long ({e}). Try a shorter one."
        except ServiceError:
            raise
        except Exception as e:  # a fault in one tool must not end the question
            observation = f"{self.name} failed ({type(e).__name__}: {e}). Try another input or another tool."
        return observation if len(observation) <= LIMIT else observation[:LIMIT - 4] + " ..."

    def over(self, memory):
        """This tool bound to another memory; a tool that reads no memory is the same for all."""
        return self


# paper, Appendix C, word for word
WIKI_DESCRIPTION = """\
Use this tool to get a brief summary from Wikipedia about a specific topic.

Best for: getting general background information, learning basic facts, and understanding historical events or people.

Input: a clear, specific topic name (e.g., 'Albert Einstein', 'World War II').

Output: returns a concise Wikipedia summary.

Note: use precise topic names for better results."""

# paper, Appendix C, word for word
RAG_DESCRIPTION = """\
Retrieve top-k relevant items/histories from the user memory using RAG (Retrieval-Augmented Generation).

Best for: finding detailed information on related items, answering specific questions from personal data, and \
incorporating user preferences into the final answer.

Input: a specific search query or question about the content.

Output: relevant interaction histories from the user memory.

Note: more specific queries yield more accurate results.

Requirement: must use this tool at least once to answer the question."""

WIKI_DOWN = "Wikipedia cannot be reached at the moment. Use another tool, or answer from what you know."  # ours


class Wiki(Tool):
    """Wikipedia: full-text search, then the summary of the best page, over the REST endpoints.

    base_url: a host root (another language, a mirror). contact: who runs this, an e-mail or web address, for the
    User-Agent that Wikimedia's policy asks for (default: $WIKIPEDIA_CONTACT). One request at a time, each address once.
    After a whole round of tries has failed, Wikipedia is not tried again and each call gets WIKI_DOWN.
    """

    def __init__(self, base_url="https://en.wikipedia.org", contact=None, http=None):
        super().__init__("Wiki", WIKI_DESCRIPTION, self._summary)
        contact = " ".join((contact or os.environ.get("WIKIPEDIA_CONTACT") or "no contact given").split())
        self.base, self.http = base_url.rstrip("/"), http or Http(workers=1, tries=4, deadline=120, polite=5)
        agent = f"PersonaAgent/0.1 ({contact}) python-requests/{requests.__version__}"
        self.headers = {"User-Agent": agent.encode("ascii", "replace").decode()}
        self.down = None  # why Wikipedia was given up
        self._seen, self._lock = {}, threading.Lock()

    def _summary(self, topic):
        topic = " ".join(topic.encode("utf-8", "replace").decode().split())[:250]
        if not topic:
            return "Wiki needs a topic name as its input."
        with self._lock:
            try:
                return self._look_up(topic)
            except ServiceError as e:
                if e.status in (400, 404, 414):  # this topic, not Wikipedia
                    return f"Wikipedia cannot search for '{topic}'. Try a shorter and more common topic name."
                self.down = self.down or str(e)
                return WIKI_DOWN

    def _get(self, path):
        if path not in self._seen:
            if self.down:
                raise ServiceError(self.down)
            self._seen[path] = self.http.send("GET", self.base + path, headers=self.headers, read=_no_error, timeout=30)
        return self._seen[path]

    def _look_up(self, topic):
        found = self._get(f"/w/rest.php/v1/search/page?q={quote(topic, safe='')}&limit=5").get("pages") or []
        pages = [p for p in found if isinstance(p, dict) and p.get("key")][:5]  # title matches may make the list longer
        if not pages:
            return f"Wikipedia has no page about '{topic}'. Try a more precise or a more common topic name."
        try:
            page = self._get("/api/rest_v1/page/summary/" + quote(pages[0]["key"], safe=""))
        except ServiceError as e:
            if e.status != 404:
                raise
            page = {}
        title = page.get("title") or pages[0].get("title") or topic
        extract = (page.get("extract") or "").strip()
        if page.get("type") == "disambiguation":
            others = "; ".join(f"{p.get('title')} ({p.get('description') or 'no description'})" for p in pages[1:])
            return f"'{title}' may refer to several topics. {extract} Search again with one of: {others or 'a longer name'}"
        extract = extract or f"{_plain(pages[0].get('description'))} {_plain(pages[0].get('excerpt'))}".strip()
        return f"{title}: {extract or 'this page has no summary.'}"


def _no_error(answer):
    if answer.get("error"):
        raise ValueError
    return answer


def _plain(text):
    """'<span class="searchmatch">AC</span>&amp;DC' -> 'AC&DC'."""
    return html.unescape(re.sub(r"<[^>]+>", "", text or ""))


class RAG(Tool):
    """Top-k retrieval from one user's episodic memory."""

    def __init__(self, memory, k=4):
        super().__init__("RAG", RAG_DESCRIPTION, self._recall)
        self.memory, self.k = memory, k

    def over(self, memory):
        return RAG(memory, self.k)

    def _recall(self, query):
        if not query.strip():
            return "RAG needs a search query as its input."
        try:
            found = [episode for episode, _ in self.memory.search(query, self.k)]
        except ValueError as e:  # embeddings of another dimension: the embedding service is broken, not the query
            raise ServiceError(f"the memory cannot be searched: {e}") from None
        room = max(LIMIT // max(len(found), 1) - 8, 40)  # every hit is shown, the long ones cut
        # no numbers before the hits: '[1]' would look like an answer of LaMP-1
        lines = [f"- {e.text if len(e.text) <= room else e.text[:room - 4] + ' ...'}" for e in found]
        return "\n".join(lines) or "The user memory is empty: nothing is known about this user."
