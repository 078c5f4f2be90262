"""Preference data: from files, folders, the hub or a class to tokenized, packed pairs."""

from reinforcer_tp.data.chat import encode_pair, load_tokenizer
from reinforcer_tp.data.dataset_classes import (
    BinaryPreferenceDataset,
    DPODataset,
    HelpSteer3Dataset,
    PreferenceDataset,
    Tulu3PreferenceDataset,
)
from reinforcer_tp.data.load import load_preference_dataset
from reinforcer_tp.data.pairs import PreferencePair, TaskDataSpec
from reinforcer_tp.data.prepare import PreparedData, format_report, prepare_data
from reinforcer_tp.data.shapes import format_helpsteer3
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet

__all__ = [
    "BinaryPreferenceDataset",
    "DPODataset",
    "HelpSteer3Dataset",
    "PreferenceDataset",
    "PreferencePair",
    "PreparedData",
    "TaskDataSpec",
    "TokenizedPair",
    "TokenizedSet",
    "Tulu3PreferenceDataset",
    "encode_pair",
    "format_helpsteer3",
    "format_report",
    "load_preference_dataset",
    "load_tokenizer",
    "prepare_data",
]
