"""The head: a gradient that is made in the forward pass, against autograd through all logits."""

import pytest
import torch
from conftest import ODD, make_lm

import common
from common import add_lora, completion_logprobs, frozen_copy, lm_logits

torch.set_num_threads(1)
SHAPE = (3, 7)


def inputs(seed=0):
    """-> hidden [3, 7, 32], ids with duplicates, mask, weights of the loss."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*SHAPE, 32, generator=rng)
    ids = torch.randint(6, SHAPE, generator=rng)
    mask = torch.rand(SHAPE, generator=rng) < 0.8
    return hidden, ids, mask, torch.randn(SHAPE, generator=rng)


def naive(lm, hidden, ids, mask, temperature):
    logprobs = (lm_logits(lm, hidden) / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[..., None])[..., 0] * mask, (entropy * mask).detach()


def result(function, lm, hidden, ids, mask, weights, *args):
    """-> log-probs, entropy, gradient of a weighted sum for the hidden states."""
    hidden = hidden.clone().requires_grad_()
    logprobs, entropy = function(lm, hidden, ids, mask, *args)
    (logprobs * weights).sum().backward()
    assert not entropy.requires_grad
    return logprobs.detach(), entropy, hidden.grad


@pytest.mark.parametrize("kind", ["llama", *ODD])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [29, 29 * 4])
def test_a_frozen_head_gives_the_gradient_of_autograd(kind, temperature, chunk, monkeypatch):
    lm = frozen_copy(make_lm(kind))
    data = inputs()
    expected = result(naive, lm, *data, temperature)
    calls, logits = [], lm_logits
    monkeypatch.setattr(common, "lm_logits", lambda *args: calls.append(1) or logits(*args))
    found = result(completion_logprobs, lm, *data, temperature, chunk)
    assert len(calls) == -(-int(data[2].sum()) // (chunk // 29))  # none is computed again
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert expected[2].abs().max() > 0.1


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_head_of_which_something_is_trained_gets_its_gradient(trained):
    lm = frozen_copy(make_lm())
    lm.lm_head.bias = torch.nn.Parameter(torch.zeros(40), requires_grad=False)
    parameter = getattr(lm.lm_head, trained).requires_grad_()
    found = []
    for function, more in ((naive, ()), (completion_logprobs, (29 * 2,))):
        parameter.grad = None
        result(function, lm, *inputs(), 1.0, *more)
        found.append(parameter.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_several_ids_at_a_position_have_their_gradient_too():
    lm = frozen_copy(make_lm())
    hidden, _, mask, _ = inputs()
    ids = torch.randint(5, (*SHAPE, 4))  # with duplicates
    grads = []
    for chunk in (29 * 2, 1 << 24):
        states = hidden.clone().requires_grad_()
        logprobs, _ = completion_logprobs(lm, states, ids, mask, 0.7, chunk)
        logprobs.square().sum().backward()
        grads.append(states.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_in_bfloat16_it_is_the_recomputed_gradient(lora, monkeypatch):
    lm = make_lm().requires_grad_(False)
    if lora:
        lm = lm.to(torch.bfloat16)
        add_lora(lm, 2)
    lm.compute_dtype = torch.bfloat16
    found = []
    for is_known_frozen in (True, False):
        if not is_known_frozen:  # as a module of another kind
            head = lm.lm_head
            monkeypatch.setattr(lm, "get_output_embeddings", lambda: head.forward)
        hidden, *data = inputs()
        with monkeypatch.context() as patch:
            if not is_known_frozen:
                patch.setattr(common, "frozen_logprobs", None)
            states = hidden.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                logprobs, _ = completion_logprobs(lm, states, data[0], data[1], 1.0, 29 * 3)
            (logprobs * data[2]).sum().backward()
        found.append((logprobs.detach(), states.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-2, atol=2e-2)
    exact = result(naive, lm.float(), *inputs(), 1.0)[2] if not lora else found[1][1]
    assert (found[0][1] - exact).norm() <= 2e-2 * exact.norm()
