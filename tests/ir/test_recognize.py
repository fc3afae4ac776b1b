"""Recognition: the right regions with the right constants, by dataflow alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from blockwright.driver.manager import run_passes
from blockwright.ir.capture import capture
from blockwright.ir.errors import OptionError
from blockwright.ir.program import Program
from blockwright.ir.recognize import Attention, Block, FeedForward, Norm
from blockwright.ir.regions import Region
from blockwright.ir.run import run
from blockwright.models.gpt import GPT, GPTConfig
from blockwright.passes import FuseProjections, QuantizeWeights
from blockwright.testing.snapshot import scrambled

IDS = torch.arange(12).reshape(2, 6) % 32
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LLM = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a tiny model with random weights, and inputs."""
    if name == "gpt":
        return GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=2, ffn_dim=12)), (IDS,)
    if name == "dit":
        diffusers = pytest.importorskip("diffusers")
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
        )  # fmt: skip
        latent, steps = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
        inputs = {"hidden_states": latent, "timestep": steps, "class_labels": steps}
        return model, inputs | {"return_dict": False}
    hf = pytest.importorskip("transformers")
    if name == "gpt2":
        sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
        ends = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **ends)), (IDS,)
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**LLM, num_key_value_heads=2)), (IDS,)
    if name == "qwen3":
        config = hf.Qwen3Config(**LLM, num_key_value_heads=2, head_dim=6)
        return hf.Qwen3ForCausalLM(config), (IDS,)
    if name == "bert":
        return hf.BertModel(hf.BertConfig(**LLM), add_pooling_layer=False), (IDS,)
    if name == "vit":
        return hf.ViTModel(hf.ViTConfig(**VISION), add_pooling_layer=False), (PIXELS,)
    if name == "clip_text":
        return hf.CLIPTextModel(hf.CLIPTextConfig(**LLM, projection_dim=8)), (IDS,)
    if name == "clip_vision":
        return hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, projection_dim=8)), (PIXELS,)
    assert name == "t5"
    config = hf.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    return hf.T5EncoderModel(config), (IDS,)


@pytest.fixture(scope="module")
def captured() -> Callable[[str], Program]:
    """Capture a model of `build`, once."""

    @cache
    def get(name: str) -> Program:
        torch.manual_seed(0)
        model, inputs = build(name)
        return capture(model.eval(), inputs)

    return get


STILL = {"kind": "none", "pairing": None, "dims": None}
HALVES = {"kind": "rotary", "pairing": "half"}


def row(
    norms: int, activation: str, gated: bool, sizes: tuple[int, int], place: str, **attention: Any
) -> dict[str, Any]:
    """Return what a model of two blocks must be recognised as."""
    usual = {"kv_heads": attention["heads"], "source": "self", "qk_norm": False, "rotary": STILL}
    scale = attention["head_dim"] ** -0.5
    ffn = {"activation": activation, "is_gated": gated, "dim": sizes[0], "ffn_dim": sizes[1]}
    return {
        "attentions": [usual | {"scale": pytest.approx(scale)} | attention] * 2,
        "feed_forwards": [ffn] * 2,
        "norms": norms,
        "places": [place] * 2,
    }


FREE = {"heads": 4, "head_dim": 4, "mask": "none"}
CAUSAL = FREE | {"mask": "causal"}
GROUPED = CAUSAL | {"kv_heads": 2, "rotary": HALVES | {"dims": 4}}
WIDER = GROUPED | {"head_dim": 6, "qk_norm": True, "rotary": HALVES | {"dims": 6}}
EXPECTED = {
    "gpt": row(5, "gelu_tanh", False, (8, 12), "pre", heads=2, head_dim=4, mask="causal"),
    "llama": row(5, "silu", True, (16, 24), "pre", **GROUPED),
    "qwen3": row(9, "silu", True, (16, 24), "pre", **WIDER),
    "bert": row(5, "gelu", False, (16, 24), "post", **FREE),
    "vit": row(5, "gelu", False, (16, 24), "pre", **FREE),
    "clip_text": row(5, "quick_gelu", False, (16, 24), "pre", **CAUSAL),
    "clip_vision": row(6, "quick_gelu", False, (16, 24), "pre", **FREE),
    "t5": row(5, "relu", False, (16, 24), "pre", **FREE | {"mask": "bias", "scale": 1.0}),
    "dit": row(5, "gelu_tanh", False, (16, 64), "pre", heads=2, head_dim=8, mask="none"),
}


def found(program: Program) -> dict[str, Any]:
    return {
        "attentions": [attention.constants() for attention in program.attentions()],
        "feed_forwards": [ffn.constants() for ffn in program.feed_forwards()],
        "norms": len(program.norms()),
        "places": [block.norm_place for block in program.blocks()],
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_finds_everything(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    assert found(program) == EXPECTED[name]
    assert all(len(block.sublayers) == 2 for block in program.blocks())
    assert all(len(attention.layers) == 4 for attention in program.attentions())


OURS = {
    "llama.Llama.TOY": (3, 3, 7, 3),
    "bert.Bert.TOY": (3, 3, 7, 3),
    "vit.ViT.TOY": (3, 3, 7, 3),
    "swin.Swin.TOY": (6, 6, 15, 6),
    "dit.DiT.TOY": (3, 3, 7, 3),
}


@pytest.mark.parametrize("name", OURS)
def test_finds_everything_in_our_models(name: str) -> None:
    file, model, config = name.split(".")
    module = importlib.import_module(f"blockwright.models.{file}")
    program = capture(getattr(module, model)(getattr(module, config)).eval())
    parts = (program.attentions(), program.feed_forwards(), program.norms(), program.blocks())
    assert tuple(map(len, parts)) == OURS[name]
    assert all(len(attention.layers) == 4 for attention in parts[0])
    assert all(layer.is_dense for attention in parts[0] for layer in attention.layers)


def test_two_streams() -> None:
    from blockwright.models.flux import TOY_FLUX, Flux

    program = capture(Flux(TOY_FLUX).eval())
    assert len(program.attentions()) == TOY_FLUX.double_depth + TOY_FLUX.single_depth
    assert all(attention.rotary for attention in program.attentions())
    assert [len(block.streams) for block in program.blocks()] == [2, 2, 2, 1, 1, 1]
    assert not [m for m in program.explain().near_misses if m.nearest == "block"]


@pytest.mark.parametrize("name", ["gpt", "qwen3", "bert", "dit"])
def test_names_do_not_matter(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    other = scrambled(program, seed=1)
    assert found(other) == found(program)
    assert other.explain().shares == program.explain().shares


@pytest.mark.parametrize("name", ["gpt", "qwen3", "bert", "t5", "dit"])
def test_regions_are_complete(captured: Callable[[str], Program], name: str) -> None:
    """A region computes its outputs from its inputs and weights alone."""
    program = captured(name)
    values: dict[tuple[str | None, fx.Node], Any] = {}
    leaves = build(name)[1]
    inputs = leaves.values() if isinstance(leaves, dict) else leaves
    run(
        program,
        [v for v in inputs if isinstance(v, Tensor)],
        on_node=lambda instance, node, value: values.update({(instance, node): value}),
    )
    kinds: list[type[Region]] = [Attention, FeedForward, Norm, Block]
    for region in (region for kind in kinds for region in program.regions(kind)):
        before = [values[region.instance, node] for node in region.inputs]
        for node, value in zip(region.outputs, region.replay(before), strict=True):
            torch.testing.assert_close(value, values[region.instance, node], rtol=0, atol=0)


class Toy(nn.Module):
    """Layers that the models below are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.qkv, self.gate_up = nn.Linear(8, 24), nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.other, self.third = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.rand(8))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 4)).transpose(1, 2)

    def attention(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(context)), self.heads(self.v(context))
        y: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y

    def ffn(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)))
        return y


class Parallel(Toy):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y) + self.ffn(y)


class Sandwich(Toy):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.scale * self.other(self.attention(y, y))


class Cross(Toy):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attention(x, context)
        return x + self.ffn(self.norm(x))


class FusedHeads(Toy):
    """Query, key and value in one layer, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FusedPerHead(Toy):
    """Query, key and value of each head side by side, as in GPT-NeoX."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FusedGate(Toy):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up(x).chunk(2, dim=-1)
        return x + self.down(up * F.gelu(gate))


class Unattached(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


def toy(model: nn.Module, *inputs: Tensor) -> Program:
    return capture(model.eval(), inputs or (X,))


def test_parallel_sublayers() -> None:
    (block,) = toy(Parallel()).blocks()
    assert (block.is_parallel, block.norm_place, len(block.sublayers)) == (True, "pre", 2)


def test_sandwich_norm_and_gate() -> None:
    (block,) = toy(Sandwich()).blocks()
    assert (block.norm_place, block.is_gated) == ("sandwich", True)
    assert str(block.sublayers[0].residual.gate) == "scale"


class OnePlusWeight(Toy):
    """Norms as in Gemma: written out, one added to the weight, the type taken from the input."""

    def rms(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.scale)).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rms(self.ffn(self.rms(x)))


def test_norm_with_a_computed_weight() -> None:
    program = toy(OnePlusWeight())
    (block,) = program.blocks()
    assert [norm.written_out for norm in program.norms()] == [True, True]
    assert (block.norm_place, block.is_gated) == ("sandwich", False)


def test_cross_attention_without_norm() -> None:
    program = toy(Cross(), X, torch.randn(2, 3, 8))
    (attention,), (block,) = program.attentions(), program.blocks()
    assert attention.source == "cross"
    assert (attention.x_q.name, attention.x_k.name) == ("x", "context")
    assert [s.residual.norm_place for s in block.sublayers] == ["none", "pre"]


def test_fused_projections_have_their_share_of_the_weight() -> None:
    model = FusedHeads()
    (attention,) = toy(model).attentions()
    assert attention.output is not None
    q, k, v = (
        F.linear(X, layer.weight, layer.bias).unflatten(-1, (2, 4)).transpose(1, 2)
        for layer in attention.layers[:3]
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = X + F.linear(y, attention.output.weight, attention.output.bias)
    torch.testing.assert_close(out, model(X))


def test_projections_that_take_turns_head_by_head() -> None:
    model = FusedPerHead()
    (attention,) = toy(model).attentions()
    assert (attention.heads, attention.head_dim, attention.source) == (2, 4, "self")
    weight = model.qkv.weight.unflatten(0, (2, 3, 4))  # [heads, roles, head_dim, dim]
    for index, layer in enumerate(attention.layers[:3]):
        assert (layer.features, layer.is_dense, layer.is_fused) == (None, True, True)
        torch.testing.assert_close(layer.weight, weight[:, index].flatten(0, 1), rtol=0, atol=0)


class Crossed(Toy):
    """Queries made of every third feature and a few more: no regular set."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        q = self.heads(torch.cat((y[..., :3], y[..., 5:10]), dim=-1))
        k, v = self.heads(self.k(x)), self.heads(self.v(2 * x))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_features_in_no_regular_order() -> None:
    program = toy(Crossed())
    (attention,) = program.attentions()
    assert attention.query is not None
    assert not attention.query.is_dense
    with pytest.raises(OptionError, match="no dense weight of its own"):
        _ = attention.query.weight
    assert "holds its output features in no regular order" in str(program.explain())


def test_fused_gate_and_up() -> None:
    model = FusedGate()
    (ffn,) = toy(model).feed_forwards()
    assert ffn.constants() == {
        "activation": "gelu", "is_gated": True, "dim": 8, "ffn_dim": 12
    }  # fmt: skip
    torch.testing.assert_close(ffn.up, model.gate_up.weight[:12], rtol=0, atol=0)
    torch.testing.assert_close(ffn.gate, model.gate_up.weight[12:], rtol=0, atol=0)
    torch.testing.assert_close(ffn.down, model.down.weight, rtol=0, atol=0)


def test_a_network_beside_no_stream_is_no_sublayer() -> None:
    program = toy(Unattached())
    assert not program.feed_forwards()
    (miss,) = program.explain().near_misses
    assert (miss.nearest, miss.count) == ("feed_forward", 1)
    assert "where the addition to the stream would be" in miss.reason


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def not_quite_silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.1 * x)


class Acts(Toy):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (relu2, "relu2"),
        (gelu_tanh, "gelu_tanh"),
        (gelu_erf, "gelu"),
        (silu, "silu"),
        (F.leaky_relu, "leaky_relu"),
        (not_quite_silu, None),
    ],
)
def test_activations_written_out(act: Callable[[Tensor], Tensor], kind: str | None) -> None:
    ffns = toy(Acts(act)).feed_forwards()
    assert [ffn.activation for ffn in ffns] == ([kind] if kind else [])


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_fused_and_quantized_models_are_the_same(
    captured: Callable[[str], Program], name: str
) -> None:
    program = captured(name)
    fused, _ = run_passes(program, [FuseProjections()])
    assert found(fused) == found(program)
    for old, new in zip(program.attentions(), fused.attentions(), strict=True):
        assert all(layer.is_fused for layer in new.layers[:3])
        for ours, theirs in zip(new.layers, old.layers, strict=True):
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
    quantized, _ = run_passes(fused, [QuantizeWeights()])
    assert found(quantized) == found(program)
    assert not any(ffn.is_dense for ffn in quantized.feed_forwards())


@pytest.mark.parametrize("name", [*EXPECTED, "gpt2"])
def test_explanation_adds_up(captured: Callable[[str], Program], name: str) -> None:
    program = captured(name)
    explanation, cost = program.explain(), program.cost()
    assert (explanation.parameters, explanation.flops) == (cost.parameters, cost.flops)
    assert json.loads(json.dumps(explanation.to_json()))["inside"]["parameters"] <= 1
    assert "total" in str(explanation)


def test_quantized_weights_are_accounted_for(captured: Callable[[str], Program]) -> None:
    quantized, _ = run_passes(captured("llama"), [QuantizeWeights()])
    explanation, cost = quantized.explain(), quantized.cost()
    assert (explanation.parameters, explanation.flops) == (cost.parameters, cost.flops)


def test_gpt2_is_a_near_miss_until_it_is_canonical(captured: Callable[[str], Program]) -> None:
    program = captured("gpt2")
    assert [a.constants()["heads"] for a in program.attentions()] == [4, 4]
    assert not program.feed_forwards()
    misses = program.explain().near_misses
    assert {m.nearest for m in misses} >= {"linear", "attention.query", "attention.output"}
    assert all("addmm" in m.where for m in misses if m.nearest == "attention.query")


def test_each_class_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab=32, context=16, dim=8, heads=2, depth=200, ffn_dim=12))
    program = capture(model.eval(), (torch.zeros(2, 8, dtype=torch.long, device="meta"),))
    calls: list[fx.Graph] = []
    find = FeedForward.find.__func__  # type: ignore[attr-defined]

    def counting(cls: type[FeedForward], graph: fx.Graph) -> list[FeedForward]:
        calls.append(graph)
        return find(cls, graph)

    monkeypatch.setattr(FeedForward, "find", classmethod(counting))
    assert len(program.feed_forwards()) == len(program.feed_forwards()) == 200
    assert len(calls) == len(program.graphs) == 2
    assert len(program.blocks()) == 200
