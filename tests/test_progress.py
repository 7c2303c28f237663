"""Bars stay quiet enough for a kernel's message queue, resume, and can be switched off."""

import io

from tqdm import tqdm

from netspace_lite import progress


def drawn(monkeypatch, updates, seconds, **options):
    """What a bar of ``updates`` steps draws if all of them take ``seconds``."""
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    monkeypatch.setattr(progress, "tqdm", lambda **given: tqdm(**given | {"file": out}))
    with progress.progress_bar(updates, "testing", **options) as bar:
        for _ in range(updates - options.get("first", 0)):
            clock[0] += seconds / updates
            bar.update()
    return out.getvalue().split("\r")


def test_a_hundred_seconds_draw_at_most_a_hundred_lines(monkeypatch):
    lines = drawn(monkeypatch, 10_000, 100)
    assert 20 < len(lines) <= 103
    assert "testing: 100%" in lines[-1]
    assert "10000/10000" in lines[-1]


def test_a_resumed_bar_begins_where_it_stopped(monkeypatch):
    lines = drawn(monkeypatch, 50, 100, first=20)
    assert "20/50" in lines[1]
    assert "50/50" in lines[-1]


def test_no_bar_where_none_is_wanted(monkeypatch):
    assert drawn(monkeypatch, 10, 100, show=False) == [""]


def test_bars_are_text_that_a_saved_notebook_shows_as_it_ended(capsys):
    with progress.progress_bar(3, "testing") as bar:
        bar.update(3)
    shown = capsys.readouterr()
    assert "testing: 100%" in shown.out.split("\r")[-1]
    assert shown.err == ""
