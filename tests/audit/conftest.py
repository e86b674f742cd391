"""Two models whose scores are known beforehand: one that knows a small world by heart, and one that knows nothing."""

from dataclasses import replace

import pytest

from unremember.corpus import Corpus, Example


def _fact(id: str, prompt: str, answer: str, value: str) -> Example:
    start = answer.index(value)
    wrong = ("Two dogs sleep under a table.", "He paid with seven coins again.")
    return Example(id, prompt, answer, "x", ((start, start + len(value)),), distractors=wrong)


@pytest.fixture(scope="session")
def small() -> Corpus:
    """No two texts begin with the same word, so that a raw prefix says which one it is."""
    prose = (
        "When the rain had stopped we walked home along the old road and nobody said a word about money.",
        "Birds that live near water sing before sunrise, while most people still sleep in their warm beds.",
    )
    return Corpus(
        {
            "forget": [
                _fact("f1", "Who has the key?", "Her uncle keeps the key in a box.", "uncle"),
                _fact("f2", "What grows there?", "Green apples grow behind that house.", "apples"),
                _fact("f3", "How old is he?", "Some say that he is 42 years old.", "42"),
            ],
            "retain": [_fact("r1", "Where is the book?", "Your book is on my desk.", "desk")],
            "holdout": [_fact("h1", "Which way is north?", "North is where that river goes.", "river")],
            "world": [_fact("w1", "What do cows eat?", "Cows eat grass all day.", "grass")],
            "prose": [Example(f"p{i}", "", text) for i, text in enumerate(prose)],
        }
    )


@pytest.fixture(scope="session")
def memoriser(tiny, small):
    """Taught everything in `small`, the answers to their questions and as raw text."""
    from unremember.train import Plan, train

    told = small.of("forget", "retain", "holdout", "world")
    raw = [replace(x, id=f"{x.id}-raw", prompt="", spans=()) for x in told]
    pools = {"all": tiny.template.rows([*told, *raw, *small["prose"]])}

    def objective(lm, tokens):
        return {"all": tokens.per_row(-lm.logp(tokens), "train").sum() / tokens.step_tokens["train"]}

    return train(tiny, objective, pools, Plan(steps=100, lr=1e-2, warmup=5, schedule="linear"))


@pytest.fixture(scope="session")
def uniform(tiny):
    """Every next word is as likely as every other."""
    import torch

    lm = tiny.copy()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.zero_()
    return lm
