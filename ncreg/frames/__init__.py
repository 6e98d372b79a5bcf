"""Class-vector geometries, the simplex nearest to given class means, and the measures that judge a frame.

Each frame is a (num_classes, dim) tensor whose rows are unit class vectors. Frames are built in float64 on the
CPU, from a generator of their own, and rounded once to `dtype`: the same seed gives the same frame
on every rank and device, and the global generator is never touched.
"""

from ncreg.frames._alignment import similar_permutation
from ncreg.frames._codes import softmax_code, tammes
from ncreg.frames._measures import max_cosine, one_vs_rest_distance
from ncreg.frames._nearest_simplex import etf_distance, nearest_simplex_etf
from ncreg.frames._procedural import code_max_cosine, code_rows, expected_max_cosine, procedural_code
from ncreg.frames._simplex import hypercube, orthoplex, simplex_etf

__all__ = [
    "code_max_cosine",
    "code_rows",
    "etf_distance",
    "expected_max_cosine",
    "hypercube",
    "max_cosine",
    "nearest_simplex_etf",
    "one_vs_rest_distance",
    "orthoplex",
    "procedural_code",
    "similar_permutation",
    "simplex_etf",
    "softmax_code",
    "tammes",
]
