"""Text: a corpus is documents in one fixed order; documents are cut into passages of tokens."""

from .corpus import Corpus, Document, FileIdentity

__all__ = ["Corpus", "Document", "FileIdentity"]
