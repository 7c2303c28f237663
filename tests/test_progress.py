"""Bars stay quiet enough for a kernel's message queue, and can be switched off."""

import io

from netspace_lite import progress


def drawn(monkeypatch, updates, **options):
    out = io.StringIO()
    monkeypatch.setattr(progress, "tqdm", lambda **kw: plain_bar(file=out, **kw))
    with progress.progress_bar(updates, "testing", **options) as bar:
        for _ in range(updates - options.get("first", 0)):
            bar.update()
    return out.getvalue()


def plain_bar(**options):
    from tqdm import tqdm

    return tqdm(**options)


def test_ten_thousand_steps_draw_a_handful_of_lines(monkeypatch):
    text = drawn(monkeypatch, 10_000)
    assert "testing: 100%" in text and "10000/10000" in text
    assert text.count("\r") < 100  # tqdm's own interval of 0.1 s would do, one line a step not


def test_a_resumed_bar_begins_where_it_stopped(monkeypatch):
    text = drawn(monkeypatch, 50, first=20)
    assert "20/50" in text.split("\r")[1] and "50/50" in text


def test_no_bar_where_none_is_wanted(monkeypatch):
    assert drawn(monkeypatch, 10, show=False) == ""
