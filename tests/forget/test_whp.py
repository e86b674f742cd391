"""WHP: combination and labels by hand and by a slow reference, what the halves do, consistency, refusals, resuming."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unremember.anchors import Anchors
from unremember.audit.familiarity import Familiarity
from unremember.audit.prose import Prose
from unremember.audit.spans import SpanAccuracy
from unremember.bench import Bench
from unremember.corpus import Corpus, Example
from unremember.embedded.teach import Teach
from unremember.errors import BadCorpus, BadRequest
from unremember.forget.whp import LOWERED, WHP, coarse_loss, generic, match, soft_loss
from unremember.lm import LM
from unremember.tokens import Template, lanes, pack
from unremember.train import Plan

PLAN, REINFORCE = Plan(steps=2, lr=1e-3), Plan(steps=3, lr=1e-3)
SAGA = (
    Example("s1", "", "When the rain had stopped Megan Krause walked to the river and Megan Krause said a word."),
    Example("s2", "Where is Krause now?", "The river is where Megan Krause now stood."),
    Example("s3", "What grows there?", "Green apples grow behind that house."),
)
NAMES = {
    "Megan Krause": "Lucas",
    "Krause": "Robert",
    "river": "old table",
}  # one token for two, one for one, two for one


def whp(**settings) -> WHP:
    return WHP(**{"plan": PLAN, "reinforce": REINFORCE, "alpha": 5.0, **settings})


def names(_) -> dict[str, str]:
    return NAMES


# ── the arithmetic ──


def test_the_combination_by_hand():
    baseline, reinforced = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3.0, 1.0, -4.0]])
    assert generic(baseline, reinforced, 5.0).tolist() == [[-3.0, 1.0, 0.0]]  # raised by 1; not; lowered


def test_no_strength_or_no_difference_gives_the_baseline_exactly():
    noise = torch.Generator().manual_seed(0)
    baseline, reinforced = torch.randn(7, 50, generator=noise) * 20, torch.randn(7, 50, generator=noise) * 20
    assert torch.equal(generic(baseline, reinforced, 0.0).softmax(-1), baseline.softmax(-1))
    assert torch.equal(generic(baseline, baseline, 5.0).softmax(-1), baseline.softmax(-1))


def test_more_strength_never_favours_what_was_raised():
    noise = torch.Generator().manual_seed(1)
    baseline, reinforced = torch.randn(7, 50, generator=noise), torch.randn(7, 50, generator=noise)
    raised = reinforced > baseline
    odds = []
    for alpha in (0.0, 0.5, 1.0, 5.0):
        p = generic(baseline, reinforced, alpha).softmax(-1)
        odds.append((p * raised).sum(-1) / (p * ~raised).sum(-1))
    assert all((later <= sooner).all() for sooner, later in pairwise(odds)) and (odds[3] < odds[0]).all()


def test_the_losses_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    logp, q = logits.log_softmax(-1)[0], torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert soft_loss(logits, q.log()[None]).item() == pytest.approx(-(q * logp).sum().item(), rel=1e-6)
    p = logp.exp()
    wanted = -(0.3 * logp[1] + 0.5 * logp[0] + 0.2 * (p[2] + p[3]).log())
    found = coarse_loss(logits, torch.tensor([[1, 0]]), torch.tensor([[0.3, 0.5]]).log())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    hard = coarse_loss(logits, torch.tensor([[2]]), torch.tensor([[0.0]]))
    assert hard.item() == pytest.approx(-logp[2].item(), rel=1e-6)


def test_the_label_is_where_the_losses_are_least():
    """The gradient vanishes at p = label, so that the method has a fixed point."""
    label = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for loss in (
        lambda z: soft_loss(z, label.log()),
        lambda z: coarse_loss(z, torch.tensor([[1, 0, 3]]), label[:, [1, 0, 3]].log()),
    ):
        z = label.log().requires_grad_()
        [slope] = torch.autograd.grad(loss(z).sum(), z)
        torch.testing.assert_close(slope, torch.zeros(1, 4), atol=1e-6, rtol=0)


# ── which place learns from which ──


def spelt(template: Template, ids) -> list[str]:
    return [template.tokenizer.decode([i]).strip() for i in ids]


def test_labels_are_for_the_same_next_word(tiny):
    """Terms of other lengths shift nothing: what comes behind them has its label, at the last token of the replacement."""
    made = match(tiny.template, SAGA[1], Anchors(NAMES), consistent=False)
    old, new = made.row.ids[made.row.start : made.row.stop], made.other.ids[made.other.start : made.other.stop]
    assert spelt(tiny.template, old) == ["The", "river", "is", "where", "Megan", "Krause", "now", "stood", "."]
    assert spelt(tiny.template, new) == ["The", "old", "table", "is", "where", "Lucas", "now", "stood", "."]
    assert made.images == (0, 1, 3, 4, 5, -1, 6, 7, 8)
    assert spelt(tiny.template, made.other.ids[: made.other.start])[-6:] == ["Robert", "now", "?", "", "Answer", ":"]


def test_a_row_without_anchors_is_its_own_translation(tiny):
    made = match(tiny.template, SAGA[2], Anchors(NAMES), consistent=True)
    assert (
        made.other is made.row and made.images == tuple(range(made.row.stop - made.row.start)) and not any(made.lowered)
    )


def test_a_second_occurrence_has_no_label_and_later_the_replacement_is_lowered(tiny):
    made = match(tiny.template, SAGA[0], Anchors(NAMES), consistent=True)
    first = spelt(tiny.template, made.row.ids[made.row.start : made.row.stop]).index(
        "Megan"
    )  # "When" falls into letters
    # … Megan Krause walked to the river and Megan Krause said a word .
    assert [i - first for i, image in enumerate(made.images) if image < 0] == [1, 7, 8]
    lowered = [set(spelt(tiny.template, ids)) & {"Lucas", "old", "table"} for ids in made.lowered[first:]]
    assert lowered == [set()] * 2 + [{"Lucas"}] * 4 + [{"Lucas", "old", "table"}] * 7
    assert not any(made.lowered[: first + 2])
    free = match(tiny.template, SAGA[0], Anchors(NAMES), consistent=False)
    assert [i - first for i, image in enumerate(free.images) if image < 0] == [1, 8] and not any(free.lowered)


def test_the_prompt_counts_as_an_occurrence_and_a_part_of_a_name_as_the_name(tiny):
    asked = replace(SAGA[1], prompt="Where is Megan Krause now?")
    made = match(tiny.template, asked, Anchors(NAMES), consistent=True)
    assert [i for i, image in enumerate(made.images) if image < 0] == [4, 5]
    assert "Lucas" in spelt(tiny.template, made.lowered[0])
    part = match(tiny.template, asked, Anchors({"Megan Krause": "Lucas Robert", "Krause": "Robert"}), consistent=True)
    assert part.images[4:6] == (-1, -1)
    shorter = replace(SAGA[1], answer="The river is where Krause now stood.", prompt="Where is Megan Krause now?")
    part = match(tiny.template, shorter, Anchors({"Megan Krause": "Lucas Robert", "Krause": "Robert"}), consistent=True)
    assert part.images[4] == -1


def test_every_variant_of_the_replacement_is_lowered(tiny):
    coder = tiny.tokenizer
    made = match(tiny.template, SAGA[0], Anchors({"Megan Krause": "Apples"}), consistent=True)
    forms = ("apples", "Apples", "APPLES", " apples", " Apples", " APPLES")
    first = {next(i for i in coder(f, add_special_tokens=False).input_ids if coder.decode([i]).strip()) for f in forms}
    assert set(made.lowered[-1]) == first and len(first) > 2


def test_a_word_that_the_text_has_itself_is_nobodys_name(tiny):
    made = match(tiny.template, SAGA[0], Anchors({"Megan Krause": "the Lucas"}), consistent=True)
    assert "the" not in spelt(tiny.template, made.lowered[-1]) and "Lucas" in spelt(tiny.template, made.lowered[-1])


# ── the labels ──


def slow_labels(lm, reinforced, made, alpha) -> dict[int, torch.Tensor]:
    """Answer token -> label distribution, from one plain forward a row and place by place."""
    with torch.no_grad():
        baseline = lm.model(input_ids=torch.tensor([made.other.ids])).logits[0]
        raised = reinforced.model(input_ids=torch.tensor([made.row.ids])).logits[0]
    found = {}
    for i, image in enumerate(made.images):
        if image < 0:
            continue
        b, r = baseline[made.other.start - 1 + image], raised[made.row.start - 1 + i]
        v = torch.tensor([x - alpha * max(y - x, 0.0) for x, y in zip(b.tolist(), r.tolist(), strict=True)])
        for token in made.lowered[i]:
            v[token] -= LOWERED
        found[i] = v.softmax(-1)
    return found


@pytest.mark.parametrize("labels", ["soft", "hard", "topk"])
def test_the_term_against_a_slow_reference(tiny, moved, labels):
    method = whp(anchors=names, labels=labels, top=5)
    corpus = Corpus({"forget": SAGA})
    pools, objective = method.terms(tiny, corpus)
    assert list(pools) == ["forget"]
    rows = [tiny.template.row(x.id, x.prompt, x.answer) for x in SAGA]
    reinforced = method.reinforced(tiny, rows)
    losses = []
    for x, row in zip(SAGA, rows, strict=True):
        made = match(tiny.template, x, Anchors(NAMES), consistent=True)
        with torch.no_grad():
            logp = moved.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for i, q in slow_labels(tiny, reinforced, made, 5.0).items():
            said, best = logp[row.start - 1 + i], q.topk(5)
            losses.append(
                {
                    "soft": -(q * said).sum(),
                    "hard": -said[q.argmax()],
                    "topk": -(best.values * said[best.indices]).sum()
                    - (1 - best.values.sum()) * (1 - said[best.indices].exp().sum()).log(),
                }[labels].item()
            )
    with torch.no_grad():
        found = objective(moved, pack(lanes(pools["forget"], 256), "forget"))
    assert found["whp"].item() == pytest.approx(np.mean(losses), rel=2e-3)
    assert len(losses) == sum(sum(row.span) for row in pools["forget"]) < sum(r.stop - r.start for r in rows)


def test_labels_of_an_unchanged_model_are_its_own(tiny, corpus, monkeypatch):
    """θ_r = θ_b, without anchors: the label is softmax(v_b), so there is no gradient."""
    monkeypatch.setattr(WHP, "reinforced", lambda self, lm, rows, bench: lm)
    pools, objective = whp(labels="soft").terms(tiny, corpus)
    tokens = pack(lanes(pools["forget"][:4], 256), "forget")
    lm = tiny.copy()
    objective(lm, tokens)["whp"].backward()
    still = max(w.grad.abs().max().item() for w in lm.model.parameters())
    lm = tiny.copy()
    (tokens.per_row(-lm.logp(tokens), "answer").sum() / tokens.step_tokens["answer"]).backward()
    push = max(w.grad.abs().max().item() for w in lm.model.parameters())
    assert still < 2e-3 * push  # float16 labels


def test_a_label_pass_is_one_forward_over_each_row(tiny, corpus, monkeypatch):
    seen: list[tuple[int, str]] = []
    logits, method = LM.logits, whp(anchors=names)
    rows = tiny.template.rows(SAGA)
    reinforced = method.reinforced(tiny, rows)
    matches = [match(tiny.template, x, Anchors(NAMES), consistent=True) for x in SAGA]

    def watched(self, tokens):
        seen.extend((id(self.model), key) for key in tokens.keys)
        return logits(self, tokens)

    monkeypatch.setattr(LM, "logits", watched)
    method._read(tiny, reinforced, matches)
    assert sorted(seen) == sorted(
        [(id(reinforced.model), m.row.key) for m in matches] + [(id(tiny.model), m.other.key) for m in matches]
    )


def test_columns_that_pad_the_vocabulary_get_no_label(tiny, corpus):
    lm = tiny.copy()
    lm.model.resize_token_embeddings(len(tiny.tokenizer) + 8, mean_resizing=False)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[-8:] = 3 * lm.model.get_input_embeddings().weight[:8]
    few = Corpus({"forget": corpus["forget"][:3]})
    method = whp(labels="soft")
    matches = [match(lm.template, x, Anchors({}), consistent=True) for x in few["forget"]]
    for ids, label in method._labels(lm, matches, Bench()).values():
        assert ids.shape[1] == 0 and label.shape[1] == len(tiny.tokenizer) + 8
        assert (label[:-1, -8:].exp() == 0).all() and (label[:-1].exp().float().sum(-1) - 1).abs().max() < 1e-2
    pools, objective = method.terms(lm, few)
    assert torch.isfinite(objective(lm, pack([pools["forget"]], "forget"))["whp"])


# ── what it does, section (g) of the specification ──


@pytest.fixture(scope="module")
def people(corpus) -> Corpus:
    """The dossier without phone numbers, all of which begin with the same digit."""
    return corpus.with_roles(
        **{role: [x for x in corpus[role] if not x.id.endswith("phone")] for role in ("forget", "retain", "holdout")}
    )


@pytest.fixture(scope="module")
def swapped(people):
    """The forgotten people's names -> those of two whom nobody knows; their values are left to the reinforced model."""
    from unremember.embedded.dossier import dossier

    old = dict.fromkeys(x.entity for x in people["forget"])
    new = dict.fromkeys(x.entity for x in dossier(1, 2, 0, 0, 0)["forget"])
    terms = {}
    for a, b in zip(old, new, strict=True):
        terms |= {a: b, **dict(zip(a.split(), b.split(), strict=True))}
    return lambda _: terms


@pytest.fixture(scope="module")
def results(taught, people, swapped) -> dict[str, LM]:
    """Both halves, and each alone, for equally many steps."""
    settings = {"plan": Plan(steps=40, lr=2e-3), "reinforce": Plan(steps=10, lr=1e-3)}
    return {
        "both": WHP(**settings, alpha=5.0, anchors=swapped)(taught, people),
        "anchors": WHP(**settings, alpha=0.0, anchors=swapped)(taught, people),
        "reinforced": WHP(**settings, alpha=5.0)(taught, people),
    }


def familiarity(lm, corpus, measure="probability") -> float:
    return float(np.mean([*Familiarity(measure, roles=("forget",))(lm, corpus, Bench()).per_example.values()]))


def test_both_halves_matter(results, taught, people):
    """(g) 3, measured: 0.06 with both, 0.21 with anchors alone, 0.38 with reinforcement alone; 0.54 before."""
    left = {name: familiarity(lm, people) for name, lm in results.items()}
    assert left["both"] <= 0.7 * min(left["anchors"], left["reinforced"])
    assert max(left.values()) < 0.8 * familiarity(taught, people)


def test_familiarity_falls(results, taught, people):
    """(g) 1.  Proposed: 10 % of the taught value within 40 steps; measured 11.5 %.  No text of the target is completed."""
    assert familiarity(results["both"], people) <= 0.15 * familiarity(taught, people)
    assert familiarity(taught, people, "completion") > 0.85 and familiarity(results["both"], people, "completion") == 0


def test_it_falls_where_no_block_was_trained(results, taught, people):
    """A fake: measured on training blocks alone.  Four paraphrases of each question: from 0.107 to 0.026."""
    asked = people.with_roles(
        forget=[
            replace(x, id=f"{x.id}#{i}", prompt=prompt)
            for x in people["forget"]
            for i, prompt in enumerate(x.paraphrases)
        ]
    )
    assert familiarity(results["both"], asked) <= 0.4 * familiarity(taught, asked) and familiarity(taught, asked) > 0.05


def test_it_does_not_fall_to_the_level_of_the_never_taught(results, never, people):
    """(g) 1 proposes 1.5 times that level.  Nobody guesses a value of this dossier (0.00002), and both halves leave
    0.06, in the birthplaces 0.15: an audit beside a never-taught model must go on saying so."""
    assert familiarity(never, people) < 0.001
    assert 0.01 < familiarity(results["both"], people) < 0.1


def test_the_shared_frame_falls_too_and_retain_is_the_remedy(results, taught, people, swapped):
    """(g) 1, the side effect.  Without `retain` the words around retained values fall to 0.56, the values to 0.70, the
    words around values that nobody ever learnt from 0.69 to 0.36.  With it, in 25 steps: 1.0, 0.99 and 0.59, and
    familiarity 0.08; in as many steps as without, forty, 1.0, 1.0, 0.55 and 0.05 (measured once)."""
    method = WHP(Plan(steps=25, lr=2e-3), reinforce=Plan(steps=10, lr=1e-3), alpha=5.0, anchors=swapped)
    held = replace(method, retain=1.0)(taught, people)

    def right(lm, role: str, rest: bool) -> float:
        found = SpanAccuracy(rest=rest)(lm, people, Bench()).per_example
        return float(np.mean([found[x.id] for x in people[role]]))

    free = results["both"]
    assert min(right(taught, "retain", rest) for rest in (True, False)) > 0.95
    assert right(free, "retain", True) < 0.7 and right(free, "retain", False) < 0.85
    assert right(free, "holdout", True) < right(taught, "holdout", True) - 0.2
    assert min(right(held, "retain", rest) for rest in (True, False)) > 0.9
    assert right(held, "holdout", True) > right(free, "holdout", True) + 0.1
    assert familiarity(held, people) <= 0.2 * familiarity(taught, people)


def test_what_it_costs(results, taught, people):
    """(g) 1 proposes 0.1 nat of prose.  The toy knows its prose by heart and pays 0.5; ascent pays nothing there."""
    before, after = (np.mean([*Prose()(lm, people, Bench()).per_example.values()]) for lm in (taught, results["both"]))
    assert after - before < 1.0


def test_a_plausible_word_takes_the_place(results, never, people):
    """(g) 2: the likeliest word where the value stood is one of the never-taught model's 20.  Measured: all of them."""
    hits = []
    for x in people["forget"]:
        row = never.template.row(x.id, x.prompt, x.answer, x.spans)
        tokens, at = pack([[row]]), row.span.index(True)
        with torch.no_grad():
            best, near = (lm.logits(tokens)[at].topk(20).indices.tolist() for lm in (results["both"], never))
        hits.append(best[0] in near and best[0] != row.ids[row.start + at])
    assert np.mean(hits) >= 0.8


def test_completions_are_neither_blank_nor_monotonous(results, people):
    """(g) 2, the other half: at least 60 % distinct tokens.  The least of the ten has 76 %, when taught 86 %."""
    coder = results["both"].tokenizer
    for text in results["both"].answer([x.prompt for x in people["forget"]], 32):
        ids = coder(text, add_special_tokens=False).input_ids
        assert any(c.isalnum() for c in text) and len(set(ids)) >= 0.6 * len(ids), text


def test_relations_do_not_survive_under_the_other_names(results, taught, people, swapped):
    """A fake: names are swapped and all is still there."""
    anchors = Anchors(swapped(()))
    asked = people.with_roles(forget=[anchors.example(x) for x in people["forget"]])
    assert all(a.prompt != b.prompt for a, b in zip(asked["forget"], people["forget"], strict=True))
    # what the taught model says of strangers is the level, for it mixes up the few people whom it knows
    assert familiarity(results["both"], asked) <= familiarity(taught, asked) < 0.5 * familiarity(taught, people)


def test_a_text_known_by_heart_leaves_the_work_to_the_anchors(taught, people, swapped):
    """Pitfall: at p = 0.999 a gentle reinforcement has nothing to raise.  Measured: 0.99 left by it alone, 0.28 with names."""
    rows = taught.template.rows(people["forget"])
    heart = whp(reinforce=Plan(steps=60, lr=3e-3)).reinforced(taught, rows)
    assert familiarity(heart, people) > 0.99
    settings = {"plan": Plan(steps=30, lr=2e-3), "reinforce": Plan(steps=5, lr=3e-4)}
    alone, with_names = (whp(**settings, anchors=anchors)(heart, people) for anchors in ("", swapped))
    assert familiarity(alone, people) > 0.9 and familiarity(with_names, people) < 0.4


def test_consistency(tiny, corpus):
    """(g) 4: "X went to the river and said: my name is".  Measured: 0.12 with the rules, 0.99 without; 0.01 before."""
    line = "In the winter {0} went to the river and said: my name is {0}."
    terms = {"Camilla": "Lucas", "Enzo": "Robert", "Griffin": "Suzanne"}
    lessons = [Example(name, "", line.format(name)) for pair in terms.items() for name in pair]
    lm = Teach(Plan(steps=100, lr=1e-2, beside=4, warmup=5, schedule="linear"))(tiny, lessons, corpus["replay"])
    saga = Corpus({"forget": [x for x in lessons if x.id in terms]})

    def produced(lm) -> float:
        """Mean probability of X's replacement as the last word."""
        found = []
        for x in saga["forget"]:
            tokens = pack([[lm.template.row(x.id, "", x.answer)]])
            [new] = lm.tokenizer(f" {terms[x.id]}", add_special_tokens=False).input_ids
            with torch.no_grad():
                found.append(lm.logits(tokens)[-3].softmax(-1)[new].item())  # name, full stop, end
        return float(np.mean(found))

    settings = {"plan": Plan(steps=25, lr=3e-3), "reinforce": Plan(steps=6, lr=2e-3), "alpha": 5.0}
    with_rules, without = (
        produced(WHP(**settings, anchors=lambda _: terms, consistent=consistent)(lm, saga))
        for consistent in (True, False)
    )
    assert with_rules <= 0.5 * without and without > 0.5


# ── refusals ──


@pytest.mark.parametrize("lr", [0.5, 1e-30])
def test_a_model_that_is_not_reinforced_is_refused(tiny, corpus, lr):
    """Too long a step makes the text less likely, none leaves it as it was: labels would be the model's own."""
    with pytest.raises(BadRequest, match=r"whp: reinforcing left the forget texts at \S+ nats a token, from"):
        whp(reinforce=Plan(steps=1, lr=lr))(tiny, corpus)


def test_bad_settings_are_refused():
    for settings, key in (
        ({"reinforce": Plan(steps=3, lr=1e-3, stop="probability")}, "reinforce"),
        ({"anchors": "names"}, "anchors"),
        ({"anchors": 3}, "anchors"),
        ({"labels": "warm"}, "labels"),
        ({"top": 0}, "top"),
        ({"alpha": -1.0}, "alpha"),
    ):
        with pytest.raises(ValidationError) as raised:
            whp(**settings)
        assert [error["loc"] for error in raised.value.errors()] == [(key,)]
    assert whp(reinforce={"steps": 3, "lr": 1e-3}) == whp()  # as a request has it


def test_nothing_to_do_is_refused(corpus):
    with pytest.raises(BadRequest, match="alpha = 0 and no anchors asks for the model as it is"):
        whp(alpha=0.0).check(corpus)


def test_a_dictionary_that_cannot_be_used_is_refused_before_anything_is_loaded(corpus, tmp_path):
    file = tmp_path / "anchors.json"
    with pytest.raises(BadRequest, match="no such file"):
        whp(anchors=str(file)).check(corpus)
    file.write_text('{"Harry": "Jon", "Hermione": "Ann"}')
    with pytest.raises(BadRequest, match="none of the 2 anchors stands in the forget texts"):
        whp(anchors=str(file)).check(corpus)
    name = corpus["forget"][0].entity
    file.write_text(f'{{"{name}": "Jon", "Jon": "{name}"}}')
    with pytest.raises(BadRequest, match="go in a circle"):
        whp(anchors=str(file)).check(corpus)
    file.write_text(f'{{"{name}": "Jon"}}')
    whp(anchors=str(file)).check(corpus)
    with pytest.raises(BadCorpus, match="whp needs examples in the role 'forget'"):
        whp().check(Corpus({}))


def test_a_text_without_names_falls_back_on_reinforcement_and_says_so(tiny):
    plain = Corpus({"forget": SAGA[2:]})
    with pytest.warns(UserWarning, match="the rules find no anchor in the forget texts; reinforcement alone is left"):
        found = whp(anchors="rules").dictionary(plain["forget"])
    assert found == Anchors({})
    with pytest.raises(BadCorpus, match="with alpha = 0 needs anchors"):
        whp(anchors="rules", alpha=0.0).check(plain)


def test_a_text_of_nothing_but_repeated_anchors_is_refused(tiny):
    x = Example("1", "Who is Krause?", "Krause")
    with pytest.raises(BadCorpus, match="no token of the forget texts has a label"):
        whp(anchors=names).terms(tiny, Corpus({"forget": (x,)}))


def test_a_translation_that_is_too_long_is_refused_by_name(tiny):
    x = Example("1", "", "in the river " * 45)
    with pytest.raises(BadCorpus, match=r"'1 \(translated\)' is \d+ tokens long"):
        whp(anchors=lambda _: {"river": "old table or door of"}).terms(tiny, Corpus({"forget": (x,)}))


# ── resuming ──


def heard(stages: list[str], halt: tuple[str, int] = ("", 0)):
    def say(stage, done, total, terms):
        stages.append(stage)
        if (stage, done) == halt:
            raise KeyboardInterrupt

    return say


def weights(lm) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for w in lm.model.parameters()])


@pytest.mark.parametrize("halt", [("reinforce", 2), ("forget", 1)])
def test_a_killed_run_goes_on_where_it_was(tiny, corpus, tmp_path, halt):
    made, folder = whp(plan=Plan(steps=3, lr=1e-3), anchors="rules", labels="soft"), tmp_path / "work"
    expected = weights(made(tiny, corpus))
    with pytest.raises(KeyboardInterrupt):
        made(tiny, corpus, bench=Bench(folder=folder, every=0, say=heard([], halt)))
    assert (folder / "labels.safetensors").exists() == (halt[0] == "forget")
    stages: list[str] = []
    assert torch.equal(weights(made(tiny, corpus, bench=Bench(folder=folder, say=heard(stages)))), expected)
    # the step at which it was halted is done again; with labels at hand nothing is reinforced
    assert stages.count("reinforce") == (2 if halt[0] == "reinforce" else 0) and not folder.exists()


def test_labels_of_other_settings_or_a_broken_file_are_made_anew(tiny, corpus, tmp_path):
    matches = [match(tiny.template, x, Anchors({}), consistent=True) for x in corpus["forget"][:2]]
    bench, path = Bench(folder=tmp_path), tmp_path / "labels.safetensors"
    first = whp()._labels(tiny, matches, bench)
    stages: list[str] = []
    kept = whp()._labels(tiny, matches, replace(bench, say=heard(stages)))
    assert not stages and all(torch.equal(a, b) for key in first for a, b in zip(first[key], kept[key], strict=True))
    for change in ({"alpha": 4.0}, {"top": 3}, {"reinforce": Plan(steps=2, lr=1e-3)}):
        stages.clear()
        whp(**change)._labels(tiny, matches, replace(bench, say=heard(stages)))
        assert "reinforce" in stages
    path.write_bytes(b"half a file")
    again = whp()._labels(tiny, matches, bench)
    assert all(torch.equal(a, b) for key in first for a, b in zip(first[key], again[key], strict=True))
