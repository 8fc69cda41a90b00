"""Trainable rows in a frozen table: what they compute, start from and leave alone."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.tokens import tokenize
from tests.tiny import tiny_pipeline
from train import embeddings, new_tokens
from train.config import TokenConfig, UserError
from train.new_tokens import NewToken


def table(count=10, width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Embedding(count, width)


def whole(frozen, ids, rows):
    """The table with the rows in it, as a plain one."""
    large = torch.zeros(max([*ids, len(frozen.weight) - 1]) + 1, rows.shape[1])
    large[: len(frozen.weight)] = frozen.weight.detach()
    large[ids] = rows
    return nn.Embedding.from_pretrained(large)


def short(*shape):
    """Rows that are not longer than the table's."""
    return 0.1 * torch.randn(*shape)


# Ids after the table's, with gaps and out of order, and within it.
@pytest.mark.parametrize("ids", [[10, 11], [14, 10], [3, 12]])
def test_it_is_a_table_with_the_rows_in_it(ids):
    frozen, rows = table(), short(2, 4)
    module = embeddings.Embeddings(frozen, ids, rows)
    read = torch.tensor([[0, ids[0], 9, ids[1]], [ids[1], ids[1], 1, 2]])
    assert torch.equal(module(read), whole(frozen, ids, rows)(read))
    assert module(read[:, :1]).shape == (2, 1, 4)


def test_only_the_rows_that_are_read_get_a_gradient_and_the_table_none():
    module = embeddings.Embeddings(table(), [10, 11, 12], short(3, 4))
    module(torch.tensor([[1, 10, 12, 12]])).sum().backward()
    assert module.rows.grad.tolist() == [[1.0] * 4, [0.0] * 4, [2.0] * 4]
    assert not module.weight.requires_grad and module.weight.grad is None
    module.rows.grad = None
    module(torch.tensor([[1, 2]])).sum().backward()  # a batch of empty captions
    assert module.rows.grad.tolist() == [[0.0] * 4] * 3


def test_rows_are_used_as_no_longer_than_the_longest_of_the_table():
    frozen = table()
    longest = float(frozen.weight.detach().norm(dim=1).max())
    rows = torch.tensor([[9.0, 0, 0, 0], [0, 0.1, 0, 0], [0, 0, 0, 0]])
    module = embeddings.Embeddings(frozen, [10, 11, 12], rows)
    expected = [[longest, 0, 0, 0], [0, 0.1, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(module(torch.tensor([10, 11, 12])), torch.tensor(expected))
    module.values().sum().backward()
    # Along a row that is too long there is nothing to gain; the others are free.
    assert module.rows.grad[0, 0] == 0 and module.rows.grad[1:].tolist() == [[1.0] * 4] * 2


def test_rows_stay_fp32_in_a_text_encoder_of_bf16():
    pipeline = tiny_pipeline()
    pipeline.text_encoder.to(torch.bfloat16).requires_grad_(False)
    tokens = new_tokens.add(pipeline.tokenizer, [TokenConfig(token="<owl>", initial="a b")])
    module = embeddings.attach(pipeline.text_encoder, tokens)
    assert module.rows.dtype == torch.float32
    assert pipeline.text_encoder.dtype == torch.bfloat16
    output = pipeline.text_encoder(tokenize(pipeline.tokenizer, ["<owl>"]))[0]
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert module.rows.grad.abs().sum(-1).min() > 0


def test_the_text_encoder_trains_nothing_else_and_gives_what_the_initial_words_give():
    pipeline = tiny_pipeline()
    encoder = pipeline.text_encoder.requires_grad_(False)
    plain = tokenize(pipeline.tokenizer, ["x abc y"])
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = encoder(plain)[0]
    tokens = new_tokens.add(pipeline.tokenizer, [TokenConfig(token="<owl>", initial="abc")])
    embeddings.attach(encoder, tokens)
    read = tokenize(pipeline.tokenizer, ["x <owl> y"])
    assert len(tokens[0].ids) == 3 and not torch.equal(read, plain)
    assert torch.equal(encoder(read)[0], expected)
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == [
        name for name in encoder.state_dict() if name not in before
    ]
    assert all(torch.equal(before[name], encoder.state_dict()[name]) for name in before)


# Start values


def start(vectors, initial=(1, 2, 3)):
    return embeddings.start(table().weight, NewToken("x", list(range(vectors)), list(initial)))


def test_as_many_vectors_as_words_start_as_the_words_and_more_go_round():
    weight = table().weight.detach()
    assert torch.equal(start(3), weight[[1, 2, 3]])
    assert torch.equal(start(5), weight[[1, 2, 3, 1, 2]])
    assert torch.equal(start(2, [7]), weight[[7, 7]])


def test_fewer_start_from_means_as_long_as_the_words():
    weight = table().weight.detach()
    one, two = start(1), start(2)
    mean = weight[[1, 2, 3]].mean(0)
    torch.testing.assert_close(one[0].norm(), weight[[1, 2, 3]].norm(dim=1).mean())
    torch.testing.assert_close(nn.functional.cosine_similarity(one[0], mean, dim=0), torch.ones(()))
    torch.testing.assert_close(two[1], weight[3])  # words 1 and 2, and word 3
    assert start(1).dtype == torch.float32
    half = embeddings.start(table().weight.bfloat16(), NewToken("x", [1], [1, 2]))
    assert half.dtype == torch.float32


# Files


def tokens_of(*counts):
    first = 10
    found = []
    for index, count in enumerate(counts):
        found.append(NewToken(f"<owl-{index}>", list(range(first, first + count)), [1]))
        first += count
    return found


def saved(folder, tokens, rows):
    ids = [id for token in tokens for id in token.ids]
    embeddings.save(embeddings.Embeddings(table(), ids, rows), tokens, folder)
    return {path.name: load_file(path) for path in folder.iterdir()}


def test_one_token_is_in_the_standard_file_and_several_in_one_each(tmp_path):
    rows = short(4, 4)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = saved(tmp_path / "one", tokens_of(4), rows)
    assert list(one) == ["learned_embeds.safetensors"]
    assert torch.equal(one["learned_embeds.safetensors"]["<owl-0>"], rows)
    two = saved(tmp_path / "two", tokens_of(1, 3), rows)
    assert torch.equal(two["learned_embeds-owl-0.safetensors"]["<owl-0>"], rows[:1])
    assert torch.equal(two["learned_embeds-owl-1.safetensors"]["<owl-1>"], rows[1:])


def test_file_names_hold_nothing_of_a_token_but_plain_letters():
    names = ["../../etc", "<..>", "<日>", "<a/b>", "etc"]
    files = embeddings.file_names([NewToken(name, [], []) for name in names])
    assert files == [f"learned_embeds-{k}-{x}.safetensors" for k, x in enumerate(("etc", "", "", "ab", "etc"), 1)]  # fmt: skip  # noqa: E501


def test_embeddings_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(UserError, match="<owl-0> are not finite"):
        saved(tmp_path, tokens_of(1), torch.full((1, 4), torch.nan))
    assert not list(tmp_path.iterdir())


class Sizes(TorchDispatchMode):
    """How many numbers each operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.made.append((operation.overloadpacket.__name__, [t.numel() for t in tensors]))
        return result


def step(vocabulary):
    """What one optimizer step makes with a table of so many rows."""
    module = embeddings.Embeddings(table(vocabulary), [vocabulary, vocabulary + 1], short(2, 4))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    ids = torch.tensor([[1, vocabulary, 2, vocabulary + 1]])
    with Sizes() as sizes:
        module(ids).square().sum().backward()
        optimizer.step()
    return sizes.made


def test_a_step_costs_the_same_whatever_the_vocabulary():
    assert step(100) == step(50_000)
    assert max(max(numbers, default=0) for _, numbers in step(50_000)) < 100
