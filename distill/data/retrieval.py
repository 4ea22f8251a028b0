"""Search data in BEIR's form: a corpus, queries, and who is relevant to whom. Next: ``groups.py``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from distill.batch import Ragged
from distill.data.judged import Judged, TextTable
from distill.data.splits import SPLITS, choose, given_splits
from distill.data.tables import RawTable, Spec, read_table
from distill.data.text_data import TextData
from distill.errors import DataError

CORPUS = {"_id": "_id", "title": "title", "text": "text"}
QUERIES = {"_id": "_id", "text": "text"}
QRELS = {"query-id": "query-id", "corpus-id": "corpus-id", "score": "score"}


class Retrieval(TextData):
    """A corpus, queries, and judgements (qrels) in the form of the BEIR benchmark.

    Tables are given as ``read_table`` takes them; columns of other names are mapped per table:
    ``corpus: {path: passages.tsv, columns: {_id: pid, text: passage}}``. A title is put before its text.

    Args:
        corpus: Table with ``_id``, ``text`` and, if it has them, ``title``.
        queries: Table with ``_id`` and ``text``; queries without judgement are left out.
        qrels: Table with ``query-id``, ``corpus-id`` and, if not all are relevant, ``score`` (0 or less:
            judged as not relevant); of the train split, or a mapping from splits to tables.
        dev: The same table for dev; or a number, the share of the train queries to hold out.
        test: Like ``dev``, for test.
        drop_empty: Leave out documents without text, instead of refusing them.
        seed: Of the queries held out.

    Example:
        >>> data = Retrieval("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", dev=0.1)
        >>> data.splits
        ('train', 'dev')
    """

    def __init__(
        self,
        corpus: Spec,
        queries: Spec,
        qrels: Spec,
        dev: Spec | float | None = None,
        test: Spec | float | None = None,
        drop_empty: bool = False,
        seed: int = 0,
    ):
        given = {"train": qrels, "dev": dev, "test": test}
        if isinstance(qrels, Mapping) and "path" not in qrels:
            if unknown := set(qrels) - set(SPLITS):
                raise ValueError(f"qrels: unknown split {sorted(unknown)}; it takes {', '.join(SPLITS)}.")
            if twice := [name for name in ("dev", "test") if name in qrels and given[name] is not None]:
                raise ValueError(f"qrels of {twice[0]} are given twice: in qrels and as {twice[0]}.")
            given = {"train": None, "dev": dev, "test": test, **qrels}
        self.qrels, self.held_out = given_splits(given)
        super().__init__([name for name in SPLITS if name in self.qrels or name in self.held_out])
        self.corpus_spec, self.queries_spec = corpus, queries
        self.drop_empty, self.seed = drop_empty, seed
        self._dropped: set[str] = set()

    @cached_property
    def corpus(self) -> TextTable:
        """All documents, title before text; one table for all splits."""
        table = read_table(self.corpus_spec, CORPUS, optional={"title"}, where="corpus")
        ids, texts = table.ids("_id", unique=True), table.strings("text")
        if "title" in table:
            titles = table.strings("title")
            texts = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
        empty = [row for row, text in enumerate(texts) if not text or text.isspace()]
        if empty and not self.drop_empty:
            raise DataError(
                f"{table.where('text', empty[0])}: the document '{ids[empty[0]]}' has no text"
                + (f", as {len(empty) - 1} more" if len(empty) > 1 else "")
                + ". Fill it in, or set drop_empty: true to leave such documents out."
            )
        self._dropped = {ids[row] for row in empty}
        kept = [row for row in range(len(ids)) if ids[row] not in self._dropped]
        return TextTable([ids[row] for row in kept], [texts[row] for row in kept])

    @cached_property
    def queries(self) -> tuple[dict[str, str], str]:
        """Text by id, and the name of the file."""
        table = read_table(self.queries_spec, QUERIES, where="queries")
        return dict(zip(table.ids("_id", unique=True), table.texts("text"), strict=True)), table.name

    def read(self, name: str) -> Judged:
        cut = name in self.held_out or (name == "train" and self.held_out)
        source = "train" if cut else name
        table = read_table(self.qrels[source], QRELS, optional={"score"}, where=f"qrels of {source}")
        judged = self._judgements(table)
        texts, _ = self.queries
        if cut:
            kept = choose([texts[query] for query in judged], name, self.held_out, self.seed)
            judged = {query: rows for (query, rows), keep in zip(judged.items(), kept, strict=True) if keep}
        if not judged:
            raise DataError(f"{table.name}: no query is left for the split '{name}'.")
        rows = [list(found) for found in judged.values()]
        return Judged(
            task="retrieval",
            queries=TextTable(list(judged), [texts[query] for query in judged]),
            candidates=self.corpus,
            listed=Ragged.of(rows),
            labels=torch.tensor([score for found in judged.values() for score in found.values()]),
            name=f"{table.name} ({name})",
        )

    def _judgements(self, table: RawTable) -> dict[str, dict[int, float]]:
        """Query id -> {row of the corpus: score}, queries in the order of the queries file."""
        texts, queries_name = self.queries
        row_of = {document: row for row, document in enumerate(self.corpus.ids)}
        queries, documents = table.ids("query-id"), table.ids("corpus-id")
        scores = table.numbers("score") if "score" in table else [1.0] * len(table)
        judged: dict[str, dict[int, float]] = {}
        for row, (query, document, score) in enumerate(zip(queries, documents, scores, strict=True)):
            if query not in texts:
                raise DataError(
                    f"{table.where('query-id', row)}: no query has the id '{query}' in {queries_name}. "
                    f"Are these the qrels of other queries?"
                )
            if document in self._dropped:
                continue
            if document not in row_of:
                raise DataError(
                    f"{table.where('corpus-id', row)}: no document has the id '{document}' in the corpus. "
                    f"Are these the qrels of another corpus?"
                )
            known = judged.setdefault(query, {})
            if known.setdefault(row_of[document], score) != score:
                raise DataError(
                    f"{table.where('score', row)}: query '{query}' and document '{document}' are judged "
                    f"twice, with different scores. Remove one of the rows."
                )
        return {query: judged[query] for query in texts if query in judged}
