"""Models by name: what is saved says the same when it comes back, and what cannot be trusted is refused with a next move."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unremember.embedded import MODELS
from unremember.errors import BadModel
from unremember.loading import check, load
from unremember.tokens import pack


def logp(lm, corpus) -> torch.Tensor:
    with torch.no_grad():
        return lm.logp(pack([lm.template.rows((*corpus["forget"][:3], *corpus["world"][:3]))]))


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def checkpoint(taught, tmp_path_factory) -> Path:
    """A Hugging Face folder as a user would have it."""
    folder = tmp_path_factory.mktemp("user") / "model"
    taught.save(folder)
    return folder


def test_a_saved_folder_says_the_same(taught, corpus, checkpoint):
    again = load(str(checkpoint), precision="fp32")
    assert torch.equal(logp(again, corpus), logp(taught, corpus))
    assert again.fingerprint == taught.fingerprint and not again.model.training and not again.template.chat


def test_a_users_folder_is_never_written(corpus, checkpoint, bench):
    from unremember.forget.ascent import Ascent
    from unremember.table import table
    from unremember.train import Plan

    before = content(checkpoint)
    lm = load(str(checkpoint), precision="fp32")
    table(Ascent(Plan(steps=1, lr=1e-3))(lm, corpus, bench=bench), lm.template.rows(corpus["forget"]), bench)
    lm.answer(["Who?"], 2)
    assert content(checkpoint) == before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_equals_its_merged_model(tiny, corpus, tmp_path):
    pytest.importorskip("peft")
    live = tiny.adapted(rank=4, alpha=8)
    assert torch.equal(logp(live, corpus), logp(tiny, corpus))  # a fresh adapter is the identity
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in live.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    moved = logp(live, corpus)
    assert not torch.allclose(moved, logp(tiny, corpus), atol=0.1)
    live.save(tmp_path / "adapter")
    assert check(str(tmp_path / "adapter")) == "adapter"
    size = sum(p.stat().st_size for p in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 4 * sum(w.numel() for n, w in live.model.named_parameters() if "lora" in n) + 10_000  # no base in it
    merged = load(str(tmp_path / "adapter"), precision="fp32")
    torch.testing.assert_close(logp(merged, corpus), moved, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())


def test_a_template_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(BadModel, match="no chat template"):
        load(str(checkpoint), template="chat")


def test_every_alias_is_an_alias():
    assert {name: check(name) for name in MODELS} == dict.fromkeys(MODELS, "alias")
    assert check("owner/name") == "hub"


def test_an_unknown_name_is_met_with_the_nearest():
    with pytest.raises(BadModel, match=r"'tinny'.*did you mean 'tiny'\?"):
        check("tinny")
    with pytest.raises(BadModel, match="smollm2-135m, tiny"):
        check("zzzzzz")


def test_a_missing_path_is_named(tmp_path):
    for name in (str(tmp_path / "nowhere"), str(tmp_path / "nowhere.gguf")):
        with pytest.raises(BadModel, match="nowhere"):
            check(name)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(BadModel, match=r"without config\.json"):
        check(str(tmp_path))


def test_a_checkpoint_without_weights_is_refused(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(BadModel, match="without weights"):
        check(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickled_weights_are_refused(checkpoint, tmp_path, name):
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(BadModel, match=rf"pickled weights \({name}\).*run code"):
        load(str(tmp_path))


def adapter(folder: Path, **config) -> str:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def test_an_adapter_without_its_base_is_refused(tmp_path):
    with pytest.raises(BadModel, match="names no base model"):
        check(adapter(tmp_path, base_model_name_or_path=None))
    with pytest.raises(BadModel, match="gone"):
        check(adapter(tmp_path, base_model_name_or_path=str(tmp_path / "gone")))


def test_an_adapter_without_safetensors_is_refused(tmp_path):
    name = adapter(tmp_path, base_model_name_or_path="tiny")
    assert check(name) == "adapter"
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(BadModel, match=r"without adapter_model\.safetensors"):
        check(name)


@pytest.fixture
def broken(checkpoint, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def test_weights_cut_short_are_a_bad_model(broken):
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadModel, match="broken"):
        load(str(broken))


def test_weights_that_are_absent_are_not_made_up(broken):
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModel, match=r"lacks weights \(model\.layers\.1\.mlp\.down_proj\.weight, 1 in all\)"):
        load(str(broken))


def test_weights_of_another_shape_are_a_bad_model(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(BadModel, match="broken"):
        load(str(broken))
