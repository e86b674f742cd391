"""zsRE as a corpus of updates: the old answer (forget), the new one (new), and an out-of-scope question (neighbour).  No torch.

Levy et al. 2017 (arXiv 1706.04115), in the form of MEND (Mitchell et al. 2022, arXiv 2110.11309), one record an update:

    src, rephrase   the question and one paraphrase         answers   what was true when the data were made
    alt             the answer to edit in                   pred      what MEND's own model said (often wrong)
    loc, loc_ans    a question of Natural Questions, and its answer

Differs: the old answer is `answers`, not `pred`, which is what another model believed; whether yours knows it is for the method
and the audits to ask.  Records with an empty text or several old answers are left out, and so are those whose new answer is
the old one.  The mark "nq question: " in front of out-of-scope questions goes, and each of these is asked once.
"""

from __future__ import annotations

import json
from pathlib import Path

from unremember.corpus import Corpus, Example
from unremember.errors import BadCorpus

TEXTS = ("subject", "src", "rephrase", "alt", "loc", "loc_ans")
MARK = "nq question: "
SHOWN = 20


def zsre(path: Path, limit: int = 0) -> Corpus:
    """The first `limit` usable records (0 = all) as the roles forget, new and neighbour; ids are `zsre/<number>/<role>`.

    Raises BadCorpus for a file that is not there or not in this form, with the place of every problem.
    """
    if limit < 0:
        raise BadCorpus(f"{path}: limit is {limit}; give the number of records to take, or 0 for all of them")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCorpus(f"{path} cannot be read: {error.strerror}; name zsRE's JSON file") from error
    except ValueError as error:
        raise BadCorpus(f"{path} is no JSON ({error}); name zsRE's JSON file") from error
    if not isinstance(records, list) or not records:
        raise BadCorpus(f"{path} is no list of records; name zsRE's JSON file in MEND's form")
    problems = [f"{path}, record {n}: {wrong}" for n, record in enumerate(records, 1) if (wrong := _misfit(record))]
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise BadCorpus([*problems[:SHOWN], *more])
    usable = [(n, record) for n, record in enumerate(records, 1) if _usable(record)][: limit or None]
    if not usable:
        raise BadCorpus(f"{path}: none of the {len(records)} records holds one old answer and another new one")
    forget: list[Example] = []
    new: list[Example] = []
    neighbour: dict[str, Example] = {}
    for number, record in usable:
        text = {key: record[key].strip() for key in TEXTS}
        old, about, other = record["answers"][0].strip(), f"zsre/{number:05}", (text["rephrase"],)
        question = text["loc"].removeprefix(MARK)
        forget.append(Example(f"{about}/forget", text["src"], old, text["subject"], (), other, "", (text["alt"],)))
        new.append(Example(f"{about}/new", text["src"], text["alt"], text["subject"], (), other, "", (old,)))
        neighbour.setdefault(question, Example(f"{about}/neighbour", question, text["loc_ans"]))
    return Corpus({"forget": tuple(forget), "new": tuple(new), "neighbour": tuple(neighbour.values())})


def _misfit(record: object) -> str:
    """What keeps a value from being a record, "" where nothing does."""
    if not isinstance(record, dict):
        return f"an object was expected, not {str(record)[:40]!r}"
    if absent := [key for key in (*TEXTS, "answers") if key not in record]:
        return f"no {absent[0]!r}; name zsRE's JSON file in MEND's form"
    if strange := [key for key in TEXTS if not isinstance(record[key], str)]:
        return f"{strange[0]!r} must be text and is {record[strange[0]]!r}"
    answers = record["answers"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return f"'answers' must be a list of texts and is {answers!r}"
    return ""


def _usable(record: dict) -> bool:
    """Nothing empty, one old answer, and another new one."""
    texts = [record[key].strip() for key in TEXTS] + [answer.strip() for answer in record["answers"]]
    return len(texts) == len(TEXTS) + 1 and all(texts) and texts[-1].casefold() != record["alt"].strip().casefold()
