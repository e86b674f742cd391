"""Path patching: edges of hand-built linear models, what adds up, and the planted lookup's one way out."""

import pytest
import torch
from torch import nn

from planted import INDOORS, LOOKUP, OUTDOORS, planted
from unremember.errors import BadRequest
from unremember.locate.activation import Part, heads, patched
from unremember.locate.anatomy import components
from unremember.locate.paths import rest, through
from unremember.locate.subject import facts, known, laid, swapped


class Stream(nn.Module):
    """Three linear writers to one residual stream, and a head."""

    def __init__(self, seed=0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.f1, self.f2, self.f3 = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.head = nn.Linear(6, 1, bias=False)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=random))
        self.double()

    def forward(self, x):
        for f in (self.f1, self.f2, self.f3):
            x = x + f(x)
        return self.head(x)[:, 0]


F = [(f"f{i}", "out") for i in (1, 2, 3)]
IN = {"f2": ("f2", "in"), "f3": ("f3", "in"), "head": ("head", "in")}
X, Y = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)).double()


def effects(model, sender, names) -> dict[str, torch.Tensor]:
    return {
        name: through(model, lambda: model(X), lambda: model(Y), Part(sender), [Part(IN[name])], F).change
        for name in names
    }


def test_direct_effects_add_up_to_the_total_in_a_linear_model():
    model = Stream()
    for at, sender in enumerate(F):
        found = effects(model, sender, list(IN)[at:])
        [total] = patched(model, lambda: model(X), lambda: model(Y), [(Part(sender),)])
        torch.testing.assert_close(torch.stack(list(found.values())).sum(0), total.broken)
    by_hand = ((model.f1(X) - model.f1(Y)) @ model.head.weight.T)[:, 0]
    torch.testing.assert_close(effects(model, F[0], ["head"])["head"], by_hand.detach())


def test_an_absent_edge_is_zero_and_the_others_are_not():
    model = Stream()
    with torch.no_grad():
        model.f1.weight[3:] = 0  # f1 writes to the first three dimensions only
        model.f3.weight[:, :3] = 0  # f3 reads none of them
        model.f2.weight[3:] = 0  # and f2, which does, passes nothing on to where f3 reads
    found = effects(model, F[0], IN)
    assert found["f3"].abs().max() <= 1e-6 < 1e-2 < min(found["f2"].abs().min(), found["head"].abs().min())


def test_what_is_not_frozen_carries_the_sender_on():
    """f1 does not reach f3 by itself, but it does by way of f2: "direct" depends on what is frozen."""
    model = Stream()
    with torch.no_grad():
        model.f1.weight[3:] = 0
        model.f3.weight[:, :3] = 0
    ask = [Part(IN["f3"])]
    both = [
        through(model, lambda: model(X), lambda: model(Y), Part(F[0]), ask, frozen).change.abs().max()
        for frozen in (F, [F[0], F[2]])
    ]
    assert both[0] <= 1e-6 < 1e-2 < both[1]


def test_a_sender_behind_its_receiver_gives_exactly_nothing():
    model = Stream()
    for sender, name in ((F[1], "f2"), (F[2], "f2"), (F[2], "f3")):
        assert effects(model, sender, [name])[name].tolist() == [0.0] * 5


def test_a_nonlinear_edge_by_hand():
    """out = relu(a + b) with a read by b: the two ways of a, each by its own arithmetic."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.end = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x):
            a = self.a(x)
            return (self.end(a) + 2 * self.b(a).square())[:, 0]

    model, x, y = Two(), torch.tensor([[3.0]]), torch.tensor([[1.0]])
    a, b = ("a", "out"), ("b", "out")
    direct = through(model, lambda: model(x), lambda: model(y), Part(a), [Part(("end", "in"))], [b])
    by_b = through(model, lambda: model(x), lambda: model(y), Part(a), [Part(("b", "in"))], [b])
    assert (direct.change.item(), by_b.change.item(), direct.total.item()) == (2.0, 16.0, 18.0)
    assert direct.share == pytest.approx(1 / 9)


@pytest.fixture(scope="module")
def circuit(tiny):
    return planted(tiny)


def test_the_lookup_goes_out_by_one_head(circuit):
    """From the lookup's MLP by the values of the head for this format: all of its effect.  By the other format's: none."""
    lm, corpus = circuit
    found = facts(lm, corpus["forget"])
    x, y = laid(lm, [f.row for f in found]), laid(lm, swapped(found, found, 0, 0))
    parts = {(c.block, c.kind): c for c in components(lm.model)}
    lookup = Part(parts[LOOKUP, "mlp"].output)
    frozen = rest(lm.model, mlps=True)
    assert len(frozen) == 8 and len(rest(lm.model, mlps=False)) == 4

    def values(block):
        return [Part((parts[block, "attention"].modules[2], "out"))]

    shares = {
        block: through(lm.model, lambda: known(lm, x), lambda: known(lm, y), lookup, values(block), frozen).share
        for block in (0, INDOORS, OUTDOORS)
    }
    [total] = patched(lm.model, lambda: known(lm, x), lambda: known(lm, y), [(lookup,)])
    assert shares[0] == 0.0, "before the lookup"
    assert abs(shares[OUTDOORS]) < 0.02 < 0.3 < shares[INDOORS]
    assert shares[INDOORS] == pytest.approx(total.noising, abs=0.02)


def test_one_head_of_a_frozen_layer_may_send(circuit):
    """The other heads of the sender's own site stay as they were."""
    lm, corpus = circuit
    found = facts(lm, corpus["forget"])
    x, y = laid(lm, [f.row for f in found]), laid(lm, swapped(found, found, 0, 0))
    end = [Part(("model.norm", "in"))]
    sent = {
        head: through(
            lm.model,
            lambda: known(lm, x),
            lambda: known(lm, y),
            heads(lm.model)[INDOORS, head],
            end,
            rest(lm.model, True),
        ).share
        for head in range(4)
    }
    assert sent[0] > 0.9 and all(abs(sent[head]) < 0.02 for head in (1, 2, 3))


def test_refusals_and_clean_hands():
    model = Stream()
    with pytest.raises(BadRequest, match="no receiver"):
        through(model, lambda: model(X), lambda: model(Y), Part(F[0]), [], F)
    with pytest.raises(BadRequest, match="would send to itself"):
        through(model, lambda: model(X), lambda: model(Y), Part(F[0]), [Part(F[0])], F)

    def fails():
        model(X)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        through(model, lambda: model(X), fails, Part(F[0]), [Part(IN["head"])], F)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
