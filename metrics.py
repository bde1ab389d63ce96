"""Answers to labels, LaMP's metrics, intervals and paired tests, the run folders, and the tables of finished runs.

Parsing and scoring are apart: `parse_label` and `parse_rating` turn an answer text into a label or None, leniently but
never by guessing; the metrics then follow the official scorer (LaMP-Benchmark/LaMP, eval/evaluation.py), which strips
white space and compares exactly. They pool all queries; nothing here averages per user.
"""
import html
import json
import math
import os
import re
import sys
import threading
import time
import unicodedata
import weakref
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

import numpy as np


# ---------------------------------------------------------------------------------------------------- labels

# LaMP's labels, in the order of the official scorer
CITATIONS = ("[1]", "[2]")
MOVIE_TAGS = ("sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
              "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story")
NEWS_CATEGORIES = ("food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
                   "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
                   "healthy living")
RATINGS = ("1", "2", "3", "4", "5")


# ---------------------------------------------------------------------------------------------------- answers to labels

# Where an answer stands: at the start of a line, or after words like these. NOUN names it, KIND may stand before it.
NOUN = r"(?:answer|tags?|genre|category|score|rating|reference|option|paper|label|prediction|stars)"
KIND = rf"(?:(?:the|a|an|best|likely|most likely|probably|boxed|text|{NOUN})\b[\s#:{{]*)*"
CUE = (rf"(?:\b{NOUN}\b(?:[^\n.:=]*?(?:\bis\b|\bbe\b|\bas\b|[:=]|\bof\b)|(?=\s*['\"\[]))|\b(?:give|rate|choose|pick|tag)\b"
       r"(?: (?:it|this)(?: \w+)?)?(?: as)?|\b(?:would cite|relate[sd] to|described as|think it'?s)\b)")
# '2. ', '-> ' and the like before an answer that starts its line
LEAD = r"^(?:\s*(?:[-•>#→~]|\d+[.)])\s+)*\s*[~→]?"
# 'it is not a comedy' and 'if it were a comedy' give no answer
DENIED = re.compile(r"\b(?:no|not|never|cannot|neither|unlikely|wrong|incorrect|unrelated|if)\b|n't\b")
# 'the user's usual rating is 5' is no answer either
HABIT = re.compile(r"\b(?:usual|average|typical|favou?rite|(?:most )?(?:frequent|common))(?:ly)? (?:\w+ )?$")
# from here on an answer is explained: 'comedy, because it is no romance', 'comedy, not romance'
EXPLAINED = re.compile(r"\b(?:because|since|although|rather|instead|(?<!well )as (?!well))|[,(]\s*not\b|[.!](?=\s|$)|"
                       r"\bmore \w+ than\b")
# what ends an answer: '4 stars.', '"comedy" tag among the given options', 'comedy (it is funny)'
ENDED = re.compile(rf"[\s\"')\]}}>]*(?:-?stars?\b|points?\b|{NOUN}\b)?"
                   r"(?: (?:among|from|out of) (?:the|these)(?: \w+){1,3}?)?[\s\"')\]}>]*"
                   r"(?:$|[.!;](?=\s|$)|[,:(]|- |(?:because|since|as|is|review)\b)")
WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
# '/5', ' out of five stars', ' on a scale of 1 to 5'
SCALE = (r"\s*(?:/|\bout of\b|(?:(?<=\d )|(?<=stars ))of\b)\s*(?:5|five)(?:\.0+)?\b(?!\.\d)(?: stars?)?|"
         r"\b(?:on )?(?:a )?scale (?:of|from) 1\s*(?:to|-)\s*5\b,?|\b1\s*(?:to|-)\s*5\b")
# characters as others that mean the same
PLAIN = str.maketrans({**dict.fromkeys("\u2010\u2011\u2012\u2013\u2014", "-"), **dict.fromkeys("“”", '"'), "_": " ",
                       **dict.fromkeys("‘’", "'"), **dict.fromkeys("*`\u200b\ufeff\\$", None)})


def _clean(text):
    """'**Dark_Comedy**' -> 'dark comedy': one case, plain quotes and dashes, no emphasis or tags; options echoed on one
    line are split."""
    text = unicodedata.normalize("NFKC", html.unescape(str(text))).lower().translate(PLAIN)
    return re.sub(r"[ \t]+(?=\[\d\]:)", "\n", re.sub(r"</?(?:answer|score|tag|label|category)>", "", text)).strip()


def _given(text, one, read, mention):
    """What a clean text gives where an answer may stand: one answer, or None (nothing, or not to be told apart).

    one: pattern of an answer. read: its text -> answer, None where it is none. mention: pattern of an answer in prose."""
    cued, leading = set(), set()  # answers after words like 'the answer is'; at the start of a line
    for m in re.finditer(rf"(?:{LEAD}|(?P<cue>{CUE})\s*){KIND}(?P<open>['\"\[({{<\s]*)(?P<one>{one})"
                         r"(?!\w|\.?\d|-(?!stars?\b)\w*[a-z])", text, re.M):
        line, rest = text[text.rfind("\n", 0, m.start("one")) + 1:m.start("one")], text[m.end():].split("\n")[0]
        denied = (DENIED.search(re.split(r"[.!?;]\s|\bbut\b", line)[-1])
                  or re.match(r"(?!\W*[,(] ?not\b)\W*(?:is )?(?:not|unrelated|unlikely|wrong)\b", rest))
        habit = m["cue"] and HABIT.search(text[:m.start("cue")].split("\n")[-1])
        if denied or habit or not (ENDED.match(rest) or "[" in m["open"]):  # a bracket may be followed by its title
            continue
        others = re.findall(mention, EXPLAINED.split(rest)[0]) + re.findall(rf"^\W*(?:or |maybe |(?={one}\W*$))({one})\b", rest)
        mine = read(m["one"])
        (cued if m["cue"] else leading).add(None if any(read(o) != mine for o in others) else mine)
    found = cued or leading
    return found.pop() if len(found) == 1 else None


def parse_label(text, labels):
    """The one label that an answer text gives, or None: leniently, but never by guessing.

    It must be the whole text, or stand where an answer stands: at the start of a line or after words like 'the answer is',
    followed by an end or an explanation. 'comedy or romance', 'not a comedy' and 'comedy; romance' give None; 'comedy,
    because it is no romance' gives 'comedy'. 'food and drink', 'sci fi' and 'option 2' are 'food & drink', 'sci-fi', '[2]'.
    """
    def key(form):
        return " ".join(re.sub(r"-|\band\b|&", " ", form.strip("[] ")).split())

    names = {key(_clean(label)): label for label in labels}
    text = _clean(text)
    whole = key(re.sub(r"^[\W]*|[\W]*$", "", text))
    if whole in names and not (whole.isdigit() and text.startswith("-")):
        return names[whole]
    one = "|".join(re.sub(r"\\? ", r"[-\\s&]+(?:and\\s+)?", re.escape(n)) for n in sorted(names, key=len, reverse=True))
    bracketed = all(label.startswith("[") for label in labels)
    mention = rf"(?:[\[(]\s*|\b{NOUN} #?|\bor )({one})\b" if bracketed else rf"\b({one})\b"
    return _given(text, one, lambda form: names.get(key(form)), mention)


def parse_rating(text):
    """The one rating from 1 to 5 that an answer text gives, as a string ('4', '4/5', 'four stars' -> '4'), or None.

    '4.5' stays '4.5': LaMP's scorer takes any number. '7', '-3' and '3 or 4' give None.
    """
    text = re.sub("([★⭐]+)☆*", lambda m: f" {len(m[1])} stars" if len(m[1]) > 1 else " stars", _clean(text))
    text = re.sub(SCALE, "", re.sub(r"\b(" + "|".join(WORDS) + r")\b", lambda m: WORDS[m[1]], text))

    def read(form):
        return f"{float(form):g}" if 1 <= float(form) <= 5 else None

    whole = re.fullmatch(r"(?!-)[^\w.]*(\d+(?:\.\d+)?)[^\w.]*\.?(?:-?(?:stars?|points?)\W*)?", text.strip())
    if whole:
        return read(whole[1])
    return _given(text, r"\d+(?:\.\d+)?", read, r"\d+(?:\.\d+)?")


def parse(text, labels):
    """`parse_rating` where the labels are ratings, else `parse_label`."""
    return parse_rating(text) if tuple(labels) == RATINGS else parse_label(text, labels)


# ---------------------------------------------------------------------------------------------------- metrics

def _index(gold, pred, labels):
    """Positions in `labels` of gold and of predicted texts, two arrays (n,); -1 where a text is no label (the official
    rule: strip, then exact). Raises ValueError where the lists differ in length."""
    place = {label: i for i, label in enumerate(labels)}
    pairs = [[place.get(str(t).strip(), -1) for t in pair] for pair in zip(gold, pred, strict=True)]
    return np.array(pairs, dtype=int).reshape(-1, 2).T


def accuracy(gold, pred, labels):
    """Share of answers whose label equals the gold label; anything outside `labels` is the label -1. Empty: nan."""
    gold, pred = _index(gold, pred, labels)
    return float(np.mean(gold == pred)) if len(gold) else math.nan


def macro_f1(gold, pred, labels):
    """Mean F1 over ALL `labels`, those that never occur counting 0 (scikit-learn's f1_score(labels=range(n),
    average='macro'), as the official scorer calls it). Empty: nan."""
    gold, pred = _index(gold, pred, labels)
    if not len(gold):
        return math.nan
    ids = range(len(labels))
    hits = np.array([np.sum((gold == i) & (pred == i)) for i in ids], dtype=float)
    total = np.array([np.sum(gold == i) + np.sum(pred == i) for i in ids], dtype=float)
    return float(np.mean(np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)))


def _errors(gold, pred):
    """Rating errors, shape (n,). An answer that is no number is taken as the end of the scale farther from the gold
    (official rule). So is nan or inf, which would stop the official scorer."""
    out = []
    for g, p in zip(gold, pred, strict=True):
        g = float(g)
        try:
            p = float(p)
        except (TypeError, ValueError):
            p = math.nan
        if not math.isfinite(p):
            p = 1.0 if abs(1 - g) > abs(5 - g) else 5.0
        out.append(p - g)
    return np.array(out)


def mae(gold, pred):
    """Mean absolute error of ratings given as strings. Empty: nan."""
    errors = _errors(gold, pred)
    return float(np.mean(np.abs(errors))) if len(errors) else math.nan


def rmse(gold, pred):
    """Root mean squared error of ratings given as strings. Empty: nan."""
    errors = _errors(gold, pred)
    return float(np.sqrt(np.mean(errors ** 2))) if len(errors) else math.nan


def score(gold, pred, labels):
    """{metric name: value} as the official scorer computes it; a prediction None is an answer that it cannot read."""
    if tuple(labels) == RATINGS:
        return {"MAE": mae(gold, pred), "RMSE": rmse(gold, pred)}
    return {"accuracy": accuracy(gold, pred, labels), "macro-F1": macro_f1(gold, pred, labels)}


def floors(gold, labels):
    """{metric: the best that one constant answer reaches}: what a method must beat."""
    scores = [score(gold, [label] * len(gold), labels) for label in labels]
    best = min if tuple(labels) == RATINGS else max
    return {name: best(s[name] for s in scores) for name in scores[0]}


# ---------------------------------------------------------------------------------------------------- intervals and paired tests

def _counts(gold, pred, labels):
    """Per query the counts (n, k) whose sums over queries give every metric: ratings [1, |error|, error^2]; labels [1, then
    per label hit, then per label gold + predicted]."""
    if tuple(labels) == RATINGS:
        errors = _errors(gold, pred)
        return np.stack([np.ones(len(errors)), np.abs(errors), errors ** 2], axis=1)
    g, p = (np.eye(len(labels) + 1)[row][:, :-1] for row in _index(gold, pred, labels))  # -1, no label, is a row of zeros
    return np.hstack([np.ones((len(g), 1)), g * p, g + p])


def _from_counts(sums, labels):
    """{metric name: values} of summed counts, shape (..., k)."""
    n = sums[..., 0]
    if tuple(labels) == RATINGS:
        return {"MAE": sums[..., 1] / n, "RMSE": np.sqrt(sums[..., 2] / n)}
    hits, total = sums[..., 1:len(labels) + 1], sums[..., len(labels) + 1:]
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    return {"accuracy": hits.sum(-1) / n, "macro-F1": f1.mean(-1)}


def _resampled(users, counts, labels, resamples=2000, seed=0):
    """{metric: (resamples,)} of bootstrap samples of whole users, drawn as multinomial weights of per-user sums."""
    names, place = np.unique([str(u) for u in users], return_inverse=True)
    sums = np.zeros((len(names), counts.shape[1]))
    np.add.at(sums, place, counts)
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    return _from_counts(weights @ sums, labels)


def intervals(users, gold, pred, labels, resamples=2000, seed=0):
    """{metric: [low, high]}: 95% percentile intervals by bootstrap over users, whose queries are not independent.

    users: the user of each query. {} below 10 users, where a bootstrap tells nothing. In 1,000 simulated tables of 50 users
    with 3 queries each (accuracy 0.6, users differing by a standard deviation of 0.2) the interval held the true accuracy in
    93.9% of the cases (tests/bench.py, coverage)."""
    if len(set(users)) < 10:
        return {}
    values = _resampled(users, _counts(gold, pred, labels), labels, resamples, seed)
    return {name: np.percentile(v, [2.5, 97.5]).tolist() for name, v in values.items()}


def paired(users, gold, first, second, labels):
    """Comparison of two methods on the same queries: wins, losses and ties of `first`, the exact McNemar p-value of
    accuracy (None for ratings; it takes queries as independent, the intervals do not), and {metric: [difference, low, high]}
    by bootstrap over users ([difference] below 10)."""
    a, b = _counts(gold, first, labels), _counts(gold, second, labels)
    better = b[:, 1] - a[:, 1] if tuple(labels) == RATINGS else (a - b)[:, 1:len(labels) + 1].sum(1)
    wins, losses = int((better > 0).sum()), int((better < 0).sum())
    tail = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1)) / 2 ** (wins + losses)
    point = {name: _from_counts(a.sum(0), labels)[name] - v for name, v in _from_counts(b.sum(0), labels).items()}
    spread = {name: [] for name in point}
    if len(set(users)) >= 10:
        one, two = (_resampled(users, counts, labels) for counts in (a, b))  # the same users both times
        spread = {name: np.percentile(one[name] - two[name], [2.5, 97.5]).tolist() for name in point}
    return {"wins": wins, "losses": losses, "ties": len(gold) - wins - losses,
            "p": None if tuple(labels) == RATINGS else min(1.0, 2 * tail),
            "difference": {name: [float(v), *spread[name]] for name, v in point.items()}}


def jaccard(texts):
    """Similarity of every pair of texts as word sets, |A & B| / |A | B|, an (n, n) matrix; two texts without a word: 1.

    Appendix G gives no more than 'pairwise Jaccard similarities between the personas'. Ours: sets of lower-case words without
    punctuation, of the whole persona, nothing stemmed or left out, so that what all personas share, such as the template's
    own words, counts as similarity."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    return np.array([[len(a & b) / len(a | b) if a | b else 1.0 for b in words] for a in words]).reshape(len(texts), len(texts))


# ---------------------------------------------------------------------------------------------------- run folders

LOCKS = weakref.WeakSet()  # open lock files of run folders; a forked worker must not keep them when its run dies
if fcntl:
    os.register_at_fork(after_in_child=lambda: [file.close() for file in LOCKS])


class Problem(Exception):
    """Problem(line to print, exit code = 1): what a user can cause and mend; the exit code is 2 for wrong usage."""


def read_lines(path):
    """The whole lines of a JSON lines file, without one that is only half written; [] where there is no file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as e:
        raise Problem(f"{path} holds a line that is not JSON ({e}): mend or delete the folder.") from None


class Folder:
    """A run folder: JSON lines appended as they come, from any thread. One made with other settings is refused."""

    def __init__(self, path, settings):
        self.path, self.lock = Path(path), threading.Lock()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "predictions.jsonl").touch()
            self.held = open(self.path / "lock", "w")  # dies with its process
            LOCKS.add(self.held)
            new = not (self.path / "predictions.jsonl").stat().st_size and not (self.path / "results.json").exists()
            before = settings if new else json.loads((self.path / "results.json").read_text(encoding="utf-8"))["settings"]
            differ = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v and k != "data"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise Problem(f"cannot use the folder {self.path}: {e}. Choose another one with --output.", 2) from None
        try:
            fcntl and fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Problem(f"{self.path} is in use by another run: wait for it, or choose another --output.", 2) from None
        if differ:
            raise Problem(f"{self.path} holds a run with other settings ({'; '.join(differ)}): choose another --output.", 2)
        for file in self.path.glob("*.jsonl"):  # a last line torn by a crash goes, so that the next one stands alone
            text = file.read_bytes()
            os.truncate(file, text.rfind(b"\n") + 1)

    def append(self, name, row):
        """Add a line, whole or not at all."""
        line = (json.dumps(row) + "\n").encode()
        with self._needed(name), self.lock, open(self.path / name, "ab", buffering=0) as out:
            end = out.tell()
            try:
                while line:  # a disk that fills up takes a part of it first
                    line = line[out.write(line):]
            except OSError:
                out.truncate(end)
                raise

    def write(self, name, data):
        part = self.path / f"{name}.part"
        with self._needed(name):
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path / name)

    def save(self, name, **arrays):
        """Write an .npz file."""
        part = self.path / f"{name}.part"
        with self._needed(name):
            with open(part, "wb") as out:
                np.savez(out, **arrays)
            part.replace(self.path / name)

    @contextmanager
    def _needed(self, name):
        try:
            yield
        except OSError as e:
            raise Problem(f"cannot write {self.path / name}: {e.strerror}. What was answered is kept: once there is room, "
                          "the same command goes on from there.") from None


class Ledger:
    """The run folders of one start: what they hold already, and every new line, from any thread, with the progress on a terminal.

    folders: {method: Folder}. wanted: ids of the queries. rows: {method: {id: what the progress needs}}; lines: {method:
    {user id: line of personas.jsonl}}. stopping: failures are no longer kept, they come from stopping."""

    def __init__(self, folders, labels, wanted):
        self.folders, self.labels, self.wanted, self.stopping = folders, labels, set(wanted), False
        self.rows, self.lines, self.failed = {}, {}, {m: set() for m in folders}
        self._lock, self._start = threading.Lock(), time.time()
        for m, folder in folders.items():
            (folder.path / "errors.jsonl").unlink(missing_ok=True)  # what failed is tried again
            found = read_lines(folder.path / "predictions.jsonl")
            self.rows[m] = {r["id"]: self._brief(r) for r in found if r["id"] in self.wanted}
            self.lines[m] = {r["user_id"]: r for r in read_lines(folder.path / "personas.jsonl")}
        self._before = sum(map(len, self.rows.values()))

    @staticmethod
    def _brief(row):
        return {key: row[key] for key in ("gold", "prediction", "usage")}

    def add(self, method, file, row):
        """Append a line to a file of a method's folder. Raises Problem where it cannot be written."""
        if self.stopping and file == "errors.jsonl":
            return
        self.folders[method].append(file, row)
        with self._lock:
            if file == "errors.jsonl":
                self.failed[method].add(row["id"])
            elif file == "predictions.jsonl":
                self.rows[method][row["id"]] = self._brief(row)
            if sys.stderr.isatty() and self.rows[method]:
                left = self._seconds_left()
                print(f"\r{self._progress(method)}  {left:.0f} s left\033[K", end="" if left else "\n", file=sys.stderr, flush=True)

    def _seconds_left(self):
        done, lost = (sum(map(len, found.values())) for found in (self.rows, self.failed))
        return (time.time() - self._start) / max(done - self._before, 1) * (len(self.wanted) * len(self.folders) - done - lost)

    def _progress(self, method):
        """'rag-4 7/18, 1 failed  accuracy 0.714  ..': done of all, running metric, calls, tokens."""
        rows = list(self.rows[method].values())
        used = total(r["usage"] for r in rows)
        scores = score([r["gold"] for r in rows], [r["prediction"] for r in rows], self.labels)
        return (f"{method} {len(rows)}/{len(self.wanted)}, {len(self.failed[method])} failed  "
                + "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
                + f"  {used['calls']} calls  {(used['input'] + used['output']) / 1000:.0f}k tokens")


# ---------------------------------------------------------------------------------------------------- tables of runs

def total(usages):
    """The sum of usages (dicts of calls, input, cached, output, seconds)."""
    usages = list(usages)
    return {key: sum(u[key] for u in usages) for key in ("calls", "input", "cached", "output", "seconds")}


def tally(rows, labels):
    """What a list of answers comes to: metrics, LaMP's strict metrics on the raw texts, and counts.

    rows: dicts with user_id, gold, prediction (None: not parsed), text, status, steps ({"action", "input"}) and seconds."""
    gold, pred, texts = ([row[key] for row in rows] for key in ("gold", "prediction", "text"))
    used = [{(s["action"], s["input"].lower()) for s in row["steps"] if s["action"]} for row in rows]  # each ran once
    n = max(len(rows), 1)
    return {
        "metrics": {"n": len(rows), "right": sum(g == p for g, p in zip(gold, pred)), **score(gold, pred, labels)},
        "intervals": intervals([row["user_id"] for row in rows], gold, pred, labels), "floors": floors(gold, labels),
        "strict": score(gold, texts, labels), "unparsed": pred.count(None),
        "status": {s: sum(row["status"] == s for row in rows) for s in ("answered", "forced", "refused", "overflow")},
        "tool_calls_per_answer": {tool: round(sum(name == tool for u in used for name, _ in u) / n, 3) for tool in ("Wiki", "RAG")},
        "answers_with_two_tools": sum({"Wiki", "RAG"} <= {name for name, _ in u} for u in used),
        "seconds_per_query": round(sum(row["seconds"] for row in rows) / n, 3)}


def measure(folder, labels, ids=None):
    """What a run folder (a Path) came to, from its lines alone: `tally` of its rows ({id: line of predictions.jsonl},
    those of `ids` in this order), errors, users aligned, costs per stage, and the answers simulated in alignment."""
    rows = {row["id"]: row for row in read_lines(folder / "predictions.jsonl")}
    rows = {i: rows[i] for i in (rows if ids is None else ids) if i in rows}
    lines = list({line["user_id"]: line for line in read_lines(folder / "personas.jsonl")}.values())
    stages = {stage: total(line["usage"][stage] for line in lines) for stage in ("profile", "alignment")}
    stages["answers"], n = total(row["usage"] for row in rows.values()), max(len(rows), 1)
    return {
        "rows": rows, **tally(list(rows.values()), labels),
        "errors": len({row["id"] for row in read_lines(folder / "errors.jsonl")} - set(rows)),
        "users": {"aligned": sum(bool(line["iterations"]) for line in lines),
                  "updated": sum(any(step["accepted"] for step in line["iterations"]) for line in lines)},
        "usage": stages, "calls_per_query": round(sum(u["calls"] for u in stages.values()) / n, 1),
        "tokens_per_query": round(sum(u["input"] + u["output"] for u in stages.values()) / n),
        "simulated": [sample["answer"] for line in lines for step in line["iterations"] for sample in step["samples"]]}


def table(results):
    """{method: results.json} as an aligned text table."""
    names = [name for name in next(iter(results.values()))["metrics"] if name not in ("n", "right")]
    rows = [["method", "n", "right", *names, "unparsed", "forced", "errors", "aligned", "updated",
             "calls/query", "tokens/query"]]
    for method, r in results.items():
        users = r["users"]  # aligned: those with a batch to learn from; updated: those whose persona changed
        aligned = [f"{users['aligned']} of {users['n']}", users["updated"]] if users["aligned"] else ["-", "-"]
        rows.append([method, r["metrics"]["n"], r["metrics"]["right"], *(f"{r['metrics'][name]:.3f}" for name in names),
                     r["unparsed"], r["status"]["forced"], r["errors"], *aligned, r["calls_per_query"], r["tokens_per_query"]])
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(str(c).rjust(w) if i else str(c).ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
                     for row in rows)


# paper, Tables 2 and 3: per method the metrics of LaMP-1, 2M, 2N and 3 (accuracy, F1; for LaMP-3 MAE, RMSE). All accuracies
# of LaMP-1 are k/123, of 2M k/300, all MAEs of LaMP-3 k/112: so small are the test sets.
PAPER = {method: dict(zip(("lamp1", "lamp2m", "lamp2n", "lamp3"), zip(*[iter(figures.split())] * 2))) for method, figures in {
    "prompt": "0.772 0.771 0.387 0.302 0.660 0.386 0.295 0.590", "icl": "0.780 0.766 0.283 0.217 0.388 0.145 0.277 0.543",
    "rag-1": "0.683 0.705 0.320 0.256 0.687 0.439 0.304 0.655", "rag-4": "0.715 0.714 0.427 0.386 0.742 0.484 0.313 0.713",
    "pag-4": "0.837 0.837 0.430 0.387 0.768 0.509 0.339 0.835", "react": "0.837 0.853 0.450 0.378 0.639 0.381 0.313 0.590",
    "membank": "0.862 0.861 0.470 0.391 0.741 0.456 0.321 0.582",
    "personaagent": "0.919 0.918 0.513 0.424 0.796 0.532 0.241 0.509",
    "no-alignment": "0.894 0.893 0.487 0.403 0.775 0.502 0.259 0.560",
    "no-persona": "0.846 0.855 0.463 0.361 0.769 0.483 0.277 0.542",
    "no-memory": "0.821 0.841 0.460 0.365 0.646 0.388 0.348 0.661",
    "no-action": "0.764 0.789 0.403 0.329 0.626 0.375 0.375 0.756"}.items()}


SUBSET = ("users", "queries_per_user", "limit")  # the settings that choose the queries


def markdown(runs, task, title, labels):
    """Lines of two Markdown tables: what the runs reached, with 95% intervals, the paper's figures where --data was given,
    and the paired difference from rag-4 and from no-alignment of the same settings; and what they cost per query.

    runs: results.json each, joined with `measure` and with changed (the settings in which the runs differ)."""
    first = max(runs, key=lambda run: run["metrics"]["n"])  # the others may be unfinished
    names, settings = list(first["floors"]), first["settings"]
    real = settings["data"] and not first["stand_in"]
    model = "" if "model" in first["changed"] else f", model {settings['model']}"
    yield from (f"### {title}", "", f"Data: {settings['data'] or 'the bundled sample'}"
                + "".join(f", {k} {settings[k]}" for k in SUBSET if settings.get(k))
                + (", NO LANGUAGE MODEL (stand-in)" if first["stand_in"] else model)
                + ". Best constant answer: " + ", ".join(f"{k} {v:.3f}" for k, v in first["floors"].items()) + "."
                + ("" if first["intervals"] else " No intervals: a bootstrap over users tells nothing below 10 users."), "")
    head = ["method", "n", *(x for name in names for x in ([name, "paper"] if real else [name])),
            f"{names[0]} vs rag-4", "vs no-alignment", "unparsed", "forced", "errors"]
    yield from ("| " + " | ".join(head) + " |", "|" + "---|" * len(head))
    for run in runs:
        cells = [run["method"] + run["changed"] + ("" if run["complete"] else " (unfinished)"), run["metrics"]["n"]]
        for i, name in enumerate(names):
            spread = " [{:.3f}, {:.3f}]".format(*run["intervals"][name]) if run["intervals"] else ""
            theirs = PAPER.get(run["method"], {}).get(task, ("", ""))  # none for a method or a task of one's own
            cells += [f"{run['metrics'][name]:.3f}{spread}"] + ([theirs[i]] if real else [])
        for name in ("rag-4", "no-alignment"):
            other = next((r for r in runs if r["method"] == name and r["changed"] == run["changed"] and r is not run), None)
            cells.append(_versus(run["rows"], other["rows"], labels, names[0]) if other else "")
        cells += [run["unparsed"], run["status"]["forced"], run["errors"]]
        yield "| " + " | ".join(map(str, cells)) + " |"
    yield from ("", "| per query: calls, tokens in (of them cached) + out, seconds | profile | alignment | answering |",
                "|---|---|---|---|")
    for run in runs:
        costs, n = run["usage"].values(), max(run["metrics"]["n"], 1)
        yield f"| {run['method']}{run['changed']} | " + " | ".join(
            f"{c['calls'] / n:.1f}, {c['input'] / n:.0f} ({c['cached'] / n:.0f}) + {c['output'] / n:.0f}, {c['seconds'] / n:.1f}"
            for c in costs) + " |"
    yield ""


def _versus(rows, others, labels, name):
    """'+0.111 [-0.050, 0.230], 3 won, 1 lost, p 0.625' of one run against another on the queries that both have."""
    ids = [i for i in rows if i in others]
    found = paired([rows[i]["user_id"] for i in ids], [rows[i]["gold"] for i in ids], [rows[i]["prediction"] for i in ids],
                   [others[i]["prediction"] for i in ids], labels)
    value, *spread = found["difference"][name]
    p = "" if found["p"] is None else ", p < 0.001" if found["p"] < 0.001 else f", p {found['p']:.3f}"
    return (f"{value:+.3f}" + (" [{:+.3f}, {:+.3f}]".format(*spread) if spread else "")
            + f", {found['wins']} won, {found['losses']} lost{p}")


def runs_below(roots, tasks):
    """Every run with answers below the folders `roots`: results.json joined with `measure` and its folder (a Path), by path."""
    runs = []
    for file in sorted({f for root in roots for f in Path(root).rglob("results.json")}):
        try:
            made = json.loads(file.read_text(encoding="utf-8"))
            made |= measure(file.parent, tasks[made["task"]].labels) | {"folder": file.parent}
            runs += [made] if made["rows"] and made["settings"]["data_hash"] else []
        except (ValueError, KeyError, TypeError) as e:
            raise Problem(f"{file} is not a results file of ours ({e!r}): name another folder.") from None
    if not runs:
        raise Problem(f"no run with answers below {', '.join(roots)}", 2)
    return runs


def report(roots, tasks, order):
    """Markdown of every run folder below `roots`, recomputed from its lines: a section per task, data and choice of queries.

    tasks: {name: Task}; order: method names."""
    groups, lines = {}, []
    for run in runs_below(roots, tasks):
        choice = [str(run["settings"].get(k)) for k in ("data_hash", *SUBSET)]
        groups.setdefault((run["task"], run["stand_in"], *choice), []).append(run)
    for (name, *_), runs in groups.items():
        differ = [k for k in runs[0]["settings"] if len({str(run["settings"].get(k)) for run in runs}) > 1]
        for run in runs:
            run["changed"] = "".join(f", {k} {run['settings'].get(k)}" for k in differ)
        runs.sort(key=lambda r: (r["changed"], order.index(r["method"]) if r["method"] in order else len(order)))
        lines += markdown(runs, name, tasks[name].title, tasks[name].labels)
    return "\n".join(lines)
