"""Tokens lie end to end, and are found by their place in the cached ids."""

import torch

from distill.tokens import Tokens


def tokens() -> Tokens:
    """[CLS] 3 ids [SEP]; nothing; one id: values are 10 times row plus place, special ones negative."""
    places = torch.tensor([-1, 0, 1, 2, -1, 0])
    values = torch.tensor([-5.0, 0, 1, 2, -6, 20]).requires_grad_()
    return Tokens(values, torch.tensor([0, 5, 5, 6]), places[:, None])


def test_tokens_are_laid_out_by_place_and_special_ones_left_out():
    values, mask = tokens().placed(4)
    assert values.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [20, 0, 0, 0]]
    assert mask.sum(dim=1).tolist() == [3, 0, 1] and mask[0].tolist() == [True] * 3 + [False]
    shorter, _ = tokens().placed(2)
    assert shorter.tolist() == [[0, 1], [0, 0], [20, 0]]
    assert tokens().longest() == 3


def test_the_places_of_two_texts_read_together_are_told_apart():
    places = torch.tensor([[-1, -1], [0, -1], [-1, -1], [-1, 0], [-1, 1]])
    joint = Tokens(torch.arange(5.0), torch.tensor([0, 5]), places)
    assert joint.placed(2, text=0)[0].tolist() == [[1, 0]]
    assert joint.placed(2, text=1)[0].tolist() == [[3, 4]]
    assert (joint.longest(0), joint.longest(1)) == (1, 2)


def test_rows_are_selected_kept_spread_and_stacked():
    said = tokens()
    picked = said.select(torch.tensor([2, 0]))
    assert picked.values.tolist() == [20, -5, 0, 1, 2, -6] and picked.lengths.tolist() == [1, 5]
    kept = said.keep(said.places[:, 0] != 1)
    assert kept.values.tolist() == [-5, 0, 2, -6, 20] and kept.lengths.tolist() == [4, 0, 1]
    among = picked.among(torch.tensor([1, 4]), 6)
    assert among.lengths.tolist() == [0, 1, 0, 0, 5, 0] and among.values is picked.values
    assert said.rows(slice(1, 3)).values.tolist() == [20] and said.rows(slice(1, 3)).lengths.tolist() == [
        0,
        1,
    ]
    both = Tokens.stack([said, picked])
    assert len(both) == 5 and both.placed(3)[0][3].tolist() == [20, 0, 0]


def test_gradients_reach_each_token_as_often_as_it_was_laid_out():
    said = tokens()
    (said.placed(3)[0].sum() + said.select(torch.tensor([2, 2])).values.sum()).backward()
    assert said.values.grad.tolist() == [0, 1, 1, 1, 0, 3]
