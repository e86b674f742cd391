"""The forget room: one file a method, `(LM, Corpus) -> LM`.  The table below is the list of them.

Presets are the settings that a method starts from where a request names none; numbers that a paper tunes live here, in
sight, and not in the classes.  Those of most methods were searched for on the default model and a dossier of its own
(`python -m benchmarks.tune`; benchmarks/compare/tuned.json has every trial); depn's and pcgu's are first guesses that were
run, and seul, advga, advnpo and advrmu take those of the method that they build on.
"""

from unremember.forget.advga import AdvGA
from unremember.forget.advnpo import AdvNPO
from unremember.forget.advrmu import AdvRMU
from unremember.forget.ascent import Ascent
from unremember.forget.depn import DEPN
from unremember.forget.dpo import DPO
from unremember.forget.flearning import FLearning
from unremember.forget.kga import KGA
from unremember.forget.llmu import LLMU
from unremember.forget.mechanistic import Mechanistic
from unremember.forget.npo import NPO
from unremember.forget.pcgu import PCGU
from unremember.forget.rmu import RMU
from unremember.forget.seul import SeUL
from unremember.forget.simnpo import SimNPO
from unremember.forget.undial import Undial
from unremember.forget.wga import WGA
from unremember.forget.whp import WHP

METHODS = {
    "advga": AdvGA,
    "advnpo": AdvNPO,
    "advrmu": AdvRMU,
    "ascent": Ascent,
    "depn": DEPN,
    "dpo": DPO,
    "flearning": FLearning,
    "kga": KGA,
    "llmu": LLMU,
    "mechanistic": Mechanistic,
    "npo": NPO,
    "pcgu": PCGU,
    "rmu": RMU,
    "seul": SeUL,
    "simnpo": SimNPO,
    "undial": Undial,
    "wga": WGA,
    "whp": WHP,
}

PRESETS = {
    "advga": {"plan": {"steps": 40, "lr": 3e-5, "stop": "probability"}, "radius": 0.1, "inner": 3},
    "advnpo": {
        "plan": {"steps": 30, "lr": 5e-5, "stop": "probability"},
        "beta": 0.1,
        "retain": 4.0,
        "radius": 0.1,
        "inner": 3,
    },
    "advrmu": {
        "plan": {"steps": 80, "lr": 1e-3, "stop": "probability"},
        "scale": 5.0,
        "alpha": 10.0,
        "radius": 0.1,
        "inner": 3,
    },
    "ascent": {"plan": {"steps": 40, "lr": 3e-5, "stop": "probability"}},
    "depn": {"neurons": 400, "stop": "probability", "every": 50},
    "dpo": {"plan": {"steps": 40, "lr": 9e-5, "stop": "probability"}, "beta": 0.1, "retain": 4.0},
    "flearning": {
        "plan": {"steps": 8, "lr": 5e-5, "stop": "probability"},
        "strength": [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    },
    "kga": {
        "plan": {"steps": 40, "lr": 9e-5, "stop": "probability"},
        "helper": {"steps": 30, "lr": 1e-4},
        "alpha": 1.0,
        "part": "span",
    },
    "llmu": {"plan": {"steps": 30, "lr": 3e-5, "stop": "probability"}, "forget": 0.5, "mismatch": 1.0, "kl": 5.0},
    "mechanistic": {
        "plan": {"steps": 40, "lr": 3e-4, "clip": 1.0, "stop": "probability"},
        "retain": 4.0,
        "locator": "path",
    },
    "npo": {"plan": {"steps": 30, "lr": 5e-5, "stop": "probability"}, "beta": 0.1, "retain": 4.0},
    "pcgu": {
        "plan": {
            "steps": 60,
            "lr": 0.03,
            "optimiser": "sgd",
            "clip": 1.0,
            "schedule": "linear",
            "stop": "probability",
        },
        "k": 10000,
        "retain": 10.0,
    },
    "rmu": {"plan": {"steps": 80, "lr": 1e-3, "stop": "probability"}, "scale": 5.0, "alpha": 10.0},
    "seul": {"plan": {"steps": 40, "lr": 3e-5, "stop": "probability"}},
    "simnpo": {"plan": {"steps": 30, "lr": 9e-5, "stop": "probability"}, "beta": 1.0, "retain": 4.0},
    "undial": {"plan": {"steps": 40, "lr": 3e-4, "stop": "probability"}, "strength": 20.0, "retain": 4.0},
    "wga": {"plan": {"steps": 40, "lr": 1.5e-4, "stop": "probability"}, "alpha": 1.0, "retain": 4.0},
    "whp": {
        "plan": {"steps": 40, "lr": 9e-5, "stop": "probability"},
        "reinforce": {"steps": 10, "lr": 5e-5},
        "retain": 4.0,
        "alpha": 5.0,
        "anchors": "rules",
    },
}
