"""SeUL: it is ascent on spans, bit for bit; what marks the spans, by hand and on the toy; and what it protects and does not.

Measured on the toy at lr 1e-3, every run stopped at the S-MA of the never-taught people (0.143), from 0.99:

                       steps   S-MA   rest-MA   retained S-MA
    ascent, all tokens   6     0.13     0.75        0.62
    SeUL, corpus spans   6     0.13     0.99        0.45
    SeUL, online         7     0.14     0.99        0.39

(g) 2 of the specification, prose, cannot be shown here: the toy has lost its prose when it was taught (NLL 4.8 nats).
"""

import math
from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import normalizers

from unremember.annotate import MOST
from unremember.audit.spans import SpanAccuracy
from unremember.bench import Bench
from unremember.corpus import Example
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.forget import seul
from unremember.forget.ascent import Ascent
from unremember.forget.seul import SeUL, bridged, intervals, open_to, surprising
from unremember.table import Reading, read
from unremember.tokens import lanes, pack
from unremember.train import Plan, train

PLAN = Plan(steps=3, lr=1e-3)
LONG = Plan(steps=40, lr=1e-3)


def flags(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def bare(corpus, role="forget"):
    return [replace(x, spans=()) for x in corpus[role]]


# ── the loss ──


def test_the_loss_by_hand(taught, moved, corpus, slow_nll):
    """Mean log p over the span tokens of the step: the others add nothing, and rows weigh by their span tokens."""
    pools, objective = SeUL(PLAN).terms(taught, corpus)
    assert list(pools) == ["forget"]
    with torch.no_grad():
        [found] = objective(moved, pack(lanes(pools["forget"], 256), "forget")).values()
        spans = [-slow_nll(moved, row)[torch.tensor(row.span)] for row in pools["forget"]]
    assert found.item() == pytest.approx(torch.cat(spans).mean().item(), rel=1e-4)
    rows = torch.stack([x.mean() for x in spans]).mean().item()
    assert abs(found.item() - rows) > 0.01  # not a mean of means


def test_no_other_token_has_a_gradient(taught, corpus):
    pools, objective = SeUL(PLAN).terms(taught, corpus)
    tokens, asked = pack(lanes(pools["forget"], 256), "forget"), []

    class Watched:
        def logp(self, tokens):
            asked.append(torch.full((len(tokens.row),), -1.0, requires_grad=True))
            return asked[0]

    [slope] = torch.autograd.grad(sum(objective(Watched(), tokens).values()), asked)
    assert not slope[~tokens.span].any() and not tokens.span.all()
    torch.testing.assert_close(slope[tokens.span], torch.full((int(tokens.span.sum()),), 1 / int(tokens.span.sum())))


@pytest.mark.parametrize("keep", [{}, {"retain": 2.0}, {"kl": 1.0}])
def test_it_adds_nothing_to_ascent_on_spans(taught, corpus, keep):
    """The whole of the method is which tokens are marked: with the corpus' spans it is `ascent`, weight for weight."""
    ours, base = SeUL(PLAN, **keep)(taught, corpus), Ascent(PLAN, part="span", **keep)(taught, corpus)
    assert same(ours, base) and not same(ours, Ascent(PLAN, **keep)(taught, corpus)) and not same(ours, taught)


@pytest.mark.parametrize("spans", ["offline", "online"])
def test_found_spans_change_the_marks_and_nothing_else(taught, never, corpus, spans):
    """Handing the chosen spans to plain ascent gives the same weights, too."""
    some = corpus.with_roles(forget=[x for x in corpus["forget"] if not x.id.endswith("/occupation")])
    method = SeUL(PLAN, spans=spans, scorer=never)
    marked = some.with_roles(forget=method.choose(taught, some))
    assert same(method(taught, some), Ascent(PLAN, part="span")(taught, marked))


# ── which tokens are marked: by hand ──


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.2, "00010"), (0.21, "10010"), (0.4, "10010"), (0.6, "10011"), (1.0, "11111"), (1e-9, "00010")],
)
def test_the_top_share_by_hand(share, expected):
    assert (surprising(np.array([3.0, 0.0, 1.0, 5.0, 2.0]), share) == flags(expected)).all()


def test_ties_go_to_the_earlier_token():
    assert (surprising(np.array([1.0, 2.0, 2.0, 2.0]), 0.5) == flags("0110")).all()


def test_the_deviations_by_hand():
    """Mean 2, standard deviation √3.2: the bound is 3.79 at one, 2.89 at a half."""
    surprisal = np.array([3.0, 0.0, 1.0, 5.0, 1.0])
    assert surprisal.std() == pytest.approx(math.sqrt(3.2))
    assert (surprising(surprisal, 0.9, 1.0) == flags("00010")).all()
    assert (surprising(surprisal, 0.9, 0.5) == flags("10010")).all()
    assert not surprising(np.ones(4), 0.9, 1.0).any() and not surprising(np.array([]), 0.5).any()


@pytest.mark.parametrize(
    ("gap", "expected"), [(0, "10100110001"), (1, "11100110001"), (2, "11111110001"), (3, "11111111111")]
)
def test_gaps_by_hand(gap, expected):
    assert (bridged(flags("10100110001"), gap) == flags(expected)).all()
    assert not bridged(flags("000"), gap).any()


TEXT = "Ann's number is 061-24 (home)."
ENDS = (3, 5, 12, 15, 17, 18, 19, 20, 21, 22, 24, 26, 28, 30)
PIECES = list(zip((0, *ENDS), ENDS, strict=False))


def test_tokens_become_intervals_of_whole_words():
    """'Ann 's_number_is_0 6 1 - 2 4_(ho me).' with the space in front of a token, as byte-level tokenizers have it."""
    assert [TEXT[a:b] for a, b in PIECES] == [
        "Ann", "'s", " number", " is", " 0", "6", "1", "-", "2", "4", " (", "ho", "me", ")."
    ]  # fmt: skip

    def said(marked: str) -> list[str]:
        return [TEXT[a:b] for a, b in intervals(TEXT, PIECES, flags(marked))]

    assert said("00000100000000") == ["061"]  # one digit: its whole number
    assert said("00001111110000") == ["061-24"]
    assert said("00000000000100") == ["home"] and said("00000000001100") == ["(home"]
    assert said("10000000010000") == ["Ann", "24"]
    assert said("01000100000000") == ["'s", "061"]
    assert said("0" * 14) == []
    assert said("00000010100000") == ["061", "24"]


def test_two_halves_of_a_word_are_one_interval():
    assert intervals("walnut", [(0, 2), (2, 4), (4, 6)], flags("101")) == [(0, 6)]
    assert intervals("é!", [(0, 1), (0, 1), (1, 2)], flags("010")) == [(0, 1)]  # one byte of a character of two


def test_punctuation_and_what_the_prompt_says_is_not_marked():
    free = open_to("What is ANN's home number?", TEXT, PIECES)
    assert (free == flags("00001110110000")).all()  # the digits alone: "home" is asked for, the dash is a sign
    assert (open_to("", TEXT, PIECES) == flags("11111110110110")).all()
    assert (open_to("Is it 06?", TEXT, PIECES)[4:7] == flags("111")).all()  # 06 is not 061
    assert not open_to("", " \n.", [(0, 1), (1, 2), (2, 3)]).any() and not open_to("", "a", [(0, 0)]).any()


# ── which tokens are marked: on the toy ──


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Chance that a marked token scores above one that is not."""
    a, b = scores[truth], scores[~truth]
    return float((a[:, None] > b[None]).mean() + 0.5 * (a[:, None] == b[None]).mean())


def ranked(lm, corpus, free_only: bool) -> float:
    """ROC-AUC of the surprisal against the corpus' spans."""
    gold = np.concatenate([row.span for row in lm.template.rows(corpus["forget"])])
    surprisal = -np.concatenate([x.logp for x in read(lm, lm.template.rows(bare(corpus)))])
    if not free_only:
        return auc(surprisal, gold)
    free = np.concatenate([_free(lm, x) for x in corpus["forget"]])
    return auc(surprisal[free], gold[free])


def _free(lm, x: Example) -> np.ndarray:
    offsets = lm.tokenizer(" " + x.answer, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return open_to(x.prompt, x.answer, [(max(a - 1, 0), b - 1) for a, b in offsets])


def test_a_scorer_that_knows_the_template_finds_the_values(tiny, taught, never, corpus):
    """(g) 4.  Measured over all tokens: never 0.63, since the unknown names surprise it as much as the values (the specification
    has 0.76, and 0.85 without the opening name); over the tokens that may be marked: never 0.87, untuned 0.75, taught 0.91.

    Corrected: the taught model is not 0.15 worse here.  It has memorised the values a little less firmly than the template
    (0.36 nats a token against 0.02), and this residue ranks them; in the 135M model of the specification it did not (0.51).
    Taught on, the residue moves about (0.75 after 50 more steps, 0.86 after 300): it says how the model was trained, and its
    mean is a twentieth of the surprise of the never-taught one.  That is what the warning is for.
    """
    assert ranked(never, corpus, free_only=True) >= 0.7 > ranked(never, corpus, free_only=False)
    assert ranked(never, corpus, free_only=True) > ranked(tiny, corpus, free_only=True)
    surprise = []
    for lm in (never, taught):
        rows = lm.template.rows(corpus["forget"])
        surprise.append(-np.concatenate([x.logp[x.span] for x in read(lm, rows)]).mean())
    assert surprise[0] > 10 * surprise[1]


def overlap_with_gold(taught, corpus, chosen) -> tuple[float, float]:
    """Recall and precision, in tokens."""
    gold, marked = (
        np.concatenate([row.span for row in taught.template.rows(examples)]) for examples in (corpus["forget"], chosen)
    )
    both = (gold & marked).sum()
    return both / gold.sum(), both / marked.sum()


def test_what_is_chosen_online_are_the_values(taught, never, corpus):
    """Measured: recall 0.71, precision 1.0 (specification: 0.79 and 0.81)."""
    recall, precision = overlap_with_gold(
        taught, corpus, SeUL(PLAN, spans="online", scorer=never).choose(taught, corpus)
    )
    assert recall >= 0.6 and precision >= 0.8
    minus = SeUL(PLAN, spans="online", scorer=never, minus=True).choose(taught, corpus)
    assert overlap_with_gold(taught, corpus, minus)[0] >= 0.6
    wide = SeUL(PLAN, spans="online", scorer=never, share=0.9).choose(taught, corpus)
    assert overlap_with_gold(taught, corpus, wide)[0] > recall


def test_minus_ranks_by_the_difference(monkeypatch, taught, never, corpus):
    """What surprises the scorer and the model alike was not memorised."""
    surprise = {"never": np.array([6.0, 5.0, 1.0, 1.0, 1.0]), "taught": np.array([6.0, 0.0, 0.0, 0.0, 0.0])}
    zeros, asked = np.zeros(5), corpus.with_roles(forget=[Example("x", "Who?", "He walked home again.")])

    def reads(lm, rows, bench):
        return [Reading(-surprise["taught" if lm is taught else "never"], zeros, zeros, zeros, zeros)]

    monkeypatch.setattr(seul, "read", reads)
    for minus, expected in ((False, ("He",)), (True, ("walked",))):
        [x] = SeUL(PLAN, spans="online", scorer=never, minus=minus, share=0.25).choose(taught, asked)
        assert x.values() == expected


def test_the_choice_rests_on_scorer_and_text_alone(taught, never, corpus):
    method = SeUL(PLAN, spans="online", scorer=never)
    chosen = {x.id: x.spans for x in method.choose(taught, corpus)}
    turned = corpus.with_roles(forget=[replace(x, spans=((0, 1),)) for x in reversed(corpus["forget"])])
    assert {x.id: x.spans for x in method.choose(taught, turned, Bench(budget=300))} == chosen


def test_a_scorer_may_be_named_and_is_loaded_late(taught, never, corpus, tmp_path):
    never.save(tmp_path / "scorer")
    method = SeUL(PLAN, spans="online", scorer=str(tmp_path / "scorer"))
    expected = SeUL(PLAN, spans="online", scorer=never).choose(taught, corpus)
    assert method.choose(taught, corpus) == expected


# ── what it does ──


def accuracy(lm, corpus, role: str, rest: bool = False) -> float:
    found = SpanAccuracy(rest=rest)(lm, corpus, Bench()).per_example
    return float(np.mean([found[x.id] for x in corpus[role]]))


class AtLevel:
    """Stops where the mean S-MA of the forget rows, on the corpus' own spans, is that of the never-taught people."""

    every = 1

    def __init__(self, lm, corpus):
        self.looks, self.rows = [], lm.template.rows(corpus["forget"])
        self.level = accuracy(lm, corpus, "holdout")

    def __call__(self, lm, step: int) -> bool:
        now = float(np.mean([x.hit[x.span].mean() for x in read(lm, self.rows)]))
        self.looks.append({"step": step, "mean": now})
        return now <= self.level


@pytest.fixture(scope="module")
def stopped(taught, never, corpus):
    """method -> (model, steps), each stopped at the same S-MA: comparing at equal steps would compare different things."""

    def run(terms, plan=LONG, stop=True):
        pools, objective = terms
        look = AtLevel(taught, corpus) if stop else None
        result = train(taught, objective, pools, plan, stop=look)
        return result, look.looks[-1]["step"] if look else plan.steps

    done = {
        "full": run(Ascent(LONG).terms(taught, corpus)),
        "given": run(SeUL(LONG).terms(taught, corpus)),
        "online": run(SeUL(LONG, spans="online", scorer=never).terms(taught, corpus)),
    }
    rng, rows = np.random.default_rng(0), []
    pools, objective = SeUL(LONG).terms(taught, corpus)
    for row in pools["forget"]:
        others = np.flatnonzero(~np.array(row.span))
        picked = set(rng.choice(others, min(len(others), sum(row.span)), replace=False).tolist())
        rows.append(replace(row, span=tuple(i in picked for i in range(len(row.span)))))
    steps = done["given"][1]
    done["placebo"] = run(({"forget": rows}, objective), replace(LONG, steps=steps), stop=False)
    return done


def test_the_words_around_the_value_stay(taught, stopped, corpus):
    """(g) 1.  rest-MA 0.99 against 0.75 (never taught: 0.66), in no more steps.

    Three seeds cost three toys more, twenty seconds, so they were measured once: on the dossiers of seeds 1, 2 and 3
    rest-MA is 0.81, 0.95 and 0.78 against 0.33, 0.64 and 0.55, in 11, 8 and 7 steps against 12, 10 and 8.
    """
    (full, slow), (given, fast) = stopped["full"], stopped["given"]
    assert 1 < fast <= slow < LONG.steps, "both reached the level, and not in a single leap"
    level = accuracy(taught, corpus, "holdout")
    assert level < 0.3 and max(accuracy(full, corpus, "forget"), accuracy(given, corpus, "forget")) <= level
    assert accuracy(given, corpus, "forget", rest=True) - accuracy(full, corpus, "forget", rest=True) >= 0.15
    assert accuracy(given, corpus, "forget", rest=True) > accuracy(taught, corpus, "holdout", rest=True)


def test_neighbouring_facts_are_not_protected(taught, stopped, corpus):
    """Retained values of the same template fall with it, 0.99 -> 0.45, further than under full ascent (0.62): the wording
    stays and carries the push on.  Who needs them sets `retain`."""
    given = stopped["given"][0]
    assert accuracy(taught, corpus, "retain") > 0.95 and accuracy(given, corpus, "retain") < 0.7
    assert accuracy(given, corpus, "retain", rest=True) > 0.9
    held = SeUL(replace(LONG, steps=20), retain=3.0)(taught, corpus)
    assert accuracy(held, corpus, "forget") < 0.3 and accuracy(held, corpus, "retain") > 0.7


def test_as_many_other_tokens_do_not_do_it(stopped, corpus):
    """(g) 3, the placebo: an equal number of random non-span tokens, as many steps."""
    (given, steps), (placebo, as_many) = stopped["given"], stopped["placebo"]
    assert steps == as_many
    assert accuracy(placebo, corpus, "forget") - accuracy(given, corpus, "forget") >= 0.3


def test_spans_found_online_reach_the_level_of_the_corpus_own(taught, stopped, corpus):
    """(g) 5, within twice the steps (7 and 6), judged on the corpus' own spans; and the wording stays here, too."""
    (given, few), (online, more) = stopped["given"], stopped["online"]
    assert more <= 2 * few and accuracy(online, corpus, "forget") <= accuracy(taught, corpus, "holdout")
    assert accuracy(online, corpus, "forget", rest=True) >= accuracy(given, corpus, "forget", rest=True) - 0.1


# ── offline ──


def test_rules_mark_what_they_can_see(taught, corpus):
    """They ignore what the corpus marks, and refuse an example in which they see nothing: here the occupations."""
    seen = [x for x in corpus["forget"] if not x.id.endswith("/occupation")]
    hidden = corpus.with_roles(forget=[replace(x, spans=((0, 1),)) for x in seen])
    chosen = SeUL(PLAN, spans="offline").choose(taught, hidden)
    assert [x.spans for x in chosen] == [x.spans for x in seen]
    blind = [x.id for x in corpus["forget"] if x.id.endswith("/occupation")]
    with pytest.raises(BadCorpus, match=f"seul: example '{blind[0]}': nothing sensitive was found") as raised:
        SeUL(PLAN, spans="offline").check(corpus)
    assert len(raised.value.problems) == len(blind)
    with pytest.raises(BadCorpus, match=r"\.\.\. and \d+ more"):
        SeUL(PLAN, spans="offline", annotators=("money",)).check(corpus)


# ── bad input ──


def test_an_example_without_spans_is_refused(taught, corpus):
    """Elsewhere no spans means the whole answer; here this would be full ascent under another name."""
    mixed = corpus.with_roles(forget=[replace(corpus["forget"][0], spans=()), *corpus["forget"][1:]])
    for ask in (lambda: SeUL(PLAN).check(mixed), lambda: SeUL(PLAN)(taught, mixed)):
        with pytest.raises(BadCorpus, match=f"seul: example '{corpus['forget'][0].id}' has no spans; mark them"):
            ask()
    assert SeUL(PLAN).check(corpus) is None


def test_online_without_a_scorer_is_refused(taught, corpus):
    method = SeUL(PLAN, spans="online")
    for ask in (lambda: method.check(corpus), lambda: method(taught, corpus)):
        with pytest.raises(
            BadRequest, match=r"needs a scorer that has not seen the forget texts, and forget\.scorer is empty"
        ):
            ask()


def test_the_model_itself_as_a_scorer_is_warned_of(taught, corpus):
    with pytest.warns(UserWarning, match="the scorer is the model that is to forget"):
        SeUL(PLAN, spans="online", scorer=taught.copy()).choose(taught, corpus)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_so_it_is_where_an_adapter_is_trained_over_it(tiny, corpus):
    """Its fingerprint is another then, its name is not."""
    lm = replace(tiny.adapted(2, 4), name="tiny")
    with pytest.warns(UserWarning, match="the scorer is the model that is to forget"):
        SeUL(PLAN, spans="online", scorer="tiny").choose(lm, corpus)


@pytest.mark.parametrize("scorer", ["much", 3, None, "no/such/model"])
def test_an_unknown_scorer_is_refused_by_name(scorer):
    with pytest.raises(ValidationError) as raised:
        SeUL(PLAN, spans="online", scorer=scorer)
    assert [error["loc"] for error in raised.value.errors()] == [("scorer",)]


def test_minus_wants_the_same_tokens(taught, never, corpus):
    lower = deepcopy(never.tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    other = replace(never, template=replace(never.template, tokenizer=lower), name="other")
    with pytest.raises(BadModel, match="the scorer 'other' cuts the text differently"):
        SeUL(PLAN, spans="online", scorer=other, minus=True).choose(taught, corpus)


def test_where_nothing_surprises_it_says_so(taught, never, corpus):
    with pytest.raises(BadCorpus, match=r"nothing in example '.*' surprises the scorer enough; raise forget\.share"):
        SeUL(PLAN, spans="online", scorer=never, deviations=50.0).choose(taught, corpus)


def test_spans_that_cover_nearly_all_are_warned_of(taught, corpus):
    """Beyond 60 % of the tokens it is full ascent."""
    wide = corpus.with_roles(forget=[replace(x, spans=((0, len(x.answer) - 1),)) for x in corpus["forget"]])
    with pytest.warns(
        UserWarning, match=r"its spans cover \d\d% of the answers' tokens; this is ascent on all of them"
    ):
        SeUL(PLAN).terms(taught, wide)
    rows = taught.template.rows(corpus["forget"])
    assert sum(sum(r.span) for r in rows) < MOST * sum(len(r.span) for r in rows)  # the toy's own: no warning


def test_bad_spans_are_refused_and_untidy_ones_are_not(taught, corpus):
    first, *rest = corpus["forget"]
    with pytest.raises(BadCorpus, match="lies outside its answer"):
        corpus.with_roles(forget=[replace(first, spans=((0, 999),)), *rest])
    [(a, b)] = first.spans
    untidy = corpus.with_roles(forget=[replace(first, spans=((b - 1, b), (a, b), (a, a + 1))), *rest])
    assert SeUL(PLAN).terms(taught, untidy)[0] == SeUL(PLAN).terms(taught, corpus)[0]


def test_a_passage_whose_span_is_its_first_token_is_refused(taught, corpus):
    """Nothing stands before it, so nothing predicts it; with another span beside it all is well."""
    text = Example("text", "", "The dog is old.", spans=((0, 3),))
    with pytest.raises(BadCorpus, match="'text': its spans cover no token that can be scored"):
        SeUL(PLAN).terms(taught, corpus.with_roles(forget=(text,)))
    [row] = SeUL(PLAN).terms(taught, corpus.with_roles(forget=[replace(text, spans=((0, 3), (11, 14)))]))[0]["forget"]
    assert sum(row.span) == 1


def test_a_fact_that_stands_twice_and_is_marked_once_stays(taught, corpus):
    """Leaking by context: the second mention gets no push.  Annotators mark all occurrences; by hand one must."""
    first, *rest = corpus["forget"]
    value = first.values()[0]
    twice = replace(first, answer=f"{first.answer} Yes, {value}.")
    [row, *_] = SeUL(PLAN).terms(taught, corpus.with_roles(forget=(twice, *rest)))[0]["forget"]
    assert sum(row.span) == sum(taught.template.rows([first])[0].span)


def test_every_setting_is_checked():
    for name, value in {
        "share": 0.0,
        "gap": -1,
        "deviations": -1.0,
        "annotators": (),
        "retain": -1.0,
        "kl": -1.0,
    }.items():
        with pytest.raises(ValidationError) as raised:
            SeUL(PLAN, **{name: value})
        assert [error["loc"] for error in raised.value.errors()] == [(name,)]
    assert {f.name for f in fields(SeUL)} >= {"plan", "spans", "scorer"}
