"""Next-token prediction: loss and perplexity against a direct computation, refusals, samples."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import CheckpointError, ModelStateError, TrainingError
from surgery.train.data.base import Facts
from surgery.train.data.tokenizer import ByteTokenizer
from surgery.train.objectives.configs import LanguageObjective, TextSampling
from surgery.train.objectives.language import Language

VOCAB, LENGTH = 259, 24
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
FACTS = Facts("text", vocab_size=VOCAB, length=LENGTH, tokenizer=ByteTokenizer())
PLAIN = LanguageObjective(kind="language")


class Averager(nn.Module):
    """Logits from the mean of the tokens so far; a plain module."""

    def __init__(self, vocabulary: int = VOCAB, *, causal: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, vocabulary)
        self.causal = causal

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embed(ids)
        if not self.causal:
            return self.head(embedded + embedded.mean(dim=1, keepdim=True))
        counts = torch.arange(1, ids.shape[1] + 1).unsqueeze(-1)
        return self.head(embedded.cumsum(dim=1) / counts)


class Unshifted(Averager):
    """Computes the loss of each token itself."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(input_ids)
        loss = None if labels is None else nn.functional.cross_entropy(logits.mT, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def llama(**changes: Any) -> nn.Module:
    return surgery.load("transformers:LlamaForCausalLM", config=LLAMA | changes)


def rewired() -> nn.Module:
    model = llama()
    surgery.apply(model, surgery.Rule(surgery.Shortcuts()))
    return model


def ids(batch: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(5))


def nats(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """Minus log-probability of each following token, one by one in float64."""
    logs = logits.detach().double().log_softmax(dim=-1)
    return [
        [
            -float(logs[row, place, labels[row, place + 1]])
            for place in range(labels.shape[1] - 1)
            if labels[row, place + 1] >= 0
        ]
        for row in range(labels.shape[0])
    ]


@pytest.mark.parametrize("build", [llama, rewired, Averager])
def test_loss_is_the_mean_over_following_tokens(build: Any) -> None:
    model = build()
    tokens = ids()
    loss = Language(PLAIN, FACTS, model).loss(model, {"input_ids": tokens}, step=1)
    output = model(tokens)
    logits = output if isinstance(output, Tensor) else output.logits
    expected = sum(map(sum, nats(logits, tokens))) / (3 * (LENGTH - 1))
    # float32 cross entropy over 69 tokens beside float64.
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("build", [llama, rewired, Averager])
def test_perplexity_weighs_every_token_alike(build: Any) -> None:
    model = build()
    objective = Language(PLAIN, FACTS, model)
    tokens = ids(5)
    labels = tokens.clone()
    labels[1, 10:] = -100
    split = [
        {"input_ids": tokens[:2], "labels": labels[:2]},
        {"input_ids": tokens[2:], "labels": labels[2:]},
    ]
    found = objective.evaluate(model, split)
    with torch.no_grad():
        output = model.eval()(tokens)
    logits = output if isinstance(output, Tensor) else output.logits
    each = [value for row in nats(logits, labels) for value in row]
    assert len(each) == 4 * (LENGTH - 1) + 9
    assert found["loss"] == pytest.approx(sum(each) / len(each), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-5)


def test_evaluation_counts_what_all_ranks_gathered() -> None:
    model = Averager()
    objective = Language(PLAIN, FACTS, model)
    mine, theirs = ids(4)[:2], ids(4)[2:]
    together = objective.evaluate(model, [{"input_ids": ids(4)}])
    measured = objective._per_sample(model, {"input_ids": theirs})
    gathered = objective.evaluate(
        model, [{"input_ids": mine}], gather=lambda values: torch.cat([values, measured.detach()])
    )
    assert gathered == pytest.approx(together, rel=1e-6)


def test_evaluation_keeps_modes_and_gradients() -> None:
    model = llama()
    model.train()
    model.get_submodule("model.layers.0").eval()
    before = [module.training for module in model.modules()]
    Language(PLAIN, FACTS, model).evaluate(model, [{"input_ids": ids()}])
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_of_nothing_is_an_error() -> None:
    model = Averager()
    with pytest.raises(TrainingError, match="no held-out sample"):
        Language(PLAIN, FACTS, model).evaluate(model, [])


def test_diverged_model_has_infinite_perplexity() -> None:
    model = Averager()
    objective = Language(PLAIN, FACTS, model)
    nn.init.constant_(model.head.bias[:1].data, 1e4)
    assert objective.evaluate(model, [{"input_ids": ids() + 1 - 1}])["perplexity"] == math.inf


def test_weights_in_bfloat16() -> None:
    model = surgery.load("transformers:LlamaForCausalLM", config=LLAMA, dtype="bfloat16")
    loss = Language(PLAIN, FACTS, model).loss(model, {"input_ids": ids()}, step=1)
    # Near uniform over 300 tokens at the start: log 300 = 5.70.
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(math.log(300), abs=0.1)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: llama(vocab_size=100), "tokenizer has 259 tokens, and the model predicts 100"),
        (lambda: Averager(258), "tokenizer has 259 tokens, and the model predicts 258"),
        (lambda: llama(max_position_embeddings=16), "samples have 24 tokens.*context is 16"),
        (lambda: surgery.load("transformers:LlamaModel", config=LLAMA), "without logits"),
        (lambda: Averager(causal=False), "sees what it should predict"),
        (Unshifted, "loss is .* that of each token itself"),
        (lambda: nn.Linear(4, 4), "Linear cannot be called with tokens"),
        (lambda: surgery.load("timm:resnet10t"), "ResNet cannot be called with tokens"),
        (
            lambda: surgery.load(
                "transformers:BertForMaskedLM",
                config={
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "vocab_size": 300,
                },
            ),
            "sees what it should predict",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(build: Any, said: str) -> None:
    with pytest.raises(ModelStateError, match=said):
        Language(PLAIN, FACTS, build())


def test_input_embedding_smaller_than_the_head_is_refused() -> None:
    model = llama()
    model.set_input_embeddings(nn.Embedding(200, 32))
    with pytest.raises(ModelStateError, match="259 tokens, and the model embeds 200"):
        Language(PLAIN, FACTS, model)


def test_model_on_meta_is_refused() -> None:
    model = surgery.load("transformers:LlamaForCausalLM", config=LLAMA, device="meta")
    with pytest.raises(ModelStateError, match="meta device"):
        Language(PLAIN, FACTS, model)


def test_images_have_no_tokens() -> None:
    with pytest.raises(TrainingError, match="digits data has no tokens"):
        Language(PLAIN, Facts("digits", channels=1, size=(8, 8), classes=10), llama())


def test_foreign_state_is_refused() -> None:
    objective = Language(PLAIN, FACTS, Averager())
    objective.load_state_dict(objective.state_dict())
    with pytest.raises(CheckpointError, match="ema of another objective"):
        objective.load_state_dict({"ema": {}})


# --- samples ----------------------------------------------------------------------------------


def drawing(**changes: Any) -> LanguageObjective:
    fields: dict[str, Any] = {"prompts": ("def ", ""), "tokens": 12} | changes
    return LanguageObjective(kind="language", sample=TextSampling(**fields))


@pytest.mark.parametrize("build", [llama, rewired])
def test_samples_are_reproducible_and_leave_the_generator_alone(build: Any, tmp_path: Path) -> None:
    model = build()
    objective = Language(drawing(), FACTS, model)
    assert objective.sample_every == 1000
    before = torch.get_rng_state()
    first = objective.sample(model, tmp_path / "samples", 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == tmp_path / "samples" / "step-000007.txt"
    text = first.read_text(encoding="utf-8")
    assert text.startswith("def ")
    assert text.count("-" * 80) == 2
    torch.rand(3)
    again = objective.sample(model, tmp_path, 8)
    assert again is not None
    assert again.read_text(encoding="utf-8") == text
    assert objective.sample(model, None, 9) is None


def test_greedy_text_is_that_of_the_likeliest_tokens(tmp_path: Path) -> None:
    model = rewired().eval()
    path = Language(drawing(prompts=("ab",), temperature=0.0), FACTS, model).sample(
        model, tmp_path, 1
    )
    row = list(b"ab")
    with torch.no_grad():
        for _ in range(12):
            logits = model(torch.tensor([row])).logits[0, -1]
            logits[[256, 258, *range(VOCAB, 300)]] = -torch.inf
            row.append(int(logits.argmax()))
    assert path is not None
    text = path.read_text(encoding="utf-8").partition("\n" + "-" * 80)[0]
    assert text == ByteTokenizer().decode(row[: row.index(257) if 257 in row else None])


def test_prompts_do_not_depend_on_each_other(tmp_path: Path) -> None:
    model = llama()
    both = Language(drawing(prompts=("x", "y")), FACTS, model).sample(model, tmp_path, 1)
    one = Language(drawing(prompts=("y",)), FACTS, model).sample(model, tmp_path, 2)
    assert both is not None
    assert one is not None
    assert both.read_text(encoding="utf-8").endswith(one.read_text(encoding="utf-8"))


def test_plain_modules_draw_no_text() -> None:
    assert Language(PLAIN, FACTS, Averager()).sample_every is None
    with pytest.raises(ModelStateError, match=r"Averager cannot draw text.*\n.*objective.sample"):
        Language(drawing(), FACTS, Averager())


def test_sampling_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(TrainingError, match="without a tokenizer"):
        Language(drawing(), Facts("tokens", vocab_size=VOCAB, length=LENGTH), llama())


def test_training_learns_a_sequence() -> None:
    model = rewired()
    objective = Language(PLAIN, FACTS, model)
    batch = {"input_ids": torch.arange(LENGTH).remainder(7).repeat(4, 1)}
    optimizer = torch.optim.AdamW(surgery.parameter_groups(model, weight_decay=0.1), lr=1e-2)
    for step in range(30):
        loss = objective.loss(model, batch, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = objective.evaluate(model, [batch])
    # Uniform over the seven tokens that occur is log 7 = 1.95; the cycle itself is learnable.
    assert found["loss"] < 1.0
