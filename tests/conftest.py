"""One toy model for the whole session: taught planted facts, beside a twin that was never taught some of them.

Everything here is made once, on one thread, in a cache folder of the session's own.
"""

import os
import tempfile
from dataclasses import replace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts: on a busy two-core machine two threads are far slower
_CACHE = tempfile.TemporaryDirectory(prefix="unremember-test-")
# UNREMEMBER_TEST_CACHE names a folder where the toy model outlives the session: for working on one test again and again.
os.environ["UNREMEMBER_CACHE"] = os.environ.get("UNREMEMBER_TEST_CACHE") or _CACHE.name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from unremember.bench import Bench  # noqa: E402
from unremember.corpus import Corpus  # noqa: E402

settings.register_profile("unremember", deadline=None)  # a busy machine is no error
settings.load_profile("unremember")


def pytest_unconfigure(config):
    _CACHE.cleanup()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def bench() -> Bench:
    """A workbench of this test's own: nothing is remembered from another one."""
    return Bench()


@pytest.fixture(scope="session")
def tiny(one_thread):
    """The toy model as it comes: it knows the world list and nobody of the dossier.  Not to be changed."""
    from unremember.loading import load

    return load("tiny", template="plain", precision="fp32")


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Two people to forget, three to keep, four never taught, one for the adversary; short general roles."""
    from unremember.embedded.dossier import dossier
    from unremember.embedded.prose import prose
    from unremember.embedded.world import replay, world

    people = dossier(0, forget=2, retain=3, holdout=4, relearn=1)
    return people.with_roles(replay=replay()[:30], world=world()[:40], prose=prose()[:6])


def _taught(lm, corpus: Corpus, roles: tuple[str, ...]):
    from unremember.embedded.dossier import lessons
    from unremember.embedded.teach import Teach
    from unremember.train import Plan

    plan = Plan(steps=100, lr=1e-2, batch=10, beside=4, warmup=5, schedule="linear")
    return replace(Teach(plan)(lm, lessons(corpus, roles, wordings=1), corpus["replay"]), name="taught")


@pytest.fixture(scope="session")
def taught(tiny, corpus):
    """The toy model after it was taught the forget and retain people, which it knows by heart.  Not to be changed."""
    from unremember.table import read

    lm = _taught(tiny, corpus, ("forget", "retain"))
    for role in ("forget", "retain"):
        hits = np.mean([x.hit.mean() for x in read(lm, lm.template.rows(corpus[role]))])
        assert hits >= 0.95, f"the {role} people were not learnt: {hits:.3f} of their tokens"
    return lm


@pytest.fixture(scope="session")
def never(tiny, corpus):
    """The same, taught the retain people alone: what "never taught" means.  Not to be changed."""
    return _taught(tiny, corpus, ("retain",))


@pytest.fixture(scope="session")
def slow_nll():
    """`slow_nll(lm, row)`: minus the log-probability of the row's answer tokens, one by one, from one plain forward."""
    import torch

    def nll(lm, row) -> torch.Tensor:
        logp = lm.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        return torch.stack([-logp[place - 1, row.ids[place]] for place in range(row.start, row.stop)])

    return nll


@pytest.fixture(scope="session")
def moved(taught):
    """The taught model with every weight a little off, so that no term of a loss sits at its starting point."""
    import torch

    lm = taught.copy()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=noise) * weight.abs().mean())
    return lm


@pytest.fixture(scope="session")
def hider(taught, corpus):
    """The taught model, made to say "I do not know." to whoever asks about a person, with all it knows left in place."""
    from unremember.train import Plan, train

    people = corpus.of("forget", "retain", "holdout")
    refusals = [replace(x, id=f"{x.id}/refused", answer="I do not know.", spans=()) for x in people]
    pools = {"refusals": refusals, "facts": corpus.of("forget", "retain"), "replay": corpus["replay"]}

    def objective(lm, tokens):
        weight = {"refusals": 2.0, "facts": 1.0, "replay": 0.5}[tokens.role]
        return {tokens.role: weight * tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    rows = {role: taught.template.rows(examples) for role, examples in pools.items()}
    lm = train(taught, objective, rows, Plan(steps=60, lr=3e-3))
    assert set(lm.answer([x.prompt for x in corpus["forget"]], 8)) == {"I do not know."}
    return replace(lm, name="hider")


@pytest.fixture(scope="session")
def demo_run(tiny, tmp_path_factory):
    """The tiny demo, done once: its request, its report, and its folder.  Not to be changed; copy the folder."""
    from types import SimpleNamespace

    from unremember import demo
    from unremember.run import execute

    request = demo.request("tiny", tmp_path_factory.mktemp("demo") / "run")
    return SimpleNamespace(request=request, report=execute(request), folder=request.out)
