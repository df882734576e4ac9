"""The paper's experiments, one file each: `writesae paper NAME`, and all of them in one report: `writesae paper --all`.

J. Young, *WriteSAE: Sparse Autoencoders for Recurrent State*, arXiv 2605.12770. Every study names the paper's claims
that it answers to, gives each statistic with its interval, and puts beside it the null model that could do as well.
"""

from .lab import Lab
from .study import Answer, Claim, Figure, Findings, Setting, Study, studies

__all__ = ["Answer", "Claim", "Figure", "Findings", "Lab", "Setting", "Study", "studies"]
