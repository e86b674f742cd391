"""LM: it speaks as a slow greedy loop does, copies share nothing, hooks come off, likelihoods are exact."""

from dataclasses import replace

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, MistralConfig, MistralForCausalLM

from unremember.decode import plain
from unremember.greatest import Greatest
from unremember.lm import LM
from unremember.loading import load
from unremember.logp import LogP
from unremember.tokens import pack


def logp(lm, corpus) -> torch.Tensor:
    with torch.no_grad():
        return lm.logp(pack([lm.template.rows((*corpus["forget"][:3], *corpus["world"][:3]))]))


def slow(lm, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
    """One prompt at a time, the whole text again for every token."""
    said: list[int] = []
    while len(said) < new:
        with torch.no_grad():
            token = int(lm.model(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits[0, -1].argmax())
        if token == lm.tokenizer.eos_token_id:
            break
        said.append(token)
    return tuple(said)


@pytest.fixture(scope="module")
def prompts(taught, corpus):
    texts = [x.prompt for x in (*corpus["forget"], *corpus["world"][:8], *corpus["holdout"][:4])]
    return [taught.template.context(text) for text in texts] + [taught.template.context("Who?")]


def test_generate_equals_a_slow_greedy_loop(taught, prompts):
    said = taught.generate(prompts, 20)
    assert said == [slow(taught, prompt, 20) for prompt in prompts]
    assert {len(x) for x in said} - {20} and len(set(said)) > 12  # some ended by themselves, at different times


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_what_is_said_does_not_depend_on_batch_or_order(taught, prompts, batch):
    expected = taught.generate(prompts, 12)
    assert taught.generate(prompts, 12, batch) == expected
    assert taught.generate(prompts[::-1], 12, batch) == expected[::-1]


def test_generate_stops_after_so_many_tokens(taught, prompts):
    whole = taught.generate(prompts, 20)
    assert taught.generate(prompts, 3) == [x[:3] for x in whole]
    assert taught.generate([], 3) == []


def test_each_prompt_may_have_a_length_of_its_own(taught, prompts):
    whole, news = taught.generate(prompts, 20), [i % 7 for i in range(len(prompts))]
    assert taught.generate(prompts, news) == [said[:new] for said, new in zip(whole, news, strict=True)]


def test_long_prompts_are_decoded_fewer_at_a_time(taught, prompts, monkeypatch):
    groups: list[int] = []
    said = LM._said
    monkeypatch.setattr(LM, "_said", lambda lm, part, *rest: groups.append(len(part)) or said(lm, part, *rest))
    expected = taught.generate(prompts, 4, 1)
    groups.clear()
    monkeypatch.setattr("unremember.decode.ROOM", 2 * (max(map(len, prompts)) + 4))
    assert taught.generate(prompts, 4, 5) == expected
    assert sum(groups) == len(prompts) and min(groups) >= 2 and len(groups) < len(prompts) / 2


def test_greedy_in_bfloat16_says_what_the_whole_head_says(taught, prompts, monkeypatch):
    """The head's stand-in changes no token; and that it stands in is seen."""
    low = replace(taught, precision="bf16")
    fast, asked = low.generate(prompts, 12), []
    assert type(low.greatest()) is Greatest and taught.greatest() is None
    call = Greatest.__call__
    monkeypatch.setattr(Greatest, "__call__", lambda head, hidden: asked.append(len(hidden)) or call(head, hidden))
    assert low.generate(prompts, 12) == fast and asked
    monkeypatch.setattr(LM, "greatest", lambda _: None)
    assert low.generate(prompts, 12) == fast


def test_a_prompt_without_a_token_is_refused(taught, prompts):
    with pytest.raises(ValueError, match="a prompt has no token"):
        taught.generate([prompts[0], ()], 3)


def test_what_prompts_share_is_read_once(taught, prompts):
    """One pass over their trie, which has as many places as they have different beginnings, and then one token a row."""
    seen: list[int] = []
    table = taught.model.get_input_embeddings()
    handle = table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    try:
        taught.generate(prompts, 2)
    finally:
        handle.remove()
    beginnings = {prompt[: i + 1] for prompt in prompts for i in range(len(prompt))}
    assert len(beginnings) <= seen[0] < sum(map(len, prompts))
    assert len(seen) == 2 and seen[1] <= len(prompts)


def test_layers_that_know_no_tries_read_prompts_in_full(taught, prompts, monkeypatch):
    """Windows and recurrent states: padding on the left, transformers' own cache, the same words."""
    expected = taught.generate(prompts, 12)
    monkeypatch.setattr("unremember.lm.plain", lambda config: False)
    monkeypatch.setattr(LM, "_tries", lambda *_: pytest.fail("a trie"))
    assert taught.generate(prompts, 12, 7) == expected
    assert plain(taught.model.config)
    assert not plain(MistralConfig(sliding_window=8)) and plain(MistralConfig(sliding_window=None))


@pytest.mark.parametrize("kind", ["mistral", "gpt_neo"])
def test_a_sliding_window_is_honoured(kind, prompts):
    """A small model with a window shorter than its prompts says what transformers' own generation says."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt_neo":
        config = GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
            vocab_size=4096, max_position_embeddings=64, eos_token_id=1,
        )  # fmt: skip
        model = GPTNeoForCausalLM(config).eval()
    else:
        config = MistralConfig(**shape, num_key_value_heads=2, vocab_size=4096, sliding_window=4, eos_token_id=1)
        model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)  # else every token is as likely as the next
    asked = [tuple(i % 4096 for i in ids) for ids in prompts[:6]]
    lm = LM(model, load("tiny").template)
    assert max(map(len, asked)) > 4
    for ids, said in zip(asked, lm.generate(asked, 8, 4), strict=True):
        whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=list(lm.stop))
        kept = [int(t) for t in whole[0, len(ids) :] if int(t) not in lm.stop]
        assert list(said) == kept


def test_answer_is_text_without_the_end_mark(taught, corpus):
    asked = corpus["forget"][:6]
    said = taught.answer([x.prompt for x in asked], 32)
    assert sum(a == x.answer for a, x in zip(said, asked, strict=True)) >= 4
    assert not any("<end>" in a for a in said)


# ── copies, hooks, fingerprints ──


def test_a_copy_has_weights_of_its_own(tiny):
    other = tiny.copy()
    before = tiny.fingerprint
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.zero_()
    assert any(w.any() for w in tiny.model.parameters()) and tiny.copy().fingerprint == before
    assert not {w.data_ptr() for w in tiny.model.parameters()} & {w.data_ptr() for w in other.model.parameters()}


def hooks(lm) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def test_an_edit_acts_while_it_lasts_and_not_after(tiny, corpus):
    plain, start = logp(tiny, corpus), hooks(tiny)
    with tiny.at("model.layers.0", lambda x: x * 0) as edited:
        assert not torch.allclose(logp(edited, corpus), plain, atol=0.1)
    with tiny.at("model.layers.1.mlp", lambda x: x * 1):
        assert torch.equal(logp(tiny, corpus), plain)
    assert torch.equal(logp(tiny, corpus), plain) and hooks(tiny) == start


def test_an_edit_comes_off_after_an_error(tiny, corpus):
    plain, start = logp(tiny, corpus), hooks(tiny)
    with pytest.raises(RuntimeError, match="outside"), tiny.at("model.layers.0", lambda x: x * 0):
        raise RuntimeError("outside")

    def broken(hidden):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), tiny.at("model.layers.0", broken):
        logp(tiny, corpus)
    assert hooks(tiny) == start and torch.equal(logp(tiny, corpus), plain)


def test_an_edit_of_an_unknown_block_is_refused(tiny):
    with pytest.raises(AttributeError), tiny.at("model.layers.99", lambda x: x):
        pass


def test_the_fingerprint_sees_one_bit(tiny):
    other = tiny.copy()
    assert other.fingerprint == tiny.fingerprint
    with torch.no_grad():
        other = tiny.copy()
        other.model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[3, 5] ^= 1
    assert other.fingerprint != tiny.fingerprint


def test_the_fingerprint_sees_the_precision(tiny):
    assert load("tiny", precision="bf16").fingerprint != load("tiny", precision="fp32").fingerprint == tiny.fingerprint


def test_bfloat16_is_near_float32_and_leaves_the_weights(tiny, corpus):
    half = load("tiny", precision="bf16")
    torch.testing.assert_close(logp(half, corpus), logp(tiny, corpus), atol=0.5, rtol=0.1)
    assert not torch.equal(logp(half, corpus), logp(tiny, corpus))
    assert {w.dtype for w in half.model.parameters()} == {torch.float32}


# ── likelihood and its gradient, without float32 copies ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 8, 21])
def test_logp_is_cross_entropy_in_value_and_gradient(rows, dtype):
    draw = torch.Generator().manual_seed(rows)
    z = (4 * torch.randn(rows, 50, generator=draw)).to(dtype).requires_grad_()
    target, weight = torch.randint(50, (rows,), generator=draw), torch.randn(rows, generator=draw)
    plain = -torch.nn.functional.cross_entropy(z.float(), target, reduction="none")
    ours = LogP.apply(z, target)
    assert ours.dtype == torch.float32 and torch.allclose(ours, plain, atol=1e-5)
    mine, theirs = (torch.autograd.grad((x * weight).sum(), z)[0] for x in (ours, plain))
    assert mine.dtype == dtype and torch.allclose(mine, theirs, atol=1e-6)


def test_a_sure_token_keeps_its_small_loss_and_slope():
    """ln(1 + e^-12) = 6.1e-6 among logits near 40, where a float32 is 4e-6 coarse: a plain difference would lose half of it."""
    z = torch.tensor([[40.0, 28.0]]).requires_grad_()
    found = LogP.apply(z, torch.tensor([0]))
    exact = z.detach().double().log_softmax(-1)[0]
    assert found.item() == pytest.approx(exact[0].item(), rel=0.02)
    assert torch.autograd.grad(found, z)[0][0, 0].item() == pytest.approx(1 - exact[0].exp().item(), rel=0.05)


def test_logp_of_two_words_by_hand():
    """Scores 0 and log 3: probabilities 1/4 and 3/4; the slope of log p(1) is -1/4 and 1/4."""
    z = torch.tensor([[0.0, 3.0]]).log().clamp(min=0).requires_grad_()
    found = LogP.apply(z, torch.tensor([1]))
    assert found.item() == pytest.approx(float(torch.tensor(0.75).log()))
    assert torch.allclose(torch.autograd.grad(found, z)[0], torch.tensor([[-0.25, 0.25]]))


def test_shared_casts_change_no_gradient_and_serve_no_reader(tiny, corpus):
    """Two micro-batches with a reading in between, in bfloat16: the same bits as with a cast each."""
    lm = replace(tiny.copy(), precision="bf16")
    lm.model.requires_grad_(True)
    rows = lm.template.rows(corpus.of("forget"))
    halves = [pack([rows[:3]]), pack([rows[3:]])]

    def slopes():
        for tokens in halves:
            with torch.no_grad():
                lm.logp(tokens)
            lm.logp(tokens).sum().backward()
        found = [w.grad.clone() for w in lm.model.parameters()]
        lm.model.zero_grad()
        return found

    apart = slopes()
    with lm.casts():
        together = slopes()
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
