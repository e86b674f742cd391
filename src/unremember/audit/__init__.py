"""The audit room: measures of one model, `(LM, Corpus) -> Score`.  The table below is the list of them."""

from unremember.audit.accuracy import Accuracy
from unremember.audit.answers import Rouge, Said
from unremember.audit.bias import Gap
from unremember.audit.choice import Choice
from unremember.audit.discoverable import Discoverable
from unremember.audit.editing import Conflict, Editing
from unremember.audit.exposure import ReciprocalRank
from unremember.audit.extraction import ExtractionStrength
from unremember.audit.familiarity import Familiarity
from unremember.audit.lens import LensRank
from unremember.audit.likelihood import ExtractionLikelihood
from unremember.audit.membership import Membership
from unremember.audit.muse import VerbMem
from unremember.audit.probability import Probability
from unremember.audit.prose import Distinct, Prose
from unremember.audit.spans import SpanAccuracy, SpanExtraction
from unremember.audit.truth_ratio import TruthRatio

AUDITS = {
    "EL_3": ExtractionLikelihood(),
    "ROUGE-L F1": Rouge("fmeasure"),
    "ROUGE-L recall": Rouge("recall"),
    "VerbMem": VerbMem(),
    "choice": Choice(),
    "discoverable extraction": Discoverable(),
    "distinct tokens": Distinct(),
    "exact match": Accuracy(),
    "extraction strength": ExtractionStrength(),
    "familiarity": Familiarity(),
    "generality": Editing("generality"),
    "generality, said": Editing("generality", said=True),
    "lens rank": LensRank(),
    "locality": Editing("locality"),
    "locality, said": Editing("locality", said=True),
    "membership Min-K": Membership("Min-K"),
    "membership Min-K++": Membership("Min-K++"),
    "membership loss": Membership("loss"),
    "membership lowercase": Membership("lowercase"),
    "membership zlib": Membership("zlib"),
    "memorisation accuracy": Accuracy(raw=True),
    "preference gap": Gap(),
    "probability": Probability("answer"),
    "probability familiarity": Familiarity("probability"),
    "prose NLL": Prose(),
    "reliability": Editing("reliability"),
    "reliability, said": Editing("reliability", said=True),
    "residual conflict": Conflict(),
    "rest accuracy": SpanAccuracy(rest=True),
    "said": Said(),
    "sampled extraction": Discoverable(samples=100),
    "span accuracy": SpanAccuracy(),
    "span extraction": SpanExtraction(),
    "truth ratio": TruthRatio(),
    "value MRR": ReciprocalRank(),
    "value probability": Probability("span"),
    "world accuracy": Choice(accuracy=True, roles=("world",)),
}

EVIDENCE = ("value probability", "said", "extraction strength", "choice")  # what a verdict rests on
UTILITY = ("world accuracy", "prose NLL", "distinct tokens")  # what its gate rests on, beside the retain role
