"""`python -m benchmarks.membership RUN`: membership inference on the models of a run folder, the forget set against the holdout.

Original, forgotten and never-taught model (where there is one), each attack with its AUC, interval and null interval over whole
people, PrivLeak of the forgotten model against the never-taught one by Min-K%, and first the control that reads words alone:
where that is beyond chance, the split itself tells members from strangers and no number below it says anything about a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unremember.audit.membership import Membership, ReCaLL
from unremember.audit.separation import privleak, separation
from unremember.audit.textonly import TextOnly
from unremember.bench import Bench
from unremember.folder import read_json
from unremember.loading import load
from unremember.machine import keep_memory
from unremember.request import again

ATTACKS = {
    **{f"{kind}": Membership(kind) for kind in ("loss", "zlib", "lowercase", "Min-K", "Min-K++")},
    "ReCaLL": ReCaLL(),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.membership", description=__doc__)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    keep_memory()
    wanted = again(args.run)
    corpus, bench = wanted.corpus, Bench()
    models = {"original": wanted.model, "forgotten": str(args.run / "model"), "never taught": wanted.control}
    members = [x.id for x in corpus["forget"]]
    strangers = [x.id for x in corpus["holdout"]]
    units = {x.id: x.entity for x in corpus.of("forget", "holdout")}
    precision = (read_json(args.run / "run.json") or {})["precision"]
    scores = {
        who: {name: attack(lm, corpus, bench) for name, attack in ATTACKS.items()}
        for who, name in models.items()
        if name
        for lm in [load(name, template=wanted.template, precision=precision)]
    }
    fewest = min(len({units[i] for i in side}) for side in (members, strangers))
    words = TextOnly(folds=min(5, fewest))(load(wanted.model, template=wanted.template), corpus, bench)
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("attack", "model", "AUC", "95 %", "by chance", "members, strangers"):
        grid.add_column(column)

    def line(name: str, who: str, score) -> None:
        there = set(score.per_example)
        kept = [i for i in members if i in there], [i for i in strangers if i in there]
        auc = separation(score, *kept, tried=len(ATTACKS), units=units)["AUC"]
        low, high = auc.null or (float("nan"), float("nan"))
        known = "—" if auc.value is None else f"{auc.value:.2f}"
        grid.add_row(name, who, known, f"{auc.low:.2f} to {auc.high:.2f}", f"{low:.2f} to {high:.2f}", str(auc.units))

    line("words alone", "none", words)
    for name in ATTACKS:
        for who in scores:
            line(name, who, scores[who][name])
    Console(highlight=False, width=110).print(grid)
    if "never taught" in scores:
        for who in ("original", "forgotten"):
            leak = privleak(scores[who]["Min-K"], scores["never taught"]["Min-K"], members, strangers, units)
            print(
                f"PrivLeak of the {who} model (Min-K%): {leak.value:+.0f} [{leak.low:+.0f}, {leak.high:+.0f}] {leak.reason}"
            )


if __name__ == "__main__":
    main()
