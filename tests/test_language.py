"""`dualprune layerwise` on models of the Hugging Face kind, built from a configuration and saved into a temporary folder."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import dualprune
from dualprune.cli import main
from dualprune.language import prune_pretrained

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "far", "away", "from", "red", "big", "dogs"]


def gpt2():
    sizes = {"vocab_size": 20, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def bert():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=32))


def roberta():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 34, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return transformers.RobertaForCausalLM(transformers.RobertaConfig(**sizes, is_decoder=True))


def masked_bert():
    return transformers.BertForMaskedLM(bert().config)


def mixture():
    sizes = llama().config.to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2}
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    names += ("max_position_embeddings", "num_local_experts", "num_experts_per_tok")
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{name: sizes[name] for name in names}))


KINDS = {"mixture": mixture, "gpt2": gpt2, "llama": llama, "bert": bert, "masked bert": masked_bert, "roberta": roberta}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Save a model with a tokenizer of whole words; give its folder and a text's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    text = " ".join(WORDS[i] for i in torch.randint(len(WORDS), (1500,), generator=generator).tolist())
    (tmp_path / "text.txt").write_text(text)

    def save(kind):
        torch.manual_seed(0)
        KINDS[kind]().save_pretrained(tmp_path / kind)
        vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
        one = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
        one.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=one, unk_token="[UNK]")
        fast.save_pretrained(tmp_path / kind)
        return kind

    return save


def call(*arguments):
    with pytest.raises(SystemExit) as caught:
        main(["layerwise", *arguments])
    return caught.value.code or 0


@pytest.mark.parametrize(("kind", "layers"), [("gpt2", 2 * 4), ("llama", 3 * 7)])
def test_a_folder_is_pruned_and_read_back(saved, kind, layers, tmp_path, capsys):
    given = ("--data", "text.txt", "--out", "pruned", "--samples", "8", "--device", "cpu")
    assert call(saved(kind), *given, "--sparsity", "0.5") == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "pruned/layerwise.json").read_text())
    assert (result["method"], len(result["layers"]), result["length"]) == ("slr", layers, 32)
    assert result["sparsity"] == pytest.approx(0.5) and f"in {layers} layers" in said
    assert f"perplexity {result['perplexity_dense']:.3f} dense, {result['perplexity_pruned']:.3f} pruned" in said
    model = type(KINDS[kind]()).from_pretrained("pruned")
    weights = [model.get_parameter(layer["name"]) for layer in result["layers"]]
    assert all(int(w.count_nonzero()) == w.numel() // 2 for w in weights)
    assert all(p.detach().all() for name, p in model.named_parameters() if "embed" in name or "wte" in name)


def test_a_head_of_another_kind_stays(saved, tmp_path):
    given = ("--data", "text.txt", "--out", "pruned", "--samples", "4", "--length", "16", "--device", "cpu")
    assert call(saved("masked bert"), *given, "--sparsity", "0.5", "--method", "wanda") == 0
    result = json.loads((tmp_path / "pruned/layerwise.json").read_text())
    assert result["perplexity_dense"] is None and result["layers"][0]["name"].startswith("bert.encoder.")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("masked bert", "pruned"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("cls."))


def test_a_model_without_a_head_has_no_perplexity(saved, tmp_path, capsys):
    given = ("--data", "text.txt", "--out", "pruned", "--samples", "4", "--length", "16", "--device", "cpu")
    assert call(saved("bert"), *given, "--pattern", "2:4", "--method", "wanda") == 0
    assert "perplexity" not in capsys.readouterr().out
    result = json.loads((tmp_path / "pruned/layerwise.json").read_text())
    assert result["perplexity_dense"] is None and result["kept"] * 2 == result["total"]


def test_a_model_inside_another_is_pruned_the_same(saved):
    """The key-value cache is switched off wherever its configuration is; else what a block reads grows with every call."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(ids)

    torch.manual_seed(0)
    ids = torch.randint(20, (4, 16))
    bare = llama()
    inner = type(bare)(bare.config)
    inner.load_state_dict(bare.state_dict())
    dualprune.prune_layerwise(bare, [ids], "wanda", sparsity=0.5)
    dualprune.prune_layerwise(Wrapper(inner), [ids], "wanda", sparsity=0.5)
    assert inner.config.use_cache
    assert all(torch.equal(w, inner.state_dict()[name]) for name, w in bare.state_dict().items())


def test_gpt2s_layers_are_the_other_way_round(saved):
    """Pruning Conv1D is pruning a Linear of its transpose."""
    model = gpt2().eval()
    ids = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0))
    block, x = model.transformer.h[0], []
    block.attn.c_attn.register_forward_pre_hook(lambda module, args: x.append(args[0].reshape(-1, 16)))
    dense = block.attn.c_attn.weight.detach().clone()
    dualprune.prune_layerwise(model, [ids], "wanda", sparsity=0.5)
    score = dense * x[0].norm(dim=0)[:, None]
    kept = score.abs().argsort(dim=0, descending=True)[:8]
    expected = torch.zeros_like(dense).scatter_(0, kept, dense.gather(0, kept))
    assert torch.equal(block.attn.c_attn.weight, expected)
    assert model.config.use_cache


def test_perplexity_of_a_model_that_knows_nothing():
    from dualprune.language import perplexity

    model = gpt2().eval()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, [torch.arange(16)[None]]) == pytest.approx(20)
    assert math.isfinite(perplexity(model, [torch.arange(2)[None]]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gpt2", "--out", "gpt2", "--sparsity", "0.5"), "never written over"),
        (("gpt2", "--out", "new", "--sparsity", "50"), "did you mean 0.5"),
        (("gpt2", "--out", "new"), "needs sparsity="),
        (("gpt2", "--out", "new", "--sparsity", "0.5", "--length", "33"), "the model sees 32 tokens, fewer than windows of 33"),
        (("gpt2", "--out", "new", "--sparsity", "0.5", "--blocks", "transformer.g.*"), "found no blocks"),
        (("no/such/model", "--out", "new", "--sparsity", "0.5"), "cannot load the model 'no/such/model'"),
    ],
)
def test_wrong_input_exits_with_2_and_writes_nothing(saved, arguments, said, tmp_path, capsys):
    saved("gpt2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert call(*arguments, "--data", "text.txt", "--device", "cpu") == 2
    assert said in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"length": 33}, "the model sees 32 tokens"),
        ({"length": 1}, "length is at least 2 tokens"),
        ({"length": 0}, "length is at least 2 tokens"),
        ({"measured": 0}, "measured is a number of windows, at least 1, got 0"),
        ({"samples": 0}, "samples is a number of windows, at least 1, got 0"),
    ],
)
def test_numbers_out_of_their_range(saved, chosen, said, tmp_path):
    with pytest.raises(dualprune.DualpruneError, match=said):
        prune_pretrained(saved("gpt2"), tmp_path / "text.txt", tmp_path / "new", sparsity=0.5, **chosen)
    assert not (tmp_path / "new").exists()


def test_windows_of_all_that_the_model_sees_and_of_two_tokens(saved, tmp_path):
    for length in (32, 2):
        given = {"sparsity": 0.5, "method": "wanda", "samples": 4, "measured": 1, "length": length}
        result = prune_pretrained(saved("gpt2"), tmp_path / "text.txt", tmp_path / "new", **given)
        assert result["length"] == length and math.isfinite(result["perplexity_pruned"])


def test_positions_that_are_kept_for_padding_are_not_seen(saved, tmp_path):
    """RoBERTa's table of 34 positions serves windows of 32: the first two are the padding's and one below it."""
    given = {"sparsity": 0.5, "method": "magnitude", "samples": 4, "measured": 1}
    result = prune_pretrained(saved("roberta"), tmp_path / "text.txt", tmp_path / "new", **given)
    assert result["length"] == 32 and math.isfinite(result["perplexity_pruned"])
    with pytest.raises(dualprune.DualpruneError, match="the model sees 32 tokens"):
        prune_pretrained("roberta", tmp_path / "text.txt", tmp_path / "more", **given, length=33)


def test_a_text_that_is_too_short(saved, tmp_path):
    (tmp_path / "short.txt").write_text("the cat sat " * 100)
    with pytest.raises(dualprune.DualpruneError, match="300 tokens, too few for windows of 32"):
        prune_pretrained(saved("gpt2"), tmp_path / "short.txt", tmp_path / "new", sparsity=0.5)


def test_experts_are_not_called_pruned(saved, tmp_path):
    """Transformers keeps all experts of a layer as two parameters of three dimensions, which no linear layer owns."""
    given = {"sparsity": 0.5, "method": "wanda", "samples": 4, "length": 16}
    with pytest.raises(dualprune.DualpruneError, match=r"in no linear layer .*mlp.experts.gate_up_proj"):
        prune_pretrained(saved("mixture"), tmp_path / "text.txt", tmp_path / "pruned", **given)
    said = []
    result = prune_pretrained(
        "mixture", tmp_path / "text.txt", tmp_path / "pruned", ignore="model.layers.*.mlp.*", note=said.append, **given
    )
    model = mixture().from_pretrained(tmp_path / "pruned")
    weights = [p for name, p in model.model.layers.named_parameters() if p.ndim > 1]
    true = 1 - sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)
    assert result == json.loads((tmp_path / "pruned/layerwise.json").read_text())
    assert result["sparsity"] == 0.5 and result["block_sparsity"] == pytest.approx(true) and true < 0.1
    assert len(result["untouched"]) == 3 * 3 and said[-1].endswith(f"{true:.4f} of all weights of the blocks")
    same = ("--sparsity", "0.5", "--method", "wanda", "--samples", "4", "--length", "16", "--ignore", "model.layers.*.mlp.*")
    assert call("mixture", "--data", "text.txt", "--out", "again", "--device", "cpu", *same) == 0
    assert json.loads((tmp_path / "again/layerwise.json").read_text())["untouched"] == result["untouched"]


def test_a_text_that_cannot_be_read(saved, capsys):
    given = (saved("gpt2"), "--out", "new", "--sparsity", "0.5", "--device", "cpu")
    assert call(*given, "--data", "none.txt") == 2
    assert "cannot read the text 'none.txt'" in capsys.readouterr().err
