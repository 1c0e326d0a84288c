"""The linear probe: against sklearn-free closed forms, its curve along a trace, and the refusals."""

import copy

import pytest
import torch

from tokenry.core.errors import InputError
from tokenry.learned import LinearProbe
from tokenry.models.anatomy import decoder_layers
from tokenry.trace.trace import capture


def separable(count=60, width=8, gap=3.0):
    """States whose first number tells the label."""
    states = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 2
    states[:, 0] = gap * (2 * labels - 1)
    return states, labels


@pytest.fixture
def bound(llama):
    torch.manual_seed(0)
    return LinearProbe(llama.config.hidden_size, layer=2).bind(llama)


def trace_of(model, tokenizer, text, hidden):
    ids = tokenizer(text, return_tensors="pt").input_ids
    with capture(model, tokenizer, hidden=hidden) as cap, torch.no_grad():
        model(ids, use_cache=False)
    return cap.trace


def test_separable_states_are_told_apart_and_a_seed_gives_the_same_probe():
    states, labels = separable()
    probes = [LinearProbe(8).fit(states, labels, learning_rate=0.05, epochs=60, seed=3) for _ in range(2)]
    assert probes[0].held_out_accuracy == 1 and probes[0].accuracy(states, labels) == 1
    assert torch.equal(probes[0].direction, probes[1].direction)
    other = LinearProbe(8).fit(states, labels, learning_rate=0.05, epochs=60, seed=4)
    assert not torch.equal(probes[0].direction, other.direction)


def test_logits_are_the_direction_and_the_threshold():
    probe, states = LinearProbe(8), torch.randn(3, 5, 8)
    expected = (states * probe.direction).sum(-1) + probe.linear.bias.detach()
    torch.testing.assert_close(probe.logits(states), expected)
    torch.testing.assert_close(probe.probabilities(states), expected.sigmoid())
    assert not probe.logits(states).requires_grad


def test_the_first_of_equally_good_epochs_is_kept():
    """On states that one step tells apart, many epochs leave what one leaves."""
    states, labels = separable(gap=50.0)
    one, many = (LinearProbe(8).fit(states, labels, learning_rate=0.5, epochs=e) for e in (1, 9))
    assert one.held_out_accuracy == many.held_out_accuracy == 1
    assert torch.equal(one.direction, many.direction)


def test_the_difference_of_means_puts_them_at_one_and_minus_one():
    states, labels = separable()
    probe = LinearProbe(8).fit_means(states, labels)
    means = torch.stack([states[labels == value].mean(0) for value in (0, 1)])
    torch.testing.assert_close(probe.logits(means), torch.tensor([-1.0, 1.0]))
    cosine = torch.cosine_similarity(probe.direction, means[1] - means[0], dim=0)
    torch.testing.assert_close(cosine, torch.tensor(1.0))


def test_a_curve_is_the_probability_at_every_token(llama, tokenizer, bound):
    trace = trace_of(llama, tokenizer, "the old lighthouse stood on the cliff", [2])
    torch.testing.assert_close(bound.curve(trace), bound.probabilities(trace.hidden(2)))
    with torch.no_grad():
        whole = llama(trace.ids[None], output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(bound.curve(trace), bound.probabilities(whole), rtol=1e-5, atol=1e-6)


def test_negative_layers_count_from_the_end(llama):
    depth = len(decoder_layers(llama))
    assert LinearProbe(32, -1).bind(llama).layer == depth and LinearProbe(32, -depth - 1).bind(llama).layer == 0


def test_saved_and_loaded_it_says_the_same(tmp_path, bound):
    bound.held_out_accuracy = 0.75
    bound.save(tmp_path / "probe")
    again, states = LinearProbe.load(tmp_path / "probe"), torch.randn(4, 32)
    assert torch.equal(again.logits(states), bound.logits(states)) and again.digest() == bound.digest()
    assert (again.layer, again.held_out_accuracy, again.made_for) == (2, 0.75, bound.made_for)


def test_another_model_is_refused(llama, tokenizer, bound):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    trace = trace_of(other, tokenizer, "the sea", [2])
    for use in (lambda: bound.check(other), lambda: bound.curve(trace)):
        with pytest.raises(InputError, match="train one for this model"):
            use()


def test_a_trace_without_the_state_says_what_to_capture(llama, tokenizer, bound):
    with pytest.raises(InputError, match=r"capture again with hidden=\[2\]"):
        bound.curve(trace_of(llama, tokenizer, "the sea", [1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, y: (s, y * 0), "60 examples|0 examples have the label 1"),
        (lambda s, y: (torch.cat([s[y == 0], s[y == 1][:9]]), [0] * 30 + [1] * 9), "9 examples have the label 1"),
        (lambda s, y: (s, y + 1), r"labels \[1, 2\]"),
        (lambda s, y: (s[:-1], y), r"\(59, 8\) for 60 labels"),
        (lambda s, y: (s / 0, y), "finite state"),
        (lambda s, y: (s[:, :7], y), "width 8, not 7"),
    ],
)
def test_examples_that_teach_nothing_are_refused(change, message):
    states, labels = change(*separable())
    with pytest.raises(InputError, match=message):
        LinearProbe(8).fit(states, labels)


def test_what_does_not_fit_is_refused(tmp_path, llama):
    with pytest.raises(InputError, match="hidden_size=0"):
        LinearProbe(0)
    with pytest.raises(InputError, match=r"give 0 \(embeddings\) to 4"):
        LinearProbe(32, 5).bind(llama)
    with pytest.raises(InputError, match="width 8, the model has 32"):
        LinearProbe(8).bind(llama)
    with pytest.raises(InputError, match="call bind"):
        LinearProbe(8).save(tmp_path)
    with pytest.raises(InputError, match="no linear probe"):
        LinearProbe.load(tmp_path / "nothing")
