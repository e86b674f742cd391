"""`python -m benchmarks.suite [MODEL]`: every audit of the table on the demo's corpus, against its generation part alone.

All audits run one after another on one bench, as in a run; then the audits that generate text run again on a fresh one, and those
that read likelihoods, each on a bench of its own, as a suite would that shares nothing.  Printed: seconds of each audit where
it ran first (what it needs and finds done is free), and the two ratios.  All in one run; only the ratios say anything.
"""

from __future__ import annotations

import argparse
import json
import time

from unremember.audit import AUDITS
from unremember.bench import Bench
from unremember.embedded.dossier import dossier
from unremember.embedded.prose import prose
from unremember.embedded.world import world
from unremember.loading import auto_precision, load
from unremember.machine import keep_memory

SPEAK = ("said", "ROUGE-L recall", "ROUGE-L F1", "VerbMem", "distinct tokens", "EL_3", "familiarity", "span extraction")
OTHER = {"new", "neighbour"}  # roles of updates, which the demo does not have


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suite", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--worlds", type=int, default=72)
    args = parser.parse_args()
    keep_memory()
    lm = load(args.model, precision=auto_precision())
    corpus = dossier(0).with_roles(prose=prose(), world=world()[: args.worlds])
    names = [name for name in AUDITS if not OTHER & set(AUDITS[name].roles)]

    def timed(chosen: list[str], bench: Bench) -> dict[str, float]:
        seconds = {}
        for name in chosen:
            began = time.perf_counter()
            AUDITS[name](lm, corpus, bench)
            seconds[name] = time.perf_counter() - began
        return seconds

    timed(["probability"], Bench())  # warm
    lm.fingerprint  # noqa: B018  hashed once in the life of a model
    everything = timed(names, Bench())
    speaking = timed([name for name in names if name in SPEAK], Bench())
    reading = [name for name in names if name not in SPEAK]
    together = timed(reading, Bench())
    apart = {name: sum(timed([name], Bench()).values()) for name in reading}
    for name, seconds in sorted(everything.items(), key=lambda item: -item[1]):
        print(f"{name:26} {seconds:7.2f} s")
    whole, spoken, shared, alone = (sum(x.values()) for x in (everything, speaking, together, apart))
    print(
        f"all {len(names)} audits {whole:.1f} s, those that generate alone {spoken:.1f} s: {whole / spoken:.2f} times"
    )
    print(
        f"the {len(reading)} that read: together {shared:.1f} s, one by one {alone:.1f} s: {alone / shared:.2f} times"
    )
    found = {"audits": everything, "all over generating": whole / spoken, "one by one over together": alone / shared}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
