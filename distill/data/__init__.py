"""Data: tables, data sets and their splits, and the sources that yield batches."""

from distill.data.dataset import DataSet
from distill.data.documentation import Documentation
from distill.data.feature_schema import Feature
from distill.data.feature_table import FeatureTable, Visits
from distill.data.features import Features
from distill.data.frequency import StreamingFrequency
from distill.data.groups import Groups, TextPairs
from distill.data.hard_negatives import BM25Negatives, HardNegatives, NearestNegatives
from distill.data.interaction_source import InteractionSource
from distill.data.interactions import Interactions
from distill.data.judged import Judged, TextTable, summary
from distill.data.kuairand import KuaiRand
from distill.data.mixture import Mixture
from distill.data.movielens import MovieLens
from distill.data.negatives import Negatives, RandomNegatives
from distill.data.retrieval import Retrieval
from distill.data.sampling import ExposedNegatives, LogUniformNegatives, MixedNegatives, PopularNegatives
from distill.data.scored_lists import ScoredLists
from distill.data.simulated import SimulatedPrivileged
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
    "ExposedNegatives",
    "Feature",
    "FeatureTable",
    "Features",
    "Groups",
    "HardNegatives",
    "InteractionSource",
    "Interactions",
    "Judged",
    "JudgedSource",
    "KuaiRand",
    "LogUniformNegatives",
    "MixedNegatives",
    "Mixture",
    "MovieLens",
    "NearestNegatives",
    "Negatives",
    "PopularNegatives",
    "RandomNegatives",
    "RawTable",
    "Retrieval",
    "ScoredLists",
    "SimulatedPrivileged",
    "Source",
    "StreamingFrequency",
    "TextData",
    "TextPairs",
    "TextSource",
    "TextTable",
    "Texts",
    "Topics",
    "Visits",
    "read_table",
    "summary",
    "tokenized",
]
