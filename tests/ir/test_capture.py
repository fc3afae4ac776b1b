"""Capture: names, ties, structure in and out, and errors with a place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from blockwright.ir.capture import capture
from blockwright.ir.errors import CaptureError, OptionError
from blockwright.ir.program import Program
from blockwright.ir.run import run
from blockwright.ir.verify import verify


def call(program: Program, *args: Any, **kwargs: Any) -> Any:
    return program.signature.pack(run(program, program.signature.bind(args, kwargs)))


def test_runs_like_the_model_at_every_batch(gpt: nn.Module, program: Program) -> None:
    for batch in (1, 2, 5):
        tokens = torch.randint(0, 32, (batch, 8))
        torch.testing.assert_close(call(program, tokens), gpt(tokens))
        torch.testing.assert_close(program.module()(tokens)[0], gpt(tokens))


def test_keeps_names_and_ties(gpt: nn.Module, program: Program) -> None:
    names = dict(gpt.named_parameters())
    assert program.parameters == names.keys()
    assert program.aliases == {"head.weight": "tokens.weight"}
    assert program.require("head.weight").data_ptr() == names["tokens.weight"].data_ptr()


def test_shares_memory_with_the_model_and_leaves_it_alone(gpt: nn.Module) -> None:
    gpt.train()
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    program = capture(gpt, fold=False)
    assert gpt.training
    assert gpt.blocks[0].training
    assert all(torch.equal(before[name], value) for name, value in gpt.state_dict().items())
    assert program.tensors["norm.weight"].data_ptr() == gpt.norm.weight.data_ptr()
    gpt.eval()


def test_folds_repeated_blocks(program: Program) -> None:
    assert list(program.instances) == ["blocks.0", "blocks.1", "blocks.2"]
    assert set(program.graphs) == {"main", "block0"}
    assert program.instances["blocks.1"].weights["up.weight"] == "blocks.1.up.weight"


def test_folding_changes_no_value(gpt: nn.Module, program: Program, tokens: Tensor) -> None:
    flat = capture(gpt, (tokens,), fold=False)
    assert not flat.instances
    assert torch.equal(run(flat, [tokens])[0], run(program, [tokens])[0])
    assert program.nodes() > len(flat.main.nodes)


class Kwargs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.arange(4.0))

    def forward(
        self,
        x: Tensor,
        *,
        options: dict[str, Tensor],
        twice: bool = False,
        mask: Tensor | None = None,
    ) -> dict[str, Any]:
        y = x * self.scale + self.shift + options["bias"]
        y = y * 2 if twice else y
        return {"y": y, "parts": (y.sum(), [y.mean(dim=0)]), "none": None, "seven": 7}


def test_structures_and_constants_round_trip() -> None:
    model, x, bias = Kwargs(), torch.randn(3, 4), torch.randn(4)
    inputs = {"x": x, "options": {"bias": bias}, "twice": True}
    program = capture(model, inputs)
    verify(program)
    expected = model(**inputs)
    for result in (call(program, **inputs), call(program, x, options={"bias": bias}, twice=True)):
        assert result.keys() == expected.keys()
        assert result["none"] is None
        assert result["seven"] == 7
        torch.testing.assert_close(result["parts"][1][0], expected["parts"][1][0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.zeros(3, 4), "twice": True}, "'options' is missing"),
        ({"x": torch.zeros(3, 4), "options": {"bias": torch.zeros(4)}, "twice": False}, "twice"),
        ({"x": torch.zeros(3, 4), "options": {}, "twice": True}, "another structure"),
        ({"x": torch.zeros(3, 5), "options": {"bias": torch.zeros(4)}, "twice": True}, r"\[3, 5\]"),
        (
            {"x": torch.zeros(3, 4).int(), "options": {"bias": torch.zeros(4)}, "twice": True},
            "int32",
        ),
    ],
)
def test_wrong_calls_are_refused(kwargs: dict[str, Any], message: str) -> None:
    inputs = {"x": torch.randn(3, 4), "options": {"bias": torch.randn(4)}, "twice": True}
    program = capture(Kwargs(), inputs)
    with pytest.raises(OptionError, match=message):
        program.signature.bind((), kwargs)


def test_dynamic_sizes_are_checked(program: Program) -> None:
    with pytest.raises(OptionError, match=r"batch in 1\.\.64"):
        program.signature.bind((torch.zeros(65, 8, dtype=torch.int64),), {})


@dataclass
class Pair:
    left: Tensor
    right: Tensor


class Paired(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x + 1, x - 1)


def test_dataclass_outputs_come_back_as_themselves() -> None:
    torch.export.register_dataclass(Pair, serialized_type_name="tests.Pair")
    result = call(capture(Paired(), (torch.ones(2),)), torch.zeros(2))
    assert isinstance(result, Pair)
    assert torch.equal(result.left, torch.ones(2))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


def test_a_buffer_that_is_written_becomes_state() -> None:
    program = capture(Counter(), (torch.zeros(2),))
    verify(program)
    (slot,) = program.state
    assert slot.name == "count"
    y, count = run(program, [torch.zeros(2), torch.tensor(4.0)])
    assert y.tolist() == [5, 5]
    assert float(count) == 5


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line an error must name
            return x
        return -x


def test_data_dependent_control_flow_names_the_source_line() -> None:
    with pytest.raises(CaptureError, match=r"Branching does not export") as caught:
        capture(Branching(), (torch.ones(2),))
    assert caught.value.where is not None
    assert Path(__file__).name in caught.value.where
    assert "\n" not in caught.value.one_line()


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such luck")


def test_a_model_that_raises_is_chained() -> None:
    with pytest.raises(CaptureError, match="no such luck") as caught:
        capture(Failing(), (torch.ones(2),))
    assert caught.value.__cause__ is not None


def test_inputs_are_required() -> None:
    with pytest.raises(CaptureError, match="offers no example inputs"):
        capture(Paired())


def test_zero_and_no_parameters() -> None:
    program = capture(nn.Sequential(), (torch.ones(2),))
    verify(program)
    assert torch.equal(run(program, [torch.full((2,), 3.0)])[0], torch.full((2,), 3.0))


class Shared(nn.Module):
    """One block called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return x


def test_a_block_called_thrice_stays_tied() -> None:
    model = Shared()
    program = capture(model, (torch.ones(2, 4),))
    verify(program)
    assert len(program.tensors) == len(dict(model.named_parameters()))
    x = torch.randn(2, 4)
    torch.testing.assert_close(call(program, x), model(x))


def test_exported_programs_are_taken(gpt: nn.Module, tokens: Tensor) -> None:
    shapes = ({0: Dim("batch", min=1, max=8)},)
    exported = torch.export.export(gpt, (tokens,), dynamic_shapes=shapes)
    program = capture(exported)
    verify(program)
    torch.testing.assert_close(call(program, tokens), gpt(tokens))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="not a Hugging Face model directory"):
        capture(tmp_path)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_hugging_face_causal_models_work_as_they_come(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}}
    default = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(vocab_size=40, **sizes.get(family, default))
    torch.manual_seed(0)
    head = "GPT2LMHeadModel" if family == "GPT2" else "LlamaForCausalLM"
    model = getattr(transformers, head)(config).eval()
    ids = torch.randint(0, 40, (2, 8))
    program = capture(model, {"input_ids": ids})
    verify(program)
    assert model.config.use_cache
    assert "past_key_values" in program.notes[0]
    assert len(program.instances) == 2
    with torch.no_grad():
        expected = model(ids, use_cache=False)
    result = call(program, ids)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.logits, expected.logits)


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_tensors_nothing_depends_on_are_left_out_and_named() -> None:
    program = capture(Unread(), (torch.zeros(1, 2),))
    assert program.tensors.keys() == {"used.weight", "used.bias"}
    assert "idle.bias, idle.weight" in program.notes[0]


class Squeezes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.squeeze(0).squeeze(1).squeeze((0, 1)))


def test_squeezing_an_axis_that_is_longer_is_nothing() -> None:
    program = capture(Squeezes(), (torch.ones(1, 2, 3),))
    called = [str(n.target) for n in program.main.nodes if n.op == "call_function"]
    assert called == ["aten.squeeze.dim", "aten.relu.default"]
    assert call(program, torch.ones(1, 2, 3)).shape == (2, 3)


class Variadic(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0] + xs[1]


def test_variadic_models_may_be_dynamic() -> None:
    batch = {0: Dim("batch", min=1, max=9)}
    program = capture(Variadic(), (torch.ones(3), torch.ones(3)), dynamic_shapes=((batch, batch),))
    assert call(program, torch.ones(5), torch.ones(5)).tolist() == [2] * 5


class Updates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.add_(1)
        return x + self.weight


def test_a_parameter_that_is_written_is_refused() -> None:
    with pytest.raises(CaptureError, match="writes into its parameter"):
        capture(Updates(), (torch.zeros(2),))


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.max(-1)


def test_named_tuples_come_back_as_tuples() -> None:
    values, indices = call(capture(Largest(), (torch.eye(3),)), torch.eye(3))
    assert values.tolist() == [1, 1, 1]
    assert indices.tolist() == [0, 1, 2]


class Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), self.linear.weight.clone()


def test_copies_stay_copies() -> None:
    model, x = Copies(), torch.zeros(3)
    y, weight = call(capture(model, (x,)), x)
    y.add_(1), weight.zero_()
    assert x.sum() == 0
    assert model.linear.weight.abs().sum() > 0


DECODER = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4,
}  # fmt: skip


@pytest.mark.slow
def test_numbered_decoder_layers_are_one_class_at_every_size() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER)).eval()
    batch, seq = Dim("batch", min=1, max=8), Dim("seq", min=2, max=32)
    ids = torch.randint(0, 40, (2, 8))
    program = capture(model, {"input_ids": ids}, dynamic_shapes={"input_ids": {0: batch, 1: seq}})
    verify(program)
    assert [i.block for i in program.instances.values()] == ["block0"] * 8
    assert list(program.instances) == [f"model.layers.{i}" for i in range(8)]
    for size in ((1, 5), (3, 8)):
        ids = torch.randint(0, 40, size)
        with torch.no_grad():
            torch.testing.assert_close(call(program, input_ids=ids).logits, model(ids).logits)


def test_sliding_and_full_attention_are_classes_of_their_own() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = DECODER | {"num_hidden_layers": 12, "sliding_window": 4, "query_pre_attn_scalar": 4}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).eval()
    ids = torch.randint(0, 40, (2, 8))
    program = capture(model, {"input_ids": ids})
    verify(program)
    assert [i.block for i in program.instances.values()] == ["block0", "block1"] * 6
    with torch.no_grad():
        torch.testing.assert_close(call(program, input_ids=ids).logits, model(ids).logits)


@pytest.mark.slow
def test_an_encoder_and_its_decoder_drop_their_cache() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=7, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": torch.randint(0, 40, (2, 8)),
        "decoder_input_ids": torch.ones(2, 5).long(),
    }
    program = capture(model, inputs)
    verify(program)
    assert model.config.use_cache
    assert model.decoder.config.use_cache
    assert any("past_key_values" in note for note in program.notes)
    assert len(program.instances) == 12
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(call(program, **inputs).logits, expected.logits)


def test_two_towers_are_two_classes() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 40, "max_position_embeddings": 16, "intermediate_size": 24,
                    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    vision = sizes | {"image_size": 8, "patch_size": 4, "intermediate_size": 20}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 40, (2, 8)), "pixel_values": torch.randn(2, 3, 8, 8)}
    program = capture(model, inputs)
    verify(program)
    assert len(program.instances) == 12
    assert set(program.graphs) == {"main", "block0", "block1"}
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(call(program, **inputs).logits_per_image, expected.logits_per_image)


def test_a_failing_capture_leaves_the_model_as_it_was() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).train()
    model.model.norm.weight.requires_grad_(False)
    before = [(m, dict(vars(m)), len(m._forward_hooks), m.training) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CaptureError, match="does not export"):
        capture(model, {"input_ids": torch.randn(2, 8)})  # no token numbers
    assert model.config.use_cache
    assert [p.requires_grad for p in model.parameters()] == grads
    for module, attributes, hooks, training in before:
        assert vars(module).keys() == attributes.keys()
        for name, value in attributes.items():
            now = vars(module)[name]
            assert now is value or (type(value) is dict and now == value)  # torch copies dicts
        assert (len(module._forward_hooks), module.training) == (hooks, training)
