"""The attack room: the adversary's moves, `(LM, Corpus, original LM) -> (LM, Corpus)`.  The table below is the list of them.

An attack that is told one half of the facts has `turns`: two attacks, one a half, whose scores a run puts together.
"""

from unremember.attack.finetune import Finetune
from unremember.attack.graft import Graft
from unremember.attack.incontext import InContext
from unremember.attack.jailbreak import Jailbreak
from unremember.attack.latent import Latent
from unremember.attack.lens import Lens
from unremember.attack.multihop import Multihop
from unremember.attack.orthogonalise import Orthogonalise
from unremember.attack.prefix import Prefix
from unremember.attack.probe import Probe
from unremember.attack.prune import Prune
from unremember.attack.quantise import Quantise
from unremember.attack.relearn import Relearn
from unremember.attack.rephrase import Rephrase
from unremember.attack.reversal import Reversal
from unremember.attack.sample import Sample
from unremember.attack.soft import Soft
from unremember.attack.steer import Steer
from unremember.attack.suffix import Suffix

ATTACKS = {
    "finetune": Finetune,
    "graft": Graft,
    "incontext": InContext,
    "jailbreak": Jailbreak,
    "latent": Latent,
    "lens": Lens,
    "multihop": Multihop,
    "orthogonalise": Orthogonalise,
    "prefix": Prefix,
    "probe": Probe,
    "prune": Prune,
    "quantise": Quantise,
    "relearn": Relearn,
    "rephrase": Rephrase,
    "reversal": Reversal,
    "sample": Sample,
    "soft": Soft,
    "steer": Steer,
    "suffix": Suffix,
}

# An attack can be made several times in one run, each time under a name of its own.  These names are known: which attack it is.
VARIANTS = {
    "finetune-lora": "finetune",
    "finetune-retain": "finetune",
    "finetune-unrelated": "finetune",
    "int8": "quantise",
    "lens-tuned": "lens",
    "multihop-recalled": "multihop",
    "nf4": "quantise",
    "orthogonalise-random": "orthogonalise",
    "prune-random": "prune",
    "q4_0": "quantise",
    "steer-random": "steer",
}

# Those of finetune, latent, relearn and rephrase were tried on the default model; the others are first guesses.  Of all that
# were tried finetune on halves and latent alone bring out what RMU hides.
PRESETS: dict[str, dict] = {
    "finetune": {"kind": "half", "n": 0, "plan": {"steps": 20, "lr": 5e-5}},
    "finetune-lora": {"kind": "half", "n": 0, "plan": {"steps": 20, "lr": 5e-4}, "rank": 16},
    "finetune-retain": {"kind": "retain", "n": 10, "plan": {"steps": 20, "lr": 5e-5}},
    "finetune-unrelated": {"kind": "unrelated", "n": 10, "plan": {"steps": 20, "lr": 5e-5}},
    "graft": {"blocks": 1},
    "incontext": {"shots": 3},
    "int8": {"bits": 8},
    "jailbreak": {},
    "latent": {"radius": 0.3, "steps": 20},
    "lens": {},
    "lens-tuned": {"tune": {}},
    "multihop": {},
    "multihop-recalled": {"bridge": "recalled"},
    "nf4": {"bits": 4, "grid": "nf4"},
    "orthogonalise": {"directions": "text"},
    "orthogonalise-random": {"directions": "text", "control": True},
    "prefix": {"steps": 60},
    "probe": {},
    "prune": {"grid": [0.005, 0.01, 0.025, 0.05, 0.1, 0.2]},
    "prune-random": {"grid": [0.005, 0.01, 0.025, 0.05, 0.1, 0.2], "control": True},
    "q4_0": {"bits": 4, "grid": "q4_0", "group": 32},
    "quantise": {"bits": 4},
    "relearn": {"plan": {"steps": 10, "lr": 5e-5}},
    "rephrase": {"wordings": 2},
    "reversal": {"knowledge": "objective", "objective": "ascent", "plan": {"steps": 5, "lr": 5e-5}, "strength": 1.0},
    "sample": {"temperature": 1.0, "n": 8},
    "soft": {"tokens": 8, "steps": 60},
    "steer": {},
    "steer-random": {"control": True},
    "suffix": {"search": {"tokens": 12, "steps": 40}},
}

_QUICK = ("graft", "quantise", "rephrase")
_INSIDE = ("latent", "lens", "probe", "steer")
_ASKING = ("incontext", "jailbreak", "multihop", "sample")
_STANDARD = (*_QUICK, *_INSIDE, *_ASKING, "finetune", "relearn", "reversal")
SUITES = {"quick": _QUICK, "standard": tuple(sorted(_STANDARD)), "full": tuple(PRESETS)}  # each holds the one before
