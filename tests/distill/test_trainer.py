"""The training loop: equal however it is cut into batches, and clear about how it ends."""

import math

import pytest
import torch

from distill.checkpoint import latest
from distill.data import Mixture
from distill.errors import RecipeError, RunError
from distill.graph import Arrow, DistillationGraph
from distill.objectives import EmbeddingMatch, MarginMSE, Objective, RankNet, SampledSoftmax, ScoreKL
from distill.outputs import Needs
from tests.distill.training import (
    QUERIES,
    Bag,
    equal,
    graph,
    history,
    labels_arrow,
    source,
    trainer,
    weights,
    with_teacher,
)


class Explodes(Objective):
    """Finite until its ``at``-th call; then its loss, or only its gradient, is not."""

    def __init__(self, at, gradient=False):
        super().__init__(student_needs=Needs("scores"))
        self.at, self.gradient, self.calls = at, gradient, 0

    def count(self, batch):
        return torch.ones(len(batch.query_ids))

    def loss(self, student, teacher, batch):
        self.calls += 1
        scores = student.scores.square().sum(-1)
        if self.calls < self.at:
            return scores
        return (scores * 0).sqrt() if self.gradient else scores * math.nan


# one step


@pytest.mark.parametrize(
    "objective",
    [
        SampledSoftmax(temperature=1.0, in_batch=False),
        ScoreKL(),
        RankNet(),
        MarginMSE(),
        MarginMSE(pairs="all"),
    ],
    ids=["labels", "kl", "ranknet", "margin", "margins"],
)
def test_two_batches_of_four_teach_what_one_of_eight_does(objective, tmp_path):
    """Each query counts once, in however many batches they come, and however many pairs it has."""
    tail = None if not objective.teacher_needs else "teacher"
    found = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4), (1, 8)):
        made = graph([Arrow("it", objective, "student", tail)])
        it = trainer(tmp_path, made, source(batch_size), accumulate=accumulate)
        gradients = {}

        def keep(*_, gradients=gradients, made=made):
            gradients.update({name: p.grad.clone() for name, p in made.trainable().items()})
            return 0.0

        it._descend = keep
        losses, _, _ = it._step()
        found.append((losses["it"], gradients))
    (loss, expected), *others = found
    assert loss > 0 and any(g.abs().max() > 1e-3 for g in expected.values())
    for other, gradients in others:
        torch.testing.assert_close(other, loss, atol=1e-6, rtol=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_mean_over_what_counts_and_arrows_are_weighted(tmp_path):
    made = graph(with_teacher())
    it = trainer(tmp_path, made, source(QUERIES), steps=1)
    batch = it.source.batch(0, 0)
    made.eval()
    expected = {name: loss.loss.sum() / loss.count.sum() for name, loss in made(batch).items()}
    assert made(batch)["labels"].count.sum() < QUERIES  # one query has no positive
    total = expected["labels"] + 0.5 * expected["scores"]
    gradients = torch.autograd.grad(total, [*made.trainable().values()])
    it.optimizer.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in it.parameters.values())
    )
    seen = []
    it.settings = it.settings.model_copy(update={"clip": None})
    it.fit()
    (line,) = history(tmp_path)
    assert line["loss/labels"] == pytest.approx(expected["labels"].item(), rel=1e-5)
    assert line["loss/scores"] == pytest.approx(expected["scores"].item(), rel=1e-5)
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert (line["weight/labels"], line["weight/scores"]) == (1.0, 0.5)
    for gradient, expected_gradient in zip(seen, gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


class Halves(Objective):
    """The sum of the scores, told as two parts."""

    def __init__(self):
        super().__init__(student_needs=Needs("scores"))

    def count(self, batch):
        return batch.mask.sum(dim=1).float()

    def loss(self, student, teacher, batch):
        scores = student.scores.masked_fill(~batch.mask, 0.0).sum(dim=1)
        return {"third": scores / 3, "rest": scores * 2 / 3}


def test_the_parts_of_a_loss_are_logged_beside_it_and_counted_once(tmp_path):
    made = DistillationGraph({"student": Bag()}, [Arrow("x", Halves(), "student", weight=0.5)], {"student"})
    trainer(tmp_path, made, steps=2, accumulate=2, log_every=1).fit()
    for line in history(tmp_path):
        assert line["loss/x/third"] == pytest.approx(line["loss/x"] / 3, rel=1e-5)
        assert line["loss/x/rest"] == pytest.approx(line["loss/x"] * 2 / 3, rel=1e-5)
        assert line["loss"] == pytest.approx(0.5 * line["loss/x"], rel=1e-5) != 0
        assert not any(name.startswith("weight/x/") for name in line)


def norms_at_each_step(it):
    norms = []
    it.optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in it.parameters.values())))
    )
    it.fit()
    return norms


def test_gradients_are_clipped_together(tmp_path):
    free = norms_at_each_step(trainer(tmp_path / "free", steps=3, clip=None))
    assert min(free) > 0.01
    clipped = norms_at_each_step(trainer(tmp_path / "clipped", steps=3, clip=0.01))
    assert clipped == pytest.approx([0.01] * 3, rel=1e-3)
    assert history(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(
        free[0], rel=1e-5
    )  # before clipping


# rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))]),
    ],
)
def test_the_rate_warms_up_and_follows_its_schedule(schedule, expected, tmp_path):
    it = trainer(tmp_path, steps=10, warmup=0.2, schedule=schedule, learning_rate=0.01)
    used = []
    it.optimizer.optimizer.register_step_pre_hook(
        lambda *_: used.append(it.optimizer.param_groups[0]["lr"] / 0.01)
    )
    it.fit()
    assert used == pytest.approx(expected)
    assert [line["learning_rate"] / 0.01 for line in history(tmp_path)] == pytest.approx(expected)


def test_nodes_may_have_rates_of_their_own_and_vectors_do_not_decay(tmp_path):
    made = graph(with_teacher(detach=False), trained=("student", "teacher"))
    it = trainer(tmp_path, made, learning_rates={"teacher": 0.5}, weight_decay=0.3)
    names = {id(p): name for name, p in it.parameters.items()}
    groups = {
        names[id(p)]: (g["lr"], g["weight_decay"]) for g in it.optimizer.param_groups for p in g["params"]
    }
    assert groups == {
        "node_modules.student.words.weight": (0.05, 0.3),
        "node_modules.student.linear.weight": (0.05, 0.3),
        "node_modules.student.linear.bias": (0.05, 0.0),
        "node_modules.teacher.words.weight": (0.5, 0.3),
        "node_modules.teacher.linear.weight": (0.5, 0.3),
        "node_modules.teacher.linear.bias": (0.5, 0.0),
    }


def test_a_rate_for_a_model_that_is_not_trained_is_refused(tmp_path):
    match = r"train.learning_rates: 'studnet' is not a trained model; .* student.* Did you mean 'student'\?"
    with pytest.raises(RecipeError, match=match):
        trainer(tmp_path, learning_rates={"studnet": 1e-3})


# how long


def test_epochs_become_steps_and_steps_cross_epochs(tmp_path):
    made = source()
    asked, batch = [], made.batch
    made.batch = lambda epoch, step: asked.append((epoch, step)) or batch(epoch, step)
    progress = trainer(tmp_path, given=made, epochs=2, accumulate=2).fit()
    assert made.steps(0) == 3
    assert progress.step == progress.steps == 3
    assert asked == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [line["epoch"] for line in history(tmp_path)] == pytest.approx([2 / 3, 4 / 3, 2.0], abs=1e-3)
    assert trainer(tmp_path / "half", epochs=0.5).progress.steps == 2
    assert trainer(tmp_path / "few", steps=7).progress.steps == 7


def test_minutes_cut_the_steps_and_teach_nothing(tmp_path):
    cut = trainer(tmp_path / "cut", epochs=50, minutes=1e-5)
    assert cut.fit().steps == 1 < cut._steps()
    results = []
    for name, minutes in (("free", None), ("enough", 100.0)):
        made = graph(dropout=0.3)
        progress = trainer(tmp_path / name, made, epochs=2, minutes=minutes).fit()
        assert progress.steps == 6
        results.append(weights(made))
    assert equal(*results)


def test_minutes_do_not_cut_steps_that_were_given(tmp_path):
    """The baseline takes the steps that its student took."""
    assert trainer(tmp_path, steps=5, minutes=1e-5).fit().steps == 5


def test_an_arrow_opens_by_progress_and_a_closed_step_changes_nothing(tmp_path):
    made = graph([labels_arrow(weight=[[0, 0], [0.5, 0], [0.5, 1]])])
    states = [weights(made)]

    def evaluate():
        states.append(weights(made))
        return {"x": float(len(states))}

    trainer(tmp_path, made, steps=4, evaluate_every=0.01, evaluate=evaluate).fit()  # after each step
    assert equal(states[0], states[1]) and equal(states[0], states[2])
    assert not equal(states[2], states[3]) and not equal(states[3], states[4])
    lines = [line for line in history(tmp_path) if "grad_norm" in line]
    assert [set(line) & {"loss/labels"} for line in lines] == [set(), set(), {"loss/labels"}, {"loss/labels"}]
    assert lines[0]["grad_norm"] == 0


# the best step


def scripted(made, values):
    """An evaluation that answers by a list, and keeps what the weights were."""
    states = []

    def evaluate():
        assert not made.training
        states.append(weights(made))
        return {"MAP": values[len(states) - 1], "other": 0.0}

    return states, evaluate


def test_the_best_parameters_are_restored(tmp_path):
    made = graph(dropout=0.2)
    states, evaluate = scripted(made, [0.1, 0.5, 0.3, 0.5])
    progress = trainer(tmp_path, made, evaluate=evaluate, select="MAP", epochs=4).fit()
    assert (progress.best, progress.best_step, progress.step) == (0.5, 6, 12)  # the first of the two
    assert progress.dev == {"MAP": 0.5, "other": 0.0}
    assert equal(weights(made), states[1])
    assert not equal(states[1], states[3])
    assert not made.training
    assert [line["dev/MAP"] for line in history(tmp_path) if "dev/MAP" in line] == [0.1, 0.5, 0.3, 0.5]


def test_without_a_dev_split_the_last_parameters_stay(tmp_path):
    made = graph()
    trainer(tmp_path, made).fit()
    saved = latest(tmp_path / "checkpoints")
    assert saved.name == "step-00000006" and not (tmp_path / "checkpoints" / "best").exists()


def test_it_stops_when_it_gets_no_better(tmp_path):
    made = graph()
    states, evaluate = scripted(made, [0.5, 0.4, 0.6, 0.5, 0.6, 0.7])
    it = trainer(tmp_path, made, evaluate=evaluate, select="MAP", epochs=6, patience=2)
    progress = it.fit()
    assert (progress.step, progress.best_step) == (15, 9)
    assert progress.stopped == "no better MAP in 2 evaluations"
    assert equal(weights(made), states[2])
    again = graph()  # and it does not go on when it is started again
    assert (
        trainer(tmp_path, again, evaluate=lambda: 1 / 0, select="MAP", epochs=6, patience=2).fit().step == 15
    )
    assert equal(weights(again), states[2])


def test_evaluations_come_as_often_as_asked(tmp_path):
    steps = []
    it = trainer(
        tmp_path, epochs=3, evaluate_every=0.34, evaluate=lambda: steps.append(it.progress.step) or {"x": 1}
    )
    it.fit()
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    never = trainer(tmp_path / "never", evaluate=lambda: 1 / 0, evaluate_every=None)
    assert never.fit().best is None


# what is said


def test_history_names_arrows_and_has_each_step_once(tmp_path):
    trainer(tmp_path, log_every=2, epochs=2.4).fit()
    lines = history(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 7]  # the last step too
    assert all(
        {"loss", "loss/labels", "loss/scores", "weight/scores", "grad_norm"} <= set(line) for line in lines
    )
    assert all(line["tokens_per_second"] > 0 for line in lines)


def test_a_mixture_logs_each_arrow_where_it_was_heard(tmp_path):
    arrows = [
        labels_arrow(data=("one",)),
        Arrow("vectors", EmbeddingMatch(), "student", "teacher", data=("two",)),
    ]
    mixture = Mixture({"one": source(name="one"), "two": source(name="two")}, seed=1)
    trainer(tmp_path, graph(arrows), mixture, epochs=1, log_every=6).fit()
    (line,) = history(tmp_path)
    assert {"loss/labels", "loss/vectors"} <= set(line)


@pytest.mark.parametrize("gradient", [False, True])
def test_what_is_not_finite_stops_the_run_and_names_the_arrow(gradient, tmp_path):
    what = "the gradient of losses.bad is not finite" if gradient else "the loss of losses.bad became nan"
    for checkpoint_every, kept in (
        (1, "step-00000002 is the last good one"),
        (100, "No checkpoint was written"),
    ):
        folder = tmp_path / str(checkpoint_every)
        made = graph([labels_arrow(), Arrow("bad", Explodes(3, gradient), "student")])
        with pytest.raises(RunError, match=f"step 3: {what}.*{kept}"):
            trainer(folder, made, checkpoint_every=checkpoint_every).fit()
    saved = latest(tmp_path / "1" / "checkpoints")
    made = graph([labels_arrow(), Arrow("bad", Explodes(100), "student")])
    assert trainer(tmp_path / "1", made).fit().step == 6  # from there one can go on
    assert not saved.exists()


def test_half_precision_without_a_gpu_is_refused_in_words(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RecipeError, match=r"train.mixed_precision: fp16 needs a GPU; leave it at auto"):
        trainer(tmp_path, mixed_precision="fp16")


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"train: .*tensorbord"):
        trainer(tmp_path, trackers=["tensorbord"])


def test_a_tracker_writes_its_file(tmp_path):
    pytest.importorskip("tensorboard")
    trainer(tmp_path, trackers=["tensorboard"], evaluate=lambda: {"nDCG@10": 0.5}).fit()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "logs" / "distill").glob("events.out.*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert {"loss/labels", "loss/scores", "grad_norm", "dev/nDCG@10"} <= set(read.Tags()["scalars"])
    assert [event.step for event in read.Scalars("loss/labels")] == [1, 2, 3, 4, 5, 6]


def test_precision_of_one_training_does_not_decide_the_next(tmp_path):
    assert trainer(tmp_path / "a", mixed_precision="bf16").precision == "bf16"
    assert trainer(tmp_path / "b", mixed_precision="no").precision == "no"


def test_bf16_trains(tmp_path):
    made = graph()
    trainer(tmp_path, made, mixed_precision="bf16", epochs=8).fit()
    lines = history(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_it_learns_what_its_teacher_says(tmp_path):
    made = graph([Arrow("vectors", EmbeddingMatch(distance="mse"), "student", "teacher")])
    before = weights(made)
    trainer(tmp_path, made, epochs=30).fit()
    lines = history(tmp_path)
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert not equal(before, weights(made))
    assert made.nodes["teacher"].asked == 2  # once for all queries, once for all candidates
