"""Answers to labels; LaMP's metrics against its official rule, computed here a second time in plain
Python (the official scorer itself is not run); intervals and comparisons by hand."""

import json
import math
import random
from functools import partial
from itertools import permutations, product
from pathlib import Path

import pytest

import metrics
from align import bare, is_degenerate, unwrap
from metrics import compare, interval, parse_label, parse_rating, score

OFFICIAL = """\
[1], [2]
sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, psychology, \
fantasy, romance, thought-provoking, social commentary, violence, true story
food & drink, sports, education, parents, religion, travel, business, crime, \
science & technology, culture & arts, entertainment, politics, women, style & beauty, healthy living
1, 2, 3, 4, 5"""
CITATIONS, TAGS, CATEGORIES, RATINGS = (tuple(line.split(", ")) for line in OFFICIAL.split("\n"))
LABELS = {"citations": CITATIONS, "tags": TAGS, "categories": CATEGORIES, "stars": RATINGS}
PARSE = {name: partial(parse_label, labels=labels) for name, labels in LABELS.items()}
PARSE["ratings"] = parse_rating
READ = {"unwrap": unwrap, "is_degenerate": is_degenerate, "bare": bare}
TABLES = Path(__file__).parent / "tables"
ANSWERS = json.loads((TABLES / "answers.json").read_text("utf-8"))
NASTY = json.loads((TABLES / "alignment.json").read_text("utf-8"))
LONG = [(name, *nasty) for name in PARSE for nasty in NASTY["nasty_answers"]]
LONG += [(name, *nasty) for name in READ for nasty in NASTY["nasty_prompts"]]


@pytest.mark.parametrize("name, before, repeated, after", LONG)
def test_100_000_characters_are_read_within_a_second(one_second, name, before, repeated, after):
    (PARSE | READ)[name](before + (repeated * 100_000)[:100_000] + after)


def test_the_labels_are_those_of_the_official_scorer_in_its_order():
    ours = (metrics.CITATIONS, metrics.MOVIE_TAGS, metrics.NEWS_CATEGORIES, metrics.RATINGS)
    assert ours == tuple(LABELS.values())


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_every_label_is_read_in_every_usual_form(labels):
    for form, label in product(ANSWERS["forms_one"], labels):
        for written in (label, label.upper(), label.capitalize()):
            assert parse_label(form.format(written), labels) == label, (form, written)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_two_labels_or_a_denied_one_are_no_answer(labels):
    for form in ANSWERS["forms_two"] + ANSWERS["forms_denied"]:
        for one, other in permutations(labels, 2):
            assert parse_label(form.format(one, other), labels) is None, (form, one, other)


@pytest.mark.parametrize("name", PARSE)
def test_an_answer_is_read_or_not_guessed(one_second, name):
    wanted = {text: label for parser, text, label in ANSWERS["cases"] if parser == name}
    assert {text: PARSE[name](text) for text in wanted} == wanted


# a line, before what speaks about the answer (quoted, before all), before what begins a sentence
ORDER = ["romance\nTag: comedy", 'The tag is "romance", a comedy.', "action. Tag: romance"]


@pytest.mark.parametrize("text", ORDER)
def test_the_rules_are_tried_in_order(text):
    assert parse_label(text, TAGS) == "romance"


def rule_for_labels(gold, pred, labels):
    """Stripped, then exact or -1; F1 is the mean over ALL labels, 0 where it is undefined."""
    gold, pred = ([str(text).strip() for text in texts] for texts in (gold, pred))
    gold, pred = ([text if text in labels else -1 for text in texts] for texts in (gold, pred))
    right = [g for g, p in zip(gold, pred) if g == p]
    total = 0.0
    for label in set(right) & set(labels):
        precision = right.count(label) / pred.count(label)
        recall = right.count(label) / gold.count(label)
        total += 2 * precision * recall / (precision + recall)
    return {"accuracy": len(right) / len(gold), "macro-F1": total / len(labels)}


def rule_for_ratings(gold, pred):
    """What is no finite number is the end of the scale that is farther from the gold."""
    errors = []
    for g, p in zip(map(float, gold), pred):
        far = 1.0 if abs(1 - g) > abs(5 - g) else 5.0
        try:
            value = float(p)
        except (TypeError, ValueError):
            value = far
        errors.append((value if math.isfinite(value) else far) - g)
    rmse = math.hypot(*errors) / math.sqrt(len(gold))
    return {"MAE": sum(map(abs, errors)) / len(gold), "RMSE": rmse}


@pytest.mark.parametrize("labels", [CITATIONS, TAGS, CATEGORIES], ids=[*LABELS][:3])
def test_label_metrics_equal_the_official_rule(labels):
    for seed in range(200):
        rng = random.Random(seed)
        some = rng.sample(labels, rng.randint(1, len(labels)))
        one = some[0]
        ugly = [f" {one}\n", f"\t{one}", one.upper(), f"{one}.", f"**{one}**", "no label", "", " "]
        gold = rng.choices(some + rng.choice([[], ["west", f"{one} ", None]]), k=rng.randint(1, 40))
        pred = rng.choices(some * rng.randint(1, 5) + [*ugly, "-1", "0", None, 1], k=len(gold))
        expected = rule_for_labels(gold, pred, labels)
        assert score(gold, pred, labels) == pytest.approx(expected, abs=1e-12), (gold, pred)


def test_rating_metrics_equal_the_official_rule():
    ugly = ["7", "4.5", "-3", "", " ", None, "four", "nan", "inf", "-inf", "1e1", " 2 ", "4/5"]
    for seed in range(300):
        rng = random.Random(seed)
        gold = rng.choices([*RATINGS, " 4", "2.5", "3.0", "7", 2], k=rng.randint(1, 40))
        pred = rng.choices([*RATINGS, *RATINGS, *ugly, "+3", 4, 2.5], k=len(gold))
        expected = rule_for_ratings(gold, pred)
        assert score(gold, pred, list(RATINGS)) == pytest.approx(expected, abs=1e-12), (gold, pred)


@pytest.mark.parametrize("labels, expected", [(TAGS, 0.1444), (TAGS[:3], 0.7222)])
def test_macro_f1_averages_over_all_labels(labels, expected):
    gold, pred = [TAGS[i] for i in (0, 0, 1, 1, 2)], [TAGS[i] for i in (0, 9, 1, 0, 2)]
    assert metrics.macro_f1(gold, pred, labels) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("answer", ["", "four", None, "4/5", "nan", "inf", "-inf"])
def test_an_answer_that_is_no_number_counts_as_the_far_end(answer):
    assert [metrics.mae([gold], [answer]) for gold in RATINGS] == [4, 3, 2, 3, 4]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "mae", "rmse"])
def test_no_answers_give_nan_and_lists_of_unequal_length_an_error(name):
    more = [RATINGS] if name in ("accuracy", "macro_f1") else []
    metric = getattr(metrics, name)
    assert math.isnan(metric([], [], *more))
    for gold, pred in [("12", "123"), ("123", "12"), ("1", ""), ("", "1")]:
        with pytest.raises(ValueError):
            metric(list(gold), list(pred), *more)


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 400)


def play(n, seed, labels=TAGS[:5], right=0.5):
    """Golds and answers of n queries, each right by chance."""
    rng = random.Random(seed)
    gold = rng.choices(labels, k=n)
    return gold, [g if rng.random() < right else rng.choice([None, "7"]) for g in gold]


def test_of_40_intervals_some_38_hold_the_truth(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 100)
    found = [interval(range(20), *play(20, seed), TAGS[:5])["accuracy"] for seed in range(40)]
    assert 36 <= sum(low <= 0.5 <= high for low, high in found) <= 39


@pytest.mark.parametrize("size, margin", [(3, 0.0895), (1, 0.0517)])
def test_an_interval_is_of_whole_users_and_the_same_twice(size, margin):
    users, gold = [i // size for i in range(120)], ["3"] * 120
    pred = [3 + i // 3 / 40 for i in range(120)]
    found = interval(users, gold, pred, RATINGS)
    assert found["MAE"] == pytest.approx([0.4875 - margin, 0.4875 + margin], abs=0.012)
    assert found == interval(users, gold, pred, RATINGS) and set(found) == {"MAE", "RMSE"}


def test_below_ten_users_there_is_no_interval():
    users, (gold, pred) = [i // 3 for i in range(27)], play(27, 1)
    assert interval(users, gold, pred, TAGS) == {}
    assert compare(users, gold, pred, gold, TAGS)["interval"] == {}


@pytest.mark.parametrize("won, lost, p", [(8, 1, 5 / 128), (3, 3, 1), (0, 0, 1), (0, 5, 1 / 16)])
def test_the_sign_test_is_exact(won, lost, p):
    first = ["comedy"] * won + ["action"] * lost + ["comedy", None]
    second = ["action"] * won + ["comedy"] * lost + ["comedy", "fantasy"]
    found = compare([0] * len(first), ["comedy"] * len(first), first, second, TAGS)
    assert (found["won"], found["lost"], found["p"]) == (won, lost, p)


def test_of_ratings_the_smaller_error_wins():
    found = compare("abcde", list("53145"), ["4", "3", None, "x", "4"], list("34542"), RATINGS)
    assert (found["won"], found["lost"], found["p"]) == (3, 1, 10 / 16)


@pytest.mark.parametrize("labels", [TAGS[:5], RATINGS])
def test_a_difference_is_that_of_the_metrics_and_lies_in_its_interval(labels):
    (gold, first), (_, second) = play(60, 1, labels, 0.8), play(60, 2, labels, 0.2)
    found = compare(range(60), gold, first, second, labels)
    one, two = score(gold, first, labels), score(gold, second, labels)
    assert set(found["interval"]) == set(found["difference"]) == set(one)
    for name, (low, high) in found["interval"].items():
        assert found["difference"][name] == pytest.approx(one[name] - two[name], abs=1e-12)
        assert low < found["difference"][name] < high and (low > 0 or high < 0)
