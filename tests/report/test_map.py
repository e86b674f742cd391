"""The page of a fact: drawings that are well-formed and say what they show, of one model or two, and nothing that runs."""

import json
import re
from copy import deepcopy
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from unremember.report.map import SCHEMA, first, heat, page, seen, write, written

BLOCKS, WORDS = 4, ("Ada", "Byron", "live?", "Answer:", "in")


def example(**changes) -> dict:
    """What `asdict` makes of a FactMap, by hand: the stream at the name early, at the last word late."""
    stream = [[0.0, 1.0 if b < 2 else 0.02, 0.0, 0.01, 0.03 if b < 2 else 0.98] for b in range(BLOCKS)]
    mlp = [[0.0, 0.41 if b == 1 else 0.0, 0.0, 0.0, -0.02] for b in range(BLOCKS)]
    return {
        "model": "toy", "question": "Where does Ada Byron live?", "answer": "in Porto", "words": WORDS,
        "subject": (True, True, False, False, False), "asked": 4,
        "tokens": (" Por", "to"), "measure": "odds", "clean": 9.2, "corrupt": -1.4,
        "window": 1, "draws": 10, "effects": {"residual": stream, "mlp": mlp},
        "rank": [[900, 800], [300, 200], [40, 10], [1, 2], [1, 1]],
        "probability": [[1e-4, 1e-4], [1e-3, 2e-3], [0.01, 0.1], [0.8, 0.4], [0.99, 0.98]],
        "attention": [[0.1, 0.0], [0.0, 0.2], [6.0, 5.0], [0.3, 0.1]], "mlp": [[0.0, 0.1], [0.2, 0.1], [-0.5, 0.4], [1.0, 2.0]],
        "embedding": (0.1, 0.0), "logit": (7.2, 7.9),
    } | changes  # fmt: skip


def forgotten() -> dict:
    gone = [[900, 800], [300, 200], [40, 10], [3, 5], [4000, 700]]
    return example(model="after", clean=-8.0, corrupt=-8.1, effects={}, rank=gone, probability=[[1e-4, 1e-4]] * 5)


def text(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def drawings(before, after=None):
    return [*(heat(before, kind) for kind in before["effects"]), seen(before, after), written(before, after)]


@pytest.mark.parametrize("after", [None, forgotten()])
def test_drawings_are_well_formed_the_same_every_time_and_hold_no_picture(after):
    once, twice = drawings(example(), after), drawings(example(), after)
    assert once == twice
    for svg in once:
        assert ElementTree.fromstring(svg).get("aria-label")
        assert "<image" not in svg and "<script" not in svg, "pictures would be blocked by the page's own rules"


def test_the_map_has_its_words_and_layers_and_names_the_most():
    said = text(heat(example(), "mlp"))
    assert [word for word in said if word in WORDS] == list(WORDS)
    assert [line for line in said if line.isdigit()][:BLOCKS] == list(map(str, range(BLOCKS)))
    assert "most: 41% at the question's “Byron”, layer 1" in said and {"question", "answer"} <= set(said)


def test_every_cell_is_drawn_and_darker_is_more():
    svg = heat(example(), "residual")

    cells = re.findall(r"fill: (#[0-9a-f]{6}); stroke: #ffffff", svg)
    assert len(cells) == BLOCKS * len(WORDS)

    def light(colour):
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    flat = [cell for line in example()["effects"]["residual"] for cell in line]
    shades = [light(colour) for colour in cells]
    assert shades[1] == min(shades) and shades[0] == max(shades)
    assert all(
        a <= b for (x, a) in zip(flat, shades, strict=True) for (y, b) in zip(flat, shades, strict=True) if x > y
    )


def test_names_stand_out_from_other_words():
    svg = heat(example(), "mlp")
    bold = {
        "".join(n.itertext())
        for n in ElementTree.fromstring(svg).iter()
        if "font-weight: 700" in (n.get("style") or "")
    }
    assert {"Ada", "Byron"} <= bold and not bold & {"live?", "in"}


def test_the_lens_says_which_curve_is_which():
    assert {"before", "after"} <= set(text(seen(example(), forgotten())))
    assert "before" not in text(seen(example())) and "toy" in text(seen(example()))
    assert "1,000" in text(seen(example(), forgotten()))


def test_the_level_from_which_it_is_said():
    assert first(example()) == 4 and first(forgotten()) is None
    assert first(example(rank=[[1], [5], [1], [1], [1]])) == 2 and first(example(rank=[[1]] * 5)) == 0


@pytest.mark.parametrize("blocks", [1, 30])
def test_one_layer_and_one_word_or_many_can_be_drawn(blocks):
    long = "Donaudampfschifffahrtsgesellschaft"
    fact = example(
        words=(long,), subject=(True,), asked=1, effects={"residual": [[0.5]] * blocks, "attention": [[-0.1]] * blocks},
        rank=[[7]] * (blocks + 1), probability=[[0.0]] * (blocks + 1), attention=[[0.0]] * blocks, mlp=[[0.0]] * blocks,
        tokens=("x",), embedding=(0.0,), logit=(0.0,),
    )  # fmt: skip
    for svg in drawings(fact, deepcopy(fact)):
        ElementTree.fromstring(svg)
    assert any("…" in line for line in text(heat(fact, "residual")))


def test_the_page_says_it_in_words():
    whole = page(example(), forgotten())
    said = " ".join(re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]+>", " ", whole, flags=re.DOTALL).split())
    assert "Where does Ada Byron live? — in Porto" in said and "Porto (2 tokens)" in said
    assert "the likeliest answer from layer 3 on" in said and "not the likeliest answer at the end" in said
    assert "Nothing: here the name does not raise the answer by enough to share." in said and "−8.0" in said
    alone = page(example())
    assert "Nothing: here" not in alone and "<h3>" not in alone and alone.count("<svg") == 4


def test_nothing_in_it_runs_and_strangers_words_are_escaped():
    evil = "<script>alert(1)</script>"
    fact = example(question=evil, answer=evil, model=evil, words=(evil, *WORDS[1:]), tokens=(evil, "$x$"))
    whole = page(fact, forgotten())
    assert "<script" not in whole and "&lt;script&gt;" in whole
    assert "default-src 'none'" in whole and not re.search(r"(?:src|href)=", whole.replace("xlink:href", ""))


def test_it_is_written_as_numbers_and_as_a_page(tmp_path):
    place = write(example(), forgotten(), tmp_path / "out")
    assert sorted(p.name for p in place.parent.iterdir()) == ["fact.html", "fact.json"]
    told = json.loads((place.parent / "fact.json").read_text(encoding="utf-8"))
    assert (
        told["schema"] == SCHEMA and told["before"]["effects"]["mlp"][1][1] == 0.41 and told["after"]["effects"] == {}
    )
    assert place.read_text(encoding="utf-8") == page(told["before"], told["after"])
    assert json.loads((write(example(), None, tmp_path / "one").parent / "fact.json").read_text())["after"] is None
