"""What is wanted, as a TOML file: parsed, completed from presets and checked, before a weight is loaded.

Checking collects every problem of the file, of the corpus and of the model names, and raises them together.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from unremember.bench import LEAST
from unremember.corpus import ROLES, Corpus, Example
from unremember.errors import BadInput, BadRequest, nearest
from unremember.folder import read_json
from unremember.readers import SHOWN, Source, read
from unremember.score import RULE, Rule

TEMPLATE = """\
# A request to unremember.  Check it with `unremember validate`, run it with `unremember run`.

[run]
name = "my-request"
out = "runs/my-request"       # everything is written here, nothing anywhere else
seed = 0
# places = 1024               # tokens of a forward pass; fewer take less memory, the same numbers come out
# recompute = true            # keep less between forward and backward pass, for a third more arithmetic

[model]
name = "path/to/model"        # a folder, a GGUF file, a PEFT adapter, a hub id, or smollm2-135m
# control = "path/to/control" # a model trained in the same way without the forget set, if there is one
template = "auto"             # "chat", "plain" or "auto" = chat where the tokenizer has a chat template
precision = "auto"            # "bf16", "fp32" or "auto"

[corpus]                      # .jsonl, .json, .txt, .csv, .parquet; see docs/corpus.md
forget = "forget.jsonl"       # what must go
retain = "retain.jsonl"       # the same kind of knowledge, about others: must stay
holdout = "holdout.jsonl"     # the same kind, never taught: the level that "forgotten" is measured against
# replay = "replay.jsonl"     # general questions that join the retain term
# relearn = "relearn.jsonl"   # other people's facts, for the relearning attack
# columns of a table: forget = { file = "forget.csv", question = "q", answer = "a" }
# world and prose come with the package; name files to use your own

[forget]
method = "npo"                # `unremember ls` lists the methods
beta = 0.1
retain = 1.0
plan = { steps = 30, lr = 5e-5, stop = "probability" }
# sites = ["model.layers.1?.mlp.*"]   # parameters that may move, as shell patterns; all of them by default
# lora = { rank = 8, alpha = 16 }     # write a PEFT adapter instead of whole weights
# chunks = 4                          # forget in portions, one after another

# [locate]                    # where it is stored; then only these weights move
# locator = "integrated"      # `unremember ls` lists the locators
# budget = { share = 0.01 }   # or units = 200, or parameters = 1000000

[audit]
# audits = ["probability", "said"]    # on top of what the verdict needs; all of them by default

[attack.rephrase]             # each attack is a table; `unremember attack RUN --suite standard` adds many
wordings = 2
# [attack.relearn]
# plan = { steps = 10, lr = 5e-5 }
# [attack.gentle]             # the same attack again, under a name of its own
# attack = "relearn"
# plan = { steps = 5, lr = 2e-5 }

[rule]                        # what "forgotten" means
tolerance = 0.25
"""


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter instead of whole weights (peft)."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(ge=1)] = 16
    targets: str = "all-linear"


@dataclass(frozen=True)
class Request:
    """A checked request.  method: an instance out of the forget room; attacks: name -> instance out of the attack room."""

    name: str
    out: Path
    model: str
    corpus: Corpus
    method_name: str
    method: Any
    attacks: Mapping[str, Any]
    audits: tuple[str, ...]
    rule: Rule = RULE
    seed: int = 0
    control: str = ""
    template: str = "auto"
    precision: str = "auto"
    sites: tuple[str, ...] = ()
    locator_name: str = ""
    locator: Any = None
    budget: Any = None
    chunks: int = 1
    lora: Lora | None = None
    echo: Mapping[str, Any] = field(default_factory=dict)
    places: int = 0  # as the bench has it
    recompute: bool = False


SECTIONS = {
    "run": ("name", "out", "seed", "places", "recompute"),
    "model": ("name", "control", "template", "precision"),
    "corpus": ROLES,
    "locate": None,  # depends on the locator
    "forget": None,  # depends on the method
    "audit": ("audits",),
    "attack": None,  # depends on the attack
    "rule": tuple(x.name for x in fields(Rule)),
}


def parse(file: Path, changes: Iterable[str] = ()) -> dict[str, Any]:
    """The file's tables with `a.b=value` changes applied; BadRequest where it cannot be read."""
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadRequest(f"no such request file: {file}; write one with `unremember init`") from error
    except OSError as error:
        raise BadRequest(f"{file} cannot be read: {error.strerror}; name a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{file} is no valid TOML: {error}") from error
    return changed(raw, changes)


def again(folder: Path, changes: Iterable[str] = ()) -> Request:
    """The request of a run folder, from what the run wrote there; BadRequest where that is no run folder."""
    meta, roles = read_json(folder / "run.json"), read_json(folder / "corpus.json")
    if meta is None or roles is None:
        raise BadRequest(f"{folder} is no run folder; name one that `unremember run` made, or a request file")
    corpus = Corpus({role: tuple(Example.plain(x) for x in rows) for role, rows in roles.items()})
    if any(change.strip().startswith("corpus") for change in changes):
        raise BadRequest("the corpus of a run folder is fixed; start another run from a request file to change it")
    raw = changed(meta["request"], (*changes, f"run.out={json.dumps(str(folder))}"))
    return request(raw, corpus=corpus)


def changed(raw: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """`raw` with `a.b=value` changes written into it; BadRequest where one has no such form."""
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise BadRequest(f"--set {change!r}: write it as section.key=value")
        try:
            parsed = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            parsed = value
        *sections, key = path.strip().split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise BadRequest(f"--set {change!r}: {section!r} is a value, not a table")
        place[key] = parsed
    return raw


def request(raw: Mapping[str, Any], where: Path = Path(), corpus: Corpus | None = None) -> Request:
    """Check everything in `raw` and build the request.  where: folder that relative corpus paths start from.

    corpus: replaces the [corpus] table.  Raises BadRequest with all problems together; loads no weight.
    """
    from unremember.attack import ATTACKS, SUITES, VARIANTS
    from unremember.attack import PRESETS as ATTACK_PRESETS
    from unremember.audit import AUDITS, EVIDENCE, UTILITY
    from unremember.forget import METHODS, PRESETS
    from unremember.forget.sequential import portioned, portions
    from unremember.loading import check
    from unremember.locate import LOCATORS
    from unremember.locate import PRESETS as LOCATE_PRESETS
    from unremember.locate.ranking import Budget
    from unremember.stop import check as check_level

    problems: list[str] = []

    def table(name: str) -> dict[str, Any]:
        value = raw.get(name, {})
        if isinstance(value, dict):
            return dict(value)
        problems.append(f"[{name}] must be a table and is {value!r}")
        return {}

    for name, value in raw.items():
        if name not in SECTIONS:
            problems.append(f"unknown table [{name}]; {nearest(name, SECTIONS)}")
        elif (known := SECTIONS[name]) and isinstance(value, dict):
            problems += [f"unknown key {name}.{k}; {nearest(k, known)}" for k in value if k not in known]

    run, model, forget, attack = table("run"), table("model"), table("forget"), table("attack")

    def text(section: str, values: dict, key: str, default: str, allowed: tuple[str, ...] = ()) -> str:
        value = values.get(key, default)
        if not isinstance(value, str) or (allowed and value not in allowed):
            problems.append(
                f"{section}.{key} is {value!r}; it must be {' or '.join(map(repr, allowed)) if allowed else 'a text'}"
            )
            return default
        return value

    name = text("run", run, "name", "run")
    out = Path(text("run", run, "out", f"runs/{name}"))
    seed = run.get("seed", 0)
    if type(seed) is not int or seed < 0:
        problems.append(f"run.seed is {seed!r}; it must be a whole number from 0")
        seed = 0
    places, recompute = run.get("places", 0), run.get("recompute", False)
    if "places" in run and (type(places) is not int or places < LEAST):
        problems.append(
            f"run.places is {places!r}; it must be a whole number from {LEAST}, the tokens of a forward pass"
        )
    if type(recompute) is not bool:
        problems.append(f"run.recompute is {recompute!r}; it must be true or false")
    model_name = text("model", model, "name", "")
    control = text("model", model, "control", "")
    template = text("model", model, "template", "auto", ("auto", "chat", "plain"))
    precision = text("model", model, "precision", "auto", ("auto", "bf16", "fp32"))
    if not model_name:
        problems.append("model.name is missing; name a folder, a GGUF file, an adapter, a hub id or smollm2-135m")
    there = bool(model_name)
    for candidate in filter(None, (model_name, control)):
        try:
            check(candidate)
        except BadInput as error:
            there = there and candidate != model_name
            problems += error.problems

    if corpus is None:
        corpus = read_corpus(table("corpus"), where, problems)
    if corpus and not control and not corpus.of("holdout"):
        problems.append(
            "nothing can be called forgotten without a never-taught level; give a holdout file under [corpus], or a "
            "control model under [model]"
        )

    method_name = text("forget", forget, "method", "npo")
    sites, lora_raw = forget.pop("sites", []), forget.pop("lora", None)
    forget.pop("method", None)
    chunks = forget.pop("chunks", 1)
    if type(chunks) is not int or chunks < 1:
        problems.append(f"forget.chunks is {chunks!r}; it must be a whole number from 1")
        chunks = 1
    method = None
    if method_name not in METHODS:
        problems.append(f"unknown method {method_name!r}; {nearest(method_name, METHODS)}")
    else:
        method = build(METHODS[method_name], merged(PRESETS[method_name], forget), "forget", problems)
    if not (isinstance(sites, list) and all(isinstance(p, str) for p in sites)):
        problems.append(f"forget.sites is {sites!r}; it must be a list of parameter name patterns")
        sites = []
    lora = None if lora_raw is None else build(Lora, lora_raw, "forget.lora", problems)

    if lora and method_name == "depn":
        problems.append(
            "forget.lora: depn switches neurons off in whole matrices, which an adapter cannot; leave it out"
        )

    found = table("locate")
    locator_name, locator, budget = "", None, None
    if found:
        locator_name = text("locate", found, "locator", "")
        budget = build(Budget, found.pop("budget", {}), "locate.budget", problems)
        found.pop("locator", None)
        if locator_name in LOCATORS:
            settings = merged(LOCATE_PRESETS.get(locator_name, {}), found)
            locator = build(LOCATORS[locator_name], settings, "locate", problems)
        else:
            problems.append(f"unknown locator {locator_name!r}; {nearest(locator_name, LOCATORS)}")
        if sites or lora:
            problems.append("[locate] says which weights move, and so do forget.sites and forget.lora; leave one out")

    attacks, named_here = {}, set(attack)
    if (suite := attack.pop("suite", None)) is not None:
        if suite not in SUITES:
            problems.append(f"attack.suite is {suite!r}; {nearest(str(suite), SUITES)}")
        attack = {name: {} for name in SUITES.get(suite, ())} | attack
    for key, settings in attack.items():
        if not isinstance(settings, dict):
            problems.append(f"attack.{key} is {settings!r}; it must be a table, [attack.{key}]")
        elif key == "none" or not re.fullmatch(r"\w[\w.-]{,39}", key, re.ASCII):
            problems.append(
                f"attack {key!r} is no name for an attack; take up to 40 letters, digits, '-', '_' and '.', and not 'none'"
            )
        elif (kind := settings.get("attack", VARIANTS.get(key, key))) not in ATTACKS:
            known = {*ATTACKS, *VARIANTS}
            problems.append(
                f"unknown attack {kind!r}; {nearest(str(kind), known)}; under a name of its own an attack says which it is: "
                f'[attack.{key}] attack = "…"'
            )
        else:
            own = {k: v for k, v in settings.items() if k != "attack"}
            preset = ATTACK_PRESETS[key if VARIANTS.get(key) == kind else kind]
            attacks[key] = build(ATTACKS[kind], merged(preset, own), f"attack.{key}", problems)

    audits = table("audit").get("audits", list(AUDITS))
    if not isinstance(audits, list):
        problems.append(f"audit.audits is {audits!r}; it must be a list of names")
        audits = []
    problems += [f"unknown audit {a!r}; {nearest(str(a), AUDITS)}" for a in audits if a not in AUDITS]
    rule = build(Rule, table("rule"), "rule", problems)

    if corpus:
        for who, part in ((method_name, method), (locator_name, locator), *attacks.items()):
            try:
                if part and part is attacks.get(who):
                    part.check(handed(corpus, bool(control)))
                elif hasattr(part, "check"):
                    part.check(corpus)
                elif part:
                    corpus.require(who, part.needs)
                if part is method and part:
                    level = getattr(part, "plan", part).stop
                    parts = portions(corpus["forget"], chunks) if chunks > 1 else ()
                    for one in (corpus, *(portioned(corpus, x) for x in parts)):
                        if one is not corpus and hasattr(part, "check"):
                            part.check(one)
                        if level != "never":
                            check_level(one, level)
            except BadInput as error:
                if part is attacks.get(who) and who not in named_here:
                    continue  # a suite's: the run goes on, and says "not applicable", and why
                problems += error.problems
    named = {*audits, *EVIDENCE, *UTILITY}
    if corpus and there:
        too_short = _encoded(model_name, template, corpus, problems)
        if control and template == "auto":
            problems += _unlike(model_name, control)
        problems += [f"audit {a!r}: {too_short[a]}" for a in table("audit").get("audits", ()) if a in too_short]
        named -= set(too_short)
    if problems or corpus is None:
        raise BadRequest(dict.fromkeys(problems))
    wanted = tuple(a for a in AUDITS if a in named)
    return Request(
        name, out, model_name, corpus, method_name, method, attacks, wanted, rule, seed, control, template, precision,
        tuple(sites), locator_name, locator, budget, chunks, lora, dict(raw), places, recompute,
    )  # fmt: skip


def handed(corpus: Corpus, control: bool) -> Corpus:
    """What an attack is handed: as many retained facts as must go, and no holdout where a control model is the level."""
    kept = {role: rows for role, rows in corpus.items() if role != "holdout" or not control}
    if "retain" in kept:
        kept["retain"] = kept["retain"][: len(corpus.of("forget")) or None]
    return Corpus(kept)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def build(kind: type, values: Any, where: str, problems: list[str]) -> Any:
    """An instance of a dataclass from plain values; what is wrong goes to `problems`, with the path `where`."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    if not hasattr(kind, "__pydantic_config__"):
        kind_checked = with_config(ConfigDict(extra="forbid"))(kind)
    else:
        kind_checked = kind
    try:
        return TypeAdapter(kind_checked).validate_python(values)
    except ValidationError as error:
        for found in error.errors():
            path = ".".join((where, *map(str, found["loc"])))
            if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                owner = _owner(kind, found["loc"][:-1])
                problems.append(f"unknown key {path}; {nearest(str(found['loc'][-1]), owner)}")
            else:
                problems.append(f"{path} is {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}")
        return None


def _unlike(model: str, control: str) -> list[str]:
    """The problem where one of them has a chat template and the other has not, as far as their tokenizers are at hand."""
    from unremember.loading import tokenizer_and_limit

    try:
        found = {name: tokenizer_and_limit(name) for name in (model, control)}
    except BadInput:
        return []  # told elsewhere
    chat = [name for name, known in found.items() if known and known[0].chat_template]
    plain = [name for name, known in found.items() if known and not known[0].chat_template]
    if not chat or not plain:
        return []
    return [
        f"{chat[0]!r} has a chat template and {plain[0]!r} has none, so they would be asked in different ways and could not be "
        'compared; set model.template = "plain", or give the other its template'
    ]


def _encoded(name: str, template: str, corpus: Corpus, problems: list[str]) -> dict[str, str]:
    """Encode every text as the run will; what does not fit goes to `problems`.

    Returns the audits that read answers as raw text and find some too short, with the reason; all is well where the
    tokenizer is not at hand.
    """
    from unremember.attack.rephrase import cloze
    from unremember.loading import tokenizer_and_limit
    from unremember.tokens import Template

    try:
        found = tokenizer_and_limit(name)
    except BadInput as error:
        problems += error.problems
        return {}
    if found is None or not found[0].is_fast:
        return {}
    tokenizer, limit = found
    if template == "chat" and not tokenizer.chat_template:
        problems.append(f'model {name!r} has no chat template; set model.template = "plain"')
        return {}
    coder = Template(tokenizer, template != "plain" and bool(tokenizer.chat_template))
    wrong: list[str] = []
    for rows in corpus.values():
        for x in rows:
            gap = cloze(x)
            asked = [(prompt, x.answer) for prompt in (x.prompt, *x.paraphrases, *((gap.prompt,) if gap else ()))]
            try:
                for prompt, answer in (*asked, *((x.prompt, text) for text in (x.rewording, *x.distractors) if text)):
                    coder.row(x.id, prompt, answer, limit=limit)
            except BadInput as error:
                wrong += error.problems
    problems += wrong[:SHOWN] + ([f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])
    lead, short = len(coder.context("")), {}
    scored = ("forget", "retain", "holdout")
    for audit, least, roles, all_of_them in (
        ("memorisation accuracy", 2, scored, True),
        ("EL_3", 4, ("forget", "holdout"), True),
        ("discoverable extraction", 100, scored, False),  # a question is context enough for its answer
        ("sampled extraction", 100, scored, False),
    ):
        few = [
            x.id
            for x in corpus.of(*roles)
            if (all_of_them or not x.prompt)
            and lead + len(tokenizer(x.answer, add_special_tokens=False).input_ids) < least
        ]
        if few:
            short[audit] = f"the answer of {', '.join(few[:5])} has fewer than {least} tokens; leave this audit out"
    return short


def _owner(kind: Any, path: tuple) -> list[str]:
    """Field names of the dataclass that `path` leads to."""
    import typing

    for step in path:
        hint = typing.get_type_hints(kind).get(str(step))
        kind = hint if isinstance(hint, type) and is_dataclass(hint) else kind
    return [f.name for f in fields(kind)]


def read_corpus(tables: Mapping[str, Any], where: Path, problems: list[str]) -> Corpus | None:
    """Read every role's file; the world and prose roles fall back on the embedded ones."""
    from unremember.embedded.prose import prose
    from unremember.embedded.world import world

    roles = {}
    before = len(problems)
    for role, value in tables.items():
        if role not in ROLES:
            continue
        settings = {"file": value} if isinstance(value, str) else value
        if not isinstance(settings, dict) or "file" not in settings:
            problems.append(f'corpus.{role} is {value!r}; write a file name, or {{ file = "…", question = "…" }}')
            continue
        source = build(Source, {**settings, "file": where / str(settings["file"])}, f"corpus.{role}", problems)
        if source is None:
            continue
        try:
            roles[role] = read(source)
        except BadInput as error:
            problems += error.problems
    if "forget" not in tables:
        problems.append('corpus.forget is missing; name the file of what must go, as in forget = "forget.jsonl"')
    elif not roles.get("forget") and len(problems) == before:
        problems.append(f"corpus.forget: {tables['forget']!r} holds no example; there is nothing to forget")
    if len(problems) > before:
        return None
    try:
        return Corpus({"world": world()[:96], "prose": prose(), **roles})
    except BadInput as error:
        problems += error.problems
        return None
