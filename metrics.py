"""Answers to labels, and LaMP's metrics.

Parsing and scoring are apart: `parse_label` and `parse_rating` turn an answer text into a label or None, leniently but
never by guessing; the metrics then follow the official scorer (LaMP-Benchmark/LaMP, eval/evaluation.py), which strips
white space and compares exactly. They pool all queries; nothing here averages per user.
"""
import math
import re
import unicodedata

import numpy as np

# LaMP's labels, in the order of the official scorer
CITATIONS = ("[1]", "[2]")
MOVIE_TAGS = ("sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
              "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story")
NEWS_CATEGORIES = ("food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
                   "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
                   "healthy living")
RATINGS = ("1", "2", "3", "4", "5")

CUE = (r"\b(?:answer|tag|category|score|rating|reference|option|label)\b"
       r"(?:[^\n.:=]*?(?:\bis\b|\bbe\b|[:=])\s*|\s+(?=['\"\[]))")
KIND = r"(?:(?:the|tag|category|score|rating|reference|option|label|answer)\s+)*"
END = r"(?=\s*(?:$|[.;:!()\"\n—–]|- |\bbecause\b|\bsince\b|\bas\b|\bstars?\b))"
WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
SCALE = r"\s*(?:/|\bout of\b|\bof\b)\s*(?:5|five)\b(?:\s*stars?)?|\b(?:on a )?scale (?:of|from) 1\s*(?:to|-)\s*5\b|\b1\s*(?:to|-)\s*5\b"


def _clean(text):
    """'**Dark Comedy**' -> 'dark comedy': one case, plain characters, no emphasis; options echoed on one line are split."""
    text = unicodedata.normalize("NFKC", str(text)).lower().replace("’", "'")
    return re.sub(r"[ \t]+(?=\[\d\]:)", "\n", re.sub(r"[*_`]", "", text)).strip()


def parse_label(text, labels):
    """The one label that an answer text gives, or None.

    It must be the whole text, or stand where an answer stands: at the start of a line or after 'the answer is', and be
    followed by an end or an explanation. 'comedy or romance' and 'not a comedy' give None; 'comedy. Because it is not
    a romance' gives 'comedy'. A label in brackets may lose them: 'option 2' gives '[2]'.
    """
    names = {form: label for label in labels for form in (_clean(label), _clean(label).strip("[]"))}
    text = _clean(text)
    whole = text.strip(" .,;:!?'\"()")
    if whole in names:
        return names[whole]
    one = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
    found = re.findall(rf"(?:^[\s>#\-('\"]*|{CUE}){KIND}['\"(]*({one})(?!\w)['\")]*{END}", text, re.MULTILINE)
    found = {names[f] for f in found}
    return found.pop() if len(found) == 1 else None


def parse_rating(text):
    """The one rating from 1 to 5 that an answer text gives, as a string ('4', '4/5', 'four stars' -> '4'), or None.

    '4.5' stays '4.5': LaMP's scorer takes any number. '7' and '3 or 4' give None.
    """
    text = re.sub(SCALE, "", _clean(text))
    text = re.sub(r"\b(" + "|".join(WORDS) + r")\b", lambda m: WORDS[m[1]], text)
    number = re.fullmatch(r"\W*([1-4]\.\d+|5\.0+)\W*(?:stars?\W*)?", text)
    return f"{float(number[1]):g}" if number else parse_label(text, RATINGS)


def _index(texts, labels):
    """Position of each text in `labels`, -1 where it is none of them (the official rule: strip, then exact)."""
    place = {label: i for i, label in enumerate(labels)}
    return np.array([place.get(str(t).strip(), -1) for t in texts], dtype=int)


def accuracy(gold, pred, labels):
    """Share of answers whose label equals the gold label; anything outside `labels` is the label -1. Empty: nan."""
    gold, pred = _index(gold, labels), _index(pred, labels)
    return float(np.mean(gold == pred)) if len(gold) else math.nan


def macro_f1(gold, pred, labels):
    """Mean F1 over ALL `labels`, those that never occur counting 0 (scikit-learn's f1_score(labels=range(n),
    average='macro'), as the official scorer calls it). Empty: nan."""
    gold, pred = _index(gold, labels), _index(pred, labels)
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
    return float(np.mean(np.abs(_errors(gold, pred)))) if len(gold) else math.nan


def rmse(gold, pred):
    """Root mean squared error of ratings given as strings. Empty: nan."""
    return float(np.sqrt(np.mean(_errors(gold, pred) ** 2))) if len(gold) else math.nan


def parse(text, labels):
    """`parse_rating` where the labels are ratings, else `parse_label`."""
    return parse_rating(text) if labels == RATINGS else parse_label(text, labels)


def score(gold, pred, labels):
    """{metric name: value} as the official scorer computes it; a prediction None is an answer that it cannot read."""
    pred = ["" if p is None else p for p in pred]
    if labels == RATINGS:
        return {"MAE": mae(gold, pred), "RMSE": rmse(gold, pred)}
    return {"accuracy": accuracy(gold, pred, labels), "macro-F1": macro_f1(gold, pred, labels)}
