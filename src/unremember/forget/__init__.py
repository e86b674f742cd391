"""The forget room: one file a method, `(LM, Corpus) -> LM`.  The table below is the list of them.

Presets are the settings that a method starts from where a request names none; numbers that a paper tunes live here, in
sight, and not in the classes.  Those of ascent, npo and simnpo were tried on the default model and the dossier; the others
are first guesses that nobody has tuned yet.
"""

from unremember.forget.ascent import Ascent
from unremember.forget.dpo import DPO
from unremember.forget.llmu import LLMU
from unremember.forget.npo import NPO
from unremember.forget.rmu import RMU
from unremember.forget.simnpo import SimNPO
from unremember.forget.undial import Undial
from unremember.forget.wga import WGA

METHODS = {
    "ascent": Ascent,
    "dpo": DPO,
    "llmu": LLMU,
    "npo": NPO,
    "rmu": RMU,
    "simnpo": SimNPO,
    "undial": Undial,
    "wga": WGA,
}

PRESETS = {
    "ascent": {"plan": {"steps": 20, "lr": 3e-5, "stop": "probability"}},
    "dpo": {"plan": {"steps": 30, "lr": 3e-5, "stop": "probability"}, "beta": 0.1, "retain": 1.0},
    "llmu": {"plan": {"steps": 30, "lr": 3e-5, "stop": "probability"}, "forget": 0.5, "mismatch": 1.0, "kl": 1.0},
    "npo": {"plan": {"steps": 30, "lr": 5e-5, "stop": "probability"}, "beta": 0.1, "retain": 1.0},
    "rmu": {"plan": {"steps": 80, "lr": 1e-3, "stop": "probability"}, "scale": 5.0, "alpha": 10.0},
    "simnpo": {"plan": {"steps": 30, "lr": 3e-5, "stop": "probability"}, "beta": 2.5, "retain": 1.0},
    "undial": {"plan": {"steps": 30, "lr": 1e-4, "stop": "probability"}, "strength": 10.0, "retain": 1.0},
    "wga": {"plan": {"steps": 30, "lr": 5e-5, "stop": "probability"}, "alpha": 1.0, "retain": 1.0},
}
