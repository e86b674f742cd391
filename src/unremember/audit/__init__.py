"""The audit room: measures of one model, `(LM, Corpus) -> Score`.  The table below is the list of them."""

from unremember.audit.accuracy import Accuracy
from unremember.audit.answers import Rouge, Said
from unremember.audit.choice import Choice
from unremember.audit.extraction import ExtractionStrength
from unremember.audit.likelihood import ExtractionLikelihood
from unremember.audit.probability import Probability
from unremember.audit.prose import Distinct, Prose
from unremember.audit.truth_ratio import TruthRatio

AUDITS = {
    "EL_3": ExtractionLikelihood(),
    "ROUGE-L F1": Rouge("fmeasure"),
    "ROUGE-L recall": Rouge("recall"),
    "choice": Choice(),
    "distinct tokens": Distinct(),
    "exact match": Accuracy(),
    "extraction strength": ExtractionStrength(),
    "memorisation accuracy": Accuracy(raw=True),
    "probability": Probability("answer"),
    "prose NLL": Prose(),
    "said": Said(),
    "truth ratio": TruthRatio(),
    "value probability": Probability("span"),
    "world accuracy": Choice(accuracy=True, roles=("world",)),
}

EVIDENCE = ("value probability", "said", "extraction strength", "choice")  # what a verdict rests on
UTILITY = ("world accuracy", "prose NLL", "distinct tokens")  # what its gate rests on, beside the retain role
