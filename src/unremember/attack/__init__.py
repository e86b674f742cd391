"""The attack room: the adversary's moves, `(LM, Corpus, original LM) -> (LM, Corpus)`.  The table below is the list of them."""

from unremember.attack.relearn import Relearn
from unremember.attack.rephrase import Rephrase

ATTACKS = {
    "relearn": Relearn,
    "rephrase": Rephrase,
}

PRESETS = {
    "relearn": {"plan": {"steps": 10, "lr": 5e-5}},
    "rephrase": {"wordings": 2},
}
