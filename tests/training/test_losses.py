import pytest
import torch
from torch.nn import functional as F

from hf_mmclf.training.losses import DECISIONS, LOSSES, MultiLabelLoss

POSITIVES, ROWS = torch.tensor([40.0, 20.0, 4.0, 1.0, 0.0]), 100


def draw(rows=16, labels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, labels, generator=generator)
    return logits, (torch.rand(rows, labels, generator=generator) < 0.4).float()


def loss_of(name, **options):
    return MultiLabelLoss(name, POSITIVES, ROWS, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_descent_gets_all_decisions_right(name):
    logits, labels = draw()
    labels[0], labels[1] = 0, 1  # rows of which a comparison may say nothing
    logits.requires_grad_()
    optimizer, loss = torch.optim.Adam([logits], lr=0.1), loss_of(name)
    before = loss(logits, labels).item()
    for _ in range(300):
        optimizer.zero_grad()
        value = loss(logits, labels)
        value.backward()
        assert logits.grad.isfinite().all()
        optimizer.step()
    assert value.item() < before
    rows = slice(2, None) if name == "two_way" else slice(None)  # which ranks, and knows no cut for all rows
    lowest = torch.where(labels > 0, logits, torch.inf).amin(1)[rows]
    highest = torch.where(labels > 0, -torch.inf, logits).amax(1)[rows]
    assert (lowest > highest).all()


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_labels_have_no_part_in_it(name):
    logits, labels = draw()
    unknown = torch.rand(labels.shape) < 0.3
    hidden, other = torch.where(unknown, -1, labels), torch.where(unknown, logits + 5, logits)
    loss = loss_of(name)
    assert loss(logits, hidden).item() == pytest.approx(loss(other, hidden).item())
    logits.requires_grad_()
    loss(logits, hidden).backward()
    assert (logits.grad[unknown] == 0).all() and (logits.grad[~unknown] != 0).any()
    assert loss(logits, torch.full_like(labels, -1)).item() == 0 or name in ("zlpr", "two_way")


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_single(name):
    logits, labels = draw()
    logits = 30 * logits.half()
    value = loss_of(name)(logits, labels.half())
    assert value.dtype == torch.float32 and value.isfinite()
    assert value.item() == pytest.approx(loss_of(name)(logits.float(), labels).item(), rel=1e-6)


def test_plain_loss_and_smoothing_are_those_of_torch():
    logits, labels = draw()
    assert MultiLabelLoss()(logits, labels) == F.binary_cross_entropy_with_logits(logits, labels)
    smoothed = F.binary_cross_entropy_with_logits(logits, labels * 0.8 + 0.1)
    assert MultiLabelLoss(smoothing=0.2)(logits, labels).item() == pytest.approx(smoothed.item())


def test_positive_weights_follow_frequencies_up_to_the_cap():
    logits, labels = draw()
    weights = torch.tensor([(60 / 40) ** 0.5, 2.0, (96 / 4) ** 0.5, 6.0, 6.0])
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)
    assert loss_of("bce", power=0.5, cap=6.0)(logits, labels).item() == pytest.approx(expected.item())
    for name in DECISIONS:
        plain, weighted = loss_of(name), loss_of(name, power=1.0)
        only = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
        gradients = []
        for loss in (plain, weighted):
            x = torch.zeros(1, 5, requires_grad=True)
            loss(x, only).backward()
            gradients.append(x.grad)
        assert gradients[1][0, 2] == pytest.approx(10 * gradients[0][0, 2].item(), rel=1e-4)  # 24, capped
        assert torch.equal(gradients[0][0, [0, 1, 3, 4]], gradients[1][0, [0, 1, 3, 4]])


@pytest.mark.parametrize("name", ["bce", "distribution_balanced"])
def test_frequencies_are_those_of_the_known_rows(name):
    logits, labels = draw()
    known = torch.tensor([50, 40, 100, 10, 5])
    shares = torch.tensor([0.4, 0.5, 0.04, 0.1, 0.2])
    found = MultiLabelLoss(name, shares * known, known, power=0.5)(logits, labels)
    assert found.item() == pytest.approx(MultiLabelLoss(name, shares * 100, 100, power=0.5)(logits, labels).item())


def test_a_label_that_all_rows_have_still_trains():
    assert MultiLabelLoss("bce", torch.tensor([8.0]), 8, power=1.0).positive_weights.item() == 1 / 8


def test_rare_labels_weigh_more_in_the_balanced_loss():
    loss, labels = loss_of("distribution_balanced"), torch.eye(5)[:3]
    x = torch.zeros(3, 5, requires_grad=True)
    loss(x, labels).backward()
    assert x.grad[2, 2].abs() > x.grad[0, 0].abs()


def test_bad_requests_are_explained():
    with pytest.raises(ValueError, match="unknown loss 'hinge'; expected one of bce, focal"):
        MultiLabelLoss("hinge")
    for options in (dict(power=1.0), dict(smoothing=0.1)):
        with pytest.raises(ValueError, match="'zlpr' compares labels with each other"):
            loss_of("zlpr", **options)
    with pytest.raises(ValueError, match="label smoothing is 1.5"):
        MultiLabelLoss(smoothing=1.5)
    with pytest.raises(ValueError, match="power -1 and the cap 10.0"):
        loss_of("bce", power=-1)
    for name, options in (("bce", dict(power=0.5)), ("distribution_balanced", {})):
        with pytest.raises(ValueError, match="needs `positives` and `rows`"):
            MultiLabelLoss(name, **options)
