"""Batch statistics, dropout and buffers in the inner loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.errors import ModelStateError
from surgery.train.adapt.functional import bound, episode_mode


def model() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(5.0)
    norm.running_var.fill_(4.0)
    return nn.Sequential(nn.Linear(2, 3), norm, nn.Dropout(0.5))


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def test_an_episode_normalises_by_its_own_samples_and_records_nothing():
    module, x = model(), torch.randn(16, 2)
    before = buffers(module)
    with episode_mode(module, "episode", dropout=False):
        found = bound(module, {"1.weight": torch.full((3,), 2.0)})(x)
    hidden = module[0](x)
    centred = hidden - hidden.mean(0)
    expected = 2 * centred / torch.sqrt(hidden.var(0, unbiased=False) + module[1].eps)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(after, before[n]) for n, after in buffers(module).items())


def test_running_statistics_on_request():
    module, x = model(), torch.randn(16, 2)
    before = buffers(module)
    with episode_mode(module, "running", dropout=False):
        found = module(x)
    expected = (module[0](x) - 5) / torch.sqrt(torch.tensor(4.0) + module[1].eps)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(after, before[n]) for n, after in buffers(module).items())


def test_running_statistics_of_a_norm_that_keeps_none_are_refused():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with (
        pytest.raises(ModelStateError, match=r"1 \(BatchNorm1d\) keeps no running statistics"),
        episode_mode(module, "running", dropout=False),
    ):
        pass


def test_instance_norms_need_no_running_statistics():
    module = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3))
    x = torch.randn(4, 2, 5)
    with episode_mode(module, "running", dropout=False):
        assert torch.equal(module(x)[:1], module(x[:1]))


@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_dropout_is_off_unless_asked_for(statistics: str):
    module, x = model(), torch.randn(16, 2)
    with episode_mode(module, statistics, dropout=False):  # type: ignore[arg-type]
        assert torch.equal(module(x), module(x))
    with episode_mode(module, statistics, dropout=True):  # type: ignore[arg-type]
        found = module(x)
        assert not torch.equal(found, module(x))
        assert 0.2 < float((found == 0).float().mean()) < 0.8


def test_modes_come_back():
    module = model().train()
    module[2].eval()
    with episode_mode(module, "running", dropout=True):
        assert module[2].training
        assert not module[1].training
    assert [each.training for each in module] == [True, True, False]
    assert module[1].track_running_stats


@pytest.mark.parametrize("statistics", ["episode", "running"])
def test_tasks_side_by_side_do_not_see_each_other(statistics: str):
    module, x = model(), torch.randn(4, 16, 2)
    with episode_mode(module, statistics, dropout=False):  # type: ignore[arg-type]
        mapped = torch.func.vmap(bound(module, {}))(x)
        alone = torch.stack([module(each) for each in x])
    assert torch.allclose(mapped, alone, rtol=1e-5, atol=1e-6)
