"""Pairs from docstrings: what is kept, what is taken out, and that no text is in two splits."""

import importlib
from itertools import combinations

import pytest

from distill.data import Documentation
from distill.data import documentation as module
from distill.data.documentation import pair_of
from distill.errors import DataError

BODY = "The meeting takes place in the city whose name stands on the second line of the invitation."


def test_markup_code_and_the_name_are_taken_out():
    summary, body = pair_of(
        "find_place",
        f"""Find the :class:`~geo.Place` with find_place() for *all* guests.

        {BODY} See `find_place` and [`Place`](https://a.b/c).

        .. note::
            hidden

        Args:
            guest (`list[str]`, *optional*): Who was invited.
            far : int
                How far it is.

        Examples:
            >>> find_place(["me"])
            Place()

        ```python
        code = 1
        ```
        """,
    )
    assert summary == "Find the geo.Place with for all guests."
    assert body == f"{BODY} See and Place. guest: Who was invited. far: How far it is."


def test_the_first_sentence_of_one_paragraph_is_the_query():
    assert pair_of("f", f"Tell where people meet. {BODY}") == ("Tell where people meet.", BODY)


@pytest.mark.parametrize(
    "docstring",
    [
        "Tell where people meet.",
        "Tell where people meet.\n\nToo short a body.",
        f"Place.\n\n{BODY}",
        f"guests: those who were invited to it\n\n{BODY}",
        "Tell where people meet.\n\n" + "a_b = c.d(e) + 3 " * 9,
        "",
    ],
)
def test_what_is_not_prose_is_left_out(docstring):
    assert pair_of("f", docstring) is None


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of 60 files; the last ten repeat texts of the first, but for names."""
    folder = tmp_path / "paperpack"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    words = "river stone cloud meadow harbour lantern window garden bridge copper".split()
    for i in range(60):
        one, two, three = words[i % 50 % 10], words[i % 50 // 10], "abcde"[i % 5]
        text = (
            f"Draw the {one} by the {two} at Place{i}.\n\n    Of the {one} and {two} we say {three}: {BODY}"
        )
        (folder / f"m{i}.py").write_text(f'def draw():\n    """{text}"""\n')
    (folder / "broken.py").write_text("def (")
    (folder / "tests" / "t.py").write_text(f'def t():\n    """Check that it is drawn. {BODY}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_version", lambda package: "1")
    importlib.invalidate_caches()
    return folder


def test_no_text_and_no_file_is_in_two_splits(package):
    data = Documentation(["paperpack"])
    texts = [text for name in data.splits for text in data.split(name).candidates.texts]
    assert len(texts) == len(set(texts)) == 50  # neither copies, nor tests, nor what cannot be parsed
    judged = data.split("train")
    assert judged.task == "retrieval" and judged.listed.tolist() == [[i] for i in range(len(judged.queries))]
    assert 30 <= len(judged.queries) <= 48 and bool((judged.labels == 1).all())


def test_docstrings_of_one_file_stay_together(package):
    """Of each file a second one, about the same two words; these tell the file."""
    for path in sorted(package.glob("m*.py"))[:50]:
        first = path.read_text()
        second = first.replace("Draw the", "Paint the").replace("we say", "others shout")
        path.write_text(first + second.replace("def draw", "def paint"))
    data = Documentation(["paperpack"])
    files = {
        name: [" ".join(text.split()[:5]) for text in data.split(name).candidates.texts]
        for name in data.splits
    }
    assert sum(map(len, files.values())) > 80 and all(files.values())
    for one, two in combinations(files, 2):
        assert not set(files[one]) & set(files[two])


def test_a_split_that_no_docstring_falls_to_is_told(package):
    for path in sorted(package.glob("m*.py"))[1:]:
        path.unlink()
    data = Documentation(["paperpack"])
    with pytest.raises(DataError, match=r"of paperpack no docstring falls to (dev|test|train); name more"):
        [data.split(name) for name in data.splits]


def test_it_is_parsed_once_and_a_damaged_cache_is_made_again(package, monkeypatch):
    first = Documentation(["paperpack"]).split("train").candidates.texts
    (cache,) = (package.parent / "cache" / "documentation").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(module, "_docstrings", None)
        assert Documentation(["paperpack"]).split("train").candidates.texts == first
    cache.write_bytes(cache.read_bytes()[:99])
    assert Documentation(["paperpack"]).split("train").candidates.texts == first


def test_a_limit_cuts_train_alone(package):
    full, some = Documentation(["paperpack"]), Documentation(["paperpack"], limit=7, seed=1)
    assert len(some.split("train").queries) == 7
    assert set(some.split("train").queries.texts) < set(full.split("train").queries.texts)
    assert some.split("test").queries.ids == full.split("test").queries.ids
    other = Documentation(["paperpack"], limit=7, seed=2)
    assert other.split("train").queries.ids != some.split("train").queries.ids
    with pytest.raises(ValueError, match="limit"):
        Documentation(limit=0)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(DataError, match="'paperpack_x' is not installed"):
        Documentation(["paperpack_x"]).split("train")


@pytest.mark.slow
def test_an_installed_package_gives_pairs_worth_searching():
    data = Documentation(["numpy", "pandas"])
    judged = data.split("train")
    assert len(judged.queries) > 1000 and len(data.split("test").queries) > 100
    assert not any(">>>" in text or "```" in text for text in judged.candidates.texts)
