"""What the README shows runs: its Python, with fewer nets and steps, and the targets it names."""

import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALLER = {  # each is there, and once
    r"draw_recipes\(500\b": "draw_recipes(24",
    r"val=50, test=50": "val=4, test=4",
    r"^(fit\(.*)\)$": r"\1, steps=8, epoch=4)",
}


def shrunk(code):
    for pattern, smaller in SMALLER.items():
        code, found = re.subn(pattern, smaller, code, flags=re.MULTILINE)
        assert found == 1, f"the README no longer has one {pattern}"
    return code


def test_the_example_runs_and_its_comments_are_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(shrunk(BLOCKS[0]), "README.md", "exec"), names)
    z, nets, data = names["z"], names["nets"], names["data"]
    shape = re.search(r"z = space\.encode\(test\)  # \[50, (\d+)\]", BLOCKS[0])
    assert z.shape == (4, int(shape[1]))
    assert nets.accuracy(data.test).shape == (4,)
    assert isinstance(nets.to_module(0), nn.Module)
    torch.testing.assert_close(
        nets.to_module(0)(data.test.x), nets.outputs(data.test.x)[0], rtol=1e-4, atol=1e-4
    )
    last = BLOCKS[0].strip().splitlines()[-1].partition("#")[0]
    assert len(eval(last, names)) == 11
    assert (tmp_path / "build/my-zoo/zoo.json").is_file()


def test_all_python_compiles():
    for code in BLOCKS:
        compile(code, "README.md", "exec")


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", README, re.MULTILINE)) <= targets


def test_the_short_table_says_what_the_long_ones_say():
    _, short, long = re.split(r"\| \| ours \| beside it \|\n|\nDigits, the default preset", README)
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", short)
    assert len(found) > 30
    assert [number for number in found if not re.search(rf"(?<![\d.]){number}\b", long)] == []
