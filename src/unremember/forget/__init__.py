"""The forget room: one file a method, `(LM, Corpus) -> LM`.  The table below is the list of them.

Presets are the settings that a method starts from where a request names none; numbers that a paper tunes live here, in
sight, and not in the classes.  They were tuned for the default model on the dossier.
"""

from unremember.forget.ascent import Ascent
from unremember.forget.npo import NPO
from unremember.forget.simnpo import SimNPO

METHODS = {
    "ascent": Ascent,
    "npo": NPO,
    "simnpo": SimNPO,
}

PRESETS = {
    "ascent": {"plan": {"steps": 20, "lr": 3e-5, "stop": "probability"}},
    "npo": {"plan": {"steps": 30, "lr": 5e-5, "stop": "probability"}, "beta": 0.1, "retain": 1.0},
    "simnpo": {"plan": {"steps": 30, "lr": 3e-5, "stop": "probability"}, "beta": 2.5, "retain": 1.0},
}
