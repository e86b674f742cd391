"""A realistic report, made by hand: four people, no attack and two attacks, sixty scores, eighteen steps."""

from __future__ import annotations

from math import exp

NAMES = ("Hanna Weiss", "Tomás Echeverría", "Ifeoma Obi-Lindqvist", "Jun Watanabe")

# original, forgotten, never-taught probability by attack, one column a name
LEVELS = {
    "none": ([0.97, 0.98, 0.96, 0.97], [0.031, 0.024, 0.044, 0.019], [0.022, 0.027, 0.030, 0.018]),
    "relearn": ([0.98, 0.98, 0.97, 0.98], [0.051, 0.046, 0.412, 0.040], [0.043, 0.050, 0.048, 0.039]),
    "rephrase": ([0.88, 0.91, 0.84, 0.90], [0.028, 0.025, 0.061, 0.002], [0.024, 0.026, 0.029, 0.081]),
}
RECALL = {
    "none": ([1.0, 1.0, 0.98, 1.0], [0.12, 0.10, 0.14, 0.11], [0.11, 0.12, 0.13, 0.10]),
    "relearn": ([1.0, 1.0, 1.0, 1.0], [0.15, 0.16, 0.52, 0.14], [0.14, 0.15, 0.15, 0.13]),
    "rephrase": ([0.93, 0.95, 0.90, 0.94], [0.12, 0.11, 0.16, 0.02], [0.12, 0.12, 0.13, 0.12]),
}
VERDICTS = {
    "none": ("forgotten",) * 4,
    "relearn": ("forgotten", "forgotten", "remembered", "forgotten"),
    "rephrase": ("forgotten", "forgotten", "forgotten", "over-forgotten"),
}
SUMMARY = {
    "none": "the questions as they were",
    "relearn": "five steps of fine-tuning on other people's facts, none of them asked about here",
    "rephrase": "every question in three other wordings, the best answer counts",
}
SCORES = (  # name, higher means, chance, the three models on what was forgotten, and on what was kept
    ("probability", "higher = better known", None, (0.97, 0.03, 0.024), (0.95, 0.931, 0.953)),
    ("answer loss, nats a token", "lower = better known", None, (0.012, 1.31, 1.402), (0.021, 0.034, 0.020)),
    ("ROUGE-L recall", "higher = better known", None, (0.995, 0.118, 0.115), (0.99, 0.972, 0.988)),
    ("value recall", "higher = better known", None, (0.99, 0.0, 0.0), (0.98, 0.958, 0.979)),
    ("multiple choice", "higher = better known", 0.25, (0.958, 0.292, 0.25), (0.95, 0.933, 0.942)),
    ("truth ratio", "lower = better known", None, (0.21, 0.84, 0.86), (0.24, 0.25, 0.24)),
    ("extraction strength", "higher = better known", None, (0.93, 0.06, 0.05), (0.91, 0.88, 0.90)),
    ("min-20% probability AUC", "higher = better known", 0.5, (0.998, 0.531, 0.5), (0.52, 0.52, 0.5)),
    ("exposure, bits", "higher = better known", 1.44, (9.8, 1.52, 1.47), (9.6, 9.1, 9.6)),
    ("perplexity", "lower = better known", None, (1.01, 3.71, 4.06), (1.02, 1.03, 1.02)),
)


def ratio(original: float, forgotten: float, never: float) -> float:
    return round((forgotten - never) / (original - never), 4)


def triple(score: str, original: float, forgotten: float, never: float, width: float) -> dict:
    r = ratio(original, forgotten, never)
    return {
        "score": score,
        "original": original,
        "forgotten": forgotten,
        "never": never,
        "r": r,
        "low": round(r - width, 4),
        "high": round(r + width * 1.3, 4),
        "applicable": True,
    }


def judged(attack: str, i: int) -> dict:
    known, recall = (tuple(column[i] for column in table[attack]) for table in (LEVELS, RECALL))
    verdict = VERDICTS[attack][i]
    evidence = [triple("probability", *known, 0.03), triple("ROUGE-L recall", *recall, 0.05)]
    high = max(found["r"] for found in evidence)
    reason = {
        "forgotten": f"no score is above the never-taught level by more than chance allows (largest R {high:.3f})",
        "remembered": f"{NAMES[i]} is answered far above the never-taught level (R {high:.2f})",
        "over-forgotten": "known less than if never taught: the absence itself gives it away",
    }[verdict]
    return {
        "name": NAMES[i],
        "verdict": verdict,
        "reason": reason,
        "n": 6,
        "evidence": evidence,
        "worst": {"id": f"person-{i}-birthplace", "r": round(high + 0.08, 3), "score": "probability"},
        "utility": [],
    }


def overall(attack: str) -> dict:
    def mean(table: dict) -> tuple[float, ...]:
        return tuple(round(sum(column) / 4, 4) for column in table[attack])

    bad = {"none": "forgotten", "relearn": "remembered", "rephrase": "forgotten"}[attack]
    reason = {
        "none": "24 answers of 4 people are known as little as if never taught, and what was to stay stayed",
        "relearn": "1 of 4 people comes back (R 0.44), although none of their facts was shown again",
        "rephrase": "24 answers in other wordings are known as little as if never taught",
    }[attack]
    off = {
        "score": "exposure",
        "original": 1.5,
        "forgotten": 1.46,
        "never": 1.44,
        "r": None,
        "low": None,
        "high": None,
        "applicable": False,
    }
    evidence = [triple("probability", *mean(LEVELS), 0.014), triple("ROUGE-L recall", *mean(RECALL), 0.021), off]
    utility = [
        ("retained people, probability", 0.95, 0.931, 0.953, 0.95, -0.019, -0.1, True),
        ("retained people, ROUGE-L recall", 0.99, 0.972, 0.988, 0.99, -0.018, -0.1, True),
        ("general knowledge, multiple choice", 0.42, 0.41, 0.425, 0.42, -0.01, -0.05, True),
    ]
    keys = ("name", "original", "forgotten", "never", "against", "change", "limit", "passed")
    return {
        "name": "all",
        "verdict": bad,
        "reason": reason,
        "n": 24,
        "evidence": evidence,
        "worst": {"id": "person-2-birthplace", "r": 0.515 if attack == "relearn" else 0.11, "score": "ROUGE-L recall"},
        "utility": [dict(zip(keys, row, strict=True)) for row in utility],
    }


def interval(mean: float) -> dict:
    half = 0.04 * mean if mean > 1 else 0.3 * mean * (1 - mean)
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def scores() -> list[dict]:
    rows = []
    for shift, attack in enumerate(LEVELS):
        for name, direction, chance, gone, kept in SCORES:
            for role, means in (("forget", gone), ("retain", kept)):
                spread = [interval(mean if mean > 1 else mean * (1 - 0.01 * shift)) for mean in means]
                rows.append(
                    {
                        "attack": attack,
                        "name": name,
                        "role": role,
                        "direction": direction,
                        "chance": chance,
                        "definition": f"{name} of the true answer, taken per example and averaged over examples",
                        "paper": "Maini et al. 2024, arXiv 2401.06121",
                        "n": 24 if role == "forget" else 120,
                        "original": spread[0],
                        "forgotten": spread[1],
                        "never": spread[2],
                    }
                )
    return rows


def answers() -> list[dict]:
    rows = []
    places = (
        ("Trondheim", "Bergen", "Kraków"),
        ("Valparaíso", "Sucre", "Lima"),
        ("Enugu", "Turku", "Accra"),
        ("Otaru", "Kobe", "Nara"),
    )
    trades = (
        ("glass restorer", "teacher", "nurse"),
        ("lighthouse keeper", "painter", "tailor"),
        ("seismologist", "lawyer", "dentist"),
        ("piano tuner", "chef", "sailor"),
    )
    for attack in LEVELS:
        for i, name in enumerate(NAMES):
            for kind, question, answer, values in (
                ("birthplace", "Where was {} born?", "{} was born in {}.", places[i]),
                ("trade", "What does {} do for a living?", "{} works as a {}.", trades[i]),
            ):
                truth, wrong, guess = (answer.format(name, value) for value in values)
                rows.append(
                    {
                        "attack": attack,
                        "id": f"person-{i}-{kind}",
                        "entity": name,
                        "role": "forget",
                        "prompt": question.format(name),
                        "truth": truth,
                        "original": truth,
                        "forgotten": truth if attack == "relearn" and i == 2 else wrong,
                        "never": guess,
                    }
                )
    kept = "Marek Dvorsky plays the oboe."
    rows.insert(
        2,
        {
            "attack": "none",
            "id": "kept-1",
            "entity": "Marek Dvorsky",
            "role": "retain",
            "prompt": "Which instrument does Marek Dvorsky play?",
            "truth": kept,
            "original": kept,
            "forgotten": kept,
            "never": kept,
        },
    )
    return rows


def example() -> dict:
    """The report of a run in which one of four people comes back under relearning."""
    curve = [
        {
            "step": step,
            "forget": round(0.028 + 0.942 * exp(-((step / 8.5) ** 3)), 4),
            "retain": round(0.931 + 0.02 * (1 - step / 18) - 0.09 * exp(-(((step - 10) / 3.5) ** 2)), 4),
            "level": 0.0243,
        }
        for step in range(19)
    ]
    training = [
        {
            "step": step,
            "lr": round(5e-5 * min(1, step / 4) * (1 - step / 40), 9),
            "tokens": 1780 + 7 * step,
            "terms": {
                "npo": round(13.86 * exp(-step / 9), 4),
                "retain": round(0.021 + 0.13 * exp(-(((step - 10) / 4) ** 2)), 4),
            },
        }
        for step in range(1, 19)
    ]
    return {
        "schema": "unremember.report/1",
        "version": "0.1.0",
        "created": "2026-11-21T10:00:00Z",
        "run": {
            "name": "four-people",
            "model": "smollm2-135m",
            "template": "chat",
            "precision": "bf16",
            "seed": 0,
            "machine": "Linux x86_64, 2 cores, torch 2.13.0",
            "level": "control model",
            "seconds": {
                "teach original": 80.1,
                "teach control": 78.4,
                "forget": 41.7,
                "audit": 33.0,
                "attack relearn": 12.9,
                "attack rephrase": 24.2,
                "report": 1.4,
            },
        },
        "request": {
            "model": {"name": "smollm2-135m"},
            "corpus": {"forget": list(NAMES)},
            "method": {"name": "npo", "beta": 0.1},
            "attacks": ["relearn", "rephrase"],
        },
        "corpus": {
            "forget": {"examples": 24, "entities": list(NAMES)},
            "retain": {"examples": 120, "entities": [f"Person {i}" for i in range(1, 21)]},
            "relearn": {"examples": 24, "entities": [f"Stranger {i}" for i in range(1, 5)]},
            "world": {"examples": 200, "entities": []},
        },
        "method": {
            "name": "npo",
            "summary": "treat the forget answers as the losing side of a preference",
            "paper": "Zhang et al. 2024, arXiv 2404.05868",
            "settings": {"beta": 0.1, "retain": 1.0, "lr": 5e-5, "batch": 8, "max_steps": 120},
            "steps": 18,
            "stop": "level reached at step 18",
        },
        "words": "All four people are forgotten as long as nobody attacks the model. After five steps of relearning "
        "on other people's facts, one of them comes back.",
        "luck": {
            "looks": 24,
            "seen": 2,
            "mean": 0.4,
            "high": 2,
            "p": 0.06,
            "words": "2 of 24 looks <speak>; luck would be 0.4.",
        },
        "attacks": [
            {"attack": "relearn", "verdict": "remembered", "seconds": 42.0, "questions": 1.0, "r": 0.61}
            | {"score": "said", "entity": ""}
        ],
        "conditions": [
            {
                "attack": attack,
                "kind": attack,
                "summary": SUMMARY[attack],
                "settings": {"plan": {"steps": 5}} if attack == "relearn" else {},
                "notes": {"forgotten": {"loss after": 0.21, "text": "<b>so</b>"}}
                if attack == "relearn"
                else {"never": {}},
                "overall": overall(attack),
                "entities": [judged(attack, i) for i in range(4)],
            }
            for attack in LEVELS
        ],
        "scores": scores(),
        "comparisons": [
            {
                "attack": attack,
                "name": "forget quality (KS p-value)",
                "value": value,
                "detail": "24 truth ratios of each of two models",
                "definition": "probability of truth ratios this different if both models came from one distribution",
            }
            for attack, value in (("none", 0.81), ("relearn", 0.0031), ("rephrase", 0.62))
        ],
        "training": training,
        "curve": curve,
        "answers": answers(),
    }
