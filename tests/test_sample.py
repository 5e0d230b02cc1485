"""Drawing one of many ids: its law, ids that are impossible, the same draws as before if few."""

import pytest
import torch
from conftest import METHODS
from test_replay import build, draw

import common
from common import make_rng, sample


def many(number, seed=0):
    """Skewed probabilities [number], a third of them 0."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, generator=rng) * 2
    logits[torch.rand(number, generator=rng) < 1 / 3] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("number, width", [(1024, 256), (5000, 256), (1500, 7), (3001, 4000)])
def test_draws_follow_the_probabilities_and_never_hit_an_impossible_id(number, width):
    probs = many(number)
    places = sample(probs.expand(20000, -1), make_rng("cpu", 0), width)
    counts = torch.bincount(places, minlength=number).double()
    assert counts.shape == probs.shape and not counts[probs == 0].any()
    order = probs.argsort(descending=True)
    classes = torch.arange(number).div(10, rounding_mode="floor")[order.argsort()]  # of ten each
    expected = torch.zeros(number).double().index_add(0, classes, 20000 * probs.double())
    found = torch.zeros(number).double().index_add(0, classes, counts)
    kept = expected > 5
    chi = ((found - expected)[kept] ** 2 / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    assert degrees > 40 and chi < degrees + 4 * (2 * degrees) ** 0.5


def test_an_only_possible_id_is_drawn_wherever_it_stands():
    for place in (0, 255, 256, 1279, 1299):
        probs = torch.zeros(50, 1300)
        probs[:, place] = 1e-30
        assert (sample(probs, make_rng("cpu", 1)) == place).all()


def test_rows_draw_independently():
    places = sample(torch.ones(200, 2000), make_rng("cpu", 2))
    assert len(places.unique()) > 150


def test_few_ids_are_drawn_as_before():
    probs = many(1023).expand(64, -1)
    expected = torch.multinomial(probs, 1, generator=make_rng("cpu", 3))[:, 0]
    assert torch.equal(sample(probs, make_rng("cpu", 3)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_script_draws_its_tokens_so(method, monkeypatch):
    module, policy, cfg = build(method)
    calls = []
    monkeypatch.setattr(module, "sample", lambda *args: calls.append(1) or common.sample(*args))
    batch = draw(module, policy, cfg)
    assert 0 < len(calls) <= batch["lengths"].max()
