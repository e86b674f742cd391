"""The locate room: where in a model something sits, `(LM, Corpus) -> Ranking`.  The table below is the list of locators.

A Ranking and a Budget make Sites (`select`), and Sites are where a forgetting method may move weights.
"""

from unremember.locate.activation import ActivationPatching
from unremember.locate.contrast import Contrast
from unremember.locate.controls import ActivityMatched, Random
from unremember.locate.gradients import Gradients
from unremember.locate.integrated import IntegratedGradients
from unremember.locate.lookup import FactLookup
from unremember.locate.patching import AttributionPatching
from unremember.locate.path import PathPatching
from unremember.locate.tracing import CausalTracing

LOCATORS = {
    "activation": ActivationPatching,
    "contrast": Contrast,
    "gradients": Gradients,
    "integrated": IntegratedGradients,
    "lookup": FactLookup,
    "matched": ActivityMatched,
    "patching": AttributionPatching,
    "path": PathPatching,
    "random": Random,
    "tracing": CausalTracing,
}

PRESETS: dict[str, dict] = {"gradients": {"kind": "weight"}}
