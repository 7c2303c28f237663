"""Scores against scikit-learn and numpy; baselines against what they claim to be."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, r2_score
from torch import nn
from toy import generator, mlp, random_nets, small_nets, toy_data

from netspace_lite import metrics
from netspace_lite.metrics import averages, disagreement, novelty, readout
from netspace_lite.nets import Nets
from netspace_lite.space import NetSpace, SpaceConfig

NET = nn.Sequential(nn.Linear(4, 3))


def nets(count, seed=0):
    return Nets(NET, torch.randn(count, 15, generator=torch.Generator().manual_seed(seed)))


def test_compare_is_what_scikit_learn_and_scipy_say():
    a, b = torch.randn(6, 40, 3), torch.randn(6, 40, 3)
    y = torch.randint(3, (40,))
    found = metrics.compare(a, b, y)
    pa, pb = a.argmax(-1).numpy(), b.argmax(-1).numpy()
    accuracies = [[accuracy_score(y, p) * 100 for p in rows] for rows in (pa, pb)]
    assert found["agreement"] == pytest.approx(accuracy_score(pa.ravel(), pb.ravel()) * 100)
    assert found["mae"] == pytest.approx(np.abs(np.subtract(*accuracies)).mean(), abs=1e-4)
    assert found["r"] == pytest.approx(pearsonr(*accuracies).statistic, abs=1e-4)


def test_nets_compared_with_themselves_agree_and_equal_nets_have_no_correlation():
    logits, y = torch.randn(5, 30, 3), torch.randint(3, (30,))
    same = metrics.compare(logits, logits, y)
    assert same == pytest.approx({"agreement": 100, "mae": 0, "r": 1}, abs=1e-4)
    assert metrics.compare(logits[:1].expand(5, -1, -1), logits, y)["r"] == 0


def test_nearest_nets_come_from_the_zoo():
    zoo = nets(10)
    probe = Nets(NET, zoo.rows[[7, 2]] + 1e-3)
    assert torch.equal(metrics.nearest_by_weights(zoo, probe).rows, zoo.rows[[7, 2]])
    answers = torch.eye(10)
    found = metrics.nearest_by_answers(answers, answers[[4]] * 0.9, zoo)
    assert torch.equal(found.rows, zoo.rows[[4]])


def test_copies_are_the_nearest_of_nets_that_hardly_differ():
    """Seen before: of nets trained on from one start 7 in 100 copies found themselves by weights.

    Distances came from products in fp32, whose rounding is larger than what sets the nets apart.
    """
    start = 10 * torch.randn(1, 15, generator=generator(1))
    zoo = Nets(NET, start + 1e-4 * torch.randn(40, 15, generator=generator(2)))
    assert torch.equal(metrics.nearest_by_weights(zoo, zoo).rows, zoo.rows)
    answers = 30 + 1e-3 * torch.randn(40, 65, generator=generator(3))
    assert torch.equal(metrics.nearest_by_answers(answers, answers, zoo).rows, zoo.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_baselines_take_nets_of_any_precision(dtype):
    zoo = Nets(NET, nets(12).rows.to(dtype))
    assert torch.equal(metrics.nearest_by_weights(zoo, zoo[[7, 2]]).rows, zoo.rows[[7, 2]])
    assert torch.equal(metrics.nearest_by_answers(zoo.rows, zoo.rows[[4]], zoo).rows, zoo.rows[[4]])
    whole = metrics.pca_nets(zoo, zoo, 12).rows
    assert whole.dtype == dtype
    torch.testing.assert_close(whole, zoo.rows, atol=0.02, rtol=0.02)


def test_the_mean_net_is_the_mean():
    found = metrics.mean_net(nets(10), nets(3, seed=1)).rows
    np.testing.assert_allclose(found, np.tile(nets(10).rows.numpy().mean(0), (3, 1)), rtol=1e-4)


def test_pca_with_all_components_gives_the_weights_back_and_with_few_does_not():
    zoo = nets(30)
    torch.testing.assert_close(metrics.pca_nets(zoo, zoo, 15).rows, zoo.rows, rtol=0, atol=1e-4)
    assert (metrics.pca_nets(zoo, zoo, 3).rows - zoo.rows).abs().max() > 0.1


def test_noise_has_the_size_that_was_asked_for():
    target = Nets(NET, torch.randn(400, 15))
    noise = metrics.noisy_nets(target, 0.1).rows - target.rows
    share = noise.square().mean().sqrt() / target.rows.square().mean().sqrt()
    assert share.item() == pytest.approx(0.1, rel=0.05)


def test_a_line_drops_under_its_weaker_end():
    line = torch.tensor([[90.0, 70, 95], [90, 99, 80], [50, 50, 50]])
    assert metrics.line_drop(line).tolist() == [20, 0, 0]
    ends = torch.tensor([[80.0, 72], [100, 100], [40, 60]])
    assert metrics.line_drop(line, ends).tolist() == [2, 20, 0]


def test_scores_compare_each_net_with_what_it_decodes_to():
    data, modules = toy_data(), small_nets()[:2]
    zoos = [random_nets(module, 4) for module in modules]
    config = SpaceConfig(embedding=6, probes=8, weights=False, hidden=8)
    space = NetSpace.for_zoos(zoos, data.train.x, config)
    for a, zoo in enumerate(zoos):  # nets say themselves what they are decoded as
        decoded = space.decode(space.encode(zoo, a), a)
        found = metrics.scores(space, zoo, data.val)
        expected = metrics.compare(decoded.outputs(data.val.x), zoo.outputs(data.val.x), data.val.y)
        assert found == expected


def test_novelty_is_zero_for_copies_and_finds_the_nearest():
    zoo, x = nets(12), torch.randn(60, 4, generator=generator())
    copies = novelty(zoo[[2, 5]], x, zoo)
    assert copies["function"].tolist() == [0, 0]
    assert copies["weights"].max() < 1e-2
    within = novelty(zoo, x)
    by_hand = min(float((zoo.rows[0] - row).norm()) for row in zoo.rows[1:])
    assert float(within["weights"][0]) == pytest.approx(by_hand, rel=1e-4)
    classes = [net.to_module()(x).argmax(-1) for net in zoo]
    by_hand = min(float((classes[0] != c).float().mean() * 100) for c in classes[1:])
    assert float(within["function"][0]) == pytest.approx(by_hand)
    assert disagreement(zoo.outputs(x), zoo.outputs(x)).diagonal().sum() == 0


def test_novelty_in_weights_is_of_nets_that_compute_alike():
    """Seen before: nets of Tanh were as near as copies to nets of ReLU with the same weights."""
    relu, tanh = (random_nets(mlp(f), 3) for f in (nn.ReLU(), nn.Tanh()))
    for other in (tanh, nets(3)):
        with pytest.raises(ValueError, match="compute something else: no comparing their weights"):
            novelty(relu, torch.randn(5, 4), other)


def test_averages_of_all_nets_are_the_mean_net():
    zoo = nets(12)
    found = averages(zoo, 3, of=12)
    torch.testing.assert_close(found.rows, zoo.rows.mean(0).expand(3, -1))
    with pytest.raises(ValueError, match="averages of 13 nets each can't be drawn from 12"):
        averages(zoo, 3, of=13)


def test_readout_finds_a_linear_property():
    x = torch.randn(80, 5, generator=generator())
    y = x @ torch.arange(5.0) + 3
    predicted, r2 = readout(x[:60], y[:60], x[60:], y[60:])
    assert r2 > 0.9999
    expected = Ridge(1e-3).fit(x[:60].numpy(), y[:60].numpy()).predict(x[60:].numpy())
    np.testing.assert_allclose(predicted, expected, atol=1e-2)


def test_answers_that_are_not_finite_agree_with_nothing():
    """Seen before: nets of NaN agreed with each other on 100% of samples, and were no news."""
    answers, y = torch.full((2, 5, 3), torch.nan), torch.zeros(5, dtype=torch.long)
    assert metrics.compare(answers, answers, y)["agreement"] == 0
    assert (disagreement(answers, answers) == 100).all()
    overflowing = Nets(NET, torch.full((1, 15), 1e38))
    assert novelty(overflowing, 10 * torch.ones(4, 4), overflowing)["function"] == 100


@pytest.mark.parametrize(("nets", "samples"), [(1, 7), (4, 7), (2, 1)])
def test_what_is_compared_is_of_one_size(nets, samples):
    """Seen before: one net, or one label, stood for all."""
    with pytest.raises(ValueError, match="of as many nets each and B labels"):
        metrics.compare(torch.zeros(nets, 7, 3), torch.zeros(2, 7, 3), torch.zeros(samples).long())


def test_a_correlation_is_as_exact_in_mixed_precision():
    logits = torch.randn(2, 30, 200, 5, generator=generator())
    y = logits[0, 0].argmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = metrics.compare(*logits, y)
    assert mixed == metrics.compare(*logits, y)


@pytest.mark.parametrize("held", [1, 3])
def test_held_out_values_that_are_alike_have_no_share_explained(held):
    """Seen before: minus infinity or NaN."""
    x, y = torch.randn(20, 4, generator=generator()), torch.arange(20.0)
    with pytest.raises(ValueError, match="give some that differ"):
        readout(x, y, x[:held], torch.ones(held))


def test_the_nearest_net_is_so_by_euclidean_distance():
    rows = torch.zeros(2, 15)
    rows[0, 0], rows[1, :2] = 3, 2  # 3 and 2.8 from the origin; 3 and 4 by absolute differences
    zoo, origin = Nets(NET, rows), Nets(NET, torch.zeros(1, 15))
    assert torch.equal(metrics.nearest_by_weights(zoo, origin).rows, rows[1:])
    assert torch.equal(metrics.nearest_by_answers(rows, origin.rows, zoo).rows, rows[1:])


def test_pca_of_a_zoo_squeezes_nets_that_it_has_not_seen():
    zoo, others = nets(30), nets(4, seed=1)
    mean = zoo.rows.mean(0)
    axes = torch.linalg.svd(zoo.rows - mean, full_matrices=False).Vh[:3]
    expected = mean + (others.rows - mean) @ axes.T @ axes
    torch.testing.assert_close(metrics.pca_nets(zoo, others, 3).rows, expected, rtol=0, atol=1e-4)


def test_noise_is_a_share_of_each_nets_own_size_and_follows_its_seed():
    rows = torch.tensor([[3.0], [0.01]]).expand(2, 2000)
    target = Nets(nn.Linear(99, 20), rows)
    found, same, other = (metrics.noisy_nets(target, seed=seed).rows for seed in (0, 0, 1))
    shares = (found - rows).square().mean(1).sqrt() / rows[:, 0]
    torch.testing.assert_close(shares, torch.full((2,), 0.1), rtol=0.1, atol=0)
    assert torch.equal(found, same)
    assert not torch.equal(found, other)


def test_an_average_is_of_two_different_nets_and_each_of_others():
    zoo = Nets(NET, torch.eye(15))  # a row says itself which nets it is the mean of
    found, same, other = (averages(zoo, 40, seed=seed).rows for seed in (0, 0, 1))
    assert ((found == 0.5).sum(1) == 2).all()
    assert len(found.unique(dim=0)) > 20
    assert torch.equal(found, same)
    assert not torch.equal(found, other)
    assert (averages(zoo, 5, of=1).rows.amax(1) == 1).all()


def test_readout_neither_follows_noise_nor_the_scale_of_features():
    x, y = torch.randn(80, 30, generator=generator()), torch.randn(80, generator=generator(1)) + 5
    y[60:] += 1  # the mean of held-out nets is their own
    predicted, r2 = readout(x[:60], y[:60], x[60:], y[60:])
    assert r2 == pytest.approx(r2_score(y[60:], predicted))
    assert predicted.std() < 0.3  # nothing is there to be found
    scaled = x * torch.logspace(-3, 3, 30)
    again, _ = readout(scaled[:60], y[:60], scaled[60:], y[60:])
    torch.testing.assert_close(again, predicted, rtol=1e-4, atol=1e-4)
