import pytest
import torch
from torch import nn

from netspace_lite.explore import interpolate, weight_line
from netspace_lite.functional import Nets


def test_interpolate_is_the_line_computed_by_hand():
    start, end = torch.tensor([[0.0, 4.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 5.0]])
    expected = [[[0, 4], [1, 2], [2, 0]], [[1, 1], [1, 3], [1, 5]]]
    assert interpolate(start, end, 3).tolist() == expected
    assert interpolate(start[0], end[0], 3).tolist() == expected[0]


def test_weight_line_mixes_the_parameters_pair_by_pair():
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    nets = Nets(nn.Linear(3, 2), rows)
    line = weight_line(nets[:2], nets[2:], 5)
    assert len(line) == 10
    torch.testing.assert_close(line.rows[5 + 1], 0.75 * rows[1] + 0.25 * rows[3])
    assert torch.equal(line.rows[[0, 4]], rows[[0, 2]])


def test_lines_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"same shape.*\[3\] and \[4\]"):
        interpolate(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="at least 2 points"):
        interpolate(torch.zeros(3), torch.ones(3), 1)
    with pytest.raises(ValueError, match="they differ"):
        weight_line(
            Nets(nn.Linear(3, 2), torch.zeros(1, 8)), Nets(nn.Linear(2, 3), torch.zeros(1, 9))
        )
