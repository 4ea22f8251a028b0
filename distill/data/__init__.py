"""Data: tables, data sets and their splits, and the sources that yield batches."""

from distill.data.dataset import DataSet
from distill.data.documentation import Documentation
from distill.data.groups import Groups, TextPairs
from distill.data.hard_negatives import BM25Negatives, HardNegatives, NearestNegatives
from distill.data.judged import Judged, TextTable, summary
from distill.data.mixture import Mixture
from distill.data.negatives import Negatives, RandomNegatives
from distill.data.retrieval import Retrieval
from distill.data.scored_lists import ScoredLists
from distill.data.source import JudgedSource, Source, TextSource
from distill.data.tables import RawTable, read_table
from distill.data.text_data import TextData
from distill.data.texts import Texts
from distill.data.tokens import tokenized
from distill.data.topics import Topics

__all__ = [
    "BM25Negatives",
    "DataSet",
    "Documentation",
    "Groups",
    "HardNegatives",
    "Judged",
    "JudgedSource",
    "Mixture",
    "NearestNegatives",
    "Negatives",
    "RandomNegatives",
    "Retrieval",
    "ScoredLists",
    "Source",
    "RawTable",
    "TextData",
    "TextPairs",
    "TextSource",
    "TextTable",
    "Texts",
    "Topics",
    "read_table",
    "summary",
    "tokenized",
]
