"""The command line: one sub-command a room.  Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from unremember import __version__
from unremember.errors import BadRequest, Interrupted, UnrememberError, nearest
from unremember.screen import at_work

app = typer.Typer(
    help="Make a language model forget, attack the result, and report a verdict that a sceptic can check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RequestFile = Annotated[Path, typer.Argument(help="The request: a TOML file, or the folder of an earlier run.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change one value of the request; repeatable.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write here instead of run.out.")]
Device = Annotated[str, typer.Option(help="torch device: cpu, cuda, cuda:1 …")]

NAMED = 4  # people who are named behind a verdict


def main() -> None:
    """Run the command line; errors of ours end with their text and their exit code, without a traceback."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    try:
        code = app(standalone_mode=False)
        if code == Interrupted.code:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        console.print(
            "\n[yellow]Interrupted.[/] What is finished is kept; the same command again goes on from there.",
        )
        sys.exit(Interrupted.code)
    except UnrememberError as error:
        for problem in getattr(error, "problems", (str(error),)):
            console.print(Text("✗ ", "red") + Text(problem), soft_wrap=True)
        sys.exit(error.code)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not worth an import here
            console.print(
                Text("✗ ", "red") + Text(f"{str(error).splitlines()[0]} Set run.recompute = true, forget.lora or fewer "
                "run.places; the same command again goes on from there."), soft_wrap=True
            )  # fmt: skip
            sys.exit(1)
        said = getattr(error, "format_message", None)  # click's own usage errors
        if said is None:
            raise
        if text := said():
            console.print(Text("✗ ", "red") + Text(text), soft_wrap=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit()


@app.command()
def demo(
    preset: Annotated[str, typer.Option(help="smollm2 (the real thing) or tiny (under a minute).")] = "smollm2",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder.")] = None,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """Teach a small model fictional people, make it forget some of them, attack it, and report."""
    with at_work(device) as work:
        from unremember import demo as room

        if preset not in room.PRESETS:
            raise BadRequest(f"unknown preset {preset!r}; {nearest(preset, room.PRESETS)}")
        folder = out or Path("runs") / f"demo-{preset}"
        done = room.demo(preset, folder, seed, work.bench, work.title)
    if not work.quiet:
        _verdict(done, folder / "report.html")


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("request.toml"),
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write a commented request.toml."""
    from unremember.folder import write_text
    from unremember.request import TEMPLATE

    if file.exists() and not force:
        raise BadRequest(f"{file} exists; choose another name, or replace it with --force")
    write_text(file, TEMPLATE)
    print(f"wrote {file}; edit it, then: unremember validate {file}")


@app.command()
def annotate(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A corpus file: .jsonl, .json, .txt, .csv or .parquet.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write it with spans: a new .jsonl file.")],
    chosen: Annotated[
        str, typer.Option("--with", metavar="A,B", help="Annotators; presidio is one more.")
    ] = "date,digits,email,money,names,phone,url",
    entries: Annotated[
        Path | None, typer.Option("--list", metavar="FILE", help="Mark these names, too: one a line.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Mark what is sensitive in the answers of a corpus file, by rules, and write it with spans."""
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from unremember.annotate import MOST, Propose, annotated, gazetteer, named, together
    from unremember.errors import BadCorpus, BadFolder
    from unremember.readers import SHOWN, Source, read, write_jsonl

    if target.suffix != ".jsonl":
        raise BadRequest(f"{target} does not end in .jsonl, which is what is written; choose such a name")
    if target.exists() and not force:
        raise BadRequest(f"{target} exists; choose another name, or replace it with --force")
    proposers = {name: named(name) for name in dict.fromkeys(filter(None, map(str.strip, chosen.split(","))))}
    if entries:
        try:
            proposers[entries.name] = gazetteer(entries.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise BadCorpus(f"{entries} cannot be read as UTF-8 text: {error}; check the path") from error
    if not proposers:
        raise BadRequest("--with names no annotator; leave it out for all that follow rules")
    found: Counter[str] = Counter()

    def counted(name: str) -> Propose:
        def propose(text: str):
            spans = list(proposers[name](text))
            found[name] += len(spans)
            return spans

        return propose

    result = annotated(read(Source(source)), together(*map(counted, proposers)))
    try:
        write_jsonl(result.examples, target)
    except OSError as error:
        raise BadFolder(f"cannot write {target}: {error.strerror}; choose another place") from error
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("annotator")
    grid.add_column("found", justify="right")
    for name in proposers:
        grid.add_row(name, str(found[name]))
    console = Console(highlight=False)
    console.print(grid)
    marked = sum(bool(x.spans) for x in result.examples)
    print(f"{marked} of {len(result.examples)} examples are marked, {result.coverage:.0%} of their answers' text")
    if result.coverage > MOST:
        print(f"more than {MOST:.0%}: to forget this is to forget nearly all of the text; use fewer annotators")
    for problem in result.problems[:SHOWN]:
        console.print(f"✗ {problem}", markup=False, soft_wrap=True)
    if len(result.problems) > SHOWN:
        print(f"... and {len(result.problems) - SHOWN} more")
    print(f"wrote {target}")


@app.command()
def validate(file: RequestFile, changes: Changes = None) -> None:
    """Check a request, its corpus files and its model names without loading a weight."""
    wanted = _request(file, changes, None)
    for role, rows in wanted.corpus.items():
        print(f"{role:8} {len(rows):5} examples")
    print(f"method {wanted.method_name}, attacks: {', '.join(wanted.attacks) or 'none'}; the request is good")


@app.command()
def run(file: RequestFile, changes: Changes = None, out: Out = None, device: Device = "cpu") -> None:
    """Do the whole job: audit, locate, forget, audit, attack, audit, report.  Goes on where it was stopped."""
    _stages(file, changes, out, device, ("audit", "locate", "forget", "attack", "report"))


@app.command()
def audit(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A request or run folder; with --corpus a model.")],
    changes: Changes = None,
    out: Out = None,
    device: Device = "cpu",
    corpus: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Scan these: .jsonl, .txt, .md, .csv, .tsv, .parquet, folders; repeatable."),
    ] = None,
    holdout: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Documents that the model never saw: the chance level; repeatable."),
    ] = None,
    control: Annotated[str, typer.Option(metavar="MODEL", help="A model that never saw them, to compare with.")] = "",
    field: Annotated[str, typer.Option(help="The documents' key or column that holds the text.")] = "text",
    skip: Annotated[bool, typer.Option(help="Leave bad documents out.")] = False,
) -> None:
    """Measure the models of a request that are there; or, with --corpus, find what a model knows by heart, and make a
    forget set of it."""
    if corpus:
        _scan(source, corpus, changes, out, device, holdout, control, field, skip)
    elif holdout or control or skip or field != "text":
        raise BadRequest(
            "--holdout, --control, --field and --skip are for a scan; name its documents with --corpus PATH"
        )
    else:
        _stages(Path(source), changes, out, device, ("audit",))


@app.command()
def ability(
    model: Annotated[str, typer.Argument(help="A folder, GGUF file, adapter, hub id or alias.")],
    tasks: Annotated[
        list[str], typer.Option("--task", help="A file NAME.jsonl in --data, or lm-eval's name; repeatable.")
    ],
    data: Annotated[Path | None, typer.Option(help="A folder of NAME.jsonl files.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows a task, evenly spread; 0 = all.")] = 0,
    shots: Annotated[int | None, typer.Option(min=0, help="Worked examples in front.")] = None,
    device: Device = "cpu",
) -> None:
    """General ability by lm-evaluation-harness: a line a task."""
    from rich.console import Console
    from rich.table import Table

    from unremember.audit.harness import Harness, accuracy

    asked = Harness(tuple(tasks), data, limit, shots)
    asked.check()  # before a weight is loaded
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("task", "n", "right", "95 %", "chance"):
        grid.add_column(name)
    with at_work(device) as work:
        from unremember.loading import load

        work.title("general ability")
        for name, score in asked.scores(load(model, device=device), work.bench).items():
            x = accuracy(score)
            grid.add_row(
                name, str(x["n"]), f"{x['mean']:.3f}", f"{x['low']:.3f} to {x['high']:.3f}", f"{x['chance']:.2f}"
            )
    Console(highlight=False).print(grid)


@app.command()
def locate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A request or run folder; with --fact a model: alias, folder, GGUF file."
        ),
    ],
    changes: Changes = None,
    out: Out = None,
    device: Device = "cpu",
    fact: Annotated[str, typer.Option(metavar="QUESTION", help="Map one fact instead: its question.")] = "",
    answer: Annotated[str, typer.Option(help="The fact's answer, as the model would say it.")] = "",
    value: Annotated[str, typer.Option(help="The part of the answer that matters; all but the name by default.")] = "",
    subject: Annotated[str, typer.Option(help="The name in the question; found by its capitals by default.")] = "",
    after: Annotated[str, typer.Option(metavar="MODEL", help="A second model, to compare: after unlearning.")] = "",
    draws: Annotated[int, typer.Option(min=1, help="Corruptions of the name.")] = 3,
) -> None:
    """Rank where it is stored and write OUT/sites.safetensors; or, with --fact, map one fact and write OUT/fact.html."""
    if not fact:
        given = {"--answer": answer, "--value": value, "--subject": subject, "--after": after}
        if named := [name for name, text in given.items() if text]:
            raise BadRequest(
                f"{', '.join(named)}: a fact is meant, so give its question too: --fact 'Where does … live?'"
            )
        _stages(Path(source), changes, out, device, ("locate",))
        return
    if changes:
        raise BadRequest("--set changes a request, and with --fact there is none; leave it out")
    example = _asked(fact, answer, value, subject)
    print(f"fact: {_map(source, after, example, out or Path('runs') / 'fact', draws, device)}")


@app.command()
def forget(file: RequestFile, changes: Changes = None, out: Out = None, device: Device = "cpu") -> None:
    """Run the method, write OUT/model, and audit it."""
    _stages(file, changes, out, device, ("forget",))


@app.command()
def attack(
    file: RequestFile,
    changes: Changes = None,
    out: Out = None,
    device: Device = "cpu",
    suite: Annotated[str, typer.Option(help="quick, standard or full: these attacks beside the request's.")] = "",
) -> None:
    """Attack the forgotten model of a run, and its original and control in the same way; with --suite, then report."""
    from unremember.attack import SUITES
    from unremember.folder import read_json

    if suite not in SUITES:
        _stages(file, [*(changes or ()), *([f"attack.suite={suite}"] if suite else ())], out, device, ("attack",))
        return
    # each suite holds the one before: of a run that has a larger one already the rest stays, and stays in the report
    earlier = ((read_json(file / "run.json") or {}) if file.is_dir() else {}).get("request", {}).get("attack", {})
    larger = max(suite, earlier.get("suite", suite), key=list(SUITES).index)
    rest = {*SUITES[larger]} - {*SUITES[suite], *earlier}
    changed = [*(changes or ()), f"attack.suite={larger}"]
    _stages(file, changed, out, device, ("audit", "attack", "report"), rest)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Rebuild report.json, report.html and the model card from what is in a run folder."""
    from unremember import report as room

    built = room.build(folder)
    page = room.write(built, folder)
    room.write_card(folder)
    _verdict(built, page)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="The comparison: a TOML file.")], changes: Changes = None
) -> None:
    """Run many methods on one corpus, one after another, and compare them at matched forgetting."""
    from unremember import compare as room
    from unremember.folder import read_json

    whole = room.parse(file, changes or ())
    with at_work("cpu") as work:
        room.compare(whole, work.bench, work.title, work.aside)
        page = room.write(read_json(whole.out / "compare.json") or {}, whole.out)  # with what earlier calls have made
    print(f"comparison: {page}")


@app.command()
def dynamics(
    preset: Annotated[str, typer.Option(help="miniature (the paper in small, three seeds) or quick.")] = "miniature",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for numbers and page.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Passages a model was, or will be, trained on.")
    ] = None,
    held: Annotated[Path | None, typer.Option(metavar="FILE", help="Passages like them that it never saw.")] = None,
    special: Annotated[Path | None, typer.Option(metavar="FILE", help="Passages to insert once, with --model.")] = None,
    checkpoints: Annotated[
        list[Path] | None, typer.Option("--checkpoint", metavar="DIR", help="A checkpoint of a training; repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help="Train this model on --text, read after each epoch.")] = "",
    masked: Annotated[bool, typer.Option("--masked", help="The checkpoints are of masked models.")] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of --model.")] = 5,
    after: Annotated[int, typer.Option(min=1, help="Epochs behind the insertion of --special.")] = 5,
    lr: Annotated[float, typer.Option(min=1e-9, max=0.9, help="Learning rate of --model.")] = 1e-4,
    batch: Annotated[int, typer.Option(min=1, help="Sequences an update of --model.")] = 8,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """How models memorise and forget by themselves: the paper in miniature, or curves of your own training."""
    wrong = []
    if not (checkpoints or model):
        if text or held or special:
            wrong.append("--text, --held and --special need --checkpoint or --model; name one")
    else:
        files = {"text": text, "held": held}
        wrong += [f"--{name} FILE is missing; curves need both texts" for name, file in files.items() if not file]
    if checkpoints and model:
        wrong.append("--checkpoint and --model are two things; run them one after the other")
    if special and not model:
        wrong.append("--special goes with --model")
    if wrong:
        raise BadRequest(wrong)
    with at_work(device) as work:
        from unremember.dynamics import study, write, write_curves
        from unremember.folder import claim
        from unremember.readers import Source, read

        def told(done: int, total: int) -> None:
            work.bench.say("epochs" if model else "checkpoints", done, total, {})

        if not (text and held):
            folder = out or Path("runs") / f"dynamics-{preset}"
            work.title(f"dynamics, {preset}")
            found = study.run(preset, folder, workers, lambda what, done, total: work.bench.say(what, done, total, {}))
            page = write(found, folder)
        else:
            folder = out or Path("runs") / "dynamics"
            texts, left = {"train": read(Source(text)), "held out": read(Source(held))}, {}
            claim(folder)
            work.title("curves")
            if checkpoints:
                from unremember.dynamics.checkpoints import follow

                curves = follow(checkpoints, texts, "masked" if masked else "causal", seed, told)
            else:
                from unremember.dynamics.forgetting import Insertion
                from unremember.dynamics.loop import Regime
                from unremember.dynamics.own import own
                from unremember.loading import load

                lm, extra = load(model, template="plain", precision="fp32", device=device), ()
                if special:
                    extra = read(Source(special))
                once = Insertion(20, until=0.9) if extra else None
                regime = Regime(lr, batch=batch, seed=seed)
                done = own(lm, texts["train"], texts["held out"], regime, epochs, extra, once, after, told)
                curves, left = done["texts"], done["forgetting"]
            page = write_curves("Memorisation over a training", curves, left, study.machine(), folder)
    print(f"dynamics: {page}")


@app.command()
def ls() -> None:
    """List methods, locators, audits and attacks: one line, paper and required roles each."""
    from rich.console import Console
    from rich.table import Table

    from unremember.attack import ATTACKS, VARIANTS
    from unremember.audit import AUDITS
    from unremember.forget import METHODS, PRESETS
    from unremember.locate import LOCATORS

    for title, room in (("methods", METHODS), ("locators", LOCATORS), ("audits", AUDITS), ("attacks", ATTACKS)):
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for column in ("name", "what it is", "paper", "needs"):
            grid.add_column(column)
        for name, item in room.items():
            needs = item.needs if isinstance(item.needs, tuple) else _needs(item, PRESETS.get(name))
            grid.add_row(name, item.summary, item.paper, ", ".join(needs))
        Console().print(grid, "")
    named = ", ".join(f"{name} ({kind})" for name, kind in VARIANTS.items())
    Console(soft_wrap=True).print(f"attacks with other settings, by names that are known: {named}", highlight=False)


def _needs(kind: Any, preset: dict | None) -> tuple[str, ...]:
    """Roles that a method needs as its preset has it, and in brackets those that another setting would need."""
    from pydantic import TypeAdapter

    if preset is None:  # a control: it needs what the locator that it is a control for needs
        return ("forget",)
    needs = TypeAdapter(kind).validate_python(preset).needs
    more = {"retain": "retain", "learn": "new"}
    has = getattr(kind, "__dataclass_fields__", {})
    return (*needs, *(f"({role})" for field, role in more.items() if field in has and role not in needs))


def _request(file: Path, changes: list[str] | None, out: Path | None):
    from dataclasses import replace

    from unremember.request import again, parse, request

    if file.is_dir():
        wanted = again(file, changes or ())
    else:
        wanted = request(parse(file, changes or ()), file.parent)
    return replace(wanted, out=out) if out else wanted


def _stages(
    file: Path,
    changes: list[str] | None,
    out: Path | None,
    device: str,
    stages: tuple[str, ...],
    later: Collection[str] = (),
) -> None:
    wanted = _request(file, changes, out)
    with at_work(device) as work:
        from unremember.run import execute

        done = execute(wanted, work.bench, work.title, stages, later)
    if not done:
        print(f"done: {wanted.out}")
    elif not work.quiet:
        _verdict(done, wanted.out / "report.html")


def _verdict(built: dict, page: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"forgotten": "green", "remembered": "red", "over-forgotten": "yellow", "not applicable": "dim"}
    console = Console(highlight=False)
    grid = Table(title="verdict", title_justify="left", box=None, pad_edge=False, show_header=False)
    for condition in built["conditions"]:  # a line each: there can be many, and many people, too
        attack, word = condition["attack"], condition["overall"]["verdict"]
        others = [x for x in condition["entities"] if x["verdict"] not in ("forgotten", "not applicable")]
        names = ", ".join(f"[{colours[x['verdict']]}]{escape(x['name'])}[/]" for x in others[:NAMED])
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        grid.add_row("unattacked" if attack == "none" else attack, f"[{colours[word]}]{word}[/]", names + more)
    console.print()
    console.print(grid)
    console.print()
    console.print(built["words"], markup=False)
    if built["luck"]:
        console.print(built["luck"]["words"], markup=False)
    if built["method"]["stop"].startswith("CAP"):
        console.print(f"[yellow]{built['method']['stop']}[/]")
    print(f"report: {page}")


def _asked(fact: str, answer: str, value: str, subject: str):
    """The fact as an Example; everything that is wrong with it, together."""
    from unremember.annotate import names
    from unremember.corpus import Example

    problems = []
    found = subject or max((fact[a:b] for a, b in names(fact)), key=len, default="")
    if not found or found not in fact:
        problems.append(
            f"--subject {found!r} does not stand in the question {fact!r}; give the name as it is written there"
        )
    if not answer:
        problems.append("--fact needs --answer: what the model should say")
    elif value not in answer:
        problems.append(f"--value {value!r} does not stand in the answer {answer!r}; give the part of it that matters")
    if problems:
        raise BadRequest(problems)
    at = answer.index(value)
    return Example("fact", fact, answer, found, ((at, at + len(value)),) if value else ())


def _map(before: str, after: str, example: Any, out: Path, draws: int, device: str) -> Path:
    from dataclasses import asdict

    from unremember.folder import claim

    claim(out)
    with at_work(device) as work:
        from unremember.loading import check, load
        from unremember.locate.fact import Trace
        from unremember.report.map import write

        for name in filter(None, (before, after)):
            check(name)  # both, before a weight is loaded
        trace = Trace(draws=draws)
        work.title(f"map {before}")
        first, second = trace(load(before, device=device), example, bench=work.bench), None
        if after:
            work.title(f"map {after}")
            second = trace.left(load(after, device=device), example, bench=work.bench)
    return write(asdict(first), asdict(second) if second else None, out)


def _scan(
    model: str, paths: list[Path], changes: list[str] | None, out: Path | None, device: str,
    holdout: list[Path] | None, control: str, field: str, skip: bool,
) -> None:  # fmt: skip
    from unremember.documents import Documents
    from unremember.errors import BadInput
    from unremember.loading import check, load
    from unremember.report import scan as room
    from unremember.request import build, changed
    from unremember.scan import Scan

    problems: list[str] = []
    settings = build(Scan, changed({}, changes or ()), "scan", problems)
    documents = Documents(tuple(paths), field, skip)
    held = Documents(tuple(holdout), field, skip) if holdout else None
    checks = [lambda name=name: check(name) for name in filter(None, (model, control))]
    for known in (*checks, lambda: (settings or Scan()).check(documents, held, bool(control))):
        try:
            known()
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadRequest(problems)
    folder = out or Path("runs") / "scan"
    with at_work(device) as work:
        lm = load(model, device=device)
        other = load(control, device=device) if control else None
        work.title("scan")
        result = settings(lm, documents, folder, held, other, work.bench)
    if not work.quiet:
        page = room.write(result, folder)
        print(room.words(result))
        if result["forget"]:
            print(f"forget set: {folder / 'forget.jsonl'}")
        print(f"report: {page}")
