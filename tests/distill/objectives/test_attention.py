"""VIRT's and Distilled-DualEncoder's losses: the worked example, and real transformers that read apart."""

import json
import shutil

import pytest
import torch

from distill.batch import Batch, Ragged
from distill.errors import DataError, RecipeError
from distill.graph import Arrow, DistillationGraph
from distill.objectives import AttentionKL, AttentionMSE
from distill.objectives.attention import log_map
from distill.objectives.attention_kl import attention_kl
from distill.objectives.attention_mse import attention_mse
from distill.outputs import Needs, Outputs
from distill.tokens import Tokens
from students import BiEncoder
from teachers import CrossEncoder

Q_X, K_X = [[1, 0, 1, 0], [0, 2, 0, 0]], [[1, 0, 1, 0], [0, 1, 0, 2]]
Q_Y = [[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]  # the third is padding
K_Y = [[1, 1, 0, 0], [0, 1, 0, 1], [2, 0, 1, 0]]
T_XY, T_YX = [[2, 0.5, 9], [0, 1, 9]], [[1, 0], [0.5, 0.5], [3, -3]]
X_REAL, Y_REAL = torch.tensor([[True, True]]), torch.tensor([[True, True, False]])


def blocks():
    """Student's and teacher's logits, and masks, of both directions."""
    q_x, k_x, q_y, k_y = (torch.tensor(m, dtype=torch.float32)[None, None] for m in (Q_X, K_X, Q_Y, K_Y))
    forth, back = q_x @ k_y.transpose(2, 3) / 2, q_y @ k_x.transpose(2, 3) / 2
    t_xy, t_yx = (torch.tensor(m)[None, None] for m in (T_XY, T_YX))
    return (forth, t_xy, X_REAL, Y_REAL), (back, t_yx, Y_REAL, X_REAL)


def test_the_maps_are_those_of_the_worked_example():
    expected = (
        ([[0.622459, 0.377541, 0], [0.5, 0.5, 0]], [[0.817574, 0.182426, 0], [0.268941, 0.731059, 0]]),
        (
            [[0.377541, 0.622459], [0.5, 0.5], [0.5, 0.5]],
            [[0.731059, 0.268941], [0.5, 0.5], [0.997527, 0.002473]],
        ),
    )
    for (student, teacher, _, columns), maps in zip(blocks(), expected, strict=True):
        for logits, map_ in zip((student, teacher), maps, strict=True):
            said = log_map(logits, columns).exp()[0, 0]
            torch.testing.assert_close(said, torch.tensor(map_), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "function, official, expected",
    [
        (attention_mse, True, [0.030486, 0.124169]),
        (attention_mse, False, [0.045729, 0.062487]),
        (attention_kl, True, [(0.090238 + 0.110944) / 2, (0.257403 + 0 + 0.675836) / 3]),
        (attention_kl, False, [(0.090238 + 0.110944) / 2, 0.257403 / 2]),
    ],
)
def test_the_worked_example(function, official, expected):
    found = [function(*block, official=official).item() for block in blocks()]
    assert found == pytest.approx(expected, abs=2e-6)


def test_the_example_in_one_layer_of_tokens():
    """As a student that reads apart and a teacher that reads together would say it, padding left out."""

    def said(*sides, outside=0):
        rows = [[[torch.tensor(q), torch.tensor(k)]] for qs, ks in sides for q, k in zip(qs, ks, strict=True)]
        values = torch.stack([torch.stack([torch.stack(pair) for pair in row]) for row in rows])[
            :, :, :, None
        ]
        places = torch.full((len(rows), len(sides)), -1)
        at = 0
        for side, (qs, _) in enumerate(sides):
            places[at : at + len(qs), side] = torch.arange(len(qs))
            at += len(qs)
        return Tokens(values.float(), torch.tensor([0, len(rows)]), places, (-1,))

    def half(rows):  # queries are handed over scaled
        return (torch.tensor(rows) / 2).tolist()

    student = Outputs(
        query_attention=said((half(Q_X), K_X)), candidate_attention=said((half(Q_Y[:2]), K_Y[:2]))
    )
    # a teacher whose products are the example's: queries spell the logits, keys pick one
    x_keys, y_keys = [[1, 0, 0, 0], [0, 1, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]]
    x_queries, y_queries = [[*row[:2], 0, 0] for row in T_XY], [[*row, 0, 0] for row in T_YX[:2]]
    teacher = Outputs(joint_attention=said((x_queries, x_keys), (y_queries, y_keys)))
    batch = Batch.of_scores(1, 1)
    assert AttentionMSE("last")(student, teacher, batch).loss.item() == pytest.approx(0.108216, abs=2e-6)
    assert AttentionKL()(student, teacher, batch).loss.item() == pytest.approx(0.229293, abs=2e-6)
    # beside a candidate of three tokens, `official` divides by its size; padding adds nothing
    longer = (
        said((half(Q_Y), K_Y)),
        said((x_queries, x_keys), ([[*row, 0, 0] for row in T_YX], [*y_keys, y_keys[0]])),
    )
    student = Outputs(
        query_attention=student.query_attention,
        candidate_attention=Tokens.stack([student.candidate_attention, longer[0]]),
    )
    teacher = Outputs(joint_attention=Tokens.stack([teacher.joint_attention, longer[1]]))
    batch = Batch(torch.tensor([[0, 1]]), torch.ones(1, 2).bool(), torch.arange(1), torch.arange(2))
    pairs = AttentionMSE("last", official=True, first=1)(student, teacher, batch).loss.item()
    assert pairs == pytest.approx(0.108216 * 2 / 3, abs=2e-6)


QUERIES = ["what is a wing", "heart", "how does a ship flow in the river"]
PASSAGES = [
    "a wing is a surface in the flow of air",
    "the heart moves blood",
    "city",
    "old film and music " * 3,
]


def batch_of(model) -> Batch:
    queries, candidates, _ = model.reads
    return Batch(
        index=torch.tensor([[0, 2, 0], [1, 3, 0], [3, 0, 2]]),
        mask=torch.tensor([[True, True, False], [True, True, True], [True, False, False]]),
        query_ids=torch.arange(3),
        candidate_ids=torch.arange(4),
        queries={queries[0].key: queries[0].encode(QUERIES)},
        candidates={candidates[0].key: candidates[0].encode(PASSAGES)},
        source="wings",
    )


def ends(tiny_bert, **arguments):
    student = BiEncoder(tiny_bert(seed=1), precision="no", dropout=0.0, **arguments)
    return student, CrossEncoder(tiny_bert(num_labels=1), precision="no", max_length=24)


def graph_of(student, cross, *objectives) -> DistillationGraph:
    arrows = [Arrow(f"arrow{i}", one, "student", "cross") for i, one in enumerate(objectives)]
    return DistillationGraph({"student": student, "cross": cross}, arrows, ["student"])


def maps(transformer, ids):
    """The transformer's own maps of one text in the first layer, eagerly: [H, T, T], before the softmax."""
    transformer.set_attn_implementation("eager")
    with torch.no_grad():
        said = transformer(**ids, output_attentions=True).attentions[0][0]
    transformer.set_attn_implementation("distill")
    return said


def test_the_teachers_block_is_that_of_its_own_map(tiny_bert):
    """As the transformer computes it eagerly, with the row's sum divided out."""
    _, cross = ends(tiny_bert)
    batch = batch_of(cross)
    joint = cross.represent(batch, Needs("joint_attention", layers=[0])).joint_attention
    ids, types = cross.encoder.tokenizer.frame_pairs(
        batch.queries[cross.column.key].select(torch.tensor([1])),
        batch.candidates[cross.column.key].select(torch.tensor([3])), 24, 64,
    )  # fmt: skip
    given = {"input_ids": ids[0][None].long(), "token_type_ids": types[0][None].long()}
    whole = maps(cross.encoder.backbone, given)
    row = joint.select(torch.tensor([4]))  # of the second query, its second
    query, candidate = row.places.T >= 0
    block = whole[:, query][:, :, candidate]
    (q, _), (_, k) = (row.layer(0).placed(row.longest(i), i)[0][0].unbind(dim=1) for i in (0, 1))
    found = torch.einsum("xhd,yhd->hxy", q, k).softmax(dim=-1)
    torch.testing.assert_close(found, block / block.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert query.sum() == 1 and candidate.sum() == len(ids[0]) - 4  # cut to fit into 24


@pytest.mark.parametrize(
    "objective", [AttentionMSE(), AttentionKL(), AttentionKL(layers="all", heads="mean")]
)
def test_a_student_learns_by_it_in_the_graph(objective, tiny_bert):
    student, cross = ends(tiny_bert)
    graph = graph_of(student, cross, objective)
    graph.check()
    batch = batch_of(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss, count = graph(batch)["arrow0"]
        (loss.sum() / count.sum()).backward()
        optimizer.step()
        losses.append(loss.sum().item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in cross.parameters())


@pytest.mark.parametrize("text, side", [(0, "query"), (1, "candidate")])
@pytest.mark.parametrize(
    "objective",
    [AttentionMSE("last"), AttentionKL(), AttentionMSE("last", official=True), AttentionKL(official=True)],
    ids=["mse", "kl", "official mse", "official kl"],
)
def test_tokens_that_only_one_has_read_are_left_out(objective, text, side, tiny_bert):
    """The end of a text that one of the two had no room for: as if neither had read it."""
    student, cross = ends(tiny_bert)
    batch = batch_of(student)
    with torch.no_grad():
        said = student.represent(batch, objective.student_needs)
        told = cross.represent(batch, objective.teacher_needs)

    def cut(tokens, rows, text=0):
        """Without what follows the second id of a text, in some rows."""
        row = torch.arange(len(tokens)).repeat_interleave(tokens.lengths)
        return tokens.keep((tokens.places[:, text] < 2) | ~torch.isin(row, torch.tensor(rows)))

    of_pairs = [0, 1, 2] if text == 0 else [0, 4, 5, 6]  # of query 0; of candidates 0 and 3
    of_texts = [0] if text == 0 else [0, 3]
    below = said.with_(**{f"{side}_attention": cut(getattr(said, f"{side}_attention"), of_texts)})
    above = told.with_(joint_attention=cut(told.joint_attention, of_pairs, text))
    expected = objective(below, above, batch).loss
    torch.testing.assert_close(objective(below, told, batch).loss, expected)
    torch.testing.assert_close(objective(said, above, batch).loss, expected)
    assert (objective(said, told, batch).loss - expected).abs().max() > 1e-4


def test_it_asks_the_teacher_about_the_first_candidates_only(tiny_bert):
    """And what other arrows ask of all pairs is still answered for all."""
    student, cross = ends(tiny_bert)
    batch = batch_of(cross)
    needs = Needs("joint_attention", layers=[-1], first=1) | Needs("scores")
    said = cross.represent(batch, needs)
    assert (said.joint_attention.lengths.view(3, 3) > 0).tolist() == [[True, False, False]] * 3
    torch.testing.assert_close(said.scores, cross.represent(batch, Needs("scores")).scores)
    few, every = AttentionKL(first=1), AttentionKL()
    assert few.count(batch).tolist() == [1, 1, 1] and every.count(batch).tolist() == [2, 3, 1]
    one, two = (graph_of(student, cross, objective)(batch)["arrow0"].loss for objective in (few, every))
    torch.testing.assert_close(one[2], two[2])
    assert one[0] < two[0]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cached_gradient_is_the_plain_one(rows, tiny_bert):
    """Tokens are put together from pieces as all else."""
    gradients = []
    for cache in (None, rows):
        student, cross = ends(tiny_bert)
        graph = graph_of(student, cross, AttentionMSE(), AttentionKL(first=2)).eval()
        graph.gradient_cache = cache
        sum(loss.loss.sum() for loss in graph(batch_of(student)).values()).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-4)


def test_layers_are_matched_by_a_map(tiny_bert):
    student, cross = ends(tiny_bert, layers=1)
    with pytest.raises(RecipeError, match=r"losses.arrow0: .*student has 1 and the teacher 2.*\[\[0, 1\]\]"):
        graph_of(student, cross, AttentionMSE())
    loss = graph_of(student, cross, AttentionMSE([[0, 1]]))(batch_of(student))["arrow0"].loss
    torch.testing.assert_close(
        loss, graph_of(student, cross, AttentionMSE("last"))(batch_of(student))["arrow0"].loss
    )
    with pytest.raises(RecipeError, match="the teacher has 2 layers, and no layer 2"):
        graph_of(student, cross, AttentionMSE([[0, 2]]))


def test_heads_are_matched_or_averaged(tiny_bert):
    student = BiEncoder(tiny_bert(heads=4), precision="no")
    _, cross = ends(tiny_bert)
    with pytest.raises(RecipeError, match=r"student has 4 heads .* teacher 2.*heads: mean"):
        graph_of(student, cross, AttentionKL())
    graph = graph_of(student, cross, AttentionKL(heads="mean"))
    assert graph(batch_of(student))["arrow0"].loss.isfinite().all()


def test_other_ids_are_refused_before_training(tiny_bert, tmp_path):
    """Another tokenizer, or the same behind a prompt: places would name other words."""
    shutil.copytree(tiny_bert(), tmp_path / "swapped")
    tokenizer = json.loads((path := tmp_path / "swapped" / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["heart"], words["river"] = words["river"], words["heart"]
    path.write_text(json.dumps(tokenizer))
    _, cross = ends(tiny_bert)
    prompted = BiEncoder(tiny_bert(), precision="no", query_prompt="query ")
    swapped = BiEncoder(tmp_path / "swapped", precision="no")
    for other in (prompted, swapped):
        with pytest.raises(RecipeError, match="tokenizers or prompts differ"):
            graph_of(other, cross, AttentionKL()).check()


def test_a_text_with_no_token_left_is_named(tiny_bert):
    student, _ = ends(tiny_bert)
    batch = batch_of(student)
    (key,) = batch.queries
    bare = Ragged.of([[] for _ in batch.candidate_ids], dtype=torch.int32)
    _, cross = ends(tiny_bert)
    with pytest.raises(
        DataError, match=r"'wings': of query row 0 and candidate row 0 .* no token of the candidate"
    ):
        graph_of(student, cross, AttentionKL())(
            Batch(batch.index, batch.mask, batch.query_ids, batch.candidate_ids,
                  queries=batch.queries, candidates={key: bare}, source="wings")
        )  # fmt: skip
    empty = Ragged.of([[], [5], [6]], dtype=torch.int32)
    _, cross = ends(tiny_bert)
    with pytest.raises(DataError, match=r"of query row 0 .* no token of the query"):
        graph_of(student, cross, AttentionKL())(
            Batch(batch.index, batch.mask, batch.query_ids, batch.candidate_ids,
                  queries={key: empty}, candidates=batch.candidates, source="wings")
        )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": "some"}, "layers must be one of all, last"),
        ({"layers": [[0, 1, 2]]}, "a list of layers, or of"),
        ({"layers": []}, "a list of layers, or of"),
        ({"heads": "first"}, "heads must be one of each, mean"),
        ({"first": 0}, "first must be at least 1"),
        ({"student": "tokens", "temperature": 0.0}, "temperature must be positive"),
        ({"student": "tokens", "heads": "mean"}, "heads: for `student: tokens` the teacher's are averaged"),
        ({"student": "tokens", "layers": [[0, -1]]}, "has one map and no layers"),
        ({"temperature": 0.5}, "temperature divides the products of `student: tokens`"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionKL(**arguments)
