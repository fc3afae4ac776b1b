"""FoldNorms keeps to what every pass keeps to."""

from blockwright_fold_norms import FoldNorms

from blockwright.testing import pass_suite

TestFoldNorms = pass_suite(FoldNorms(), examples=5)
