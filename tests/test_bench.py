"""The benchmark's own parts: what its canned server makes of an evaluation, and its table. Nothing is timed here."""
from tests import bench


def test_an_evaluation_over_the_canned_server_makes_the_calls_it_should():
    with bench.canned() as url:
        seconds, calls, longest = bench.evaluate(url, 1)
        # the history and the profile; three simulations and three answers of 2 chats and an embedding; 3 gradients, an update
        assert calls == 2 + 6 * 3 + 3 + 1
        assert longest == 1 + 3 + 1 + 1 + 3  # profile, simulation, gradient, update, answer
        assert bench.evaluate(url, 3)[1:] == (3 * calls, 0)


def test_a_row_tells_whether_the_median_meets_its_target(capsys):
    assert bench.show("chat", "ours / floor", [1.1, 9.0, 1.2], 1.3)
    assert not bench.show("load", "peak memory", [101.0], 100, " MB")
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["chat", "ours", "/", "floor", "1.20", "1.10", "to", "9.00", "1.3", "ok"]
    assert second.split()[-3:] == ["100", "MB", "MISSED"]
