"""AdvNPO, AdvGA, AdvRMU: their losses by hand, what the hardening is worth at equal silence, its price, two processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from unremember import team
from unremember.attack.gcg import Search
from unremember.attack.suffix import Suffix
from unremember.bench import Bench
from unremember.displace import lengths
from unremember.errors import BadCorpus, BadModel, BadRequest
from unremember.forget import PRESETS
from unremember.forget.advga import AdvGA
from unremember.forget.advnpo import AdvNPO
from unremember.forget.advrmu import AdvRMU
from unremember.forget.ascent import Ascent
from unremember.forget.npo import NPO
from unremember.forget.perturbed import displaced, displacement
from unremember.forget.rmu import RMU
from unremember.lm import LM
from unremember.loading import load
from unremember.sites import Sites
from unremember.table import read
from unremember.tokens import Tokens, lanes, pack, packs, shares
from unremember.train import Plan, order

PLAN = Plan(steps=3, lr=1e-3)
TRAINED = "model.layers.0"  # where the toy's adversary sits, at = 0.5
BUDGET = 40  # about a row a time: one of two processes has a silent micro-batch more
PLACES = (TRAINED, "model.layers.1", "model.embed_tokens")


def apart(rows, role="forget") -> Tokens:
    return pack([[row] for row in rows], role)


def surprise(lm: LM, tokens: Tokens, block: str = TRAINED, delta: torch.Tensor | None = None) -> float:
    """Mean over rows of the answer's CE, a token."""
    with torch.no_grad(), displaced(lm, tokens, block, torch.zeros(()) if delta is None else delta):
        return float((tokens.per_row(-lm.logp(tokens), "answer") / tokens.lengths("answer")).mean())


def attacked(lm: LM, tokens: Tokens, block: str, radius: float, steps: int = 10, seed: int = 77) -> float:
    """The same under a fresh displacement: this is the latent attack."""
    return surprise(lm, tokens, block, displacement(lm, tokens, block, radius, steps, seed=seed))


def hits(lm: LM, corpus, role: str) -> float:
    return float(np.mean([x.hit.mean() for x in read(lm, lm.template.rows(corpus[role]))]))


@pytest.fixture(scope="module")
def questions(taught, corpus) -> Tokens:
    return apart(taught.template.rows(corpus["forget"]))


# ── the losses ──


def test_advnpo_by_hand(taught, moved, corpus, questions):
    """The live side under δ, the reference without."""
    method = AdvNPO(PLAN, 0.3, radius=0.1, inner=2, at=0.5)
    pools, objective = method.terms(taught, corpus)
    delta = displacement(moved, questions, TRAINED, 0.1, 2)
    with torch.no_grad():
        before = questions.per_row(-taught.logp(questions), "answer")
        with displaced(moved, questions, TRAINED, delta):
            now = questions.per_row(-moved.logp(questions), "answer")
        found = objective(moved, pack(lanes(pools["forget"], 256), "forget"))["npo"].item()
    rows = [2 / 0.3 * np.log1p(np.exp(-0.3 * gap)) for gap in (now - before).double().tolist()]
    assert found == pytest.approx(np.mean(rows), rel=1e-4)


def test_advga_by_hand(taught, moved, corpus, questions):
    method = AdvGA(PLAN, radius=0.1, inner=2, retain=2.0, at=0.5)
    pools, objective = method.terms(taught, corpus)
    delta = displacement(moved, questions, TRAINED, 0.1, 2)
    with torch.no_grad(), displaced(moved, questions, TRAINED, delta):
        expected = moved.logp(questions)[questions.answer].mean().item()
    with torch.no_grad():
        assert objective(moved, pack(lanes(pools["forget"], 256), "forget"))["ascent"].item() == pytest.approx(
            expected, rel=1e-4
        )
        kept = pack(lanes(pools["retain"], 256), "retain")
        clean = -moved.logp(kept)[kept.mask("train")].mean().item()
        assert objective(moved, kept)["retain"].item() == pytest.approx(2 * clean, rel=1e-5)


def test_advrmu_by_hand(taught, moved, corpus, questions):
    """The squared distance further up, under a displacement further down that wants the answer back."""
    method = AdvRMU(PLAN, scale=1.0, alpha=10.0, radius=0.1, inner=2, depth=1.0, at=0.5)
    pools, objective = method.terms(taught, corpus)
    delta = displacement(moved, questions, TRAINED, 0.1, 2)
    with torch.no_grad():
        before = taught.hidden(questions, 1)
        draw = torch.rand(before.shape[1], generator=torch.Generator().manual_seed(0))
        goal = before.norm(dim=1).median() * draw / draw.norm()
        clean = (moved.hidden(questions, 1) - goal).square().mean(1)[questions.answer].mean().item()
        with displaced(moved, questions, TRAINED, delta):
            expected = (moved.hidden(questions, 1) - goal).square().mean(1)[questions.answer].mean().item()
        found = objective(moved, pack(lanes(pools["forget"], 256), "forget"))["rmu"].item()
    assert found == pytest.approx(expected, rel=1e-4) and found != pytest.approx(clean, rel=1e-3)


def test_advrmu_moves_what_rmu_moves(taught, corpus):
    result = AdvRMU(PLAN, 4.0, 10.0, radius=0.1, inner=1, depth=1.0, at=0.5)(taught, corpus)
    old = dict(taught.model.named_parameters())
    moved = {n for n, w in result.model.named_parameters() if not torch.equal(w, old[n])}
    assert moved == set(RMU(PLAN, 4.0, 10.0, 1.0).sites(taught).masks)


PAIRS = {
    "npo": (AdvNPO(PLAN, 0.1, radius=0.0, inner=3), NPO(PLAN, 0.1)),
    "ga": (AdvGA(PLAN, radius=0.0, inner=3, retain=1.0), Ascent(PLAN, 1.0)),
    "rmu": (AdvRMU(PLAN, 4.0, 10.0, radius=0.0, inner=3, depth=1.0), RMU(PLAN, 4.0, 10.0, 1.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_without_a_radius_the_weights_are_those_of_the_plain_method(taught, corpus, name):
    hard, plain = PAIRS[name]
    a, b = (dict(method(taught, corpus).model.named_parameters()) for method in (hard, plain))
    assert all(torch.equal(w, b[n]) for n, w in a.items()) and hard.needs == plain.needs


@pytest.mark.parametrize(("hard", "plain"), [("advga", "ascent"), ("advnpo", "npo"), ("advrmu", "rmu")])
def test_it_is_compared_with_its_plain_method_at_equal_settings(hard, plain):
    """HongbangYuan/RobustUnlearning@70a85e8 runs AdvNPO with beta = 0.1 and the plain NPO beside it with 0.2."""
    assert {k: v for k, v in PRESETS[hard].items() if k not in ("radius", "inner")} == PRESETS[plain]


def test_the_part_reaches_both_loops(taught, moved, corpus):
    values = {}
    for part in ("answer", "span"):
        pools, objective = AdvNPO(PLAN, 0.1, radius=0.1, inner=1, at=0.5, part=part).terms(taught, corpus)
        assert (objective.part, objective.radius, objective.steps, objective.block) == (part, 0.1, 1, TRAINED)
        with torch.no_grad():
            values[part] = objective(moved, pack([pools["forget"][:4]], "forget"))["npo"].item()
    assert values["answer"] != values["span"]


# ── what it is worth ──


def test_the_adversary_finds_what_is_only_hidden_and_a_random_push_does_not(taught, never, corpus, questions):
    """Section (g) 1.  A model whose upper attention alone was changed hides.  Measured: clean CE 4.71, random push of the same
    length 4.69, attacked 1.87; the never-taught control falls, too, from 5.69 to 3.45, for a free displacement can write an
    answer in: only the ratio of the two, 1.85, says recovery.
    """
    sites = Sites.named(taught.model, ["model.layers.1.self_attn.*"])
    hides = NPO(Plan(steps=20, lr=4e-3), 0.1)(taught, corpus, sites=sites)
    clean = surprise(hides, questions)
    found = displacement(hides, questions, TRAINED, 0.1, 6, seed=3)
    drawn = displacement(hides, questions, TRAINED, 0.1, 0, seed=3)
    drawn = drawn * lengths(found) / lengths(drawn)
    recalled = surprise(hides, questions, TRAINED, found)
    assert clean > 4 and recalled <= 0.5 * clean
    assert surprise(hides, questions, TRAINED, drawn) == pytest.approx(clean, rel=0.05)
    control = attacked(never, questions, TRAINED, 0.1, 6, seed=3)
    assert control < 0.75 * surprise(never, questions), "a low attacked CE alone proves nothing"
    assert control / recalled >= 1.3


@pytest.fixture(scope="module")
def hardened(taught, corpus):
    return AdvNPO(Plan(steps=40, lr=4e-3), 0.1, radius=0.1, inner=3, at=0.5)(taught, corpus)


@pytest.fixture(scope="module")
def silent(taught, corpus):
    """Plain NPO with as many steps as it takes to be as silent."""
    return NPO(Plan(steps=28, lr=4e-3), 0.1)(taught, corpus)


def test_it_is_harder_at_equal_silence_and_at_equal_effort(taught, never, corpus, questions, hardened, silent):
    """Section (g) 2, fresh displacements of 10 steps, three times as long as those of training, where it was trained, above and
    below.  Measured, plain NPO of 28 steps | of 40 steps | hardened, 40 steps, same learning rate:
    clean CE 8.38 | 9.18 | 8.42;  retained tokens 0.984 | 1.000 | 0.991;  prose NLL 7.03 | 7.38 | 7.54
    attacked 2.97, 2.93, 2.98 | 3.37, 3.46, 2.86 | 5.57, 5.31, 4.71 (block 0, block 1, embeddings).
    At the radius of training: 6.24, 6.40, 4.28 | 6.85, 7.19, 4.88 | 7.38, 7.24, 6.74: 1.5 x only at the embeddings;
    at equal silence the ratio cannot pass clean / attacked, 8.4 / 6.24 = 1.35 at block 0, hence the lower bound there.
    """
    worked = NPO(Plan(steps=40, lr=4e-3), 0.1)(taught, corpus)
    quiet = surprise(hardened, questions)
    assert surprise(silent, questions) == pytest.approx(quiet, rel=0.1)
    assert surprise(worked, questions) > quiet, "as many steps at the same rate leave the plain method no less silent"
    kept = [hits(lm, corpus, "retain") for lm in (hardened, silent, worked)]
    assert min(kept) > 0.95 and max(kept) - min(kept) <= 0.05
    for place in PLACES:
        ours = attacked(hardened, questions, place, 0.3)
        assert ours >= 1.5 * attacked(silent, questions, place, 0.3), place
        assert ours >= 1.4 * attacked(worked, questions, place, 0.3), place
        assert attacked(hardened, questions, place, 0.1) > 1.08 * attacked(silent, questions, place, 0.1), place
    assert attacked(never, questions, TRAINED, 0.1) / attacked(hardened, questions, TRAINED, 0.1) < 1.3
    prose = pack(lanes(taught.template.rows(corpus["prose"]), 256))
    with torch.no_grad():
        said = [float(-lm.logp(prose)[prose.answer].mean()) for lm in (hardened, worked)]
    assert said[0] < said[1] + 0.5, "the difference is not a broken model"


def test_a_suffix_gains_less_on_it_though_none_recalls(taught, corpus, hardened, silent):
    """Section (g) 2: a suffix of 12 tokens after 5 swaps, asked with what it was not shown.

    Measured, gain in nats a token of the answer: 0.20 hardened, 1.03 plain; with other seeds and rounding -0.06 to
    0.01, and 0.57 to 0.92.  Recall gains nothing anywhere (0.02 and 0.04 of the values' tokens are lost), so that a
    ratio of recalls, as the specification asks for, has no meaning here; nor does it hold of the values alone, which
    gain 0.7 to 1.2 nats of twelve on the one and 0.9 on the other.
    """
    attack = Suffix(Search(tokens=12, steps=5, candidates=16, stop=False))
    gains = []
    for lm in (hardened, silent):
        _, seen = attack(lm, corpus.with_roles(holdout=()), taught, Bench())
        before, after = (read(lm, lm.template.rows(x["forget"])) for x in (corpus, seen))
        gains.append([np.mean([x.loglikelihood() for x in after]) - np.mean([x.loglikelihood() for x in before])])
        gains[-1].append(
            np.mean([x.hit[x.span].mean() for x in after]) - np.mean([x.hit[x.span].mean() for x in before])
        )
    (hard, recalled), (plain, recited) = gains
    assert plain > 0.3 and hard <= 0.6 * plain
    assert max(recalled, recited) <= 0.02


def test_restarts_and_longer_attacks_find_little_more(questions, hardened):
    """No gradient masking.  Measured at radius 0.2: 6.49; other starts 6.38 to 6.53; 40 steps 6.43."""
    once = attacked(hardened, questions, TRAINED, 0.2)
    more = [attacked(hardened, questions, TRAINED, 0.2, seed=seed) for seed in (1, 2, 3)]
    assert min(*more, attacked(hardened, questions, TRAINED, 0.2, 40)) > 0.93 * once


def test_a_step_costs_no_more_than_its_passes(taught, corpus):
    """Section (g) 3: at most S + 1.5 plain steps.  Measured on the forget role alone, where rows stand apart that were packed
    together: 3.4 x at S = 3 and 5.3 x at S = 6, for weights need no gradient inside; of a whole step with its retain terms 1.5 x.
    """
    took = []
    for method in (NPO(PLAN, 0.1), AdvNPO(PLAN, 0.1, radius=0.1, inner=3, at=0.5)):
        pools, objective = method.terms(taught, corpus)
        lm, best = taught.copy(), float("inf")
        for _ in range(7):
            start = time.process_time()
            objective(lm, pack(lanes(pools["forget"], 256), "forget"))["npo"].backward()
            best = min(best, time.process_time() - start)
        took.append(best)
    assert took[1] <= 4.5 * took[0]


# ── resuming, two processes ──


def halts(stage, done, total, terms):
    if stage == "forget" and done == 3:
        raise KeyboardInterrupt


def test_a_resumed_run_draws_what_it_would_have_drawn(taught, corpus, tmp_path):
    """No step of the inner loop: starting points alone decide, and every step has its own."""
    method = AdvNPO(Plan(steps=4, lr=1e-3, batch=5), 0.1, radius=0.5, inner=0, at=0.5)
    expected = method(taught, corpus)
    with pytest.raises(KeyboardInterrupt):
        method(taught, corpus, bench=Bench(folder=tmp_path / "c", every=0, say=halts))
    found = method(taught, corpus, bench=Bench(folder=tmp_path / "c"))
    a, b = (dict(lm.model.named_parameters()) for lm in (found, expected))
    assert all(torch.equal(w, b[name]) for name, w in a.items())


def people():
    from unremember.embedded.dossier import dossier

    whole = dossier(0, forget=2, retain=3, holdout=4, relearn=1)
    return whole.with_roles(forget=whole["forget"][:7], retain=whole["retain"][:5])


def shared():
    """Plain gradient descent: the inner loop multiplies rounding by about 10, and Adam makes whole steps of what is near zero."""
    return {
        "advnpo": AdvNPO(Plan(steps=2, lr=1e-2, optimiser="sgd"), 0.1, radius=0.2, inner=2, at=0.5),
        "advrmu": AdvRMU(Plan(steps=2, lr=1e-3, optimiser="sgd"), 1.0, 10.0, radius=0.2, inner=1, depth=1.0, at=0.5),
    }


def child(model: str, out: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    team.join()
    lm = load(model, precision="fp32")
    for name, method in shared().items():
        result = method(lm, people(), bench=Bench(budget=BUDGET))
        if team.rank() == 0:
            save_file({n: w.detach().clone() for n, w in result.model.named_parameters()}, out / f"{name}.safetensors")
    team.wait()
    team.leave()


def test_two_processes_equal_one(taught, tmp_path):
    rows = taught.template.rows(people()["forget"])
    turn = [rows[i] for i in order(len(rows), len(rows), 0, 0, "forget")]
    assert len({len(packs(share, BUDGET, even=True)) for share in shares(turn, 2)}) == 2, (
        "one of them must keep step with silence"
    )
    taught.save(tmp_path / "model")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, __file__, str(tmp_path / "model"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-5000:]
    start = dict(taught.model.named_parameters())
    for name, method in shared().items():
        found, reached = load_file(tmp_path / f"{name}.safetensors"), 0
        for n, w in method(taught, people()).model.named_parameters():
            went = (w - start[n]).norm()
            reached += bool(went)
            assert (found[n] - w).norm() <= 2e-3 * went, (name, n)  # measured: 2e-4
        assert reached


# ── refusals ──


def test_the_adversary_must_sit_below_what_is_scrambled(taught, corpus):
    with pytest.raises(BadRequest, match=r"block 0 \(at = 0\.13\).*block 0 \(depth = 0\.5\).*lower at, or raise depth"):
        AdvRMU(PLAN, 4.0, 10.0, radius=0.1, inner=1, depth=0.5).terms(taught, corpus)


def test_a_model_without_blocks_is_told_so(taught, corpus, monkeypatch):
    monkeypatch.setattr(team, "blocks", lambda model: [])
    for method in (AdvNPO(PLAN, 0.1, radius=0.1, inner=1), AdvGA(PLAN, radius=0.1, inner=1)):
        with pytest.raises(BadModel, match="no list of blocks"):
            method.terms(taught, corpus)


@pytest.mark.parametrize("made", [AdvNPO, AdvGA])
def test_bad_settings_are_refused_by_name(made):
    good = {"plan": PLAN, "radius": 0.1, "inner": 3} | ({"beta": 0.1} if made is AdvNPO else {})
    for key, value in (("radius", -0.1), ("inner", -1), ("inner", 1.5), ("at", 0.0), ("at", 1.5), ("part", "prompt")):
        with pytest.raises(ValidationError) as raised:
            made(**good | {key: value})
        assert [error["loc"] for error in raised.value.errors()] == [(key,)]


def test_a_retain_term_without_retain_examples_is_refused(taught, corpus):
    with pytest.raises(BadCorpus, match=r"needs examples in the role 'retain'"):
        AdvGA(PLAN, radius=0.1, inner=1, retain=1.0)(taught, corpus.with_roles(retain=()))
    assert AdvGA(PLAN, radius=0.1, inner=1).needs == ("forget",)


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
